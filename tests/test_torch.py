# SPDX-License-Identifier: Apache-2.0
"""The operator on torch tensors: values, gradients, what torch does around it, and what is refused."""

from __future__ import annotations

import functools
import itertools
import sys
import threading

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from cupy_msda import (
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_core_pytorch,
    reference,
)
from cupy_msda.bench.correctness import by_reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.cpu import backend
from cupy_msda.problem import Level
from cupy_msda.torch import operands, operators
from cupy_msda.torch.operands import Operands, levels_of
from tests.calls import (
    BACKWARD,
    FORWARD,
    ORDERS,
    SIZES,
    STARTS,
    call,
    operator_tables,
    strided,
    with_grad,
)
from tests.problems import (
    DTYPES,
    away_from_edges,
    check_against_reference,
    exactly,
    random_inputs,
)

# --- values and gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 3])
def test_output_and_gradients_stay_within_the_error_budget(dtypes, d):
    inputs = with_grad(random_inputs(d=d, dtypes=dtypes))
    output = call(inputs)
    output.backward(inputs.grad_output)
    gradients = [tensor.grad for tensor in inputs.tensors]
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs.tensors]
    check_against_reference(inputs, output, gradients)


def test_the_array_function_gives_the_gradients_of_autograd():
    inputs = with_grad(random_inputs())
    expected = torch.autograd.grad(call(inputs), inputs.tensors, inputs.grad_output)
    got = ms_deform_attn_backward(
        inputs.grad_output, inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
    )
    assert got._fields == ("value", "sampling_locations", "attention_weights")
    for gradient, one_expected in zip(got, expected, strict=True):
        assert torch.equal(gradient, one_expected)


# It samples at the coordinates as they are: those of 16 bits are too coarse.
@pytest.mark.parametrize("dtypes", [pair for pair in DTYPES if pair[1].itemsize >= 4], ids=str)
def test_grid_sample_formulation_agrees(dtypes):
    inputs = with_grad(random_inputs(dtypes=dtypes))
    arguments = (inputs.value, inputs.shapes(), inputs.locations, inputs.weights)
    output = ms_deform_attn_core_pytorch(*arguments)
    assert_within_budget(output.detach(), by_reference(inputs)[0].detach(), exactly(inputs)[0])
    if dtypes[1] == torch.float64:
        expected = torch.autograd.grad(output, inputs.tensors, inputs.grad_output)
        got = torch.autograd.grad(call(inputs), inputs.tensors, inputs.grad_output)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    inputs = with_grad(away_from_edges(random_inputs(n=1, d=3, lq=2, p=2)))
    assert gradcheck(lambda *t: ms_deform_attn(t[0], inputs.sizes, None, *t[1:]), inputs.tensors)


@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (1, 2)], ids=str)
def test_gradients_of_gradients_are_those_of_finite_differences(needed):
    inputs = with_grad(away_from_edges(random_inputs(n=1, d=3, lq=2, p=2)), *needed)

    def function(value, locations, weights):
        return ms_deform_attn(value, inputs.shapes(), None, locations, weights)

    assert gradgradcheck(function, inputs.tensors, fast_mode=True)


def test_third_derivatives_exist():
    inputs = with_grad(away_from_edges(random_inputs(n=1, d=3, lq=2, p=1)))
    output = call(inputs).square().sum()
    for _ in range(3):
        parts = torch.autograd.grad(output, inputs.tensors, create_graph=True)
        output = sum(part.square().sum() for part in parts)
    plain = reference.forward(inputs.value, inputs.levels, *inputs.tensors[1:]).square().sum()
    for _ in range(3):
        parts = torch.autograd.grad(plain, inputs.tensors, create_graph=True)
        plain = sum(part.square().sum() for part in parts)
    torch.testing.assert_close(output, plain)
    assert output.requires_grad


def test_gradients_of_gradients_where_one_input_depends_on_another():
    inputs = away_from_edges(random_inputs(sizes=[(4, 4)], n=1, m=1, d=3, lq=2, p=1))

    def function(offsets):
        value = inputs.value * (1 + offsets.sum())
        return ms_deform_attn(value, inputs.sizes, None, inputs.locations + offsets, inputs.weights)

    offsets = torch.zeros_like(inputs.locations, requires_grad=True)
    assert gradgradcheck(function, offsets)


