# SPDX-License-Identifier: Apache-2.0
"""What torch's compiler, tracers and profiler see of the operators."""

from __future__ import annotations

import contextlib
import pickle

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from cupy_msda import (
    MSDeformAttn,
    MSDeformAttnFunction,
    ms_deform_attn,
)
from tests.calls import ORDERS, SIZES, STARTS, call, with_grad
from tests.problems import (
    random_inputs,
)

# torch 2.13's own tracer makes a Function and warns about it.
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def step_through(entry, inputs, shapes, starts=None):
    """A function of the three tensors that ends in one of the three ways to call the operator."""
    if entry == "module":
        torch.manual_seed(0)
        module = MSDeformAttn(16, len(inputs.sizes), 2, 3).to(inputs.value.dtype)

        def step(value, locations, weights):
            query = weights.flatten(2)[..., :1].expand(-1, -1, 16) * 1
            points = locations[:, :, 0, :, 0]
            return module(query, points, value.flatten(2), shapes, starts).tanh()

        return step

    def step(value, locations, weights):
        if entry == "function":
            output = ms_deform_attn(value * 1, shapes, starts, locations, weights)
        else:
            output = MSDeformAttnFunction.apply(value * 1, shapes, starts, locations, weights, 64)
        return output.tanh()

    return step


ENTRIES = pytest.mark.parametrize("entry", ["function", "apply", "module"])


def results_of(step, inputs):
    """The output of a step and the gradients by its tensors."""
    output = step(*inputs.tensors)
    return output, *torch.autograd.grad(output, inputs.tensors, inputs.grad_output)


@COMPILES
@ENTRIES
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiles_whole(entry, dynamic, as_tensor):
    inputs = with_grad(random_inputs())
    step = step_through(entry, inputs, inputs.shapes() if as_tensor else inputs.sizes)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(results_of(compiled, inputs), results_of(step, inputs))


@COMPILES
@ENTRIES
@pytest.mark.parametrize("as_tensor", [False, True])
def test_other_contents_compile_nothing_again(entry, as_tensor):
    inputs = with_grad(random_inputs())
    shapes = inputs.shapes() if as_tensor else inputs.sizes
    step = step_through(entry, inputs, shapes)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results_of(compiled, inputs)
    if as_tensor:  # other levels in the same tensor
        shapes.copy_(shapes.flip(-1))
    others = with_grad(random_inputs(seed=1))
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = results_of(compiled, others)
    torch.testing.assert_close(got, results_of(step, others))


@COMPILES
def test_other_sizes_compile_nothing_again_where_they_are_dynamic():
    inputs = [with_grad(random_inputs(n=n, lq=lq)) for n, lq in ((6, 5), (7, 9))]
    step = step_through("function", inputs[0], inputs[0].sizes)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    results_of(compiled, inputs[0])
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = results_of(compiled, inputs[1])
    torch.testing.assert_close(got, results_of(step, inputs[1]))


@COMPILES
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("order", [None, [(1, 2), (3, 1)], "of the input"], ids=str)
def test_compiles_whole_with_an_order(order, dynamic):
    of_the_input = order == "of the input"

    def step(value, locations, weights):
        grids = [(1, weights.shape[1])] if of_the_input else order
        return ms_deform_attn(value * 1, SIZES, None, locations, weights, query_order=grids).tanh()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lq in (5,) if isinstance(order, list) else (5, 7):
        inputs = with_grad(random_inputs(SIZES, lq=lq))
        torch.testing.assert_close(results_of(compiled, inputs), results_of(step, inputs))


PYRAMID = MSDeformAttn(16, 2, 2, 3)


def starts_of(sizes):
    """Starts of two levels one after another."""
    return [0, sizes[0][0] * sizes[0][1]]


def through_module(value, sizes, locations, weights):
    query, points = weights.flatten(2)[..., :1].expand(-1, -1, 16), locations[:, :, 0, :, 0]
    return PYRAMID(query, points, value.flatten(2), sizes, starts_of(sizes))


