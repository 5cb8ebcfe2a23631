# SPDX-License-Identifier: Apache-2.0
"""Every kernel, dtype and shape against the reference."""

from __future__ import annotations

import pytest

from tests.gpu.common import DEVICE, MODELS, check, in_float_and_half
from tests.problems import DTYPES, random_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 16, 30, 32, 64, 71, 128, 256])
def test_dtypes_and_head_dims(dtypes, d):
    check(random_inputs([(7, 9), (4, 5)], lq=37, d=d, dtypes=dtypes, device=DEVICE))


PYRAMID = [(25, 42), (13, 21), (7, 11), (4, 6)]


# From a few queries, which run with split-K, to more than fill the device.
@pytest.mark.parametrize("lq", [1, 2, 20, 150, 300, 900, 5000])
@in_float_and_half
def test_numbers_of_queries(lq, dtypes):
    check(random_inputs(PYRAMID, n=1, m=8, d=32, lq=lq, p=4, dtypes=dtypes, device=DEVICE))


@pytest.mark.parametrize(
    ("m", "num_levels", "p"), [(1, 1, 1), (3, 1, 8), (8, 3, 1), (3, 3, 5), (1, 4, 4), (8, 5, 7)]
)
def test_heads_levels_and_points(m, num_levels, p):
    sizes = [(9, 7), (1, 6), (5, 1), (1, 1), (3, 4)][:num_levels]
    check(random_inputs(sizes, m=m, d=16, lq=11, p=p, device=DEVICE))


@pytest.mark.parametrize("num_levels", [16, 17, 40])
@pytest.mark.parametrize("on_device", [False, True])
def test_many_levels(num_levels, on_device):
    sizes = [(1 + i % 3, 1 + i % 5) for i in range(num_levels)]
    inputs = random_inputs(sizes, d=16, p=2, device=DEVICE)
    check(inputs, inputs.shapes() if on_device else None)


@pytest.mark.parametrize("d", [1, 2, 4, 12, 24, 48, 1025])
@in_float_and_half
def test_unusual_head_dims(d, dtypes):
    check(random_inputs(d=d, dtypes=dtypes, device=DEVICE))


@in_float_and_half
@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_models(name, dtypes):
    sizes, rest = MODELS[name]
    check(random_inputs(sizes, **{"m": 8, "d": 32, **rest}, dtypes=dtypes, device=DEVICE))


@pytest.mark.parametrize("n", [154, 8200])
def test_many_images(n):
    # 8200 images of 8 heads are more than one axis of a grid holds.
    check(random_inputs([(3, 2), (1, 1)], n=n, m=8, lq=2, device=DEVICE))
