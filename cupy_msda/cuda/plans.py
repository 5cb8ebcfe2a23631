# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a problem, on what grid and with what by-value argument. The contract has checked the problem."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cupy_msda.cuda.compile import (
    BLOCK,
    DERIVED_START,
    MAX_BINNED_LEVELS,
    MAX_BINNED_POINTS,
    MAX_SPECIALISED_LEVELS,
    PERSISTENT_BLOCK,
    WARP,
    Kernel,
)
from cupy_msda.problem import MAX_GRIDS, MAX_HOST_LEVELS, Grids, LevelTable, Problem

MAX_GRID_YZ = 65535

_CPP = {"float16": "half_t", "bfloat16": "bfloat16_t", "float32": "float", "float64": "double"}
_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Enough warps for each multiprocessor to hide the latency of the gathers (not measured on a GPU).
_WARPS_PER_MULTIPROCESSOR = 16
_BLOCKS_PER_MULTIPROCESSOR = 8  # all that fit, for kernels that only pass over memory
# backward_value_tiled.cu: points of one (image, head, level), which at worst one block adds alone (kernels/README.md).
_MOST_POINTS_OWNED = 8192
_TILE_ELEMENTS = 4096  # their sums take 16 KiB of shared memory
NO_TABLE = LevelTable(None, None)


