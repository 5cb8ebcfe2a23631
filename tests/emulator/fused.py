# SPDX-License-Identifier: Apache-2.0
"""Fused calls on the emulator, beside the composition of `cupy_msda.fused` and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.contract import check_fused
from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
from cupy_msda.cuda.plans import Choice
from cupy_msda.fused import FusedPoints, gradients, locations_and_weights
from cupy_msda.problem import Grids, Level, LevelTable, Problem
from tests.emulator import launches
from tests.emulator.cases import F32
from tests.emulator.launches import NO_TABLES, device, poisoned
from tests.emulator.sampling import case

NAMES = "value", "references", "offsets", "logits"
ALL = (True, True, True)


class Fused(NamedTuple):
    """The arguments of a fused call and the gradient of its output; `rules` as the operator takes them by keyword."""

    sizes: Sequence[tuple[int, int]]
    levels: Sequence[Level]
    value: Tensor
    references: Tensor
    offsets: Tensor
    logits: Tensor
    grad_output: Tensor
    rules: dict[str, Any]
    offset_scale: float = 0.5

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The differentiable inputs, as in `NAMES`."""
        return self.value, self.references, self.offsets, self.logits

    @property
    def problem(self) -> tuple[Problem, LevelTable]:
        """The problem and its level table, through the contract."""
        starts = [level.start for level in self.levels]
        keywords = self.rules | {"offset_scale": self.offset_scale}
        return check_fused(self.value, self.sizes, starts, *self.tensors[1:], **keywords)

    def copied(self) -> Fused:
        """A copy whose tensors a test may write into."""
        names = (*NAMES, "grad_output")
        return self._replace(**{name: getattr(self, name).clone() for name in names})


def fused(
    points: Sequence[int],
    coordinates: int = 2,
    *,
    by_level: bool = True,
    images: int = 2,
    dtypes: Sequence[torch.dtype] = (F32,) * 4,
    **options: Any,
) -> Fused:
    """Random inputs whose points lie where those of `sampling.case` do; dtypes as in `NAMES`."""
    given, rules = case(points, dtypes=(dtypes[0], F32), **options)
    generator = torch.Generator().manual_seed(7)
    lq, levels = given.locations.shape[1], len(points)
    shape = images, lq, levels if by_level else 1, coordinates
    references = (0.2 + 0.6 * torch.rand(shape, generator=generator)).to(dtypes[1])
    numbers = [level for level, count in enumerate(points) for _ in range(count)]
    of_points = references.double()[:, :, None].expand(-1, -1, -1, levels, -1)[:, :, :, numbers]
    offsets = given.locations.double() - of_points[..., :2]
    if coordinates == 2:
        offsets *= given.shapes().flip(-1)[numbers]
    else:
        offsets *= torch.tensor(points)[numbers, None] / (0.5 * of_points[..., 2:])
    logits = 2 * torch.randn(given.weights.shape, generator=generator)
    points_of = references, offsets.to(dtypes[2]), logits.to(dtypes[3])
    return Fused(given.sizes, given.levels, given.value, *points_of, given.grad_output, dict(rules))


# --- by the kernels ------------------------------------------------------------------------------


def forward(
    inputs: Fused,
    multiprocessors: int = 1,
    grids: Grids = (),
    choice: Choice | None = None,
    table: LevelTable | None = None,
    tables: Sequence[Tensor | None] = NO_TABLES,
    **options: Any,
) -> Tensor:
    """The output of the emulated forward."""
    problem, known = inputs.problem
    case = problem, table or known, device(multiprocessors), grids, choice, inputs.offset_scale
    output = poisoned(inputs.value, problem.output_shape)
    _run(plans.plan_forward(*case), _arrays(inputs, tables) | {"output": output}, **options)
    return output


