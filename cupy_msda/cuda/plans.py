# SPDX-License-Identifier: Apache-2.0
"""What a call launches: problem, level table, device and request to a tuple of launches, in order.

This is the only place that decides it. The contract has checked the problem; `table` holds what the host knows.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cupy_msda.cuda.compile import Kernel
from cupy_msda.problem import MAX_GRIDS, MAX_HOST_LEVELS, NO_TABLE, Grids, LevelTable, Problem

BLOCK = 256
PERSISTENT_BLOCK = 1024
WARP = 32
MAX_GRID_YZ = 65535
MAX_LEVELS_SPECIALISED = 16
DERIVED_START = -1  # as in levels.cuh

_CPP = {"float16": "half_t", "bfloat16": "bfloat16_t", "float32": "float", "float64": "double"}
_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Enough warps for each multiprocessor to hide the latency of the gathers (not measured on a GPU).
_WARPS_PER_MULTIPROCESSOR = 16
_BLOCKS_PER_MULTIPROCESSOR = 8  # all that fit, for kernels that only pass over memory
# backward_value_tiled.cu: points of one (image, head, level), which at worst one block adds alone.
MAX_POINTS_TILED = 8192
_TILE_ELEMENTS = 4096  # their accumulators take 16 KiB of shared memory
# backward_value_binned.cu: counters of a block's points by level and bin, and the points of its 256 queries.
_MAX_LEVELS_BINNED = 8
_MAX_POINTS_BINNED = 32

NO_GRIDS: Grids = ()

# Every array that a launch may name. `accumulator` is workspace: the others are the caller's.
ARRAYS = (
    *("grad_output", "value", "locations", "weights", "sizes", "starts"),
    *("output", "grad_value", "grad_locations", "grad_weights", "accumulator"),
)

logger = logging.getLogger(__name__)


class Device(NamedTuple):
    """What a plan depends on of a device."""

    multiprocessors: int
    compute_capability: str
    warp_size: int = WARP


class Launch(NamedTuple):
    """One kernel launch: its grid and block, the names of its arrays (None: a null pointer), its by-value argument."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    arguments: tuple[str | None, ...]
    params: np.ndarray


class Fill(NamedTuple):
    """Fill an array of so many bytes with zeros."""

    array: str
    num_bytes: int


class Plan(NamedTuple):
    """The launches of one call, the bytes of `accumulator` that they need, and why these were chosen."""

    launches: tuple[Launch | Fill, ...]
    workspace: int
    reason: str


@lru_cache(maxsize=1024)
def plan_forward(problem: Problem, table: LevelTable, device: Device, grids: Grids = None) -> Plan:
    """Plan a forward, which writes `output`."""
    if problem.is_empty:
        return _empty(problem, "forward", {"output": problem.value_dtype})
    launch, reason = _forward(problem, table, device, grids)
    return _explained(problem, "forward", (launch,), 0, reason)


@lru_cache(maxsize=1024)
def plan_backward(
    problem: Problem,
    table: LevelTable,
    device: Device,
    grids: Grids = None,
    *,
    needs_value: bool = True,
    needs_points: bool = True,
    deterministic: bool = False,
) -> Plan:
    """Plan a backward, which writes `grad_value` or `grad_locations` and `grad_weights`, or all of them."""
    written: dict[str, str] = {}
    if needs_value:
        written["grad_value"] = problem.value_dtype
    if needs_points:
        written["grad_locations"] = problem.location_dtype
        written["grad_weights"] = problem.weight_dtype
    if problem.is_empty or not written:
        return _empty(problem, "backward", written)
    if not needs_value:
        launch, reason = _backward(problem, table, device, grids)
        return _explained(problem, "backward", (launch,), 0, reason)
    return _backward_of_value(problem, table, device, grids, needs_points, deterministic)