def test_the_backward_function_is_differentiable_itself():
    inputs = with_grad(away_from_edges(random_inputs(n=1, d=3, lq=2, p=1)))
    grad_output = inputs.grad_output.requires_grad_()

    def function(grad_output, value, *points):
        return tuple(ms_deform_attn_backward(grad_output, value, inputs.sizes, None, *points))

    assert gradcheck(function, (grad_output, *inputs.tensors), fast_mode=True)


def test_level_table_of_tensors_in_the_reference():
    def levels(shapes=None, starts=None, sizes=None):
        value = torch.empty(1, 14, 1, 1)
        return levels_of(Operands(value, shapes, starts, sizes, None, None, None))

    sizes, starts = [(2, 3), (3, 2)], [2, 8]
    tensors = torch.tensor(sizes, dtype=torch.int32), torch.tensor(starts)
    both = levels(*tensors)
    assert [tuple(map(int, level)) for level in both] == [(2, 3, 2), (3, 2, 8)]
    derived = levels(tensors[0])
    assert [tuple(map(int, level)) for level in derived] == [(2, 3, 0), (3, 2, 6)]
    mixed = levels(None, tensors[1], (2, 3, 3, 2))
    assert [tuple(map(int, level)) for level in mixed] == [(2, 3, 2), (3, 2, 8)]
    assert levels(None, tensors[1][:0], ()) == []
    inputs = random_inputs(sizes, s=14)
    expected = reference.forward(inputs.value, both, inputs.locations, inputs.weights)
    got = ms_deform_attn(inputs.value, sizes, starts, inputs.locations, inputs.weights)
    torch.testing.assert_close(got, expected)
    # A level that does not fit S has no positions left to read.
    for bad in (
        [(2, 3), (4, 2)],
        [(2, 3), (-3, 2)],
        [(2, 3), (2**40, 2**40)],
        [(2, 3), (3, 2**33)],
    ):
        found = levels(torch.tensor(bad), tensors[1])
        assert tuple(map(int, found[0])) == (2, 3, 2)
        assert tuple(map(int, found[1])) == (0, 0, 0)


# --- what is computed and kept ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "needed", [c for k in range(4) for c in itertools.combinations(range(3), k)]
)
def test_only_needed_gradients_are_computed(needed, monkeypatch):
    inputs = random_inputs()
    everything = with_grad(inputs)
    full = torch.autograd.grad(call(everything), everything.tensors, inputs.grad_output)
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs.tensors)]
    flags = []
    backward = operators.backward

    def spy(operands, recorded):
        flags.append((operands.needs_value, operands.needs_points))
        return backward(operands, recorded)

    monkeypatch.setattr(operators, "backward", spy)
    output = ms_deform_attn(leaves[0], inputs.sizes, None, *leaves[1:])
    assert output.requires_grad == bool(needed)
    if needed:
        output.backward(inputs.grad_output)
        assert flags == [(0 in needed, 1 in needed or 2 in needed)]
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in needed)
        if i in needed:
            assert torch.equal(leaf.grad, full[i])


@pytest.mark.parametrize("flags", list(itertools.product([True, False], repeat=2)))
def test_backward_operator_returns_nothing_for_what_is_not_needed(flags):
    inputs = random_inputs()
    table = (inputs.shapes(), None, None, None)
    gradients = BACKWARD(
        inputs.grad_output, inputs.value, *table, inputs.locations, inputs.weights, *flags
    )
    for tensor, gradient, need in zip(
        inputs.tensors, gradients, (flags[0], flags[1], flags[1]), strict=True
    ):
        assert gradient.shape == (tensor.shape if need else (0,))
        assert gradient.dtype == tensor.dtype


def test_host_tensors_are_shared_with_numpy_not_copied(monkeypatch):
    inputs = random_inputs()
    seen = []
    real = backend.forward

    def spy(problem, table, *arrays, **rules):
        seen.extend(arrays)
        return real(problem, table, *arrays, **rules)

    monkeypatch.setattr(backend, "forward", spy)
    call(inputs)
    for array, tensor in zip(seen, inputs.tensors, strict=True):
        assert array.ctypes.data == tensor.data_ptr()