def as_encoder(value, sizes, locations, weights):
    """As many queries as positions, on grids of these sizes."""
    points = (t[:, :1].expand(-1, value.shape[1], *t.shape[2:]) for t in (locations, weights))
    return ms_deform_attn(value, sizes, None, *points, query_order=[(h, w) for h, w in sizes])


def in_a_tensor(sizes):
    return torch.tensor([tuple(size) for size in sizes])


def starts_in_a_tensor(shapes):
    return torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))


# By ints of the shapes of feature maps, in every way in which a model hands them on.
BY_INTS = {
    "sizes": lambda v, s, la, w: ms_deform_attn(v, s, None, la, w),
    "pairs": lambda v, s, la, w: ms_deform_attn(v, [(h, w_) for h, w_ in s], None, la, w),
    "starts": lambda v, s, la, w: ms_deform_attn(v, s, starts_of(s), la, w),
    "tensor": lambda v, s, la, w: ms_deform_attn(v, in_a_tensor(s), None, la, w),
    "tensors": lambda v, s, la, w: ms_deform_attn(
        v, in_a_tensor(s), starts_in_a_tensor(in_a_tensor(s)), la, w
    ),
    "tensor and starts": lambda v, s, la, w: ms_deform_attn(v, in_a_tensor(s), starts_of(s), la, w),
    "apply": lambda v, s, la, w: MSDeformAttnFunction.apply(v, s, starts_of(s), la, w, 64),
    "module": through_module,
    "encoder": as_encoder,
}


def image_sizes():
    """Pairs of level sizes, no two numbers alike."""
    return [[(5 + i, 17 + 2 * i), (9 + i, 40 + i)] for i in range(4)]


def value_of(maps):
    """Feature maps as the value of the operator."""
    flat = torch.cat([image.flatten(2).transpose(1, 2) for image in maps], 1)
    return flat.unflatten(-1, (2, 8))


@COMPILES
@pytest.mark.parametrize(("dynamic", "grad"), [(None, True), (True, False)])
@pytest.mark.parametrize("way", BY_INTS)
def test_sizes_of_feature_maps_compile_two_graphs(way, dynamic, grad):
    """One graph for the first sizes, one for all others."""

    def step(maps, locations, weights):
        sizes = [image.shape[-2:] for image in maps]
        return BY_INTS[way](value_of(maps), sizes, locations, weights)

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    inputs = random_inputs(SIZES, n=1)
    for sizes in image_sizes():
        maps = [torch.rand(1, 16, *size, requires_grad=grad) for size in sizes]
        arguments = maps, inputs.locations, inputs.weights
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counter.frame_count <= 2


@COMPILES
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("way", BY_INTS)
def test_sizes_as_arguments_compile_two_graphs(way, dynamic):
    def step(value, h0, w0, h1, w1, locations, weights):
        return BY_INTS[way](value, [(h0, w0), (h1, w1)], locations, weights)

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    inputs = random_inputs(SIZES, n=1)
    for sizes in image_sizes():
        value = value_of([torch.rand(1, 16, *size) for size in sizes])
        numbers = [number for size in sizes for number in size]
        arguments = value, *numbers, inputs.locations, inputs.weights
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counter.frame_count <= 2


TABLE, FIRST = torch.tensor(SIZES), torch.tensor(STARTS)
# Every form of the level table, with arrays where a graph cannot know the numbers.
FORMS = {
    "tuples": (tuple(map(tuple, SIZES)), tuple(STARTS)),
    "torch.Size": ([torch.Size(size) for size in SIZES], STARTS),
    "range": (SIZES, range(8, 1, -6)),
    "tensors": (TABLE, FIRST),
    "int32": (TABLE.int(), FIRST.int()),
    "NumPy": (TABLE.numpy(), FIRST.numpy()),
    "NumPy sizes": (TABLE.numpy(), STARTS),
    "NumPy starts": (SIZES, FIRST.numpy()),
    "NumPy rows": (list(TABLE.numpy()), list(FIRST.numpy())),
    "NumPy numbers": ([tuple(row) for row in TABLE.numpy()], tuple(FIRST.numpy())),
    "rows of a tensor": (list(TABLE), STARTS),
    "0-dim tensors": ([tuple(row) for row in TABLE], list(FIRST)),
    "tensor and NumPy": (TABLE, FIRST.numpy()),
}


