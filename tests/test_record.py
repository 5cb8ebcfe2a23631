# SPDX-License-Identifier: Apache-2.0
"""`cupy_msda.record`: where the calls of a model look."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import cupy_msda
from cupy_msda import (
    MSDeformAttn,
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_fused,
    record,
)
from cupy_msda.integrations import deformable_detr
from tests.problems import random_inputs

# torch's own, in its compiler.
COMPILER = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Dynamo detected:UserWarning"
)

SIZES = [(5, 7), (3, 4)]
S = 47


class Layer(nn.Module):
    """A fused call by a module, then a plain one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MSDeformAttn(16, 2, 2, 3)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.5)
        nn.init.normal_(self.attention.attention_weights.weight)

    def forward(self, query, points, features):
        attended, *found = self.attention(
            query, points, features, SIZES, None, return_locations=True
        )
        value = features.unflatten(-1, (2, 8))
        return attended + ms_deform_attn(value, SIZES, None, *found)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.last = MSDeformAttn(16, 2, 2, 3)

    def forward(self, query, points, features):
        for layer in self.layers:
            query = layer(query, points, features)
        return self.last(query, points, features, SIZES, None)


def arguments(boxes=False, n=2, lq=6):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, lq, 16, generator=generator),
        torch.rand(n, lq, 1, 4 if boxes else 2, generator=generator),
        torch.randn(n, S, 16, generator=generator),
    )


@pytest.mark.parametrize("boxes", [False, True])
def test_the_calls_of_a_model_by_the_names_of_its_modules(boxes):
    model, given = Model(), arguments(boxes)
    expected = model(*given)
    with record(model) as calls:
        output = model(*given)
    assert torch.equal(output, expected)
    plain = [f"layers.{index}{name}" for index in (0, 1) for name in (".attention", "")]
    assert [call.name for call in calls] == [*plain, "last"]
    for call in calls:
        assert call.spatial_shapes == SIZES
        assert call.sampling_locations.shape == (2, 6, 2, 2, 3, 2)
        assert call.attention_weights.shape == (2, 6, 2, 2, 3)
        assert call.num_points is None
        assert not call.sampling_locations.requires_grad
        assert not call.attention_weights.requires_grad
    assert [call.reference_points is None for call in calls] == [True] * 4 + [False]
    model(*given)
    assert len(calls) == 5  # nothing is recorded after the block


@pytest.mark.parametrize("boxes", [False, True])
def test_a_fused_call_looks_where_the_module_says(boxes):
    module, given = Layer().attention, arguments(boxes)
    with record(module) as calls:
        module(*given, SIZES, None)
    _, locations, weights = module(*given, SIZES, None, return_locations=True)
    (call,) = calls
    assert call.name == ""
    assert torch.equal(call.sampling_locations, locations)
    assert torch.equal(call.attention_weights, weights)
    assert torch.equal(call.reference_points, given[1])


def test_the_points_of_a_fused_call_give_its_output():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, S, 2, 8), (2, 5, 1, 4), (2, 5, 2, 4, 2), (2, 5, 2, 4)
    value, *points = (torch.rand(shape, generator=generator) for shape in shapes)
    with record() as calls:
        output = ms_deform_attn_fused(
            value, torch.tensor(SIZES), None, *points, num_points=[3, 1], offset_scale=0.25
        )
    (call,) = calls
    assert call.num_points == [3, 1]
    where = call.spatial_shapes, None, call.sampling_locations, call.attention_weights
    plain = ms_deform_attn(value, *where, num_points=call.num_points)
    torch.testing.assert_close(plain, output)


def test_every_call_without_a_model():
    inputs = random_inputs(SIZES)
    value, *points = inputs.tensors
    with record() as calls:
        ms_deform_attn(value, SIZES, None, *points)
        cupy_msda.torch.ms_deform_attn(value.requires_grad_(), SIZES, None, *points)
        MSDeformAttnFunction.apply(value, SIZES, None, *points, 64)
        table = inputs.shapes(), inputs.starts()
        deformable_detr.ms_deform_attn_forward(value, *table, *points, 64)
    assert [call.name for call in calls] == [""] * 4
    for call in calls:
        assert call.sampling_locations.data_ptr() == points[0].data_ptr()  # no copy
        assert torch.equal(call.attention_weights, points[1])


