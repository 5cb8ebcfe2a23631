# SPDX-License-Identifier: Apache-2.0
"""Derivatives of any order in both modes, and the transforms of `torch.func`."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from torch import func  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402

from cupy_msda import (  # noqa: E402
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_backward,
    reference,
)
from cupy_msda.torch import derivatives  # noqa: E402
from cupy_msda.torch.operands import Operands, backward_operands, inputs_of  # noqa: E402
from tests.problems import Inputs, away_from_edges, random_inputs  # noqa: E402

# torch scripts its own forward-mode decompositions on first use, and its linearize warns of its own graph.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]


@pytest.fixture
def smooth() -> Inputs:
    """A small float64 problem away from cell edges."""
    return away_from_edges(random_inputs(n=1, d=3, lq=2, p=2))


def by_operator(inputs: Inputs):
    """The operator as a function of its three tensors."""
    return lambda value, *points: ms_deform_attn(value, inputs.sizes, None, *points)


def by_function(inputs: Inputs):
    """The same by the Function, with the table in tensors."""
    table = inputs.shapes(), inputs.starts()
    return lambda value, *points: MSDeformAttnFunction.apply(value, *table, *points, 64)


def by_reference(inputs: Inputs):
    """The same by the reference, which is differentiable by torch alone."""
    return lambda value, *points: reference.forward(value, inputs.levels, *points)


FUNCTIONS = pytest.mark.parametrize("make", [by_operator, by_function], ids=["integers", "tensors"])


def directions(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """One tangent for each tensor."""
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        for tensor in inputs.tensors
    )


def close(actual, expected) -> None:
    """Trees of tensors that differ by rounding at most."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --- forward mode ----------------------------------------------------------------------------------


@FUNCTIONS
def test_forward_mode_by_finite_differences(smooth, make) -> None:
    inputs = [tensor.requires_grad_() for tensor in smooth.tensors]
    assert gradcheck(make(smooth), inputs, check_forward_ad=True, check_batched_forward_grad=True)


def test_forward_over_reverse_by_finite_differences(smooth) -> None:
    inputs = [tensor.requires_grad_() for tensor in smooth.tensors]
    assert gradgradcheck(by_operator(smooth), inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize(
    "moving", [c for k in (1, 2, 3) for c in itertools.combinations(range(3), k)], ids=str
)
def test_dual_tensors(smooth, moving) -> None:
    results = []
    for make in (by_operator, by_reference):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(tensor, tangent) if i in moving else tensor
                for i, (tensor, tangent) in enumerate(
                    zip(smooth.tensors, directions(smooth), strict=True)
                )
            ]
            results.append(forward_ad.unpack_dual(make(smooth)(*duals)))
    close(results[0].primal, results[1].primal)
    close(results[0].tangent, results[1].tangent)


