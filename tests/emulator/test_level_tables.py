# SPDX-License-Identifier: Apache-2.0
"""Level tables that only a device knows, with any numbers in them, against Python's integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
from cupy_msda.problem import MAX_HOST_LEVELS
from tests.emulator.cases import UNKNOWN
from tests.emulator.emulator import Emulated
from tests.emulator.launches import checked, device, poisoned, run
from tests.problems import random_inputs

READ = """
__global__ void read(Level* to, const long long* sizes, const long long* starts, const GenericParams p) {
  for (int i = threadIdx.x; i < p.num_levels; i += WARP) to[i] = read_level(i, sizes, starts, p);
}
"""
NUMBERS = [0, 1, 2, 3, 46341, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1]
NUMBERS += [-1, -2, -(2**31), -(2**32), -(2**63)]
Sizes = Sequence[tuple[int, int]]


def read(
    sizes: Sizes, starts: Sequence[int] | None, spatial_size: int, sanitize: bool = False
) -> list[tuple[int, int, int]]:
    """The levels as a kernel reads them."""
    inputs = random_inputs(((1, 1),), n=1, m=1, d=1, lq=1, p=1)
    problem = checked(inputs)[0]._replace(num_levels=len(sizes), spatial_size=spatial_size)
    levels = np.full((len(sizes), 4), -7, np.int32)
    tables = [None if given is None else np.array(given, np.int64) for given in (sizes, starts)]
    kernel = Emulated(assemble("levels.cuh") + READ, "read", sanitize=sanitize)
    params = plans._generic_params(plans._Case(problem, UNKNOWN, device(1), (), 0.5))
    kernel((1, 1, 1), (32, 1, 1), [levels, *tables, params])
    return [tuple(level) for level in levels[:, :3].tolist()]


def expected(
    sizes: Sizes, starts: Sequence[int] | None, spatial_size: int
) -> list[tuple[int, int, int]]:
    """The same by Python's integers; a level without a place starts at -1. Of negative sizes the amounts count."""
    levels, start = [], 0
    for i, (height, width) in enumerate(sizes):
        at = start if starts is None else starts[i]
        is_size = 0 <= height < 2**31 and 0 <= width < 2**31
        if not is_size or at < 0 or at + height * width > spatial_size:
            levels.append((0, 1, -1))
        elif height * width == 0:
            levels.append((0, 1, 0))
        else:
            levels.append((height, width, at))
        start += abs(height * width)
    return levels


def tables(count: int) -> list[tuple[list[tuple[int, int]], list[int], int]]:
    """Random tables of a few levels, half of whose numbers are unusual, and numbers of positions."""
    rng = np.random.default_rng(0)

    def number() -> int:
        return NUMBERS[rng.integers(len(NUMBERS))] if rng.integers(2) else int(rng.integers(4))

    return [
        (
            [(number(), number()) for _ in range(rng.integers(1, 6))],
            [number() for _ in range(5)],
            [0, 1, 9, 40, 2**31 - 1][rng.integers(5)],
        )
        for _ in range(count)
    ]


def test_any_numbers() -> None:
    fitting = 0
    for sizes, starts, spatial_size in tables(500):
        for given in (None, starts[: len(sizes)]):
            levels = read(sizes, given, spatial_size)
            assert levels == expected(sizes, given, spatial_size), (sizes, given, spatial_size)
            fitting += sum(level[2] > 0 for level in levels)
    assert fitting > 100


def test_any_numbers_under_the_sanitizers() -> None:
    """In one table, by starts; no product may overflow."""
    pairs = [(height, width) for height in NUMBERS for width in NUMBERS]
    starts = [NUMBERS[i % len(NUMBERS)] for i in range(len(pairs))]
    for given in (None, starts):
        assert read(pairs, given, 2**31 - 1, sanitize=True) == expected(pairs, given, 2**31 - 1)


LEVELS = MAX_HOST_LEVELS + 80


@pytest.mark.parametrize("derived", [False, True], ids=["starts", "derived-starts"])
@pytest.mark.parametrize("sanitize", [False, True], ids=["", "sanitized"])
def test_more_levels_than_the_launch_parameters_hold(derived: bool, sanitize: bool) -> None:
    """The host's table may not be read beyond its end."""
    sizes = [(1 + i % 3, 2) for i in range(LEVELS)]
    assert read(sizes, None, 2000, sanitize) == expected(sizes, None, 2000)
    inputs = random_inputs(sizes, n=1, m=1, d=3, lq=2, p=1)
    few = random_inputs(sizes[:2], n=1, m=1, d=3, lq=2, p=1)
    problem = checked(few)[0]._replace(
        spatial_size=inputs.value.shape[1], num_levels=LEVELS, num_points=1
    )
    plan = plans.plan_forward(problem, UNKNOWN, device(1), ())
    output = poisoned(inputs.value, problem.output_shape)
    arrays: dict[str, Any] = inputs._asdict() | {
        "sizes": inputs.shapes(),
        "starts": None if derived else inputs.starts(),
        "output": output,
    }
    run(plan, arrays, sanitize=sanitize)
    same, exact = (
        reference.forward(case.value, case.levels, case.locations, case.weights)
        for case in (inputs, inputs.to(torch.float64))
    )
    assert_within_budget(output, same, exact)