def backward(
    inputs: Fused,
    multiprocessors: int = 1,
    grids: Grids = (),
    choice: Choice | None = None,
    needs: tuple[bool, bool, bool] = ALL,
    table: LevelTable | None = None,
    tables: Sequence[Tensor | None] = NO_TABLES,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """The gradients of `NAMES` by the emulated backward; `needs`: of value, points and reference points."""
    problem, known = inputs.problem
    plan = plans.plan_backward(
        *(problem, table or known, device(multiprocessors), grids),
        needs_value=needs[0],
        needs_points=needs[1],
        needs_references=needs[2],
        choice=choice,
        offset_scale=inputs.offset_scale,
    )
    wanted = needs[0], needs[2], needs[1], needs[1]
    results = tuple(
        poisoned(tensor) if need else None
        for tensor, need in zip(inputs.tensors, wanted, strict=True)
    )
    names = "grad_value", "grad_references", "grad_locations", "grad_weights"
    arrays = _arrays(inputs, tables) | dict(zip(names, results, strict=True))
    arrays["by_location"] = poisoned(torch.empty(inputs.offsets.shape)) if needs[2] else None
    _run(plan, arrays, **options)
    return results


def _arrays(inputs: Fused, tables: Sequence[Tensor | None]) -> dict[str, Any]:
    """What both directions read, by the names of the plans."""
    return {
        "grad_output": inputs.grad_output,
        "value": inputs.value,
        "references": inputs.references,
        "locations": inputs.offsets,
        "weights": inputs.logits,
        "sizes": tables[0],
        "starts": tables[1],
        "mask": inputs.rules.get("value_mask"),
    }


def _run(
    plan: plans.Plan, arrays: launches.Arrays, fault: tuple[str, str] | None = None, **options: Any
) -> None:
    """Run a plan; `fault`: text of the sources, and what stands there instead."""
    if fault is None:
        launches.run(plan, arrays, **options)
        return
    right, wrong = fault
    files = {step.kernel.file for step in plan.launches if isinstance(step, plans.Launch)}
    assert any(right in assemble(file) for file in files)
    with patch.object(launches, "assemble", lambda file: assemble(file).replace(right, wrong)):
        launches.run(plan, arrays, **options)


# --- by composition ------------------------------------------------------------------------------


def composed(inputs: Fused, wide: torch.dtype = F32) -> tuple[Tensor, ...]:
    """The output, then the gradients of `NAMES`, in the dtypes of the inputs or, with float64, in that."""
    value, references, offsets, logits = inputs.tensors
    exact = wide is torch.float64
    value, grad_output = (t.to(wide) if exact else t for t in (value, inputs.grad_output))
    widths = torch.tensor(inputs.sizes, dtype=wide).flip(-1)
    rules = dict(inputs.rules)
    points = FusedPoints(
        *(references.to(wide), offsets.to(wide), logits.to(wide), widths),
        rules.get("num_points"),
        inputs.offset_scale,
    )
    plain = value, inputs.levels, *locations_and_weights(points)
    output = reference.forward(*plain, **rules)
    by_value, *by_points = reference.backward(grad_output, *plain, **rules)
    results = output, by_value, *gradients(points, plain[-1], *by_points)
    if exact:
        return results
    dtypes = value.dtype, *(tensor.dtype for tensor in inputs.tensors)
    return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))


def check_forward(inputs: Fused, output: Tensor) -> None:
    """The output must stay within the error budget."""
    assert_within_budget(output, composed(inputs)[0], composed(inputs, torch.float64)[0])


def check_backward(inputs: Fused, results: Sequence[Tensor | None]) -> None:
    """Each gradient that is there must stay within the error budget."""
    same, exact = composed(inputs)[1:], composed(inputs, torch.float64)[1:]
    for name, result, *two in zip(NAMES, results, same, exact, strict=True):
        if result is not None:
            try:
                assert_within_budget(result, *two)
            except AssertionError as error:
                raise AssertionError(f"gradient of {name}: {error}") from error


# Queries are the pixels: persistent and binned kernels run too.
CASES = {
    "points": fused((4, 4, 4), d=32),
    "boxes": fused((4, 4, 4), 4, d=32),
    "one-level": fused((2, 2, 2), by_level=False, dtypes=(torch.float16,) * 4),
    "boxes-of-one-image": fused((4, 4, 4), 4, images=1),
    "uneven": fused((3, 0, 6), images=1, by_level=False),
    "uneven-boxes": fused((3, 6, 3), 4, by_level=False, d=32),
    "fewer-points-than-lanes": fused((2, 1, 2), 4, d=32, dtypes=(torch.bfloat16,) * 4),
    "nearest": fused((4, 4, 4), nearest=True),
    "nearest-boxes": fused((3, 6, 3), 4, nearest=True, masked=True),
    "masked": fused((4, 4, 4), masked=True, dtypes=(torch.float16, F32, F32, torch.float16)),
}
