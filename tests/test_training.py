# SPDX-License-Identifier: Apache-2.0
"""What training does around the operator: inference mode, batched gradients, checkpoints, torch's defaults."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch.utils import checkpoint

from cupy_msda import (
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_core_pytorch,
)
from tests.calls import (
    FORWARD,
    call,
    with_grad,
)
from tests.problems import (
    random_inputs,
)


@pytest.mark.parametrize("function", [ms_deform_attn, MSDeformAttnFunction.apply])
def test_a_level_table_made_in_inference_mode_serves_for_training(function):
    """Sizes that were kept from a validation: autograd does not save them."""
    inputs = with_grad(random_inputs())
    expected = torch.autograd.grad(call(inputs), inputs.tensors, inputs.grad_output)
    with torch.inference_mode():
        table = inputs.shapes(), inputs.starts()
    points = inputs.tensors[1:]
    for shapes, starts in (table, (inputs.sizes, table[1]), (table[0], None)):
        output = function(inputs.value, shapes, starts, *points)
        got = torch.autograd.grad(output, inputs.tensors, inputs.grad_output, create_graph=True)
        assert all(map(torch.equal, got, expected))
        got[0].sum().backward()
    gradients = ms_deform_attn_backward(inputs.grad_output, inputs.value, *table, *points)
    assert all(map(torch.equal, gradients, expected))
    gradients[0].sum().backward()


@pytest.mark.parametrize(
    ("index", "name"), [(0, "value"), (1, "sampling_locations"), (2, "attention_weights")]
)
def test_an_input_made_in_inference_mode_is_named(index, name):
    """https://github.com/roboflow/rf-detr/issues/297, where torch does not say which tensor it is."""
    inputs = random_inputs()
    with torch.inference_mode():
        made = inputs.tensors[index].clone()
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    leaves[index] = made
    arguments = leaves[0], inputs.sizes, None, *leaves[1:]
    with pytest.raises(ValueError, match=rf"{name} must not be made in torch\.inference_mode"):
        ms_deform_attn(*arguments)
    with pytest.raises(ValueError, match=rf"{name} must not be made in torch\.inference_mode"):
        ms_deform_attn_backward(inputs.grad_output, *arguments)
    with torch.no_grad():
        assert torch.equal(ms_deform_attn(*arguments), call(inputs))


def test_a_grad_output_made_in_inference_mode_is_named():
    inputs = with_grad(random_inputs())
    with torch.inference_mode():
        grad_output = inputs.grad_output.clone()
    arguments = grad_output, inputs.value, inputs.sizes, None, *inputs.tensors[1:]
    with pytest.raises(ValueError, match=r"grad_output must not be made in torch\.inference_mode"):
        ms_deform_attn_backward(*arguments)


def test_batches_of_gradients():
    """By the older `vmap` of torch.autograd, whose tensors have no memory: https://github.com/pypose/pypose/issues/122."""
    inputs = with_grad(random_inputs(n=1, m=1, d=3, lq=2, p=1))
    output = call(inputs)
    grads = torch.randn(3, *output.shape)
    got = torch.autograd.grad(
        output, inputs.tensors, grads, is_grads_batched=True, retain_graph=True
    )
    for index, grad in enumerate(grads):
        expected = torch.autograd.grad(output, inputs.tensors, grad, retain_graph=True)
        torch.testing.assert_close([batch[index] for batch in got], list(expected))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's forward mode
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorized_jacobians_and_hessians(strategy):
    inputs = random_inputs(n=1, m=1, d=3, lq=2, p=1)

    def output(locations):
        return call(inputs._replace(locations=locations))

    def loss(locations):
        return output(locations).square().sum()

    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    torch.testing.assert_close(
        jacobian(output, inputs.locations, vectorize=True, strategy=strategy),
        jacobian(output, inputs.locations),
    )
    torch.testing.assert_close(
        hessian(loss, inputs.locations, vectorize=True, outer_jacobian_strategy=strategy),
        hessian(loss, inputs.locations),
    )


def test_the_output_may_change_in_place():
    """https://github.com/open-mmlab/mmcv/issues/1511, where it was a view made inside of the Function."""
    inputs = with_grad(random_inputs())
    expected = torch.autograd.grad(call(inputs) * 2, inputs.tensors, inputs.grad_output)
    output = call(inputs)
    output.view(-1).mul_(2)
    output[0].add_(1)
    assert all(
        map(torch.equal, torch.autograd.grad(output, inputs.tensors, inputs.grad_output), expected)
    )


def assert_recomputed(inputs, shapes, **options):
    """The gradients of a forward that keeps nothing are those of one that does."""
    expected = torch.autograd.grad(call(inputs), inputs.tensors, inputs.grad_output)
    arguments = inputs.value, shapes, None, *inputs.tensors[1:]
    checkpoint.checkpoint(ms_deform_attn, *arguments, **options).backward(inputs.grad_output)
    for tensor, gradient in zip(inputs.tensors, expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.filterwarnings("ignore:.*autocast.* is deprecated")  # torch 2.4's own `checkpoint`
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_recompute_the_forward(reentrant, as_tensor):
    """https://github.com/huggingface/transformers/pull/28686"""
    inputs = with_grad(random_inputs())
    shapes = inputs.shapes() if as_tensor else inputs.sizes
    assert_recomputed(inputs, shapes, use_reentrant=reentrant)


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="selective checkpoints came with torch 2.5")
def test_selective_checkpoints_see_the_operator():
    seen = []

    def policy(_, function, *__, **___):
        seen.append(function)
        return checkpoint.CheckpointPolicy.MUST_SAVE

    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, policy)
    inputs = with_grad(random_inputs())
    assert_recomputed(inputs, inputs.sizes, use_reentrant=False, context_fn=contexts)
    assert FORWARD in seen


@pytest.fixture
def torch_defaults():
    """Restore torch's default device and dtype."""
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's forward mode
@pytest.mark.parametrize("device", [None, "meta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_defaults_of_torch_have_no_influence(device, dtype, torch_defaults):
    """Many users' `torch.set_default_device("cuda")`, and values on the CPU."""
    inputs = with_grad(random_inputs())
    values = inputs.sizes, inputs.shapes(), np.array(inputs.sizes)

    def results():
        for shapes in values:
            arguments = inputs.value, shapes, None, *inputs.tensors[1:]
            output = ms_deform_attn(*arguments)
            first = torch.autograd.grad(
                output, inputs.tensors, inputs.grad_output, create_graph=True
            )
            second = torch.autograd.grad(first[1].square().sum(), inputs.weights)
            tangents = tuple(map(torch.Tensor.detach, inputs.tensors))
            moved = torch.func.jvp(
                lambda *t, sizes=shapes: ms_deform_attn(t[0], sizes, None, *t[1:]),
                inputs.tensors,
                tangents,
            )
            plain = ms_deform_attn_core_pytorch(inputs.value, shapes, *inputs.tensors[1:])
            yield from (output, *first, *second, *moved, plain)
            yield from ms_deform_attn_backward(inputs.grad_output, *arguments)

    expected = list(results())
    torch.set_default_device(device)
    torch.set_default_dtype(dtype)
    assert all(map(torch.equal, results(), expected))
