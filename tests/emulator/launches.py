# SPDX-License-Identifier: Apache-2.0
"""Run the planned launches of the operator on the emulator, on torch CPU tensors of any dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cupy_msda.contract import check
from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
from cupy_msda.problem import Grids, LevelTable, Problem
from tests.emulator.emulator import Emulated
from tests.problems import Inputs


def checked(inputs: Inputs) -> tuple[Problem, LevelTable]:
    """The problem and its level table, through the contract."""
    return check(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)


def memory(tensor: torch.Tensor | None) -> np.ndarray[Any, Any] | None:
    """The tensor's memory as a NumPy array; 16-bit floats as their bits."""
    if tensor is None:
        return None
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


def poisoned(like: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A tensor of NaN, so that an element that is not written shows."""
    return torch.full(tuple(shape or like.shape), torch.nan, dtype=like.dtype)


def emulate(
    plan: plans.Plan,
    tensors: Sequence[torch.Tensor | None],
    tables: Sequence[torch.Tensor | None] = (None, None),
    *,
    source: str | None = None,
    seed: int = 0,
    sanitize: bool = False,
) -> None:
    """Run one planned launch as launch.py would, on host memory."""
    kernel = Emulated(source or assemble(plan.kernel.file), plan.kernel.name, sanitize=sanitize)
    arrays = [memory(tensor) for tensor in (*tensors, *tables)]
    kernel(plan.grid, plan.block, [*arrays, plan.params], seed=seed)


def forward(
    inputs: Inputs,
    multiprocessors: int = 1,
    table: LevelTable | None = None,
    grids: Grids = None,
    **options: Any,
) -> torch.Tensor:
    """The output of the emulated forward; with grids, in their order."""
    problem, known = checked(inputs)
    plan = plans.plan_forward(problem, table or known, multiprocessors, grids)
    output = poisoned(inputs.value, problem.output_shape)
    emulate(plan, (*inputs.tensors, output), **options)
    return output


def backward(
    inputs: Inputs,
    multiprocessors: int = 1,
    table: LevelTable | None = None,
    needs: tuple[bool, bool] = (True, True),
    grids: Grids = None,
    **options: Any,
) -> tuple[torch.Tensor | None, ...]:
    """The three gradients of the emulated backward, None where not needed; with grids, in their order."""
    problem, known = checked(inputs)
    case = problem, table or known, multiprocessors
    plan = plans.plan_backward(*case, *needs, grids=grids)
    wide = torch.promote_types(inputs.value.dtype, torch.float32)  # as the kernels accumulate
    grad_value = torch.zeros(inputs.value.shape, dtype=wide) if needs[0] else None
    of_points = [poisoned(t) if needs[1] else None for t in (inputs.locations, inputs.weights)]
    emulate(plan, (inputs.grad_output, *inputs.tensors, grad_value, *of_points), **options)
    if grad_value is not None:
        grad_value = grad_value.to(inputs.value.dtype)
    return (grad_value, *of_points)


def backward_fixed(
    inputs: Inputs,
    multiprocessors: int = 1,
    table: LevelTable | None = None,
    needs_points: bool = True,
    tables: Sequence[torch.Tensor | None] = (None, None),
    **options: Any,
) -> tuple[torch.Tensor | None, ...]:
    """The three gradients of the emulated backward whose sums are in fixed point."""
    problem, known = checked(inputs)
    case = problem, table or known, multiprocessors
    sums = torch.zeros(plans.num_fixed_sums(problem), dtype=torch.int64)
    grad_value = poisoned(inputs.value)
    of_points = [poisoned(t) if needs_points else None for t in (inputs.locations, inputs.weights)]
    points = (inputs.locations, inputs.weights)
    emulate(plans.plan_scale(*case), (inputs.grad_output, *points, sums), tables, **options)
    plan = plans.plan_backward(*case, True, needs_points, True)
    emulate(plan, (inputs.grad_output, *inputs.tensors, sums, *of_points), tables, **options)
    emulate(plans.plan_finish(problem, multiprocessors), (sums, grad_value), (), **options)
    return (grad_value, *of_points)


def backward_owner(
    inputs: Inputs,
    table: LevelTable | None = None,
    tables: Sequence[torch.Tensor | None] = (None, None),
    **options: Any,
) -> torch.Tensor:
    """The gradient of value of the emulated kernel whose blocks own tiles of it."""
    problem, known = checked(inputs)
    grad_value = poisoned(inputs.value)
    tensors = (inputs.grad_output, inputs.locations, inputs.weights, grad_value)
    emulate(plans.plan_owner(problem, table or known), tensors, tables, **options)
    return grad_value


def backward_sorted(
    inputs: Inputs, table: LevelTable | None = None, grids: Grids = (), **options: Any
) -> torch.Tensor:
    """The gradient of value of the emulated kernel that sorts points by cell."""
    problem, known = checked(inputs)
    wide = torch.zeros(inputs.value.shape, dtype=torch.float32)
    tensors = (inputs.grad_output, inputs.locations, inputs.weights, wide)
    emulate(plans.plan_sorted(problem, table or known, grids), tensors, **options)
    return wide.to(inputs.value.dtype)


def backward_sorted_fixed(
    inputs: Inputs,
    table: LevelTable | None = None,
    tables: Sequence[torch.Tensor | None] = (None, None),
    source: str | None = None,
    **options: Any,
) -> torch.Tensor:
    """The same with sums in fixed point; `source` of the kernel itself."""
    problem, known = checked(inputs)
    known = table or known
    sums = torch.zeros(plans.num_fixed_sums(problem), dtype=torch.int64)
    grad_value = poisoned(inputs.value)
    tensors = (inputs.grad_output, inputs.locations, inputs.weights, sums)
    emulate(plans.plan_scale(problem, known), tensors, tables, **options)
    plan = plans.plan_sorted(problem, known, (), True)
    emulate(plan, tensors, tables, source=source, **options)
    emulate(plans.plan_finish(problem), (sums, grad_value), (), **options)
    return grad_value
