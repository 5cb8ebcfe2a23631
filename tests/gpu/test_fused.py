# SPDX-License-Identifier: Apache-2.0
"""Fused calls: from reference points, offsets and logits."""

from __future__ import annotations

import pytest
import torch

from cupy_msda import ms_deform_attn_fused, ms_deform_attn_fused_backward
from tests.emulator.fused import CASES, check_backward, check_forward, composed, fused
from tests.gpu.common import DEVICE, as_cupy, on_device, same, torch_deprecations
from tests.gpu.test_sampling import ENCODER

pytestmark = pytest.mark.gpu

ALL_CASES = CASES | {
    "generic": fused((3, 0, 6), 4, d=30, masked=True),
    "encoder": fused((4, 4, 4, 4), masked=True, d=32, sizes=ENCODER, lq=1424),
    "decoder": fused((4, 4, 4, 4), 4, d=32, sizes=ENCODER, lq=900),
}


def arguments(inputs, shapes):
    """The arguments of a fused call on the GPU, whose tensors have gradients, and its keywords."""
    value, *points = (tensor.to(DEVICE).requires_grad_() for tensor in inputs.tensors)
    return (value, shapes, None, *points), on_device(inputs.rules) | {
        "offset_scale": inputs.offset_scale
    }


def gradients_of(output, given, grad_output):
    """The gradients of what has one."""
    value, _, _, *points = given
    return torch.autograd.grad(output, (value, *points), grad_output)


def run(inputs, shapes):
    """The output and the four gradients through autograd, on the host."""
    given, keywords = arguments(inputs, shapes)
    output = ms_deform_attn_fused(*given, **keywords)
    gradients = gradients_of(output, given, inputs.grad_output.to(DEVICE))
    return output.detach().cpu(), [gradient.cpu() for gradient in gradients]


@pytest.mark.parametrize("name", ALL_CASES)
def test_output_and_gradients(name):
    inputs = ALL_CASES[name]
    output, gradients = run(inputs, inputs.sizes)
    check_forward(inputs, output)
    check_backward(inputs, gradients)
    # With the level table on the device, other kernels may run.
    same(run(inputs, torch.tensor(inputs.sizes, device=DEVICE)), (output, gradients))


# The error budget needs a wider type than float64.
def test_double():
    inputs = fused((2, 2, 2), 4, dtypes=(torch.float64,) * 4)
    output, *gradients = composed(inputs, torch.float64)
    found = run(inputs, inputs.sizes)
    torch.testing.assert_close(found[0], output)
    torch.testing.assert_close(found[1], gradients)


@pytest.mark.parametrize("name", ["points", "boxes", "encoder"])
def test_deterministic_gradients(name, deterministic):
    inputs = ALL_CASES[name]
    gradients = run(inputs, inputs.sizes)[1]
    check_backward(inputs, gradients)
    for _ in range(3):
        assert all(map(torch.equal, run(inputs, inputs.sizes)[1], gradients))


@pytest.mark.parametrize("name", ["points", "uneven-boxes", "boxes-of-one-image"])
def test_gradients_of_some_inputs_alone(name):
    inputs = ALL_CASES[name]
    for needed in range(4):
        given, keywords = arguments(inputs, inputs.sizes)
        value, *_, references, offsets, logits = given
        tensors = value, references, offsets, logits
        for number, tensor in enumerate(tensors):
            tensor.requires_grad_(number == needed)
        output = ms_deform_attn_fused(*given, **keywords)
        grad_output = inputs.grad_output.to(DEVICE)
        (gradient,) = torch.autograd.grad(output, tensors[needed], grad_output)
        check_backward(inputs, [gradient.cpu() if i == needed else None for i in range(4)])


@pytest.mark.parametrize("name", ["points", "boxes"])
def test_a_graph_follows_its_inputs(name):
    inputs = ALL_CASES[name]
    given, keywords = arguments(inputs, inputs.sizes)
    grad_output = inputs.grad_output.to(DEVICE)  # a capture takes no copy from the host
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        gradients_of(ms_deform_attn_fused(*given, **keywords), given, grad_output)
    torch.cuda.current_stream(DEVICE).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ms_deform_attn_fused(*given, **keywords)
        gradients = gradients_of(output, given, grad_output)
    with torch.no_grad():
        for tensor in (given[0], *given[3:]):
            tensor.mul_(0.75)
    graph.replay()
    expected = ms_deform_attn_fused(*given, **keywords)
    same((output, gradients), (expected, gradients_of(expected, given, grad_output)))


@torch_deprecations
@pytest.mark.parametrize("name", ["points", "uneven-boxes"])
def test_compiled(name):
    inputs = ALL_CASES[name]
    given, keywords = arguments(inputs, inputs.sizes)
    output = torch.compile(ms_deform_attn_fused, fullgraph=True)(*given, **keywords)
    gradients = gradients_of(output, given, inputs.grad_output.to(DEVICE))
    gradients = [gradient.cpu() for gradient in gradients]
    same((output.detach().cpu(), gradients), run(inputs, inputs.sizes))


@pytest.mark.parametrize("name", ["points", "uneven-boxes", "nearest-boxes", "generic"])
def test_cupy_arrays(name):
    import cupy

    inputs = ALL_CASES[name]
    given, keywords = arguments(inputs, inputs.sizes)
    given = tuple(map(as_cupy, given))
    keywords = {key: as_cupy(rule) for key, rule in keywords.items()}
    output = ms_deform_attn_fused(*given, **keywords)
    gradients = ms_deform_attn_fused_backward(
        as_cupy(inputs.grad_output.to(DEVICE)), *given, **keywords
    )
    assert all(type(result) is cupy.ndarray for result in (output, *gradients))
    output, *gradients = (torch.from_dlpack(result).cpu() for result in (output, *gradients))
    check_forward(inputs, output)
    check_backward(inputs, gradients)
