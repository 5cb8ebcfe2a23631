# SPDX-License-Identifier: Apache-2.0
"""Autocast: points in 16 bits beside a value of another dtype run in float32."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cupy_msda import MSDeformAttn, MSDeformAttnFunction, ms_deform_attn, ms_deform_attn_backward
from tests.calls import call, with_grad
from tests.problems import DTYPES, random_inputs

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# dtypes of value, locations and weights, and the contract takes none of these.
MIXED = [
    (F32, F16, F16),
    (F32, BF16, BF16),
    (F32, F32, BF16),
    (F32, F16, F32),
    (F32, BF16, F16),
    (F16, BF16, BF16),
    (BF16, F32, F16),
    (BF16, BF16, F16),
]
EXPORTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
# torch 2.13's own tracer makes a Function and warns about it.
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def by_function(inputs):
    return call(inputs)


def by_apply(inputs):
    arguments = inputs.shapes(), inputs.starts(), inputs.locations, inputs.weights, 64
    return MSDeformAttnFunction.apply(inputs.value, *arguments)


def mixed_inputs(dtypes, *needed, **options):
    return with_grad(random_inputs(dtypes=dtypes, **options), *needed)


def promoted(inputs):
    """The same inputs with the points in float32, as part of the same graph."""
    points = [
        points.float() if points.dtype != inputs.value.dtype else points
        for points in (inputs.locations, inputs.weights)
    ]
    return inputs._replace(locations=points[0], weights=points[1])


def results_of(run, inputs):
    """The output and the gradients by the tensors."""
    output = run(inputs)
    return output, *torch.autograd.grad(output, inputs.tensors, inputs.grad_output)


def check_same(got, expected):
    assert [one.dtype for one in got] == [one.dtype for one in expected]
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_what_the_contract_takes_runs_as_it_is(dtypes):
    inputs = with_grad(random_inputs(dtypes=dtypes))
    expected = results_of(call, inputs)
    with torch.autocast("cpu", dtype=BF16):
        check_same(results_of(call, inputs), expected)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("run", [by_function, by_apply])
def test_points_are_promoted_and_gradients_keep_their_dtypes(run, dtypes):
    inputs = mixed_inputs(dtypes)
    plain = run(promoted(inputs))
    expected = (plain, *torch.autograd.grad(plain, inputs.tensors, inputs.grad_output))
    with torch.autocast("cpu", dtype=BF16):
        got = results_of(run, inputs)
        with torch.no_grad():
            assert torch.equal(run(inputs), plain)
    check_same(got, expected)
    assert [one.dtype for one in got] == [dtypes[0], *dtypes]


@pytest.fixture
def other_device():
    """Autocast of another device."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
def test_without_autocast_the_error_stays(dtypes, other_device):
    inputs = mixed_inputs(dtypes)
    message = "(sampling_locations|attention_weights) must have dtype float32"
    with pytest.raises(TypeError, match=message):
        call(inputs)
    with (
        torch.autocast("cpu", dtype=BF16),
        torch.autocast("cpu", enabled=False),
        pytest.raises(TypeError, match=message),
    ):
        call(inputs)


@pytest.mark.parametrize("dtypes", [(F64, BF16, BF16), (F32, F64, F64), (F32, F32, F64)], ids=str)
def test_what_autocast_does_not_cast_is_refused(dtypes):
    inputs = mixed_inputs(dtypes)
    with (
        torch.autocast("cpu", dtype=BF16),
        pytest.raises(TypeError, match="must have dtype float32"),
    ):
        call(inputs)


def test_gradients_of_gradients():
    inputs = mixed_inputs((F32, BF16, BF16))

    def second(inputs, leaves):
        output = call(inputs)
        first = torch.autograd.grad(output, leaves, inputs.grad_output, create_graph=True)
        return torch.autograd.grad(sum(one.float().square().sum() for one in first), leaves)

    expected = second(promoted(inputs), inputs.tensors)
    with torch.autocast("cpu", dtype=BF16):
        got = second(inputs, inputs.tensors)
    check_same(got, expected)
    assert all(one.any() for one in got)


def test_the_array_function_of_the_gradients():
    inputs = random_inputs(dtypes=(F32, BF16, F16))
    arguments = inputs.value, inputs.sizes, None

    def run(inputs):
        points = inputs.locations, inputs.weights
        return ms_deform_attn_backward(inputs.grad_output, *arguments, *points)

    with pytest.raises(TypeError, match="sampling_locations must have dtype float32"):
        run(inputs)
    with torch.autocast("cpu", dtype=BF16):
        got = run(inputs)
    wide = run(promoted(inputs))
    check_same(got, [one.to(like.dtype) for one, like in zip(wide, inputs.tensors, strict=True)])


