# SPDX-License-Identifier: Apache-2.0
"""Whether an implementation is right, before it is timed: compared with the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cupy_msda import reference
from cupy_msda.bench.cases import Problem
from cupy_msda.bench.implementations import Function

RESULTS = ("output", "grad value", "grad locations", "grad weights")
# Of what the reference itself is off in the same dtype, and of roundings: peers may sum in that dtype.
FACTOR, ROUNDINGS = 4, 8
_QUERIES = 256


class Expected(NamedTuple):
    """What the queries that are compared must give."""

    queries: Tensor
    grad_output: (
        Tensor  # of the whole problem, zero elsewhere: so the gradient of value is theirs alone
    )
    exact: tuple[Tensor, ...]
    budgets: tuple[float, ...]  # of the relative error, root mean square


def expect(problem: Problem) -> Expected:
    """The reference in float64 on some queries spread over all and some that follow one another."""
    lq = problem.locations.shape[1]
    spread = torch.linspace(0, lq - 1, min(lq, _QUERIES)).long()
    run = torch.arange(lq // 2, min(lq, lq // 2 + _QUERIES))
    queries = torch.unique(torch.cat([spread, run])).to(problem.value.device)
    grad_output = torch.zeros_like(problem.grad_output)
    grad_output[:, queries] = problem.grad_output[:, queries]
    part = problem._replace(
        locations=problem.locations[:, queries],
        weights=problem.weights[:, queries],
        grad_output=problem.grad_output[:, queries],
    )
    exact = _reference(Problem(part.sizes, *(tensor.double() for tensor in part[1:])))
    budgets = tuple(
        FACTOR * relative_error(same, best) + ROUNDINGS * torch.finfo(same.dtype).eps
        for same, best in zip(_reference(part), exact, strict=True)
    )
    return Expected(queries, grad_output, exact, budgets)


def _reference(problem: Problem) -> tuple[Tensor, ...]:
    """Output and gradients in the dtype of the problem."""
    value, *points = problem.tensors
    output = reference.forward(value, problem.levels, *points)
    return output, *reference.backward(problem.grad_output, value, problem.levels, *points)


def errors(function: Function, problem: Problem, expected: Expected) -> dict[str, float]:
    """The relative error of output and gradients, each as a part of its budget: right is at most 1."""
    with torch.no_grad():
        output = function(*problem.tensors)
    leaves = [tensor.detach().requires_grad_() for tensor in problem.tensors]
    by_value, *by_points = torch.autograd.grad(function(*leaves), leaves, expected.grad_output)
    parts = [tensor[:, expected.queries] for tensor in (output, *by_points)]
    return {
        name: relative_error(result, best) / budget
        for name, result, best, budget in zip(
            RESULTS,
            (parts[0], by_value, *parts[1:]),
            expected.exact,
            expected.budgets,
            strict=True,
        )
    }


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference by that of the exact result; infinite where it is not finite."""
    difference = float(torch.linalg.vector_norm(result.double() - exact))
    if not difference < torch.inf:
        return float("inf")
    return difference / (float(torch.linalg.vector_norm(exact)) or 1.0)