def test_a_dual_level_changes_nothing_where_no_input_has_a_tangent(smooth) -> None:
    with forward_ad.dual_level():
        output = by_operator(smooth)(*smooth.tensors)
    close(output, by_operator(smooth)(*smooth.tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tangents_have_the_dtype_of_the_output(dtype) -> None:
    inputs = random_inputs(dtypes=(dtype, torch.float32))
    output, tangent = func.jvp(by_operator(inputs), inputs.tensors, directions(inputs))
    assert output.dtype == tangent.dtype == dtype
    exact = inputs.to(torch.float64)
    along = tuple(tensor.double() for tensor in directions(inputs))
    _, expected = func.jvp(by_reference(exact), exact.tensors, along)
    unit = torch.finfo(dtype).eps
    assert (tangent.double() - expected).abs().max() <= 8 * unit * expected.abs().max()


@pytest.mark.parametrize("size", ["n", "lq", "m", "d", "p"])
def test_tangents_of_empty_problems_are_zero(size) -> None:
    inputs = random_inputs(**{size: 0})
    output, tangent = func.jvp(by_operator(inputs), inputs.tensors, directions(inputs))
    assert tangent.shape == output.shape
    assert not tangent.any()


# --- torch.func ------------------------------------------------------------------------------------


def loss_of(function):
    """A scalar with curvature."""
    return lambda *tensors: function(*tensors).square().sum()


ALL = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f, x, _: func.grad(loss_of(f), ALL)(*x),
    "vjp": lambda f, x, _: func.vjp(f, *x)[1](f(*x)),
    "jvp": func.jvp,
    "jvp(jvp)": lambda f, x, t: func.jvp(lambda *y: func.jvp(f, y, t)[1], x, t),
    "jvp(grad)": lambda f, x, t: func.jvp(func.grad(loss_of(f), ALL), x, t),
    "jvp(jvp(grad))": lambda f, x, t: func.jvp(
        lambda *y: func.jvp(func.grad(loss_of(f), ALL), y, t)[1], x, t
    ),
    "grad(jvp)": lambda f, x, t: func.grad(lambda *y: func.jvp(loss_of(f), y, t)[1], ALL)(*x),
    "grad(grad)": lambda f, x, _: func.grad(
        lambda *y: sum(g.square().sum() for g in func.grad(loss_of(f), ALL)(*y)), ALL
    )(*x),
    "jacrev": lambda f, x, _: func.jacrev(f, ALL)(*x),
    "jacfwd": lambda f, x, _: func.jacfwd(f, ALL)(*x),
    "hessian": lambda f, x, _: func.hessian(loss_of(f), ALL)(*x),
    "linearize": lambda f, x, t: func.linearize(f, *x)[1](*t),
}


@pytest.mark.parametrize("moving", [0, 1, 2], ids=["value", "locations", "weights"])
def test_forward_mode_of_the_gradient_by_one_input(smooth, moving) -> None:
    """The backward operator gives other gradients without elements, and their tangents must have none either."""
    along = directions(smooth)[moving]
    results = []
    for make in (by_operator, by_reference):

        def loss(tensor, make=make):
            given = [*smooth.tensors[:moving], tensor, *smooth.tensors[moving + 1 :]]
            return loss_of(make(smooth))(*given)

        results.append(func.jvp(func.grad(loss), (smooth.tensors[moving],), (along,)))
    close(*results)


@FUNCTIONS
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_agree_with_those_of_the_reference(smooth, make, transform) -> None:
    along = directions(smooth)
    got = transform(make(smooth), smooth.tensors, along)
    close(got, transform(by_reference(smooth), smooth.tensors, along))


BATCHED = [c for k in (1, 2, 3) for c in itertools.combinations(range(3), k)]


def samples(inputs: Inputs, batched: tuple[int, ...], dim: int, count: int = 3):
    """Inputs of which some have a dimension of samples, and the in_dims that say so."""
    tensors = [
        torch.stack([tensor * (1 - 0.1 * k) for k in range(count)], dim) if i in batched else tensor
        for i, tensor in enumerate(inputs.tensors)
    ]
    return tensors, tuple(dim if i in batched else None for i in range(3))


def one_by_one(function, tensors, in_dims, count: int = 3):
    """What vmap must give: the function of each sample."""
    return torch.stack(
        [
            function(*(t if d is None else t.select(d, k) for t, d in zip(tensors, in_dims, strict=True)))
            for k in range(count)
        ]
    )  # fmt: skip


@FUNCTIONS
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_vmap_over_any_input(smooth, make, batched, dim) -> None:
    tensors, in_dims = samples(smooth, batched, dim)
    expected = one_by_one(make(smooth), tensors, in_dims)
    close(func.vmap(make(smooth), in_dims)(*tensors), expected)
    moved = func.vmap(make(smooth), in_dims, out_dims=1)(*tensors)
    close(moved, expected.movedim(0, 1))


@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_vmap_of_gradients(smooth, batched) -> None:
    tensors, in_dims = samples(smooth, batched, 0)
    for argument in range(3):
        gradient = func.grad(loss_of(by_operator(smooth)), argument)
        expected = one_by_one(gradient, tensors, in_dims)
        close(func.vmap(gradient, in_dims)(*tensors), expected)


@pytest.mark.parametrize("batched", BATCHED, ids=str)
def test_gradients_of_vmap(smooth, batched) -> None:
    tensors, in_dims = samples(smooth, batched, 0)

    def mapped(*arguments):
        return func.vmap(by_operator(smooth), in_dims)(*arguments).square().sum()

    def plain(*arguments):
        return one_by_one(by_reference(smooth), arguments, in_dims).square().sum()

    close(func.grad(mapped, ALL)(*tensors), func.grad(plain, ALL)(*tensors))


def test_vmap_inside_vmap(smooth) -> None:
    tensors, in_dims = samples(smooth, (0, 1), 0)
    wide = tensors[2] * torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1, 1, 1)
    inner = func.vmap(by_operator(smooth), in_dims)
    got = func.vmap(inner, (None, None, 0))(*tensors[:2], wide)
    close(got, torch.stack([inner(*tensors[:2], part) for part in wide]))


