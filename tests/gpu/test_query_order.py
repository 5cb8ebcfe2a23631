# SPDX-License-Identifier: Apache-2.0
"""The order in which the kernels take the queries changes no bit of what it promises."""

from __future__ import annotations

import pytest
import torch

from cupy_msda import ms_deform_attn
from tests.gpu.common import (
    DEVICE,
    MODELS,
    forward_kernels,
    in_float_and_half,
    leaves,
    poison,
    run,
)
from tests.problems import check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


@in_float_and_half
@pytest.mark.parametrize("name", ["detr-encoder", "mask2former-512", "bevformer-tsa"])
def test_encoders_are_bitwise_identical_in_any_order(name, dtypes, choose):
    choose(None)
    sizes, rest = MODELS[name]
    inputs = random_inputs(sizes, **{"m": 8, "d": 32, **rest}, dtypes=dtypes, device=DEVICE)
    assert forward_kernels(inputs, ()) != forward_kernels(inputs, None)  # else nothing is compared
    results = []
    for order in (None, "auto"):
        _, *points = leaves(inputs)
        poison(inputs)
        output = ms_deform_attn(inputs.value, sizes, None, *points, query_order=order)
        results.append((output.detach(), *torch.autograd.grad(output, points, inputs.grad_output)))
    assert all(map(torch.equal, *results))


@in_float_and_half
@pytest.mark.parametrize("size", [100, 20])
def test_a_birds_eye_view_is_bitwise_identical_on_any_grid(dtypes, size):
    # BEVFormer's queries; 20 x 20 are too few for the persistent kernel and run with split-K.
    sizes, rest = MODELS["bevformer-sca"]
    options = {"m": 8, "d": 32, **rest, "lq": size * size}
    inputs = random_inputs(sizes, **options, dtypes=dtypes, device=DEVICE)
    results = []
    for order in (None, "auto", [(size, size)], [(size // 2, size)] * 2):
        output, gradients = run(inputs, query_order=order)
        check_against_reference(inputs, output, gradients)
        results.append((output, *gradients[1:]))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