def test_cpu_kernels_use_as_many_threads_as_torch(monkeypatch):
    """A DataLoader's worker, say, is told to use one."""
    cpu = pytest.importorskip("cupy_msda.cpu.kernels", reason="needs Numba")
    seen = []

    def spy(real, *arguments, threads, **rules):
        seen.append(threads)
        return real(*arguments, threads=threads, **rules)

    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, functools.partial(spy, getattr(cpu, name)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        inputs = with_grad(random_inputs())
        call(inputs).backward(inputs.grad_output)
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]


def test_gradients_flow_past_leaves():
    inputs = with_grad(random_inputs())
    scaled = ms_deform_attn(
        inputs.value * 2, inputs.sizes, None, inputs.locations * 1, inputs.weights * 3
    )
    scaled.backward(inputs.grad_output)
    doubled = with_grad(random_inputs())
    with torch.no_grad():
        doubled.value.mul_(2)
        doubled.weights.mul_(3)
    full = torch.autograd.grad(call(doubled), doubled.tensors, inputs.grad_output)
    for leaf, gradient, factor in zip(inputs.tensors, full, (2, 1, 3), strict=True):
        torch.testing.assert_close(leaf.grad, gradient * factor)


def test_a_saved_tensor_that_changes_is_noticed():
    inputs = with_grad(random_inputs())
    value = inputs.value * 1
    output = ms_deform_attn(value, inputs.sizes, None, inputs.locations, inputs.weights)
    value.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# --- forms of input --------------------------------------------------------------------------------


def test_strided_inputs_and_gradients():
    inputs = with_grad(random_inputs())
    output = call(inputs)
    output.backward(inputs.grad_output)
    value, locations, weights = others = list(map(strided, inputs.tensors))
    again = ms_deform_attn(value, inputs.sizes, None, locations, weights)
    again.backward(strided(inputs.grad_output))
    assert torch.equal(again, output)
    for other, tensor in zip(others, inputs.tensors, strict=True):
        assert not other.is_contiguous()
        assert torch.equal(other.grad, tensor.grad)