class Plan(NamedTuple):
    """One launch: the kernel, its grid and block, and its by-value argument."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    params: np.ndarray


@lru_cache(maxsize=1024)
def plan_forward(
    problem: Problem, table: LevelTable, multiprocessors: int = 1, grids: Grids = None
) -> Plan:
    """Choose the forward kernel; `table` holds host facts only."""
    vector = 16 // _SIZE[problem.value_dtype]
    if not _specialised(problem, vector):
        return _generic_plan(problem, table, "msda_forward_generic")
    group = problem.head_dim // vector
    if _ordered(problem, group, multiprocessors, grids):
        return _ordered_plan(
            problem, table, multiprocessors, grids, "forward.cu", "msda_forward_persistent"
        )
    split = _split(problem, group, WARP // group, multiprocessors)
    arguments = (*_shape_arguments(problem), split)
    queries = BLOCK // (group * split)
    return _plan(problem, "forward.cu", "msda_forward", arguments, queries, _params(problem, table))


@lru_cache(maxsize=1024)
def plan_backward(
    problem: Problem,
    table: LevelTable,
    multiprocessors: int = 1,
    needs_value: bool = True,
    needs_points: bool = True,
    fixed: bool = False,
    grids: Grids = None,
) -> Plan:
    """Choose the backward kernel for the gradients that are needed; `table` holds host facts only.

    `fixed`: gradients of value are summed in fixed point, between `plan_scale` and `plan_finish`.
    """
    if not _specialised(problem, 4):
        return _generic_plan(problem, table, "msda_backward_generic", (_cpp_bool(fixed),))
    group = problem.head_dim // 4
    # A row to a whole warp needs more than the 64 registers that a persistent block leaves a thread.
    persistent = needs_points and not needs_value and group < WARP
    if persistent and _ordered(problem, group, multiprocessors, grids):
        return _ordered_plan(
            problem, table, multiprocessors, grids, "backward.cu", "msda_backward_persistent"
        )
    points = problem.num_levels * problem.num_points
    # A group finishes as many points at once as it has lanes, so smaller parts would leave lanes idle.
    split = _split(problem, group, min(WARP // group, max(1, points // group)), multiprocessors)
    flags = map(_cpp_bool, (needs_value, needs_points, fixed))
    arguments = (*_shape_arguments(problem), split, *flags)
    queries = BLOCK // (group * split)
    params = _params(problem, table)
    return _plan(problem, "backward.cu", "msda_backward", arguments, queries, params)


@lru_cache(maxsize=1024)
def plan_sorted(
    problem: Problem, table: LevelTable, grids: Grids = (), fixed: bool = False
) -> Plan:
    """The gradient of value by sums over the points of a cell; `table` holds host facts only.

    `fixed`: those sums are added in fixed point, between `plan_scale` and `plan_finish`.
    """
    arguments = (*_shape_arguments(problem), _cpp_bool(fixed))
    template = ", ".join([_types(problem), *map(str, arguments)])
    kernel = Kernel("backward_value_binned.cu", f"msda_backward_value_binned<{template}>")
    grid = _grid(problem, -(-problem.num_queries // BLOCK))
    return Plan(kernel, grid, (BLOCK, 1, 1), _params(problem, table, grids=grids))


def _ordered(problem: Problem, group: int, multiprocessors: int, grids: Grids) -> bool:
    """True if the persistent, tiled kernel should run, with `group` lanes to a row.

    With the levels as grids: if a block on every multiprocessor is full. On given grids: unless the rows are so few
    that split-K would run instead, which adds the points of a row up in another order.
    """
    n, s, m, lq = problem.batch, problem.spatial_size, problem.num_heads, problem.num_queries
    if grids is None or (not grids and lq != s):
        return False
    least = multiprocessors * (_WARPS_PER_MULTIPROCESSOR * WARP if grids else PERSISTENT_BLOCK)
    return n * lq * m * group >= least and n * m * max(lq, s) < 2**31


def _sorted(problem: Problem, multiprocessors: int, grids: Grids) -> bool:
    """Whether gradients of value come from backward_value_binned.cu."""
    return (
        _specialised(problem, 4)
        and problem.num_levels <= MAX_BINNED_LEVELS
        and problem.num_levels * problem.num_points <= MAX_BINNED_POINTS
        and _ordered(problem, problem.head_dim // 4, multiprocessors, grids)
    )


@lru_cache(maxsize=1024)
def plan_scale(problem: Problem, table: LevelTable, multiprocessors: int = 1) -> Plan:
    """What finds the quantum of the sums in fixed point; `table` holds host facts only."""
    name = f"msda_fixed_point_scale<{_types(problem)}>"
    grid = _filling_grid(problem, problem.num_queries, multiprocessors)
    params = _params(problem, table, MAX_HOST_LEVELS)
    return Plan(Kernel("fixed_point.cu", name), grid, (BLOCK, 1, 1), params)


@lru_cache(maxsize=1024)
def plan_finish(problem: Problem, multiprocessors: int = 1) -> Plan:
    """What turns the sums in fixed point into the gradient of value."""
    name = f"msda_fixed_point_finish<{_CPP[problem.value_dtype]}>"
    grid = _filling_grid(problem, problem.spatial_size, multiprocessors)
    return Plan(Kernel("fixed_point.cu", name), grid, (BLOCK, 1, 1), _params(problem, NO_TABLE, 0))


@lru_cache(maxsize=1024)
def plan_owner(problem: Problem, table: LevelTable) -> Plan:
    """The reproducible gradient of value without sums in memory; `table` holds host facts only."""
    arguments = (*_shape_arguments(problem), _TILE_ELEMENTS // problem.head_dim)
    template = ", ".join([_types(problem), *map(str, arguments)])
    kernel = Kernel("backward_value_tiled.cu", f"msda_backward_value_tiled<{template}>")
    return Plan(kernel, (_tiles(problem), 1, 1), (BLOCK, 1, 1), _params(problem, table))


def plan_value(
    problem: Problem, table: LevelTable, multiprocessors: int, reproducible: bool, grids: Grids
) -> Plan | None:
    """The kernel that computes the gradient of value alone, where that is better than all three at once."""
    if reproducible and is_owned(problem):
        return plan_owner(problem, table)
    if _sorted(problem, multiprocessors, grids):
        return plan_sorted(problem, table, grids, reproducible)
    return None


def is_owned(problem: Problem) -> bool:
    """Whether reproducible gradients of value come from backward_value_tiled.cu."""
    few = problem.num_queries * problem.num_points <= _MOST_POINTS_OWNED
    return few and _specialised(problem, 4) and _tiles(problem) < 2**31


def _tiles(problem: Problem) -> int:
    """How many tiles, of all images and heads, backward_value_tiled.cu has to fill."""
    positions = _TILE_ELEMENTS // problem.head_dim
    return problem.batch * problem.num_heads * -(-problem.spatial_size // positions)


def num_sums(problem: Problem) -> int:
    """Size of the zeroed int64 array that `backward` takes; 0 where backward_value_tiled.cu does without."""
    return 0 if is_owned(problem) else num_fixed_sums(problem)


def num_fixed_sums(problem: Problem) -> int:
    """Size of the array for sums in fixed point, as in fixed_point.cuh."""
    limbs = 2 if problem.value_dtype == "float64" else 1
    image_heads = problem.batch * problem.num_heads
    return image_heads * (limbs * problem.spatial_size * problem.head_dim + 1)


def _specialised(problem: Problem, vector: int) -> bool:
    """Whether forward.cu and backward.cu cover the problem (their headers say what they need)."""
    group, rest = divmod(problem.head_dim, vector)
    pixel_bytes = problem.num_heads * problem.head_dim * _SIZE[problem.value_dtype]
    return (
        problem.value_dtype != "float64"
        and rest == 0
        and problem.head_dim % 8 == 0
        and group <= WARP
        and group & (group - 1) == 0
        and problem.num_levels <= MAX_SPECIALISED_LEVELS
        and problem.spatial_size < 2**22
        and problem.spatial_size * pixel_bytes < 2**31
    )


def _shape_arguments(problem: Problem) -> tuple[int, ...]:
    """The shape among the template arguments: M, D, L, P."""
    return problem.num_heads, problem.head_dim, problem.num_levels, problem.num_points


def _split(problem: Problem, group: int, most: int, multiprocessors: int) -> int:
    """Into how many equal parts to split the points of a row so that the launch fills the device."""
    rows = problem.batch * problem.num_queries * problem.num_heads
    points = problem.num_levels * problem.num_points
    wanted = multiprocessors * _WARPS_PER_MULTIPROCESSOR
    split = 1
    while rows * split * group < wanted * WARP and split * 2 <= most and points % (split * 2) == 0:
        split *= 2
    return split


def _generic_plan(
    problem: Problem, table: LevelTable, name: str, arguments: tuple[object, ...] = ()
) -> Plan:
    """One warp for each row."""
    params = _params(problem, table, MAX_HOST_LEVELS)
    return _plan(problem, "generic.cu", name, arguments, BLOCK // WARP, params)


def _ordered_plan(
    problem: Problem, table: LevelTable, multiprocessors: int, grids: Grids, file: str, name: str
) -> Plan:
    """One persistent block for each multiprocessor."""
    template = ", ".join([_types(problem), *map(str, _shape_arguments(problem))])
    params = _params(problem, table, grids=grids)
    kernel = Kernel(file, f"{name}<{template}>")
    return Plan(kernel, (multiprocessors, 1, 1), (PERSISTENT_BLOCK, 1, 1), params)


def _plan(
    problem: Problem,
    file: str,
    name: str,
    arguments: tuple[object, ...],
    queries_per_block: int,
    params: np.ndarray,
) -> Plan:
    """Put the plan together: x covers the queries."""
    template = ", ".join([_types(problem), *map(str, arguments)])
    grid = _grid(problem, -(-problem.num_queries // queries_per_block))
    return Plan(Kernel(file, f"{name}<{template}>"), grid, (BLOCK, 1, 1), params)


def _types(problem: Problem) -> str:
    """The dtypes among the template arguments: of value, locations and weights."""
    types = (problem.value_dtype, problem.location_dtype, problem.weight_dtype)
    return ", ".join(_CPP[name] for name in types)


def _cpp_bool(flag: bool) -> str:
    """A truth value as a template argument."""
    return str(flag).lower()


def _grid(problem: Problem, x: int) -> tuple[int, int, int]:
    """A grid of so many blocks for each (image, head), which y and z cover."""
    image_heads = problem.batch * problem.num_heads
    z = -(-image_heads // MAX_GRID_YZ)
    return x, -(-image_heads // z), z


def _filling_grid(problem: Problem, rows: int, multiprocessors: int) -> tuple[int, int, int]:
    """A grid of as many warps as the device holds, or as there are rows of every (image, head)."""
    wanted = multiprocessors * _BLOCKS_PER_MULTIPROCESSOR
    blocks = max(1, -(-wanted // (problem.batch * problem.num_heads)))
    return _grid(problem, min(blocks, -(-rows // (BLOCK // WARP))))


def _params(
    problem: Problem, table: LevelTable, room: int | None = None, grids: Grids = None
) -> np.ndarray:
    """The by-value argument; levels that only a device knows stay zero, with their starts derived."""
    room = problem.num_levels if room is None else room
    scalars = [(name, "i4") for name in Problem._fields[:7]]
    order = [] if grids is None else [("num_grids", "i4"), ("grids", "i4", (MAX_GRIDS, 2))]
    params = np.zeros((), [*scalars, ("levels", "i4", (room, 3)), *order])
    if grids:
        params["num_grids"] = len(grids)
        params["grids"][: len(grids)] = grids
    for name, _ in scalars:
        params[name] = getattr(problem, name)
    levels = params["levels"]
    levels[:, 2] = DERIVED_START
    if table.sizes:
        levels[: problem.num_levels, :2] = table.sizes
    if table.starts is not None:
        levels[: problem.num_levels, 2] = table.starts
    return params
