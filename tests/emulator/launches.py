# SPDX-License-Identifier: Apache-2.0
"""Run the plans of the operator on the emulator, on torch CPU tensors of any dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from cupy_msda.contract import check
from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
from cupy_msda.cuda.plans import Choice, Device, Fill, Launch, Plan
from cupy_msda.problem import Grids, LevelTable, Problem
from tests.emulator.emulator import Emulated
from tests.problems import Inputs

Arrays = Mapping[str, torch.Tensor | None]
NO_TABLES = (None, None)
# How points are sampled: num_points, interpolation and value_mask, as the operator takes them by keyword.
Rules = Mapping[str, Any]
PLAIN: Rules = {}
# Files that go before and after the kernel that a test is about.
_AROUND = ("fixed_point.cu", "round.cu")


def checked(inputs: Inputs, rules: Rules = PLAIN) -> tuple[Problem, LevelTable]:
    """The problem and its level table, through the contract."""
    starts = inputs.starts().tolist()
    return check(inputs.value, inputs.sizes, starts, inputs.locations, inputs.weights, **rules)


def device(multiprocessors: int) -> Device:
    """A device with so many multiprocessors."""
    return Device(multiprocessors, "90")


def memory(tensor: torch.Tensor | None) -> np.ndarray[Any, Any] | None:
    """The tensor's memory as a NumPy array; 16-bit floats as their bits."""
    if tensor is None:
        return None
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


def poisoned(like: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A tensor of NaN, so that an element that is not written shows."""
    return torch.full(tuple(shape or like.shape), torch.nan, dtype=like.dtype)


def run(
    plan: Plan,
    arrays: Arrays,
    *,
    source: str | None = None,
    seed: int = 0,
    sanitize: bool = False,
) -> None:
    """Run the launches of a plan as launch.py would, on host memory; `source`: of the kernel that is tested."""
    named = dict(arrays)
    if plan.workspace:
        rounds = any(isinstance(s, Launch) and s.kernel.file == "round.cu" for s in plan.launches)
        dtype, size = (torch.float32, 4) if rounds else (torch.int64, 8)
        named["accumulator"] = torch.full((plan.workspace // size,), -1, dtype=dtype)
    for step in plan.launches:
        if isinstance(step, Fill):
            filled = named[step.array]
            assert filled is not None
            assert filled.nbytes == step.num_bytes
            filled.zero_()
            continue
        text = assemble(step.kernel.file)
        if source is not None and step.kernel.file not in _AROUND:
            text = source
        kernel = Emulated(text, step.kernel.name, sanitize=sanitize)
        given = [None if name is None else memory(named[name]) for name in step.arguments]
        kernel(step.grid, step.block, [*given, step.params], seed=seed)


def forward(
    inputs: Inputs,
    multiprocessors: int = 1,
    table: LevelTable | None = None,
    grids: Grids = (),
    tables: Sequence[torch.Tensor | None] = NO_TABLES,
    choice: Choice | None = None,
    rules: Rules = PLAIN,
    **options: Any,
) -> torch.Tensor:
    """The output of the emulated forward."""
    problem, known = checked(inputs, rules)
    plan = plans.plan_forward(problem, table or known, device(multiprocessors), grids, choice)
    output = poisoned(inputs.value, problem.output_shape)
    run(plan, _arrays(inputs, tables, rules) | {"output": output}, **options)
    return output


def backward(
    inputs: Inputs,
    multiprocessors: int = 1,
    table: LevelTable | None = None,
    needs: tuple[bool, bool] = (True, True),
    grids: Grids = (),
    tables: Sequence[torch.Tensor | None] = NO_TABLES,
    deterministic: bool = False,
    max_points_tiled: int = 0,
    choice: Choice | None = None,
    rules: Rules = PLAIN,
    **options: Any,
) -> tuple[torch.Tensor | None, ...]:
    """The three gradients of the emulated backward, None where not needed."""
    problem, known = checked(inputs, rules)
    with patch.object(plans, "MAX_POINTS_TILED", max_points_tiled):
        plan = plans.plan_backward.__wrapped__(
            problem,
            table or known,
            device(multiprocessors),
            grids,
            needs_value=needs[0],
            needs_points=needs[1],
            deterministic=deterministic,
            choice=choice,
        )
    wanted = (needs[0], needs[1], needs[1])
    gradients = tuple(
        poisoned(tensor) if need else None
        for tensor, need in zip(inputs.tensors, wanted, strict=True)
    )
    names = ("grad_value", "grad_locations", "grad_weights")
    run(plan, _arrays(inputs, tables, rules) | dict(zip(names, gradients, strict=True)), **options)
    return gradients


def backward_fixed_point(
    inputs: Inputs, multiprocessors: int = 1, needs_points: bool = True, **options: Any
) -> tuple[torch.Tensor | None, ...]:
    """The three gradients, that of value in fixed point."""
    needs = True, needs_points
    return backward(inputs, multiprocessors, needs=needs, deterministic=True, **options)


def backward_tiled(inputs: Inputs, **options: Any) -> torch.Tensor:
    """The gradient of value by output-stationary tiles."""
    forced = {"deterministic": True, "max_points_tiled": 2**31}
    grad_value = backward(inputs, needs=(True, False), **forced, **options)[0]
    assert grad_value is not None
    return grad_value


def backward_binned(inputs: Inputs, grids: Grids = None, **options: Any) -> torch.Tensor:
    """The gradient of value by binned points, on the levels as grids or, if those are not the queries', on one row."""
    lq = inputs.locations.shape[1]
    if grids is None and lq != inputs.value.shape[1]:
        grids = ((1, lq),)
    # No device is too large for the persistent kernels if it has no multiprocessors.
    grad_value = backward(inputs, 0, needs=(True, False), grids=grids, **options)[0]
    assert grad_value is not None
    return grad_value


def _arrays(inputs: Inputs, tables: Sequence[torch.Tensor | None], rules: Rules) -> dict[str, Any]:
    """What both directions read, by the names of the plans."""
    return {
        "grad_output": inputs.grad_output,
        "value": inputs.value,
        "locations": inputs.locations,
        "weights": inputs.weights,
        "sizes": tables[0],
        "starts": tables[1],
        "mask": rules.get("value_mask"),
    }