def test_under_a_transform():
    inputs = random_inputs(dtypes=(F32, BF16, BF16))

    def scalar(value, locations, weights):
        return call(inputs._replace(value=value, locations=locations, weights=weights)).sum()

    run = torch.func.grad(scalar, argnums=(0, 1, 2))
    with torch.autocast("cpu", dtype=BF16):
        got = run(*inputs.tensors)
    wide = run(*promoted(inputs).tensors)
    check_same(got, [one.to(like.dtype) for one, like in zip(wide, inputs.tensors, strict=True)])


class Normalised(nn.Module):
    """LayerNorm before, Linear after: under autocast a float32 value with 16-bit points."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.offsets, self.weights = nn.Linear(16, 24), nn.Linear(16, 12)
        self.output = nn.Linear(16, 16)

    def forward(self, query, features):
        value = self.norm(features).unflatten(-1, (2, 8))
        locations = self.offsets(query).unflatten(-1, (2, 2, 3, 2)).sigmoid()
        weights = self.weights(query).unflatten(-1, (2, 2, 3)).sigmoid()
        return self.output(ms_deform_attn(value, [(5, 7), (3, 4)], None, locations, weights))


class Wide(nn.Linear):
    """A projection that opts out of autocast."""

    def forward(self, features):
        with torch.autocast("cpu", enabled=False):
            return super().forward(features)


class Swapped(nn.Module):
    """The module with a projection of the value that stays in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MSDeformAttn(16, 2, 2, 3)
        self.attention.value_proj = Wide(16, 16)

    def forward(self, query, features):
        points = torch.full((2, 5, 1, 2), 0.4)
        return self.attention(query, points, features, [(5, 7), (3, 4)], None)


@COMPILES
@pytest.mark.parametrize("make", [Normalised, Swapped])
def test_models_compiled(make):
    model, arguments = make(), (torch.randn(2, 5, 16), torch.randn(2, 47, 16))
    parameters = list(model.parameters())
    torch.compiler.reset()
    with torch.autocast("cpu", dtype=BF16):  # around the backward as well, as torch compiles it
        output, got = (
            run(*arguments)
            for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager"))
        )
        expected = output, *torch.autograd.grad(output, parameters, torch.ones_like(output))
        got = got, *torch.autograd.grad(got, parameters, torch.ones_like(got))
        torch.testing.assert_close(got, expected)


@pytest.mark.skipif(not EXPORTS, reason="torch.export is tried with torch 2.13 and later")
@pytest.mark.parametrize("make", [Normalised, Swapped])
def test_models_exported(make):
    model, arguments = make().requires_grad_(False), (torch.randn(2, 5, 16), torch.randn(2, 47, 16))
    with torch.autocast("cpu", dtype=BF16):
        program = torch.export.export(model, arguments).module()
        torch.testing.assert_close(program(*arguments), model(*arguments))


@COMPILES
@pytest.mark.parametrize("function", [ms_deform_attn, MSDeformAttnFunction.apply])
def test_compiled_gradients_keep_their_dtypes(function):
    inputs = mixed_inputs((F32, BF16, F16))
    sizes = inputs.sizes
    torch.compiler.reset()

    def step(value, locations, weights):
        return function(value * 1, sizes, None, locations, weights)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=BF16):
        expected = results_of(by_function, inputs)
        output = compiled(*inputs.tensors)
    got = (output, *torch.autograd.grad(output, inputs.tensors, inputs.grad_output))
    check_same(got, expected)


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_recorded_graph_holds_one_valid_call(mode):
    inputs = random_inputs(dtypes=(F32, BF16, BF16))

    def step(value, locations, weights):
        return call(inputs._replace(value=value, locations=locations, weights=weights))

    with torch.autocast("cpu", dtype=BF16):
        graph = torch.fx.experimental.proxy_tensor.make_fx(step, tracing_mode=mode)(*inputs.tensors)
        output = step(*inputs.tensors)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in called if "cupy_msda" in target] == [
        "cupy_msda.ms_deform_attn_forward.default"
    ]
    assert torch.equal(graph(*inputs.tensors), output)
