# SPDX-License-Identifier: Apache-2.0
"""What a call launches: problem, level table, device and request to a tuple of launches, in order.

This is the only place that decides it. The contract has checked the problem; `table` holds what the host knows.
A problem may have several candidates, between which a measurement chooses (tuned.py), else the rules here: the model.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from cupy_msda.cuda.compile import (
    BINNED_QUERIES,
    BLOCK,
    DERIVED_START,
    MAX_BINNED_LEVELS,
    MAX_BINNED_POINTS,
    MAX_SPECIALISED_LEVELS,
    PERSISTENT_BLOCK,
    WARP,
    Kernel,
)
from cupy_msda.problem import (
    MAX_GRIDS,
    MAX_HOST_LEVELS,
    MAX_UNEVEN_LEVELS,
    NO_TABLE,
    Grids,
    LevelTable,
    Problem,
)

MAX_GRID_YZ = 65535

_CPP = {"float16": "half_t", "bfloat16": "bfloat16_t", "float32": "float", "float64": "double"}
_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Enough warps for each multiprocessor to hide the latency of the gathers (not measured on a GPU).
_WARPS_PER_MULTIPROCESSOR = 16
_BLOCKS_PER_MULTIPROCESSOR = 8  # all that fit, for kernels that only pass over memory
# Rows that fill less than one wave of blocks, four to a multiprocessor, are spread evenly by smaller blocks: where
# there are 1.2 blocks on average, some multiprocessor has two.
_BLOCKS_OF_A_WAVE = 4
_SMALL_BLOCK = 64
# backward_value_tiled.cu: points of one (image, head, level), which at worst one block adds alone.
MAX_POINTS_TILED = 8192
_TILE_ELEMENTS = 4096  # their accumulators take 16 KiB of shared memory
_ROUNDED_AT_ONCE = 8  # round.cu: elements of a thread, in one pass of the grid

# Candidates of a persistent kernel: how many blocks for each multiprocessor, one of which fits at a time.
_PERSISTENT_BLOCKS = (1, 2, 4)

# The stages of points of a group, whose gradients its lanes keep in registers: more would spill.
_MAX_FUSED_STAGES = 8

# Every array that a launch may name. In a fused call `locations` are its offsets and `weights` its logits. Workspace:
# `accumulator` and `by_location`, which is float32 and of the shape of the locations. The others are the caller's.
ARRAYS = (
    *("grad_output", "references", "value", "locations", "weights", "sizes", "starts", "mask"),
    *("output", "grad_value", "grad_locations", "grad_weights", "grad_references"),
    *("accumulator", "by_location"),
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


class Candidate(NamedTuple):
    """Kernels that compute a result.

    The results of all candidates are bitwise identical, but for a gradient of value that atomics add up in any order.
    """

    # Of the output, or of gradients by row: "plain", "query tiles", "persistent", "generic"; "": none is needed.
    kernel: str
    number: int = 1  # plain: split-K; persistent: blocks for each multiprocessor
    threads: int = BLOCK  # of a block; plain alone has a choice
    value: str = ""  # "binned" or "tiled": the gradient of value has a kernel of its own
    limit: str = ""  # generic: what the specialised kernels do not cover

    def __str__(self) -> str:
        """Its name in tables and logs."""
        small = "" if self.threads == BLOCK else f", blocks of {self.threads}"
        rows = {
            "plain": f"plain, split-K {self.number}{small}",
            "query tiles": "query tiles",
            "persistent": f"persistent, {self.number} per multiprocessor",
            "generic": f"generic, {self.limit}",
        }.get(self.kernel, "")
        return f"{self.value}; points {rows}" if self.value and rows else self.value or rows


class Choice(NamedTuple):
    """A candidate by name, and why it was chosen."""

    candidate: str
    why: str


# The results that have candidates: the forward, and backwards by (needs_value, needs_points).
FORWARD = "forward"
BACKWARDS = {
    (True, True): "backward",
    (True, False): "backward of value",
    (False, True): "backward of points",
}


class _Case(NamedTuple):
    """What every decision may look at."""

    problem: Problem
    table: LevelTable
    device: Device
    grids: Grids
    offset_scale: float
    needs_references: bool = False


@lru_cache(maxsize=1024)
def plan_forward(
    problem: Problem,
    table: LevelTable,
    device: Device,
    grids: Grids = None,
    choice: Choice | None = None,
    offset_scale: float = 0.5,
) -> Plan:
    """Plan a forward, which writes `output`; `choice`: among `forward_candidates`, else the model's.

    `offset_scale`: of a fused problem, which `fused_limit` must allow.
    """
    if problem.is_empty:
        return _zeros(problem, "forward", {"output": problem.value_dtype})
    candidate, why = _choose(forward_candidates(problem, device, grids), choice)
    launch = _forward(_Case(problem, table, device, grids, offset_scale), candidate)
    return _logged("forward", problem, Plan((launch,), 0, f"{candidate}: {why}"))


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
    choice: Choice | None = None,
    needs_references: bool = False,
    offset_scale: float = 0.5,
) -> Plan:
    """Plan a backward, which writes `grad_value`, or `grad_locations` and `grad_weights`, or all of them.

    `choice`: among `backward_candidates`, else the model's. The rest is of a fused problem, which `fused_limit` must
    allow: with `needs_references`, which takes `needs_points`, it also writes `grad_references`.
    """
    written: dict[str, str] = {}
    if needs_value:
        written["grad_value"] = problem.value_dtype
    if needs_points:
        written["grad_locations"] = problem.location_dtype
        written["grad_weights"] = problem.weight_dtype
    if problem.references and needs_references:
        written["grad_references"] = problem.references.dtype
    if problem.is_empty or not written:
        return _zeros(problem, "backward", written)
    case = _Case(problem, table, device, grids, offset_scale, needs_references)
    request = needs_value, needs_points, deterministic
    candidate, why = _choose(backward_candidates(problem, device, grids, *request), choice)
    if needs_value:
        plan = _backward_of_value(case, candidate, needs_points, deterministic)
    else:
        plan = Plan((_backward(case, candidate),), 0, "")
    if needs_references:
        plan = plan._replace(launches=(*plan.launches, _reference_gradient(case)))
    return _logged("backward", problem, plan._replace(reason=f"{candidate}: {why}{plan.reason}"))


def _zeros(problem: Problem, way: str, written: dict[str, str]) -> Plan:
    """The plan of a problem without points: zeros, where there are elements."""
    elements = {
        "output": problem.output_elements,
        "grad_value": problem.value_elements,
        "grad_locations": 2 * problem.point_elements,
        "grad_weights": problem.point_elements,
        "grad_references": problem.reference_elements,
    }
    fills = tuple(
        Fill(name, elements[name] * _SIZE[dtype])
        for name, dtype in written.items()
        if elements[name]
    )
    return _logged(way, problem, Plan(fills, 0, "no point contributes: zeros"))


def _logged(way: str, problem: Problem, plan: Plan) -> Plan:
    """The plan, after the log has told it: once, since plans are cached."""
    names = [
        step.kernel.name if isinstance(step, Launch) else f"fill {step.array}"
        for step in plan.launches
    ]
    logger.debug("%s of %s: %s (%s)", way, problem, "; ".join(names) or "nothing", plan.reason)
    return plan


# --- candidates ----------------------------------------------------------------------------------


def forward_candidates(problem: Problem, device: Device, grids: Grids) -> tuple[Candidate, ...]:
    """The candidates of a forward, the model's first. Another split-K would change bits, and so is none."""
    vector = 16 // _SIZE[problem.value_dtype]
    limit = _limit(problem, vector)
    if limit:
        return (Candidate("generic", limit=limit),)
    group = problem.head_dim // vector
    split_k = _split_k(problem, device, group, WARP // group)
    plain = _with_threads(problem, device, group, [split_k])
    found = _rows_candidates(problem, device, grids, group, plain, split_k == 1)
    if split_k == 1 and _follows_grids(problem, grids):
        found = (*found, Candidate("query tiles"))
    return found


def backward_candidates(
    problem: Problem,
    device: Device,
    grids: Grids,
    needs_value: bool,
    needs_points: bool,
    deterministic: bool,
) -> tuple[Candidate, ...]:
    """The candidates of a backward, the model's first.

    Deterministic gradients of value have one kernel alone: each rounds in another place.
    """
    of_points = _points_candidates(problem, device, grids)
    if not needs_value:
        return of_points
    # The kernel of all three gradients is never persistent.
    of_all = [rows for rows in of_points if rows.kernel != "persistent"]
    of_rest = of_points if needs_points else (Candidate(""),)
    # Tiles need no zeros beforehand and no atomics, but read the points of a level once for every tile. Not measured.
    tiled = [rows._replace(value="tiled") for rows in of_rest if is_tiled(problem)]
    if deterministic and tiled:
        return tuple(tiled)
    if not _has_bins(problem) or not _follows_grids(problem, grids):
        return tuple(of_all if deterministic else of_all + tiled[:1])
    binned = [rows._replace(value="binned") for rows in of_rest]
    by_model = _fills_device(problem, device, grids, problem.head_dim // 4)
    first, second = (binned, of_all) if by_model else (of_all, binned)
    return tuple(first if deterministic else first + second + tiled[:1])


def _points_candidates(problem: Problem, device: Device, grids: Grids) -> tuple[Candidate, ...]:
    """The candidates of gradients of points, the model's first; a point's bits do not depend on split-K."""
    limit = _limit(problem, 4)
    if limit:
        return (Candidate("generic", limit=limit),)
    group, points = problem.head_dim // 4, problem.row_points
    # A group finishes as many points at once as it has lanes: smaller parts would leave lanes idle. There may
    # be as many parts as a row has stages; the last stage is not always full.
    most = min(WARP // group, max(1, -(-points // group)))
    split_k = _split_k(problem, device, group, most)
    near = [k for k in (split_k, split_k // 2, 2 * split_k) if 1 <= k <= most and points % k == 0]
    if problem.references:
        # A sum over the row, in another order for each split-K, is part of a logit's gradient.
        near = [split_k]
    plain = _with_threads(problem, device, group, near)
    # One row per warp exceeds the persistent kernel's 64-register limit.
    may_persist = group < WARP and (split_k == 1 or not problem.references)
    return _rows_candidates(problem, device, grids, group, plain, may_persist)


def _with_threads(
    problem: Problem, device: Device, group: int, splits: list[int]
) -> list[Candidate]:
    """Plain kernels with these split-K, the model's first: few rows in small blocks, the first in large ones too."""
    large = [Candidate("plain", split_k) for split_k in splits]
    rows = problem.batch * problem.num_heads * problem.num_queries
    if rows * group * splits[0] > device.multiprocessors * _BLOCKS_OF_A_WAVE * BLOCK:
        return large
    return [candidate._replace(threads=_SMALL_BLOCK) for candidate in large] + large[:1]


def _rows_candidates(
    problem: Problem,
    device: Device,
    grids: Grids,
    group: int,
    plain: list[Candidate],
    may_persist: bool,
) -> tuple[Candidate, ...]:
    """Plain and persistent kernels, with `group` lanes to a row, the model's first."""
    if not may_persist or not _follows_grids(problem, grids):
        return tuple(plain)
    persistent = [Candidate("persistent", blocks) for blocks in _PERSISTENT_BLOCKS]
    by_model = _fills_device(problem, device, grids, group)
    return tuple(persistent + plain if by_model else plain + persistent)


def _choose(candidates: tuple[Candidate, ...], choice: Choice | None) -> tuple[Candidate, str]:
    """The chosen candidate, or else the model's, and why."""
    if choice is not None:
        for candidate in candidates:
            if str(candidate) == choice.candidate:
                return candidate, choice.why
    return candidates[0], "model"


# --- the forward ---------------------------------------------------------------------------------


def _forward(case: _Case, candidate: Candidate) -> Launch:
    """The forward kernel."""
    problem = case.problem
    if candidate.kernel == "generic":
        return _generic(case, "msda_forward_generic", ("value", *_points(problem), "output"))
    arguments = ("value", *_points(problem), _references(problem), "output")
    if candidate.kernel == "persistent":
        name = "msda_forward_persistent"
        return _persistent(case, "forward.cu", name, candidate.number, arguments)
    group = problem.head_dim * _SIZE[problem.value_dtype] // 16
    if candidate.kernel == "query tiles":
        return _query_tiles(case, group, arguments)
    template = (*_shape_arguments(problem), candidate.number)
    rows = candidate.threads // (group * candidate.number)
    return _rows(case, "forward.cu", "msda_forward", template, candidate.threads, rows, arguments)


def _query_tiles(case: _Case, group: int, arguments: tuple[str | None, ...]) -> Launch:
    """A tile of queries for each block, with `group` lanes to a query."""
    problem = case.problem
    kernel = _kernel(problem, "forward.cu", "msda_forward_query_tiles", _shape_arguments(problem))
    grid = _grid(problem, -(-problem.num_queries // (BLOCK // group)))
    params = _params_with_grids(case)
    return Launch(kernel, grid, (BLOCK, 1, 1), _with_table(arguments, case.table), params)


# --- the backward --------------------------------------------------------------------------------


def _backward_of_value(
    case: _Case, candidate: Candidate, needs_points: bool, deterministic: bool
) -> Plan:
    """A backward that writes `grad_value`; the reason tells only what is special in it."""
    problem = case.problem
    of_points = (_backward(case, candidate),) if candidate.value and needs_points else ()
    if candidate.value == "tiled":
        return Plan((_tiled(case), *of_points), 0, "; deterministic, few points")
    target, workspace = _accumulator(problem, deterministic)
    if candidate.value == "binned":
        of_value = _binned(case, deterministic, target)
    else:
        of_value = _backward(case, candidate, target, needs_points, deterministic)
    fill = Fill(target, workspace or problem.value_elements * _SIZE[problem.value_dtype])
    launches = (of_value, *of_points)
    if deterministic:
        before, after = _fixed_point_scale(case), _fixed_point_finish(case)
        launches = (before, *launches, after)
    elif workspace:
        launches = (*launches, _round(case))
    return Plan(
        (fill, *launches), workspace, "; deterministic: fixed point" if deterministic else ""
    )


def _accumulator(problem: Problem, deterministic: bool) -> tuple[str, int]:
    """The array that gradients of value are added to, and the bytes of workspace that it takes."""
    if deterministic:
        return "accumulator", 8 * num_fixed_point(problem)
    if _SIZE[problem.value_dtype] == 2:
        return "accumulator", 4 * problem.value_elements
    return "grad_value", 0


def _backward(
    case: _Case,
    candidate: Candidate,
    target: str | None = None,
    needs_points: bool = True,
    deterministic: bool = False,
) -> Launch:
    """The kernel of the gradients of points, of value (added to `target`, if that is not None), or of all three.

    `deterministic`: gradients of value are added in fixed point, before `_fixed_point_finish`.
    """
    problem, split_k = case.problem, candidate.number
    of_points = ("grad_locations", "grad_weights") if needs_points else (None, None)
    inputs = "grad_output", "value", *_points(problem)
    if candidate.kernel == "generic":
        fixed = (_cpp_bool(deterministic),)
        return _generic(case, "msda_backward_generic", (*inputs, target, *of_points), fixed)
    by_location = "by_location" if case.needs_references else None
    arguments = (*inputs, _references(problem), target, *of_points, by_location)
    if candidate.kernel == "persistent":
        name = "msda_backward_persistent"
        return _persistent(case, "backward.cu", name, candidate.number, arguments)
    flags = map(_cpp_bool, (target is not None, needs_points, deterministic))
    template = (*_shape_arguments(problem), split_k, *flags)
    rows = candidate.threads // (problem.head_dim // 4 * split_k)
    return _rows(case, "backward.cu", "msda_backward", template, candidate.threads, rows, arguments)


def _binned(case: _Case, deterministic: bool, target: str) -> Launch:
    """The gradient of value by counting sort and segmented reduction."""
    problem = case.problem
    template = (*_shape_arguments(problem), _cpp_bool(deterministic))
    kernel = _kernel(problem, "backward_value_binned.cu", "msda_backward_value_binned", template)
    grid = _grid(problem, -(-problem.num_queries // BINNED_QUERIES))
    arguments = ("grad_output", *_points(problem), _references(problem), target)
    arguments = _with_table(arguments, case.table)
    return Launch(kernel, grid, (BLOCK, 1, 1), arguments, _params_with_grids(case))


def _reference_gradient(case: _Case) -> Launch:
    """The gradient of the reference points of a fused problem, from `by_location`."""
    problem = case.problem
    types = _CPP[problem.location_dtype], str(problem.num_heads), _sampling_of_shape(problem)
    name = f"msda_reference_gradient<{', '.join(types)}>"
    kernel = Kernel("reference_gradient.cu", name)
    arguments = "by_location", "locations", "grad_references"
    grid = -(-_reference_rows(problem) // (BLOCK // WARP)), 1, 1
    params = _fused(case, _params(problem, NO_TABLE))
    return Launch(kernel, grid, (BLOCK, 1, 1), arguments, params)


def _tiled(case: _Case) -> Launch:
    """The deterministic gradient of value by output-stationary tiles."""
    problem = case.problem
    template = (*_shape_arguments(problem), _TILE_ELEMENTS // problem.head_dim)
    kernel = _kernel(problem, "backward_value_tiled.cu", "msda_backward_value_tiled", template)
    arguments = _with_table(("grad_output", *_points(problem), "grad_value"), case.table)
    grid = (_num_tiles(problem), 1, 1)
    return Launch(kernel, grid, (BLOCK, 1, 1), arguments, _params(problem, case.table))


def _fixed_point_scale(case: _Case) -> Launch:
    """Find the fixed-point unit of each (image, head)."""
    problem = case.problem
    template = (_sampling(problem),)
    kernel = _kernel(problem, "fixed_point.cu", "msda_fixed_point_scale", template)
    grid = _filling_grid(case, problem.num_queries)
    arguments = _with_table(("grad_output", *_points(problem), "accumulator"), case.table)
    params = _generic_params(case)
    return Launch(kernel, grid, (BLOCK, 1, 1), arguments, params)


def _fixed_point_finish(case: _Case) -> Launch:
    """Turn the fixed-point accumulators into the gradient of value."""
    problem = case.problem
    kernel = Kernel("fixed_point.cu", f"msda_fixed_point_finish<{_CPP[problem.value_dtype]}>")
    grid = _filling_grid(case, problem.spatial_size)
    params = _params(problem, NO_TABLE, 0)
    return Launch(kernel, grid, (BLOCK, 1, 1), ("accumulator", "grad_value"), params)


def _round(case: _Case) -> Launch:
    """Round the float32 accumulators to a 16-bit gradient of value."""
    problem = case.problem
    kernel = Kernel("round.cu", f"msda_round<{_CPP[problem.value_dtype]}>")
    blocks = -(-problem.value_elements // (_ROUNDED_AT_ONCE * BLOCK))
    blocks = max(1, min(blocks, case.device.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR))
    params = _params(problem, NO_TABLE, 0)
    return Launch(kernel, (blocks, 1, 1), (BLOCK, 1, 1), ("accumulator", "grad_value"), params)


def num_fixed_point(problem: Problem) -> int:
    """64-bit words of the fixed-point accumulators, as in fixed_point.cuh."""
    limbs = 2 if problem.value_dtype == "float64" else 1
    return limbs * problem.value_elements + problem.batch * problem.num_heads


# --- what a kernel takes -------------------------------------------------------------------------


def _limit(problem: Problem, vector: int) -> str:
    """Why the specialised kernels, with `vector` channels to a lane, do not cover the problem; empty if they do."""
    group, rest = divmod(problem.head_dim, vector)
    pixel_bytes = problem.num_heads * problem.head_dim * _SIZE[problem.value_dtype]
    if problem.value_dtype == "float64":
        return "float64"
    if rest or problem.head_dim % 8 or group > WARP or group & (group - 1):
        return f"D = {problem.head_dim}"
    if problem.num_levels > MAX_SPECIALISED_LEVELS:
        return f"L = {problem.num_levels}"
    if problem.spatial_size >= 2**22 or problem.spatial_size * pixel_bytes >= 2**31:
        return f"S = {problem.spatial_size}"
    return ""


def fused_limit(problem: Problem, deterministic: bool) -> str:
    """Why no kernels of ours cover a fused problem, which is then composed; empty if they do.

    `deterministic`: its gradient of value is needed, and must be bitwise identical in every run.
    """
    if deterministic:
        return "deterministic"
    if problem.is_empty:
        return ""
    limit = _limit(problem, 16 // _SIZE[problem.value_dtype]) or _limit(problem, 4)
    if limit:
        return limit
    if problem.row_points > _MAX_FUSED_STAGES * problem.head_dim // 4:
        return f"K = {problem.row_points}"
    if problem.point_elements >= 2**31:
        return f"N * Lq * M * K = {problem.point_elements}"
    return ""


def queries(problem: Problem, grids: Grids) -> str:
    """Where the queries lie: on the "levels", on given "grids", or, with nothing known, in "order"."""
    if grids:
        return "grids"
    return "levels" if grids is None and problem.num_queries == problem.spatial_size else "order"


def _follows_grids(problem: Problem, grids: Grids) -> bool:
    """Whether the tile scheduler has grids to follow, and numbers the rows in 32 bits."""
    most = max(problem.num_queries, problem.spatial_size)
    rows = problem.batch * problem.num_heads * most
    return queries(problem, grids) != "order" and rows < 2**31


def _fills_device(problem: Problem, device: Device, grids: Grids, group: int) -> bool:
    """Whether tiled kernels are the model's choice, with `group` lanes to a row.

    With the levels as grids: if a block on every multiprocessor is full. On given grids: unless the rows are so few
    that split-K would run instead.
    """
    rows = problem.batch * problem.num_queries * problem.num_heads
    lanes = PERSISTENT_BLOCK if grids is None else _WARPS_PER_MULTIPROCESSOR * WARP
    return rows * group >= device.multiprocessors * lanes


def _has_bins(problem: Problem) -> bool:
    """Whether backward_value_binned.cu takes the problem."""
    return (
        not _limit(problem, 4)
        and problem.num_levels <= MAX_BINNED_LEVELS
        and problem.row_points <= MAX_BINNED_POINTS
    )


def is_tiled(problem: Problem) -> bool:
    """Whether backward_value_tiled.cu takes the problem, whose deterministic gradients of value then come from it."""
    few = problem.num_queries * max(problem.level_points) <= MAX_POINTS_TILED
    return few and not problem.references and not _limit(problem, 4) and _num_tiles(problem) < 2**31


def _num_tiles(problem: Problem) -> int:
    """Tiles of all images and heads."""
    positions = _TILE_ELEMENTS // problem.head_dim
    return problem.batch * problem.num_heads * -(-problem.spatial_size // positions)


def _split_k(problem: Problem, device: Device, group: int, most: int) -> int:
    """Into how many equal parts to split the points of a row so that the launch fills the device."""
    rows = problem.batch * problem.num_queries * problem.num_heads
    points = problem.row_points
    lanes = device.multiprocessors * _WARPS_PER_MULTIPROCESSOR * WARP
    split_k = 1
    while rows * split_k * group < lanes and split_k * 2 <= most and points % (split_k * 2) == 0:
        split_k *= 2
    return split_k


# --- how a launch is put together ----------------------------------------------------------------


def _generic(
    case: _Case,
    name: str,
    arguments: tuple[str | None, ...],
    template: tuple[object, ...] = (),
) -> Launch:
    """One warp for each row, with everything about the shape at run time."""
    problem = case.problem
    kernel = _kernel(problem, "generic.cu", name, (_sampling(problem), *template))
    grid = _grid(problem, -(-problem.num_queries // (BLOCK // WARP)))
    arguments = _with_table(arguments, case.table)
    return Launch(kernel, grid, (BLOCK, 1, 1), arguments, _generic_params(case))


def _rows(
    case: _Case,
    file: str,
    name: str,
    template: tuple[object, ...],
    threads: int,
    queries_of_block: int,
    arguments: tuple[str | None, ...],
) -> Launch:
    """Blocks of so many threads, for so many queries each; x covers the queries."""
    problem = case.problem
    kernel = _kernel(problem, file, name, template)
    grid = _grid(problem, -(-problem.num_queries // queries_of_block))
    arguments = _with_table(arguments, case.table)
    params = _fused(case, _params(problem, case.table))
    return Launch(kernel, grid, (threads, 1, 1), arguments, params)


def _persistent(
    case: _Case, file: str, name: str, blocks: int, arguments: tuple[str | None, ...]
) -> Launch:
    """So many blocks for each multiprocessor."""
    kernel = _kernel(case.problem, file, name, _shape_arguments(case.problem))
    grid = (blocks * case.device.multiprocessors, 1, 1)
    arguments = _with_table(arguments, case.table)
    return Launch(kernel, grid, (PERSISTENT_BLOCK, 1, 1), arguments, _params_with_grids(case))


def _points(problem: Problem) -> tuple[str | None, ...]:
    """The arrays that a kernel reads points from: a null pointer for a mask that there is not."""
    return "locations", "weights", "mask" if problem.has_mask else None


def _references(problem: Problem) -> str | None:
    """The reference points that a specialised kernel reads: a null pointer where the problem is not fused."""
    return "references" if problem.references else None


def _reference_rows(problem: Problem) -> int:
    """How many (image, query) have reference points of their own."""
    return problem.references.batch * problem.num_queries if problem.references else 0


def _with_table(arguments: tuple[str | None, ...], table: LevelTable) -> tuple[str | None, ...]:
    """The arguments, then the level table: null pointers for what the host knows of it."""
    sizes = "sizes" if table.sizes is None else None
    starts = "starts" if table.starts is None else None
    return (*arguments, sizes, starts)


def _kernel(problem: Problem, file: str, name: str, template: tuple[object, ...]) -> Kernel:
    """The instantiation for the dtypes of the problem and these further template arguments."""
    return Kernel(file, f"{name}<{', '.join([_types(problem), *map(str, template)])}>")


def _shape_arguments(problem: Problem) -> tuple[object, ...]:
    """The shape among the template arguments: M, D and how points are sampled."""
    return problem.num_heads, problem.head_dim, _sampling_of_shape(problem)


def _sampling_of_shape(problem: Problem) -> str:
    """How a kernel that knows the points of each level samples them, as point.cuh or fused.cuh declares it."""
    sampling = _sampling(problem, problem.level_points)
    if problem.references is None:
        return sampling
    _, levels, coordinates, dtype = problem.references
    by_level = _cpp_bool(levels == problem.num_levels)
    return f"Fused<{sampling}, {_CPP[dtype]}, {coordinates}, {by_level}>"


def _sampling(problem: Problem, points: tuple[int, ...] = ()) -> str:
    """How points are sampled, as point.cuh declares it, with the points of each level if the kernel must know."""
    flags = map(_cpp_bool, (problem.interpolation == "nearest", problem.has_mask))
    return f"Sampling<{', '.join([*flags, *map(str, points)])}>"


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


def _filling_grid(case: _Case, rows: int) -> tuple[int, int, int]:
    """A grid of as many warps as the device holds, or as there are rows of every (image, head)."""
    problem = case.problem
    wanted = case.device.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR
    blocks = max(1, -(-wanted // (problem.batch * problem.num_heads)))
    return _grid(problem, min(blocks, -(-rows // (BLOCK // WARP))))


_SIZES = (*Problem._fields[:6], "row_points")
_SCALARS = [(name, "i4") for name in _SIZES]


def _params(problem: Problem, table: LevelTable, room: int | None = None) -> np.ndarray:
    """The by-value argument, as levels.cuh declares it: sizes, then room for levels, by default for those there are.

    Levels that only a device knows stay zero, with their starts derived.
    """
    room = problem.num_levels if room is None else room
    params = np.zeros((), [*_SCALARS, ("levels", "i4", (room, 3))])
    for name in _SIZES:
        params[name] = getattr(problem, name)
    levels = params["levels"]
    levels[:, 2] = DERIVED_START
    if table.sizes:
        levels[: problem.num_levels, :2] = table.sizes
    if table.starts is not None:
        levels[: problem.num_levels, 2] = table.starts
    return params


def _params_with_grids(case: _Case) -> np.ndarray:
    """The same and, as tile_scheduler.cuh declares it, the grids of the queries: if there are none, the levels."""
    grids = [("num_grids", "i4"), ("grids", "i4", (MAX_GRIDS, 2))]
    params = _extended(_params(case.problem, case.table), grids)
    if case.grids:
        params["num_grids"] = len(case.grids)
        params["grids"][: len(case.grids)] = case.grids
    return _fused(case, params)


def _fused(case: _Case, params: np.ndarray) -> np.ndarray:
    """The same and, of a fused problem, what fused.cuh declares."""
    if case.problem.references is None:
        return params
    params = _extended(params, [("offset_scale", "f4"), ("reference_rows", "i4")])
    params["offset_scale"] = case.offset_scale
    params["reference_rows"] = _reference_rows(case.problem)
    return params


def _generic_params(case: _Case) -> np.ndarray:
    """The same for any level table and, as levels.cuh declares it, the points of the levels."""
    problem, points = case.problem, case.problem.num_points
    further = [("level_points", "i4"), ("ends", "i4", MAX_UNEVEN_LEVELS)]
    params = _extended(_params(problem, case.table, MAX_HOST_LEVELS), further)
    if isinstance(points, int):
        params["level_points"] = points
    else:
        params["ends"][: len(points)] = list(accumulate(points))
    return params


def _extended(params: np.ndarray, further: list[tuple[Any, ...]]) -> np.ndarray:
    """The same with further fields, which are zero."""
    longer = np.zeros((), [*params.dtype.descr, *further])
    for name in params.dtype.names or ():
        longer[name] = params[name]
    return longer
