# SPDX-License-Identifier: Apache-2.0
"""Gradients: those that are needed, by finite differences, and by every public function."""

from __future__ import annotations

import pytest
import torch

from cupy_msda import (
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_core_pytorch,
)
from tests.gpu.common import DEVICE, leaves, poison, run, same
from tests.problems import away_from_edges, random_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("d", [16, 30])
def test_needed_gradients_only(needed, d):
    inputs = random_inputs(d=d, device=DEVICE)
    _, full = run(inputs)
    tensors = [tensor.requires_grad_(i in needed) for i, tensor in enumerate(leaves(inputs))]
    poison(inputs)
    ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:]).backward(inputs.grad_output)
    for i, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (i in needed)
        if i in needed:
            torch.testing.assert_close(tensor.grad, full[i])


@pytest.mark.parametrize("on_device", [False, True])
def test_gradcheck_once_and_twice(on_device):
    inputs = away_from_edges(random_inputs(n=1, d=3, lq=2, p=2, device=DEVICE))
    shapes = inputs.shapes() if on_device else inputs.sizes

    def function(value, locations, weights):
        return ms_deform_attn(value, shapes, None, locations, weights)

    arguments = (function, leaves(inputs))
    assert torch.autograd.gradcheck(*arguments, nondet_tol=1e-10)
    assert torch.autograd.gradgradcheck(*arguments, nondet_tol=1e-10, fast_mode=True)


def test_the_functions_agree():
    inputs = random_inputs(d=16, device=DEVICE)
    expected = run(inputs)
    tensors = leaves(inputs)
    output = MSDeformAttnFunction.apply(
        tensors[0], inputs.shapes(), inputs.starts(), *tensors[1:], 64
    )
    same((output, torch.autograd.grad(output, tensors, inputs.grad_output)), expected)
    tables = (inputs.sizes, None)
    gradients = ms_deform_attn_backward(
        inputs.grad_output, inputs.value, *tables, inputs.locations, inputs.weights
    )
    same((output, gradients), expected)
    plain = ms_deform_attn_core_pytorch(*inputs.tensors[:1], inputs.sizes, *inputs.tensors[1:])
    torch.testing.assert_close(plain, expected[0], rtol=1e-4, atol=1e-4)
