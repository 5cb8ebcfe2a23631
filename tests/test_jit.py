# SPDX-License-Identifier: Apache-2.0
"""torch.jit: traces with and without gradients, saved and loaded; what cannot be traced or scripted says so."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from cupy_msda import MSDeformAttn, MSDeformAttnFunction, ms_deform_attn, ms_deform_attn_backward
from tests.calls import with_grad
from tests.problems import random_inputs

pytestmark = [
    # torch 2.13 deprecates torch.jit, part by part.
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated"),
    # A trace holds what the checks saw of its example: that shapes fit each other.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

INPUTS = random_inputs()
SIZES, STARTS = INPUTS.sizes, [0, 35]


def by_function(value, locations, weights):
    return ms_deform_attn(value, SIZES, None, locations, weights)


def by_apply(value, locations, weights):
    table = torch.tensor(SIZES), torch.tensor(STARTS)
    return MSDeformAttnFunction.apply(value, *table, locations, weights, 64)


def with_an_order(value, locations, weights):
    arguments = value, SIZES, torch.tensor(STARTS), locations, weights
    return ms_deform_attn(*arguments, query_order=[(5, 1)])


FUNCTIONS = pytest.mark.parametrize("function", [by_function, by_apply, with_an_order])


def reloaded(traced, path):
    """A trace that was saved and loaded."""
    traced.save(str(path / "traced.pt"))
    return torch.jit.load(str(path / "traced.pt"))


def gradients_of(function, tensors):
    """First gradients, and those of their squares."""
    output = function(*tensors)
    first = torch.autograd.grad(output.square().sum(), tensors, create_graph=True)
    return *first, *torch.autograd.grad(sum(one.square().sum() for one in first), tensors)


@FUNCTIONS
@pytest.mark.parametrize("traced_with_grad", [False, True])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_traced_functions_have_gradients(function, traced_with_grad, mode, tmp_path):
    inputs = with_grad(INPUTS)
    with mode():
        traced = torch.jit.trace(function, inputs.tensors if traced_with_grad else INPUTS.tensors)
    others = with_grad(random_inputs(seed=1))
    for run in (traced, reloaded(traced, tmp_path)):
        for _ in range(3):  # the interpreter optimises what it has run
            assert torch.equal(run(*others.tensors), function(*others.tensors))
            got = gradients_of(run, others.tensors)
            torch.testing.assert_close(got, gradients_of(function, others.tensors))


class Model(nn.Module):
    """The module between layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.attention = MSDeformAttn(16, 2, 2, 3)

    def forward(self, query, points, features):
        return query + self.attention(self.norm(query), points, features, SIZES, None)


def model_arguments():
    return torch.randn(2, 6, 16), torch.rand(2, 6, 1, 2), torch.randn(2, 47, 16)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_traced_modules(training, frozen, tmp_path):
    model, arguments = Model().train(training).requires_grad_(not frozen), model_arguments()
    for traced in (
        torch.jit.trace(model, arguments),
        torch.jit.trace_module(model, {"forward": arguments}),
    ):
        loaded = reloaded(traced, tmp_path)
        output, got = model(*arguments), loaded(*arguments)
        assert torch.equal(got, output)
        assert got.requires_grad != frozen
        if not frozen:
            expected = torch.autograd.grad(output.square().sum(), list(model.parameters()))
            got = torch.autograd.grad(got.square().sum(), list(loaded.parameters()))
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("optimise", [torch.jit.freeze, torch.jit.optimize_for_inference])
def test_a_traced_module_optimised(optimise):
    model, arguments = Model().eval(), model_arguments()
    optimised = optimise(torch.jit.trace(model, arguments))
    torch.testing.assert_close(optimised(*arguments), model(*arguments))


def test_a_trace_under_autocast_runs_without():
    inputs = random_inputs(dtypes=(torch.float32, torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        traced = torch.jit.trace(by_function, inputs.tensors)
        output = by_function(*inputs.tensors)
    assert torch.equal(traced(*inputs.tensors), output)


def test_the_traced_backward_function(tmp_path):
    def backward(grad_output, value, locations, weights):
        return tuple(ms_deform_attn_backward(grad_output, value, SIZES, None, locations, weights))

    leaves = INPUTS.grad_output.clone().requires_grad_(), *with_grad(INPUTS).tensors
    plain = torch.jit.trace(backward, (INPUTS.grad_output, *INPUTS.tensors))
    for traced in (plain, torch.jit.trace(backward, leaves)):
        results = backward(*leaves), reloaded(traced, tmp_path)(*leaves)
        assert all(map(torch.equal, *results))
        expected, got = (
            torch.autograd.grad(sum(one.square().sum() for one in result), leaves)
            for result in results
        )
        torch.testing.assert_close(got, expected)


def test_a_trace_runs_in_a_new_process(tmp_path):
    model, arguments = Model(), model_arguments()
    torch.jit.trace(model, arguments).save(str(tmp_path / "traced.pt"))
    torch.save(arguments, tmp_path / "in")
    code = """
        import sys
        import torch
        import cupy_msda
        model = torch.jit.load("traced.pt")
        output = model(*torch.load("in", weights_only=True))
        output.sum().backward()
        torch.save((output.detach(), [parameter.grad for parameter in model.parameters()]), "out")
    """
    checkout = str(Path(__file__).parents[1])
    code = f"import sys; sys.path.append({checkout!r})\n" + textwrap.dedent(code)
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    output, gradients = torch.load(tmp_path / "out", weights_only=True)
    expected = model(*arguments)
    assert torch.equal(output, expected)
    torch.testing.assert_close(
        tuple(gradients), torch.autograd.grad(expected.sum(), list(model.parameters()))
    )


# --- what is refused ---------------------------------------------------------------------------------


def through_vmap(value, locations, weights):
    def one(*tensors):
        return by_function(*(tensor[None] for tensor in tensors))

    return torch.func.vmap(one)(value, locations, weights)


def through_grad(value, locations, weights):
    return torch.func.grad(lambda value: by_function(value, locations, weights).sum())(value)


def through_jvp(value, locations, weights):
    def function(value):
        return by_function(value, locations, weights)

    return torch.func.jvp(function, (value,), (value,))[1]


@pytest.mark.parametrize("function", [through_vmap, through_grad, through_jvp])
def test_transforms_cannot_be_traced(function):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record cupy_msda"):
        torch.jit.trace(function, INPUTS.tensors)


@pytest.mark.parametrize("what", [by_function, Model()], ids=["function", "module"])
def test_scripting_is_refused(what):
    with pytest.raises(RuntimeError, match=r"cupy_msda cannot be compiled by torch\.jit\.script"):
        torch.jit.script(what)
