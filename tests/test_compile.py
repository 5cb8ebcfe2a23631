# SPDX-License-Identifier: Apache-2.0
"""What torch's compiler, tracers and profiler see of the operators."""

from __future__ import annotations

import contextlib
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from cupy_msda import (
    MSDeformAttn,
    MSDeformAttnFunction,
    ms_deform_attn,
)
from tests.calls import (
    BACKWARD,
    FORWARD,
    ORDERS,
    SIZES,
    call,
    operator_tables,
    strided,
    with_grad,
)
from tests.problems import (
    random_inputs,
)


# The Function around the operators has the gradient; torch says that they have none themselves.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("table", ["tensors", "integers"])
@pytest.mark.parametrize("layout", [torch.clone, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize(
    "needed", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str
)
def test_operators_pass_opcheck(table, layout, needed):
    inputs = random_inputs(n=1, d=3, lq=2, p=1)
    value, *points = (
        layout(t).detach().requires_grad_(i in needed) for i, t in enumerate(inputs.tensors)
    )
    table = operator_tables(inputs)[table]
    torch.library.opcheck(FORWARD, (value, *table, *points))
    flags = (0 in needed, 1 in needed or 2 in needed)
    grad_output = layout(inputs.grad_output).requires_grad_(bool(needed))
    torch.library.opcheck(BACKWARD, (grad_output, value, *table, *points, *flags))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("order", [None, [], [5, 1], [1, 2, 3, 1]], ids=str)
def test_operators_with_an_order_pass_opcheck(order):
    inputs = random_inputs(n=1, d=3, p=1)
    table = operator_tables(inputs)["integers"]
    value, *points = with_grad(inputs).tensors
    torch.library.opcheck(FORWARD, (value, *table, *points, order))
    grad_output = inputs.grad_output.requires_grad_()
    torch.library.opcheck(BACKWARD, (grad_output, value, *table, *points, True, True, order))


# torch 2.13's own tracer makes a Function and warns about it.
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def step_through(entry, inputs, shapes):
    """A function of the three tensors that ends in one of the three ways to call the operator."""
    if entry == "module":
        torch.manual_seed(0)
        module = MSDeformAttn(16, len(inputs.sizes), 2, 3).to(inputs.value.dtype)

        def step(value, locations, weights):
            query = weights.flatten(2)[..., :1].expand(-1, -1, 16) * 1
            points = locations[:, :, 0, :, 0]
            return module(query, points, value.flatten(2), shapes, None).tanh()

        return step

    def step(value, locations, weights):
        if entry == "function":
            output = ms_deform_attn(value * 1, shapes, None, locations, weights)
        else:
            output = MSDeformAttnFunction.apply(value * 1, shapes, None, locations, weights, 64)
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


@COMPILES
def test_sizes_of_feature_maps_compile_two_graphs():
    """As ints of the maps' shapes: one graph for the first sizes, one for all others."""

    def step(maps, locations, weights):
        sizes = [image.shape[-2:] for image in maps]
        value = torch.cat([image.flatten(2).transpose(1, 2) for image in maps], 1)
        return ms_deform_attn(value.unflatten(-1, (2, 8)), sizes, None, locations, weights)

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    inputs = random_inputs(n=1)
    for extra in range(9):
        maps = [torch.rand(1, 16, 5 + extra, 7 + 2 * extra), torch.rand(1, 16, 3 + extra, 4)]
        arguments = maps, inputs.locations, inputs.weights
        torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counter.frame_count <= 2


@COMPILES
def test_a_compiled_order_that_does_not_fit_is_refused():
    def step(value, locations, weights):
        return ms_deform_attn(value, SIZES, None, locations, weights, query_order=[(2, 2)])

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="query_order must have grids that hold the Lq = 5"):
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
    assert node.kwargs == {"query_order": order}
    assert torch.equal(traced(*inputs.tensors), function(*inputs.tensors))


@COMPILES
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
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
