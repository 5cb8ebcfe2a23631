# SPDX-License-Identifier: Apache-2.0
"""Where sampling points lie: on edges, between levels, nowhere, all in one cell."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.common import DEVICE, NAN, check, in_float_and_half, run
from tests.problems import DTYPES, check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 30])
def test_points_on_cell_edges_and_borders(dtypes, d):
    # Powers of two keep every coordinate exact: multiples of half a pixel from two pixels outside.
    sizes = [(4, 8), (2, 4)]
    inputs = random_inputs(sizes, n=1, d=d, lq=80, p=4, dtypes=dtypes, device=DEVICE)
    scale = 2 * inputs.shapes().flip(-1)[:, None]
    inputs.locations.copy_((inputs.locations * scale).round() / scale)
    check(inputs)


@pytest.mark.parametrize("d", [16, 30])
def test_positions_between_levels_are_never_read(d):
    inputs = random_inputs([(4, 8), (2, 4)], lq=200, d=d, device=DEVICE)
    n, s, m, _ = inputs.value.shape
    value = torch.full((n, s + 30, m, d), NAN, device=DEVICE)
    value[:, 10:42] = inputs.value[:, :32]
    value[:, 52:60] = inputs.value[:, 32:]
    output, gradients = run(inputs._replace(value=value), inputs.sizes, [10, 52])
    by_value = torch.cat([gradients[0][:, 10:42], gradients[0][:, 52:60]], dim=1)
    check_against_reference(inputs, output, (by_value, *gradients[1:]))
    for gap in (slice(0, 10), slice(42, 52), slice(60, None)):
        assert not gradients[0][:, gap].any()


@pytest.mark.parametrize("d", [16, 30])
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf"), 3e38, -3e38])
def test_locations_that_are_nowhere(d, bad):
    inputs = random_inputs(lq=64, d=d, device=DEVICE)
    for axis in (0, 1):
        lost = torch.rand(inputs.weights.shape, device=DEVICE) < 0.2
        inputs.locations[..., axis].masked_fill_(lost, bad)
    check(inputs)
    inputs.locations.fill_(bad)
    output, gradients = run(inputs)
    assert not output.any()
    assert not any(gradient.any() for gradient in gradients)


@in_float_and_half
def test_every_query_on_one_cell(dtypes):
    inputs = random_inputs(n=1, d=16, lq=20000, dtypes=dtypes, device=DEVICE)
    inputs.locations.fill_(0.4375)
    # Of one sign: with random signs the sums would be small, and their rounding errors would not.
    check(inputs._replace(grad_output=inputs.grad_output.abs() / 100))
