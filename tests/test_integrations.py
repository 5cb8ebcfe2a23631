# SPDX-License-Identifier: Apache-2.0
"""Code written for other people's extensions runs on this package, without their builds."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cupy_msda import MSDeformAttn, reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.integrations import deformable_detr
from cupy_msda.problem import Level
from tests.calls import SIZES, STARTS
from tests.problems import away_from_edges, check_against_reference, random_inputs

NAME = "MultiScaleDeformableAttention"


@pytest.fixture
def extension(monkeypatch):
    """What code that imports the compiled extension gets after `install`."""
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    deformable_detr.install()
    yield importlib.import_module(NAME)
    monkeypatch.delitem(sys.modules, NAME)


@pytest.fixture
def their_function(extension):
    """An autograd Function as the forks have one: all it knows is the extension's two functions."""

    class TheirFunction(Function):
        @staticmethod
        def forward(ctx, value, shapes, start_index, locations, weights, im2col_step):
            ctx.im2col_step = im2col_step
            ctx.save_for_backward(value, shapes, start_index, locations, weights)
            return extension.ms_deform_attn_forward(
                value, shapes, start_index, locations, weights, ctx.im2col_step
            )

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_output):
            grad_value, grad_locations, grad_weights = extension.ms_deform_attn_backward(
                *ctx.saved_tensors, grad_output, ctx.im2col_step
            )
            return grad_value, None, None, grad_locations, grad_weights, None

    return TheirFunction


def apply(function, inputs, im2col_step=64):
    tensors = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    tables = (inputs.shapes(), inputs.starts())
    return tensors, function.apply(tensors[0], *tables, *tensors[1:], im2col_step)


# Batches of 3 in steps of 2 are what the original refuses.
@pytest.mark.parametrize("im2col_step", [64, 2])
def test_their_function_stays_within_the_error_budget(their_function, im2col_step):
    inputs = random_inputs(n=3)
    tensors, output = apply(their_function, inputs, im2col_step)
    output.backward(inputs.grad_output)
    check_against_reference(inputs, output, [tensor.grad for tensor in tensors])


def test_their_function_passes_gradcheck(their_function):
    inputs = away_from_edges(random_inputs(n=1, d=3, lq=2, p=2))
    tensors, _ = apply(their_function, inputs)

    def function(value, locations, weights):
        tables = (inputs.shapes(), inputs.starts())
        return their_function.apply(value, *tables, locations, weights, 64)

    assert torch.autograd.gradcheck(function, tensors)


def test_keyword_arguments_have_the_names_of_the_extension(extension):
    inputs = random_inputs()
    arguments = {
        "value": inputs.value,
        "spatial_shapes": inputs.shapes(),
        "level_start_index": inputs.starts(),
        "sampling_loc": inputs.locations,
        "attn_weight": inputs.weights,
        "im2col_step": 64,
    }
    output = extension.ms_deform_attn_forward(**arguments)
    gradients = extension.ms_deform_attn_backward(**arguments, grad_output=inputs.grad_output)
    check_against_reference(inputs, output, gradients)


def test_levels_begin_where_the_caller_says(extension):
    inputs = random_inputs(SIZES, s=14)
    tables = torch.tensor(SIZES), torch.tensor(STARTS)
    output = extension.ms_deform_attn_forward(inputs.value, *tables, *inputs.tensors[1:], 64)
    arguments = inputs.value, *tables, *inputs.tensors[1:], inputs.grad_output
    gradients = extension.ms_deform_attn_backward(*arguments, 64)
    levels = [Level(*size, start) for size, start in zip(SIZES, STARTS, strict=True)]
    expected = []
    for wide in (inputs, inputs.to(torch.float64)):
        given = wide.value, levels, *wide.tensors[1:]
        expected.append((reference.forward(*given), *reference.backward(wide.grad_output, *given)))
    for actual, same, exact in zip((output, *gradients), *expected, strict=True):
        assert_within_budget(actual, same, exact)


def test_checkpoints_and_modules_of_forks_agree(their_function):
    module = MSDeformAttn(16, 2, 2, 3)
    query, flat = torch.rand(2, 5, 16), torch.rand(2, 26, 16)
    points, shapes, starts = (
        torch.rand(2, 5, 2, 2),
        torch.tensor([(4, 5), (2, 3)]),
        torch.tensor([0, 20]),
    )
    # The forward of the forks' module, in their order of operations.
    value = module.value_proj(flat).view(2, 26, 2, 8)
    offsets = module.sampling_offsets(query).view(2, 5, 2, 2, 3, 2)
    weights = torch.softmax(module.attention_weights(query).view(2, 5, 2, 6), -1).view(
        2, 5, 2, 2, 3
    )
    scale = torch.stack([shapes[..., 1], shapes[..., 0]], -1)
    locations = points[:, :, None, :, None, :] + offsets / scale[None, None, None, :, None, :]
    output = module.output_proj(their_function.apply(value, shapes, starts, locations, weights, 64))
    torch.testing.assert_close(module(query, points, flat, shapes, starts), output)


def test_install_again_changes_nothing(extension):
    assert deformable_detr.install() is extension
    assert sys.modules[NAME] is extension
    assert importlib.util.find_spec(NAME) is not None


def test_a_compiled_extension_that_is_already_imported_is_named(monkeypatch):
    theirs = types.ModuleType(NAME)
    theirs.__file__ = "/site-packages/MultiScaleDeformableAttention.so"
    monkeypatch.setitem(sys.modules, NAME, theirs)
    with pytest.raises(
        ImportError, match=r"must not be imported before install.*/site-packages/Multi"
    ):
        deformable_detr.install()
    assert sys.modules[NAME] is theirs
