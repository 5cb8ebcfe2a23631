# SPDX-License-Identifier: Apache-2.0
"""The correctness check before anything is timed: each implementation against the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cupy_msda import budget, reference
from cupy_msda.bench.cases import Inputs
from cupy_msda.bench.implementations import Function

RESULTS = ("output", "grad value", "grad locations", "grad weights")
BUDGET = "2 * (error of the reference in the same dtype + rounding band), by largest magnitude and by root mean square"
# How many budgets the error of a baseline may take: it may accumulate in half precision. Ours: one.
BASELINE_BUDGETS = 2
_QUERIES = 256


class Expected(NamedTuple):
    """The right results for the queries that are compared."""

    queries: Tensor
    grad_output: (
        Tensor  # zero for all other queries, which then add nothing to the gradient of value
    )
    reference: tuple[Tensor, ...]  # in the dtypes of the inputs
    exact: tuple[Tensor, ...]


def expect(inputs: Inputs) -> Expected:
    """The reference's results for some queries spread over all and for some consecutive ones."""
    lq = inputs.locations.shape[1]
    spread = torch.linspace(0, lq - 1, min(lq, _QUERIES)).long()
    run = torch.arange(lq // 2, min(lq, lq // 2 + _QUERIES))
    queries = torch.unique(torch.cat([spread, run])).to(inputs.value.device)
    grad_output = torch.zeros_like(inputs.grad_output)
    grad_output[:, queries] = inputs.grad_output[:, queries]
    part = inputs._replace(
        locations=inputs.locations[:, queries],
        weights=inputs.weights[:, queries],
        grad_output=inputs.grad_output[:, queries],
    )
    return Expected(queries, grad_output, by_reference(part), by_reference(part.to(torch.float64)))


def by_reference(inputs: Inputs) -> tuple[Tensor, ...]:
    """Output and gradients of the reference in the dtypes of the inputs."""
    value, *points = inputs.tensors
    output = reference.forward(value, inputs.levels, *points)
    return output, *reference.backward(inputs.grad_output, value, inputs.levels, *points)


def errors(function: Function, inputs: Inputs, expected: Expected) -> dict[str, float]:
    """The errors of output and gradients in units of their budgets."""
    with torch.no_grad():
        output = function(*inputs.tensors)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    by_value, *by_points = torch.autograd.grad(function(*leaves), leaves, expected.grad_output)
    output, *by_points = (tensor[:, expected.queries] for tensor in (output, *by_points))
    results = zip(
        RESULTS, (output, by_value, *by_points), expected.reference, expected.exact, strict=True
    )
    return {name: budget.used(*arrays) for name, *arrays in results}