def test_vmap_over_a_shared_value_runs_it_once(smooth, monkeypatch) -> None:
    """Samples become queries of one call, so that value is not copied for each."""
    shapes = []

    def spy(*arguments):
        value, locations, _ = inputs_of(Operands(*arguments))
        shapes.append((value.shape, locations.shape[:2]))
        return forward(*arguments)

    forward = derivatives.FORWARD
    monkeypatch.setattr(derivatives, "FORWARD", spy)
    tensors, in_dims = samples(smooth, (1, 2), 0)
    func.vmap(by_operator(smooth), in_dims)(*tensors)
    assert shapes == [(smooth.value.shape, (1, 3 * 2))]


GRIDS = [(1, 1), (1, 1)]


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_with_an_order(smooth, transform) -> None:
    def function(value, *points):
        return ms_deform_attn(value, smooth.sizes, None, *points, query_order=GRIDS)

    along = directions(smooth)
    got = transform(function, smooth.tensors, along)
    close(got, transform(by_reference(smooth), smooth.tensors, along))


@pytest.mark.parametrize(
    ("order", "count", "of_images", "of_queries"),
    [
        ("auto", 3, None, None),
        (None, 3, [], []),
        (GRIDS, 8, [1, 1, 1, 1], [1, 1] * 16),
        (GRIDS, 9, [1, 1, 1, 1], []),
        ([(2, 1)], 9, [2, 1], [2, 1] * 9),
    ],
    ids=str,
)
def test_samples_that_become_queries_lie_on_grids_of_their_own(
    smooth, monkeypatch, order, count, of_images, of_queries
) -> None:
    orders = []

    def spy(operator, forward_of, *arguments):
        order = forward_of(arguments).query_order
        orders.append(None if order is None else list(order))
        return operator(*arguments)

    for name, forward_of in (
        ("FORWARD", lambda arguments: Operands(*arguments)),
        ("BACKWARD", lambda arguments: backward_operands(arguments).forward),
    ):
        operator = getattr(derivatives, name)
        monkeypatch.setattr(derivatives, name, partial(spy, operator, forward_of))

    def function(value, *points):
        return ms_deform_attn(value, smooth.sizes, None, *points, query_order=order)

    for batched, expected in ((ALL, of_images), ((1, 2), of_queries)):
        tensors, in_dims = samples(smooth, batched, 0, count)
        got = func.grad(loss_of(func.vmap(function, in_dims)), ALL)(*tensors)
        assert orders == [expected] * 2
        plain = func.grad(loss_of(func.vmap(by_reference(smooth), in_dims)), ALL)(*tensors)
        close(got, plain)
        orders.clear()


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_the_first_derivative_keeps_the_kernels(smooth, monkeypatch, kernel) -> None:
    """No transform of first order may fall back to the reference."""
    monkeypatch.setattr(reference, kernel, lambda *_: pytest.fail("the reference ran"))
    monkeypatch.setattr(reference, "tangent", lambda *_: pytest.fail("the reference ran"))
    tensors, in_dims = samples(smooth, ALL, 0)
    gradient = func.grad(loss_of(by_operator(smooth)), ALL)
    func.vmap(gradient, in_dims)(*tensors)