def test_expanded_inputs_and_gradients():
    inputs = random_inputs()
    one = [tensor[:1] for tensor in inputs.tensors]
    expanded = [t.expand(3, *t.shape[1:]).requires_grad_() for t in one]
    copied = [t.detach().clone().requires_grad_() for t in expanded]
    for value, locations, weights in (expanded, copied):
        ms_deform_attn(value, inputs.sizes, None, locations, weights).sum().backward()
    for a, b in zip(expanded, copied, strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_tensor_at_an_odd_address():
    inputs = random_inputs()
    storage = torch.zeros(inputs.value.numel() + 1)
    value = storage[1:].view(inputs.value.shape).copy_(inputs.value)
    assert torch.equal(call(inputs._replace(value=value)), call(inputs))


@pytest.mark.parametrize("size", ["n", "lq", "m", "d", "p", "s", "l"])
def test_empty_sizes_give_zeros(size):
    sizes = {"s": [(0, 3), (2, 0)], "l": []}.get(size, [(2, 3), (1, 1)])
    extents = {} if size in "sl" else {size: 0}
    inputs = with_grad(random_inputs(sizes, s=7 if size == "l" else None, **extents))
    for shapes in (inputs.sizes, inputs.shapes()):
        output = ms_deform_attn(inputs.value, shapes, None, inputs.locations, inputs.weights)
        n, lq, md = inputs.grad_output.shape
        assert output.shape == (n, lq, md)
        assert not output.any()
        parts = torch.autograd.grad(output, inputs.tensors, inputs.grad_output, create_graph=True)
        for part, tensor in zip(parts, inputs.tensors, strict=True):
            assert part.shape == tensor.shape
            assert part.dtype == tensor.dtype
            assert not part.any()
        seconds = torch.autograd.grad(
            sum(p.sum() for p in parts), inputs.tensors, allow_unused=True
        )
        assert all(second is None or not second.any() for second in seconds)


AS_SHAPES = {
    "lists": list(map(list, SIZES)),
    "tuples": tuple(SIZES),
    "numpy": np.array(SIZES),
    "int64": torch.tensor(SIZES),
    "int32": torch.tensor(SIZES, dtype=torch.int32),
    "uint8": torch.tensor(SIZES, dtype=torch.uint8),
    "strided": torch.tensor(SIZES).T.contiguous().T,
}
AS_STARTS = {
    "list": STARTS,
    "numpy": np.array(STARTS),
    "int64": torch.tensor(STARTS),
    "int32": torch.tensor(STARTS, dtype=torch.int32),
}


@pytest.mark.parametrize("shapes", AS_SHAPES)
@pytest.mark.parametrize("starts", AS_STARTS)
def test_forms_of_the_level_table(shapes, starts):
    inputs = random_inputs(SIZES, s=20)
    levels = [Level(h, w, start) for (h, w), start in zip(SIZES, STARTS, strict=True)]
    value, *points = with_grad(inputs).tensors
    output = ms_deform_attn(value, AS_SHAPES[shapes], AS_STARTS[starts], *points)
    torch.testing.assert_close(output, reference.forward(value, levels, *points))
    output.backward(inputs.grad_output)
    expected = reference.backward(inputs.grad_output, value, levels, *points)
    for tensor, gradient in zip((value, *points), expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_orders_of_the_queries_give_the_same(order):
    inputs = with_grad(random_inputs())
    arguments = inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
    results = []
    for output in (call(inputs), ms_deform_attn(*arguments, query_order=order)):
        gradients = torch.autograd.grad(
            output, inputs.tensors, inputs.grad_output, create_graph=True
        )
        twice = torch.autograd.grad(gradients[1].square().sum(), inputs.weights, retain_graph=True)
        results.append((output, *gradients, *twice))
    assert all(map(torch.equal, *results))
    gradients = ms_deform_attn_backward(inputs.grad_output, *arguments, query_order=order)
    assert all(map(torch.equal, gradients, results[0][1:4]))


def test_the_order_of_meta_tensors_is_checked():
    inputs = random_inputs(device="meta")
    with pytest.raises(ValueError, match="query_order must have grids that hold the Lq = 5"):
        call(inputs, functools.partial(ms_deform_attn, query_order=[(2, 3)]))
    assert call(inputs, functools.partial(ms_deform_attn, query_order=[(5, 1)])).is_meta


# --- the Function ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [(64,), (None,), ()], ids=str)
def test_the_function_takes_the_arguments_of_the_original(step):
    inputs = with_grad(random_inputs(n=3))
    arguments = (inputs.value, inputs.shapes(), inputs.starts(), inputs.locations, inputs.weights)
    output = MSDeformAttnFunction.apply(*arguments, *step)
    assert torch.equal(output, call(inputs))
    assert type(output.grad_fn).__name__ == "MSDeformAttnFunctionBackward"
    output.backward(inputs.grad_output)
    assert all(tensor.grad is not None for tensor in inputs.tensors)


class Doubled(MSDeformAttnFunction):
    """Twice the output, with a backward that fits."""

    @staticmethod
    def forward(ctx, *arguments):
        return 2 * MSDeformAttnFunction.forward(ctx, *arguments)

    @staticmethod
    def backward(ctx, grad_output):
        return MSDeformAttnFunction.backward(ctx, 2 * grad_output)


NAMES = ("value", "locations", "weights")  # of the tensors of random inputs


class Wide(torch.autograd.Function):
    """In float32 also under autocast, as forks decorate theirs: https://github.com/IDEA-Research/detrex/pull/198."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, *arguments):
        return MSDeformAttnFunction.forward(ctx, *arguments)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_output):
        return MSDeformAttnFunction.backward(ctx, grad_output)


def test_a_subclass_of_the_function_runs_its_own_methods():
    inputs = with_grad(random_inputs())
    expected = call(inputs)
    arguments = (inputs.value, inputs.shapes(), None, inputs.locations, inputs.weights, 64)
    output = Doubled.apply(*arguments)
    assert torch.equal(output, 2 * expected)
    gradients = torch.autograd.grad(output, inputs.tensors, inputs.grad_output)
    doubled = torch.autograd.grad(expected, inputs.tensors, 2 * inputs.grad_output)
    assert all(map(torch.equal, gradients, doubled))

    class Renamed(MSDeformAttnFunction):
        pass

    assert torch.equal(Renamed.apply(*arguments), expected)


def test_the_functions_methods_inside_another():
    halves = [tensor.half().requires_grad_() for tensor in random_inputs().tensors]
    widened = (tensor.detach().float() for tensor in halves)
    inputs = with_grad(random_inputs()._replace(**dict(zip(NAMES, widened, strict=True))))
    expected = call(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = Wide.apply(halves[0], inputs.shapes(), None, *halves[1:], 64)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)
    gradients = torch.autograd.grad(output, halves, inputs.grad_output)
    wanted = torch.autograd.grad(expected, inputs.tensors, inputs.grad_output)
    assert all(torch.equal(one, other.half()) for one, other in zip(gradients, wanted, strict=True))


def test_backward_on_another_thread():
    inputs = with_grad(random_inputs())
    expected = torch.autograd.grad(call(inputs), inputs.tensors, inputs.grad_output)
    output = call(inputs)
    thread = threading.Thread(target=output.backward, args=(inputs.grad_output,))
    thread.start()
    thread.join()
    for tensor, gradient in zip(inputs.tensors, expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    inputs = with_grad(random_inputs())
    with mode():
        output = call(inputs)
    assert not output.requires_grad
    assert torch.equal(output, call(inputs))


# --- what is checked -------------------------------------------------------------------------------


@pytest.fixture
def checks(monkeypatch):
    """A list of the calls that were checked, from a state in which none was."""
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return operands.check(*arguments)

    monkeypatch.setattr(operators, "check", spy)
    operators.forget()
    return calls


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_call_like_an_earlier_one_is_not_checked_again(checks, as_tensor):
    for seed in range(3):
        inputs = with_grad(random_inputs(seed=seed))
        shapes = inputs.shapes() if as_tensor else inputs.sizes
        output = ms_deform_attn(inputs.value, shapes, None, *inputs.tensors[1:])
        output.backward(inputs.grad_output)
        assert len(checks) == 1  # the first forward


def test_whatever_a_check_looks_at_is_checked_anew(checks):
    inputs = random_inputs()
    table = inputs.shapes(), inputs.starts()

    def run(**changed):
        arguments = {"value": inputs.value, "shapes": table[0], "starts": table[1]}
        arguments |= {"locations": inputs.locations, "weights": inputs.weights, **changed}
        before = len(checks)
        order = arguments.pop("order", "auto")
        ms_deform_attn(*arguments.values(), query_order=order)
        return len(checks) - before

    assert run() == 1
    assert run() == 0
    assert run(shapes=table[0].int()) == 1
    assert run(starts=None) == 1
    assert run(weights=inputs.weights.double().float()) == 0
    for order in (None, [(5, 1)], [(1, 5)]):
        assert run(order=order) == 1
        assert run(order=order) == 0
    with pytest.raises(ValueError, match="query_order must have grids"):
        run(order=[(1, 4)])
    with pytest.raises(TypeError, match="attention_weights must have dtype float32"):
        run(weights=inputs.weights.double())
    with pytest.raises(ValueError, match="attention_weights must have shape"):
        run(weights=inputs.weights[:1])
    # The same tensors, with other numbers in them.
    table[1][1] = 36
    with pytest.raises(ValueError, match="inside the S = 47 positions of value"):
        run()
    table[1][1] = 35
    table[0][0, 0] = 4
    assert run() == 1


def test_the_most_that_is_remembered(checks, monkeypatch):
    monkeypatch.setattr(operators, "MAX_CALLS", 3)
    for lq in (1, 2, 3, 4, 1):
        call(random_inputs(lq=lq))
    assert len(checks) == 5  # the first was forgotten


# The Function around the operators has the gradient; torch says that they have none themselves.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch 2.15's opcheck
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
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch 2.15's opcheck
@pytest.mark.parametrize("order", [None, [], [5, 1], [1, 2, 3, 1]], ids=str)
def test_operators_with_an_order_pass_opcheck(order):
    inputs = random_inputs(n=1, d=3, p=1)
    table = operator_tables(inputs)["integers"]
    value, *points = with_grad(inputs).tensors
    torch.library.opcheck(FORWARD, (value, *table, *points, order))
    grad_output = inputs.grad_output.requires_grad_()
    torch.library.opcheck(BACKWARD, (grad_output, value, *table, *points, True, True, order))


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [ms_deform_attn, MSDeformAttnFunction.apply])
def test_tensors_mixed_with_arrays_are_refused(function):
    inputs = random_inputs()
    with pytest.raises(
        TypeError, match="attention_weights must be an array of the library of value"
    ):
        function(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights.numpy())


def test_the_function_refuses_numpy_arrays():
    inputs = random_inputs()
    arrays = [tensor.numpy() for tensor in inputs.tensors]
    with pytest.raises(TypeError, match=r"value must be a dense torch tensor, got ndarray"):
        MSDeformAttnFunction.apply(arrays[0], inputs.sizes, None, *arrays[1:], 64)


def test_sparse_tensors_are_refused():
    inputs = random_inputs()
    with pytest.raises(TypeError, match=r"attention_weights must be a dense tensor"):
        call(inputs._replace(weights=inputs.weights.to_sparse()))
    with pytest.raises(TypeError, match=r"grad_output must be a dense tensor"):
        ms_deform_attn_backward(
            inputs.grad_output.to_sparse(), inputs.value, inputs.sizes, None, *inputs.tensors[1:]
        )


def test_the_operators_check_what_they_are_given():
    inputs = random_inputs()
    tables = operator_tables(inputs)
    with pytest.raises(ValueError, match="spatial_shapes and level_start_index must keep"):
        FORWARD(inputs.value[:, 1:], *tables["tensors"], inputs.locations, inputs.weights)
    with pytest.raises(TypeError, match="grad_output must have the dtype of value"):
        BACKWARD(
            inputs.grad_output.double(),
            inputs.value,
            *tables["integers"],
            inputs.locations,
            inputs.weights,
            True,
            True,
        )
    arguments = inputs.value, *tables["integers"], inputs.locations, inputs.weights
    with pytest.raises(ValueError, match="query_order must have grids that hold the Lq = 5"):
        FORWARD(*arguments, [2, 3])
    with pytest.raises(ValueError, match="query_order must hold 1 to 16 grids, got 17"):
        BACKWARD(inputs.grad_output, *arguments, True, True, [1, 5, *[0] * 32])


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ([(5, 7), (3.5, 4)], TypeError, "spatial_shapes must be a sequence"),
        ([(5, 7), (3, 4, 1)], ValueError, r"spatial_shapes must hold \(H, W\) pairs"),
        ([(5, 7)], ValueError, "spatial_shapes must have one entry for each of the L = 2"),
        (torch.ones(2, 2), TypeError, "spatial_shapes must have an integer dtype"),
        (None, TypeError, "spatial_shapes must be a sequence"),
    ],
    ids=str,
)
def test_bad_level_sizes_are_refused_by_the_contract(shapes, error, message):
    inputs = random_inputs()
    with pytest.raises(error, match=message):
        ms_deform_attn(inputs.value, shapes, None, inputs.locations, inputs.weights)


def on_fake_device(device):
    """The operator on tensors that pretend to be on a device."""
    with FakeTensorMode():
        value = torch.empty(1, 6, 1, 8, device=device)
        locations = torch.empty(1, 1, 1, 1, 1, 2, device=device)
        weights = torch.empty(1, 1, 1, 1, 1, device=device)
        return ms_deform_attn(value, [(2, 3)], None, locations, weights)


@pytest.mark.parametrize("device", ["xpu:0", "mps:0"])
def test_an_unknown_device_is_named(device):
    with pytest.raises(
        ValueError, match=f"value must be on the CPU or .* CUDA device, got {device}"
    ):
        on_fake_device(device)


def test_rocm_is_refused(monkeypatch):
    assert on_fake_device("cuda").shape == (1, 1, 8)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.raises(ValueError, match="got cuda:0 of a ROCm build of torch"):
        on_fake_device("cuda")


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "cuda12x"), ("13.0", "cuda13x")])
def test_without_cupy_the_error_names_the_extra_that_fits_torch(cuda, extra, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(operators, "is_on_device", lambda _: True)
    operators.forget()
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "cupy-msda\[{extra}\]"'):
        call(random_inputs())
    operators.forget()


@pytest.fixture(params=[False, True], ids=["error", "warn"])
def deterministic(request):
    """torch's switch, in both its modes."""
    torch.use_deterministic_algorithms(True, warn_only=request.param)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_on_a_cpu(deterministic):
    """The CPU kernels are deterministic as they are: bitwise identical with the switch and without."""
    inputs = random_inputs(((9, 13), (6, 7)), m=8, d=32, lq=200, p=4)
    arguments = (inputs.grad_output, inputs.value, inputs.sizes, None, *inputs.tensors[1:])
    results = [ms_deform_attn_backward(*arguments) for _ in range(5)]
    torch.use_deterministic_algorithms(False)
    for result in (*results[1:], ms_deform_attn_backward(*arguments)):
        assert all(map(torch.equal, result, results[0]))