def _empty(problem: Problem, way: str, written: dict[str, str]) -> Plan:
    """No point contributes anything: zeros, where there are elements."""
    elements = {
        "output": problem.output_elements,
        "grad_value": problem.value_elements,
        "grad_locations": 2 * problem.point_elements,
        "grad_weights": problem.point_elements,
    }
    fills = tuple(
        Fill(name, elements[name] * _SIZE[dtype])
        for name, dtype in written.items()
        if elements[name]
    )
    return _explained(problem, way, fills, 0, "no point contributes: zeros")


def _explained(
    problem: Problem, way: str, launches: tuple[Launch | Fill, ...], workspace: int, reason: str
) -> Plan:
    """The plan; the log tells it once, since plans are cached."""
    names = [
        step.kernel.name if isinstance(step, Launch) else f"fill {step.array}" for step in launches
    ]
    logger.debug("%s of %s: %s (%s)", way, problem, "; ".join(names) or "nothing", reason)
    return Plan(launches, workspace, reason)


# --- the forward ---------------------------------------------------------------------------------


def _forward(
    problem: Problem, table: LevelTable, device: Device, grids: Grids
) -> tuple[Launch, str]:
    """The forward kernel."""
    arguments = ("value", "locations", "weights", "output")
    vector = 16 // _SIZE[problem.value_dtype]
    if not _is_specialised(problem, vector):
        launch = _generic(problem, table, "msda_forward_generic", arguments)
        return launch, "generic: " + _limits(problem, vector)
    group = problem.head_dim // vector
    if _is_persistent(problem, group, device, grids):
        launch = _persistent(
            problem, table, device, grids, "forward.cu", "msda_forward_persistent", arguments
        )
        return launch, "persistent: enough queries, on known grids, for every multiprocessor"
    split_k = _split_k(problem, group, WARP // group, device)
    template = (*_shape_arguments(problem), split_k)
    launch = _rows(
        problem, table, "forward.cu", "msda_forward", template, group * split_k, arguments
    )
    return launch, f"plain: split-K {split_k}"


# --- the backward --------------------------------------------------------------------------------


def _backward_of_value(
    problem: Problem,
    table: LevelTable,
    device: Device,
    grids: Grids,
    needs_points: bool,
    deterministic: bool,
) -> Plan:
    """A backward that writes `grad_value`, by a kernel of its own or by that of all three gradients."""
    if deterministic and is_tiled(problem):
        steps: list[Launch | Fill] = [_tiled(problem, table)]
        reasons, workspace = ["tiled: deterministic, few points"], 0
        if needs_points:
            launch, reason = _backward(problem, table, device, grids)
            steps.append(launch)
            reasons.append(reason)
        return _explained(problem, "backward", tuple(steps), workspace, "; ".join(reasons))
    target, workspace = _accumulator(problem, deterministic)
    num_bytes = workspace or problem.value_elements * _SIZE[problem.value_dtype]
    steps = [Fill(target, num_bytes)]
    if deterministic:
        steps.append(_fixed_point_scale(problem, table, device))
    if _is_binned(problem, device, grids):
        steps.append(_binned(problem, table, grids, deterministic, target))
        reasons = ["binned: enough queries on known grids"]
        if needs_points:
            launch, reason = _backward(problem, table, device, grids)
            steps.append(launch)
            reasons.append(reason)
    else:
        launch, reason = _backward(
            problem, table, device, grids, target, needs_points, deterministic
        )
        steps.append(launch)
        reasons = [reason]
    if deterministic:
        steps.append(_fixed_point_finish(problem, device))
        reasons.append("fixed point: deterministic")
    elif workspace:
        steps.append(_round(problem, device))
    return _explained(problem, "backward", tuple(steps), workspace, "; ".join(reasons))


def _accumulator(problem: Problem, deterministic: bool) -> tuple[str, int]:
    """The array that gradients of value are added to, and the bytes of workspace that it takes."""
    if deterministic:
        return "accumulator", 8 * num_fixed_point(problem)
    if _SIZE[problem.value_dtype] == 2:
        return "accumulator", 4 * problem.value_elements
    return "grad_value", 0


def _backward(
    problem: Problem,
    table: LevelTable,
    device: Device,
    grids: Grids,
    target: str | None = None,
    needs_points: bool = True,
    deterministic: bool = False,
) -> tuple[Launch, str]:
    """The kernel of the gradients of points, of value (added to `target`, if that is not None), or of all three.

    `deterministic`: gradients of value are added in fixed point, before `_fixed_point_finish`.
    """
    of_points = ("grad_locations", "grad_weights") if needs_points else (None, None)
    arguments = ("grad_output", "value", "locations", "weights", target, *of_points)
    if not _is_specialised(problem, 4):
        fixed = (_cpp_bool(deterministic),)
        launch = _generic(problem, table, "msda_backward_generic", arguments, fixed)
        return launch, "generic: " + _limits(problem, 4)
    group = problem.head_dim // 4
    # One row per warp exceeds the persistent kernel's 64-register limit.
    if target is None and group < WARP and _is_persistent(problem, group, device, grids):
        launch = _persistent(
            problem, table, device, grids, "backward.cu", "msda_backward_persistent", arguments
        )
        return launch, "persistent: enough queries, on known grids, for every multiprocessor"
    points = problem.num_levels * problem.num_points
    # A group finishes as many points at once as it has lanes: smaller parts would leave lanes idle.
    split_k = _split_k(problem, group, min(WARP // group, max(1, points // group)), device)
    flags = map(_cpp_bool, (target is not None, needs_points, deterministic))
    template = (*_shape_arguments(problem), split_k, *flags)
    launch = _rows(
        problem, table, "backward.cu", "msda_backward", template, group * split_k, arguments
    )
    return launch, f"plain: split-K {split_k}"


def _binned(
    problem: Problem, table: LevelTable, grids: Grids, deterministic: bool, target: str
) -> Launch:
    """The gradient of value by counting sort and segmented reduction."""
    template = (*_shape_arguments(problem), _cpp_bool(deterministic))
    kernel = _kernel(problem, "backward_value_binned.cu", "msda_backward_value_binned", template)
    grid = _grid(problem, -(-problem.num_queries // BLOCK))
    arguments = ("grad_output", "locations", "weights", target, "sizes", "starts")
    params = _params(problem, table, grids=grids, has_grids=True)
    return Launch(kernel, grid, (BLOCK, 1, 1), _with_table(arguments, table), params)


def _tiled(problem: Problem, table: LevelTable) -> Launch:
    """The deterministic gradient of value by output-stationary tiles."""
    template = (*_shape_arguments(problem), _TILE_ELEMENTS // problem.head_dim)
    kernel = _kernel(problem, "backward_value_tiled.cu", "msda_backward_value_tiled", template)
    arguments = ("grad_output", "locations", "weights", "grad_value", "sizes", "starts")
    params = _params(problem, table)
    grid = (_num_tiles(problem), 1, 1)
    return Launch(kernel, grid, (BLOCK, 1, 1), _with_table(arguments, table), params)


def _fixed_point_scale(problem: Problem, table: LevelTable, device: Device) -> Launch:
    """Find the fixed-point unit of each (image, head)."""
    kernel = Kernel("fixed_point.cu", f"msda_fixed_point_scale<{_types(problem)}>")
    grid = _filling_grid(problem, problem.num_queries, device)
    arguments = ("grad_output", "locations", "weights", "accumulator", "sizes", "starts")
    params = _params(problem, table, MAX_HOST_LEVELS)
    return Launch(kernel, grid, (BLOCK, 1, 1), _with_table(arguments, table), params)


def _fixed_point_finish(problem: Problem, device: Device) -> Launch:
    """Turn the fixed-point accumulators into the gradient of value."""
    kernel = Kernel("fixed_point.cu", f"msda_fixed_point_finish<{_CPP[problem.value_dtype]}>")
    grid = _filling_grid(problem, problem.spatial_size, device)
    params = _params(problem, NO_TABLE, 0)
    return Launch(kernel, grid, (BLOCK, 1, 1), ("accumulator", "grad_value"), params)


def _round(problem: Problem, device: Device) -> Launch:
    """Round the float32 accumulators to a 16-bit gradient of value."""
    kernel = Kernel("round.cu", f"msda_round<{_CPP[problem.value_dtype]}>")
    most = -(-problem.value_elements // (8 * BLOCK))
    blocks = max(1, min(most, device.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR))
    params = _params(problem, NO_TABLE, 0)
    return Launch(kernel, (blocks, 1, 1), (BLOCK, 1, 1), ("accumulator", "grad_value"), params)


def num_fixed_point(problem: Problem) -> int:
    """64-bit words of the fixed-point accumulators, as in fixed_point.cuh."""
    limbs = 2 if problem.value_dtype == "float64" else 1
    return limbs * problem.value_elements + problem.batch * problem.num_heads


# --- what a kernel takes -------------------------------------------------------------------------


def _is_specialised(problem: Problem, vector: int) -> bool:
    """Whether the specialised kernels cover the problem (their headers say what they need)."""
    return not _limits(problem, vector)


def _limits(problem: Problem, vector: int) -> str:
    """Why the specialised kernels, with `vector` channels to a lane, do not cover the problem; empty if they do."""
    group, rest = divmod(problem.head_dim, vector)
    pixel_bytes = problem.num_heads * problem.head_dim * _SIZE[problem.value_dtype]
    if problem.value_dtype == "float64":
        return "float64"
    if rest or problem.head_dim % 8 or group > WARP or group & (group - 1):
        return f"D = {problem.head_dim}"
    if problem.num_levels > MAX_LEVELS_SPECIALISED:
        return f"L = {problem.num_levels}"
    if problem.spatial_size >= 2**22 or problem.spatial_size * pixel_bytes >= 2**31:
        return f"S = {problem.spatial_size}"
    return ""


def _is_persistent(problem: Problem, group: int, device: Device, grids: Grids) -> bool:
    """True if the persistent, tiled kernel should run, with `group` lanes to a row.

    With the levels as grids: if a block on every multiprocessor is full. On given grids: unless the rows are so few
    that split-K would run instead, which adds the points of a row up in another order.
    """
    n, s, m, lq = problem.batch, problem.spatial_size, problem.num_heads, problem.num_queries
    if grids == NO_GRIDS or (grids is None and lq != s):
        return False
    lanes = PERSISTENT_BLOCK if grids is None else _WARPS_PER_MULTIPROCESSOR * WARP
    return n * lq * m * group >= device.multiprocessors * lanes and n * m * max(lq, s) < 2**31


def _is_binned(problem: Problem, device: Device, grids: Grids) -> bool:
    """Whether gradients of value come from backward_value_binned.cu."""
    return (
        _is_specialised(problem, 4)
        and problem.num_levels <= _MAX_LEVELS_BINNED
        and problem.num_levels * problem.num_points <= _MAX_POINTS_BINNED
        and _is_persistent(problem, problem.head_dim // 4, device, grids)
    )


def is_tiled(problem: Problem) -> bool:
    """Whether deterministic gradients of value come from backward_value_tiled.cu."""
    few = problem.num_queries * problem.num_points <= MAX_POINTS_TILED
    return few and _is_specialised(problem, 4) and _num_tiles(problem) < 2**31


def _num_tiles(problem: Problem) -> int:
    """Tiles of all images and heads."""
    positions = _TILE_ELEMENTS // problem.head_dim
    return problem.batch * problem.num_heads * -(-problem.spatial_size // positions)


def _split_k(problem: Problem, group: int, most: int, device: Device) -> int:
    """Into how many equal parts to split the points of a row so that the launch fills the device."""
    rows = problem.batch * problem.num_queries * problem.num_heads
    points = problem.num_levels * problem.num_points
    lanes = device.multiprocessors * _WARPS_PER_MULTIPROCESSOR * WARP
    split_k = 1
    while rows * split_k * group < lanes and split_k * 2 <= most and points % (split_k * 2) == 0:
        split_k *= 2
    return split_k


# --- how a launch is put together ----------------------------------------------------------------


def _generic(
    problem: Problem,
    table: LevelTable,
    name: str,
    arguments: tuple[str | None, ...],
    template: tuple[object, ...] = (),
) -> Launch:
    """One warp for each row, with everything about the shape at run time."""
    kernel = _kernel(problem, "generic.cu", name, template)
    grid = _grid(problem, -(-problem.num_queries // (BLOCK // WARP)))
    params = _params(problem, table, MAX_HOST_LEVELS)
    arguments = _with_table((*arguments, "sizes", "starts"), table)
    return Launch(kernel, grid, (BLOCK, 1, 1), arguments, params)


def _rows(
    problem: Problem,
    table: LevelTable,
    file: str,
    name: str,
    template: tuple[object, ...],
    lanes: int,
    arguments: tuple[str | None, ...],
) -> Launch:
    """So many lanes for each row; x covers the queries."""
    grid = _grid(problem, -(-problem.num_queries // (BLOCK // lanes)))
    arguments = _with_table((*arguments, "sizes", "starts"), table)
    kernel = _kernel(problem, file, name, template)
    return Launch(kernel, grid, (BLOCK, 1, 1), arguments, _params(problem, table))


def _persistent(
    problem: Problem,
    table: LevelTable,
    device: Device,
    grids: Grids,
    file: str,
    name: str,
    arguments: tuple[str | None, ...],
) -> Launch:
    """One persistent block for each multiprocessor."""
    kernel = _kernel(problem, file, name, _shape_arguments(problem))
    params = _params(problem, table, grids=grids, has_grids=True)
    arguments = _with_table((*arguments, "sizes", "starts"), table)
    return Launch(
        kernel, (device.multiprocessors, 1, 1), (PERSISTENT_BLOCK, 1, 1), arguments, params
    )


def _with_table(arguments: tuple[str | None, ...], table: LevelTable) -> tuple[str | None, ...]:
    """The arguments with a null pointer for what the host knows of the level table."""
    known = {"sizes": table.sizes is not None, "starts": table.starts is not None}
    return tuple(None if name is None or known.get(name) else name for name in arguments)


def _kernel(problem: Problem, file: str, name: str, template: tuple[object, ...]) -> Kernel:
    """The instantiation for the dtypes of the problem and these further template arguments."""
    return Kernel(file, f"{name}<{', '.join([_types(problem), *map(str, template)])}>")


def _shape_arguments(problem: Problem) -> tuple[int, ...]:
    """The shape among the template arguments: M, D, L, P."""
    return problem.num_heads, problem.head_dim, problem.num_levels, problem.num_points


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


def _filling_grid(problem: Problem, rows: int, device: Device) -> tuple[int, int, int]:
    """A grid of as many warps as the device holds, or as there are rows of every (image, head)."""
    wanted = device.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR
    blocks = max(1, -(-wanted // (problem.batch * problem.num_heads)))
    return _grid(problem, min(blocks, -(-rows // (BLOCK // WARP))))


def _params(
    problem: Problem,
    table: LevelTable,
    room: int | None = None,
    *,
    grids: Grids = None,
    has_grids: bool = False,
) -> np.ndarray:
    """The by-value argument; levels that only a device knows stay zero, with their starts derived."""
    room = problem.num_levels if room is None else room
    scalars = [(name, "i4") for name in Problem._fields[:7]]
    of_grids = [("num_grids", "i4"), ("grids", "i4", (MAX_GRIDS, 2))] if has_grids else []
    params = np.zeros((), [*scalars, ("levels", "i4", (room, 3)), *of_grids])
    if has_grids and grids is not None:  # no grids: the kernel takes the levels
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