@pytest.mark.parametrize("name", ["spatial_shapes", "level_start_index"])
def test_a_level_table_for_each_sample_is_refused(smooth, name) -> None:
    tables = {"spatial_shapes": smooth.shapes(), "level_start_index": smooth.starts()}
    tables[name] = torch.stack([tables[name]] * 3)

    def function(table, value):
        other = {**tables, name: table}
        return ms_deform_attn(value, *other.values(), smooth.locations, smooth.weights)

    with pytest.raises(ValueError, match=f"^{name} must be the same for all samples"):
        func.vmap(function, (0, None))(tables[name], smooth.value)


def test_the_backward_function_under_transforms(smooth) -> None:
    def ours(grad_output, value, *points):
        return tuple(ms_deform_attn_backward(grad_output, value, smooth.sizes, None, *points))

    def plain(grad_output, value, *points):
        _, pull = func.vjp(by_reference(smooth), value, *points)
        return pull(grad_output)

    inputs = (smooth.grad_output, *smooth.tensors)
    along = tuple(torch.ones_like(tensor) for tensor in inputs)
    close(func.jvp(ours, inputs, along), func.jvp(plain, inputs, along))
    stacked = [torch.stack([tensor, 0.9 * tensor]) for tensor in inputs]
    close(func.vmap(ours)(*stacked), func.vmap(plain)(*stacked))


# --- compiled --------------------------------------------------------------------------------------


def traced(test):
    """Let torch's own tracer warn: it makes a Function, and looks through caches of array-api-compat."""
    for warning in (
        "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning",
        "ignore:.*should not be instantiated:DeprecationWarning",
    ):
        test = pytest.mark.filterwarnings(warning)(test)
    return pytest.mark.skipif(
        not derivatives._SEEN_BY_DYNAMO,
        reason="the compiler of this torch cannot see transforms of torch.func",
    )(test)


COMPILED = {
    "grad": lambda f, inputs: func.grad(loss_of(f), (1, 2, 3)),
    "jvp": lambda f, inputs: (
        lambda *tensors: func.jvp(f, tensors, tuple(torch.ones_like(t) for t in tensors))
    ),
    "vmap": lambda f, inputs: func.vmap(f, (None, 1, 1, 1)),
}


def backward_function(inputs: Inputs):
    """The gradients as a function of four tensors."""
    return lambda *tensors: torch.cat(
        [
            g.flatten()
            for g in ms_deform_attn_backward(*tensors[:2], inputs.sizes, None, *tensors[2:])
        ]
    )


def forward_function(inputs: Inputs):
    """The output as a function of four tensors, of which it does without the first."""
    return lambda _, *tensors: by_operator(inputs)(*tensors)


@traced
@pytest.mark.parametrize("make", [forward_function, backward_function], ids=["forward", "backward"])
@pytest.mark.parametrize("transform", COMPILED.values(), ids=COMPILED)
def test_compiled_transforms(smooth, make, transform) -> None:
    inputs = (smooth.grad_output, *smooth.tensors)
    if transform is COMPILED["vmap"]:
        inputs = inputs[0], *(torch.stack([t, 0.9 * t], 1) for t in inputs[1:])
    function = transform(make(smooth), smooth)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    close(compiled(*inputs), function(*inputs))


@traced
def test_a_compiled_transform_of_the_function_says_what_to_call(smooth) -> None:
    """Dynamo would leave its gradients zero."""
    gradient = func.grad(loss_of(by_function(smooth)), ALL)
    torch.compiler.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"call cupy_msda\.ms_deform_attn"):
        compiled(*smooth.tensors)
    with_breaks = torch.compile(gradient, backend="aot_eager")
    close(with_breaks(*smooth.tensors), gradient(*smooth.tensors))


@traced
def test_the_compiled_backward_function_has_gradients(smooth) -> None:
    inputs = [tensor.requires_grad_() for tensor in (smooth.grad_output, *smooth.tensors)]
    function = backward_function(smooth)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, expected = (
        torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, function)
    )
    close(got, expected)