@COMPILES
@ENTRIES
@pytest.mark.parametrize(("fullgraph", "grad"), [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_table_compiles(form, fullgraph, grad, entry):
    shapes, starts = FORMS[form]
    inputs = random_inputs(SIZES, s=14)
    inputs = with_grad(inputs) if grad else inputs
    step = step_through(entry, inputs, shapes, starts)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=fullgraph, backend="aot_eager")
    results = results_of if grad else lambda step, inputs: step(*inputs.tensors)
    torch.testing.assert_close(results(compiled, inputs), results(step, inputs))


# Numbers that no graph takes: Dynamo breaks it and goes on.
OUTSIDE = {
    "values of a dict": (dict(enumerate(SIZES)).values(), STARTS, "auto"),
    "starts in a dict": (SIZES, dict(enumerate(STARTS)).values(), "auto"),
}
if torch.__version__ >= (2, 5):  # older ones fail by themselves on NumPy's numbers in a graph
    OUTSIDE["NumPy order"] = SIZES, STARTS, np.array([[5, 1]])
    OUTSIDE["NumPy numbers in the order"] = SIZES, STARTS, [(np.int64(5), np.int64(1))]


@COMPILES
# Dynamo's own, where it takes up the graph again after the call.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("form", OUTSIDE)
def test_every_other_form_breaks_the_graph(form, grad):
    shapes, starts, order = OUTSIDE[form]
    inputs = random_inputs(SIZES, s=14)
    inputs = with_grad(inputs) if grad else inputs

    def step(value, locations, weights):
        arguments = (value * 1, shapes, starts, locations, weights)
        return ms_deform_attn(*arguments, query_order=order).tanh()

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager")
    results = results_of if grad else lambda step, inputs: step(*inputs.tensors)
    torch.testing.assert_close(results(compiled, inputs), results(step, inputs))


@COMPILES
def test_sizes_read_from_a_tensor_break_the_graph():
    inputs = random_inputs(SIZES)

    def step(shapes):
        value, locations, weights = inputs.tensors
        return ms_deform_attn(value * 1, shapes.tolist(), None, locations, weights).tanh()

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(2):
        shapes = TABLE.clone()
        torch.testing.assert_close(compiled(shapes), step(shapes))


@COMPILES
def test_numbers_of_queries_that_depend_on_data_compile():
    inputs = random_inputs(SIZES)

    def step(kept):
        # Two numbers to the compiler, which cannot know that they are equal.
        chosen = (part[:, kept.nonzero()[:, 0]] for part in (inputs.locations, inputs.weights))
        return ms_deform_attn(inputs.value, SIZES, None, *chosen)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    kept = torch.tensor([True, False, True, True, False])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(compiled(kept), step(kept))


INPUTS = random_inputs(SIZES)
MISTAKES = {
    "rank of value": ({"value": INPUTS.value[0]}, "value must have shape"),
    "rank of locations": ({"locations": INPUTS.locations[0]}, "sampling_locations must have shape"),
    "rank of weights": ({"weights": INPUTS.weights[0]}, "attention_weights must have shape"),
    "heads": ({"weights": INPUTS.weights[:, :, :1]}, "attention_weights must have shape"),
    "dtype": ({"locations": INPUTS.locations.half()}, "sampling_locations must have dtype"),
    "integers": ({"value": INPUTS.value.long()}, "value must have dtype"),
    "levels": ({"sizes": SIZES[:1]}, "spatial_shapes must have one entry for each"),
    "rows of the table": ({"sizes": TABLE[:1]}, "spatial_shapes must have shape"),
    "floats": ({"sizes": TABLE.float()}, "spatial_shapes must have an integer dtype"),
    "S": ({"sizes": [(2, 3), (9, 9)]}, "spatial_shapes and level_start_index must"),
}


@COMPILES
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("entry", [ms_deform_attn, MSDeformAttnFunction.apply], ids=["", "apply"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_compiled_mistakes_are_named(mistake, entry, fullgraph):
    replaced, message = MISTAKES[mistake]
    inputs = INPUTS._replace(**replaced)
    torch.compiler.reset()
    compiled = torch.compile(entry, fullgraph=fullgraph, backend="eager")
    with pytest.raises(Exception, match=message):
        compiled(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_fake_tensors_are_named(mistake):
    replaced, message = MISTAKES[mistake]
    inputs = INPUTS._replace(**replaced)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Exception, match=message) as got:
        call(inputs)
    assert got.type in (TypeError, ValueError)


@COMPILES
def test_a_compiled_order_that_does_not_fit_is_refused():
    def step(value, locations, weights):
        return ms_deform_attn(value, SIZES, None, locations, weights, query_order=[(2, 2)])

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(TorchRuntimeError, match="query_order must have grids that hold the Lq = 5"):
        compiled(*random_inputs(SIZES).tensors)


def test_the_profiler_shows_the_operators_by_name():
    inputs = with_grad(random_inputs())
    with torch.profiler.profile() as profile:
        torch.autograd.grad(call(inputs), inputs.tensors, inputs.grad_output)
    names = [event.name for event in profile.events()]
    for way in ("forward", "backward"):
        assert names.count(f"cupy_msda::ms_deform_attn_{way}") == 1


def test_fx_keeps_the_function_whole():
    inputs = random_inputs()

    def function(value, locations, weights):
        return ms_deform_attn(value.neg(), inputs.sizes, None, locations, weights).tanh()

    traced = torch.fx.symbolic_trace(function)
    assert [n.name for n in traced.graph.nodes if n.op == "call_function"] == ["ms_deform_attn"]
    assert torch.equal(traced(*inputs.tensors), function(*inputs.tensors))


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_fx_keeps_the_order(order):
    inputs = random_inputs()

    def function(value, locations, weights):
        arguments = value, inputs.sizes, None, locations, weights
        return ms_deform_attn(*arguments, query_order=order)

    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(function)))
    (node,) = (node for node in traced.graph.nodes if node.op == "call_function")
    assert node.kwargs["query_order"] == order
    assert torch.equal(traced(*inputs.tensors), function(*inputs.tensors))


@COMPILES
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_inductor_calls_the_operators():
    inputs = with_grad(random_inputs())
    step = step_through("function", inputs, inputs.sizes)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    with torch.profiler.profile() as profile:
        got = results_of(compiled, inputs)
    torch.testing.assert_close(got, results_of(step, inputs))
    called = {event.name for event in profile.events()}
    assert {f"cupy_msda::ms_deform_attn_{way}" for way in ("forward", "backward")} <= called


def test_meta_and_fake_tensors_give_shapes():
    for place in (contextlib.nullcontext(), FakeTensorMode()):
        device = "cuda" if isinstance(place, FakeTensorMode) else "meta"
        with place:
            value = torch.empty(2, 26, 4, 8, device=device, dtype=torch.float16)
            locations = torch.empty(2, 3, 4, 2, 5, 2, device=device)
            weights = torch.empty(2, 3, 4, 2, 5, device=device)
            output = ms_deform_attn(value, [(4, 5), (2, 3)], None, locations, weights)
        assert output.shape == (2, 3, 32)
        assert output.dtype == torch.float16
        assert output.device.type == device
