# SPDX-License-Identifier: Apache-2.0
"""Points that are sampled otherwise: of each level another number, at the nearest pixel, under a mask."""

from __future__ import annotations

import pytest
import torch

from cupy_msda import ms_deform_attn, ms_deform_attn_backward, reference
from tests.emulator.cases import check_backward, check_forward
from tests.emulator.sampling import CASES, case
from tests.gpu.common import DEVICE, as_cupy, on_device, same

pytestmark = pytest.mark.gpu

ENCODER = (25, 42), (13, 21), (7, 11), (4, 6)
ALL_CASES = CASES | {
    "uneven-generic": case((3, 0, 6), masked=True, d=30),
    "encoder": case((4, 4, 4, 4), masked=True, d=32, sizes=ENCODER, lq=1424),
}


def run(inputs, rules, shapes):
    """The output and the three gradients through autograd, on the host."""
    value, *points = (tensor.to(DEVICE).requires_grad_() for tensor in inputs.tensors)
    output = ms_deform_attn(value, shapes, None, *points, **on_device(rules))
    gradients = torch.autograd.grad(output, (value, *points), inputs.grad_output.to(DEVICE))
    return output.detach().cpu(), [gradient.cpu() for gradient in gradients]


@pytest.mark.parametrize("name", ALL_CASES)
def test_output_and_gradients(name):
    inputs, rules = ALL_CASES[name]
    output, gradients = run(inputs, rules, inputs.sizes)
    check_forward(inputs, output, rules)
    check_backward(inputs, gradients, rules=rules)
    # With the level table on the device, other kernels may run.
    same(run(inputs, rules, inputs.shapes().to(DEVICE)), (output, gradients))


@pytest.mark.parametrize("name", ALL_CASES)
def test_deterministic_gradients(name, deterministic):
    inputs, rules = ALL_CASES[name]
    _, gradients = run(inputs, rules, inputs.sizes)
    check_backward(inputs, gradients, rules=rules)
    for _ in range(3):
        again = run(inputs, rules, inputs.sizes)[1]
        assert all(map(torch.equal, again, gradients))


# The error budget needs a wider type, and tests/exact.py knows no such rules.
def test_double():
    inputs, rules = case((3, 6, 3), masked=True, dtypes=(torch.float64, torch.float64))
    output, gradients = run(inputs, rules, inputs.sizes)
    given = inputs.value, inputs.levels, inputs.locations, inputs.weights
    expected = reference.forward(*given, **rules)
    torch.testing.assert_close(output, expected)
    expected = reference.backward(inputs.grad_output, *given, **rules)
    torch.testing.assert_close(gradients, list(expected))


@pytest.mark.parametrize("name", ["uneven", "nearest-masked"])
def test_cupy_arrays(name):
    import cupy

    inputs, rules = ALL_CASES[name]
    value, locations, weights, grad_output = (as_cupy(tensor.to(DEVICE)) for tensor in inputs[1:])
    given = value, inputs.sizes, None, locations, weights
    rules_of_cupy = {name: as_cupy(rule) for name, rule in on_device(rules).items()}
    output = ms_deform_attn(*given, **rules_of_cupy)
    gradients = ms_deform_attn_backward(grad_output, *given, **rules_of_cupy)
    assert all(type(result) is cupy.ndarray for result in (output, *gradients))
    output, *gradients = (torch.from_dlpack(result).cpu() for result in (output, *gradients))
    check_forward(inputs, output, rules)
    check_backward(inputs, gradients, rules=rules)