def test_calls_outside_of_the_model_are_not_recorded():
    model, given = Model(), arguments()
    with record(model) as calls:
        Model()(*given)
        model.last(*given, SIZES, None)
    assert [call.name for call in calls] == ["last"]


def test_gradients_are_those_without_recording():
    model, given = Model(), arguments()
    model(*given).square().sum().backward()
    expected = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()
    with record(model):
        model(*given).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_autograd(mode):
    model, given = Model(), arguments()
    with mode(), record(model) as calls:
        model(*given)
    assert len(calls) == 5


def test_errors_leave_no_names_behind():
    model, given = Model(), arguments()
    with record(model) as calls:
        with pytest.raises(ValueError, match="query must have"):
            model(torch.zeros(2, 6, 15), *given[1:])
        with pytest.raises(ValueError, match="sampling_locations must have shape"):
            ms_deform_attn(torch.zeros(1, 4, 1, 1), [(2, 2)], None, *random_inputs().tensors[1:])
        model.last(*given, SIZES, None)
    assert [call.name for call in calls] == ["last"]
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="torch.export is tried with torch 2.13 and later",
)
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning")
def test_an_exported_program():
    module, given = Layer().attention.eval(), arguments()
    program = torch.export.export(module, (*given, SIZES, None), strict=False).module()
    with record(program) as calls:
        program(*given, SIZES, None)
    _, locations, weights = module(*given, SIZES, None, return_locations=True)
    (call,) = calls
    assert call.name == ""
    assert list(call.spatial_shapes) == SIZES
    torch.testing.assert_close(call.sampling_locations, locations.detach())
    torch.testing.assert_close(call.attention_weights, weights.detach())
    torch.testing.assert_close(call.reference_points, given[1])


def test_arrays_of_other_libraries_are_not_recorded():
    value, *points = (tensor.numpy() for tensor in random_inputs(SIZES).tensors)
    with record() as calls:
        assert np.isfinite(ms_deform_attn(value, SIZES, None, *points)).all()
    assert calls == []


def test_other_threads_are_not_recorded():
    model, given = Model(), arguments()
    with record() as calls:
        thread = threading.Thread(target=model, args=given)
        thread.start()
        thread.join()
    assert calls == []


def test_recordings_may_be_nested():
    model, given = Model(), arguments()
    with record() as every, record(model.last) as last:
        model(*given)
    assert len(every) == 5
    assert [call.name for call in last] == [""]


# --- what is refused ---------------------------------------------------------------------------------


@COMPILER
@pytest.mark.parametrize("way", ["wrapped", "in place", "inside"])
def test_compiled_models_are_refused(way):
    model = Model()
    if way == "wrapped":
        model = torch.compile(model)
    elif way == "in place":
        model.compile()
    else:
        model.last.compile()
    message = "its module 'last' is compiled" if way == "inside" else "it is compiled"
    with pytest.raises(TypeError, match=message), record(model):
        pass


def test_what_is_no_module_is_refused():
    with (
        pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or None, got list"),
        record([]),
    ):
        pass


def test_an_export_inside_the_block_is_refused():
    module, given = MSDeformAttn(16, 2, 2, 3), arguments()
    with record(), pytest.raises(RuntimeError, match="record must see eager calls"):
        torch.export.export(module, (*given, SIZES, None), strict=False)


def test_transforms_are_refused():
    value, *points = random_inputs(SIZES).tensors
    with record(), pytest.raises(RuntimeError, match="record must see eager calls"):
        torch.func.grad(lambda v: ms_deform_attn(v, SIZES, None, *points).sum())(value)


@COMPILER
def test_a_compiled_function_runs_eagerly_or_is_refused():
    """Never is a call left out in silence."""
    value, *points = random_inputs(SIZES).tensors

    def function(value, points, weights):
        return ms_deform_attn(value, SIZES, None, points, weights)

    expected = function(value, *points)
    compiled = torch.compile(function, backend="eager")
    compiled(value, *points)
    with record() as calls:
        assert torch.equal(compiled(value, *points), expected)
    assert len(calls) == 1
    for first in (True, False):
        torch.compiler.reset()
        whole = torch.compile(function, backend="eager", fullgraph=True)
        if first:
            whole(value, *points)
        with record() as calls:
            try:  # torch 2.4 runs it eagerly, too
                whole(value, *points)
            except torch._dynamo.exc.Unsupported as error:
                assert "record must see" in str(error)  # noqa: PT017 - or else it is recorded
            else:
                assert len(calls) == 1
