# SPDX-License-Identifier: Apache-2.0
"""Which kernel runs a problem, on what grid and with what arguments. The inputs have been checked by the contract."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from cupy_msda.compile import Kernel, load
from cupy_msda.contract import MAX_GRIDS, MAX_HOST_LEVELS, Grids, LevelTable, Problem

BLOCK = 256
ORDERED_BLOCK = 1024
WARP = 32
MAX_GRID_YZ = 65535
ALIGNMENT = 16  # bytes: the widest load
MAX_LEVELS_SPECIALISED = 16
DERIVED_START = -1  # as in levels.cuh

_CPP = {"float16": "half_t", "bfloat16": "bfloat16_t", "float32": "float", "float64": "double"}
_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
# Enough warps for each multiprocessor to hide the latency of the gathers (not measured on a GPU).
_WARPS_PER_MULTIPROCESSOR = 16
_BLOCKS_PER_MULTIPROCESSOR = 8  # all that fit, for kernels that only pass over memory
# owner.cu: points of one (image, head, level), which at worst one block adds alone (kernels/README.md).
_MOST_POINTS_OWNED = 8192
_TILE_ELEMENTS = 4096  # their sums take 16 KiB of shared memory
# sorted.cu: counters of a block's points by level and bin, and the points of its 256 queries.
_MOST_LEVELS_SORTED = 8
_MOST_POINTS_SORTED = 32
_NO_TABLE = LevelTable(None, None)


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
            problem, table, multiprocessors, grids, "forward.cu", "msda_forward_ordered"
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
            problem, table, multiprocessors, grids, "backward.cu", "msda_backward_ordered"
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
    kernel = Kernel("sorted.cu", f"msda_sorted<{template}>")
    grid = _grid(problem, -(-problem.num_queries // BLOCK))
    return Plan(kernel, grid, (BLOCK, 1, 1), _params(problem, table, grids=grids))


def _ordered(problem: Problem, group: int, multiprocessors: int, grids: Grids) -> bool:
    """Whether to take the rows, of `group` lanes each, in the order of order.cuh (benchmarks/README.md has what this
    saves): where the levels are the grids, if a block on every multiprocessor is full; on grids that were given, unless
    the rows are so few that `_split` shares out their points, which adds them up in another order.
    """
    n, s, m, lq = problem.batch, problem.spatial_size, problem.num_heads, problem.num_queries
    if grids is None or (not grids and lq != s):
        return False
    least = multiprocessors * (_WARPS_PER_MULTIPROCESSOR * WARP if grids else ORDERED_BLOCK)
    return n * lq * m * group >= least and n * m * max(lq, s) < 2**31


def _sorted(problem: Problem, multiprocessors: int, grids: Grids) -> bool:
    """Whether gradients of value come from sorted.cu."""
    return (
        _specialised(problem, 4)
        and problem.num_levels <= _MOST_LEVELS_SORTED
        and problem.num_levels * problem.num_points <= _MOST_POINTS_SORTED
        and _ordered(problem, problem.head_dim // 4, multiprocessors, grids)
    )


@lru_cache(maxsize=1024)
def plan_scale(problem: Problem, table: LevelTable, multiprocessors: int = 1) -> Plan:
    """What finds the quantum of the sums in fixed point; `table` holds host facts only."""
    name = f"msda_scale<{_types(problem)}>"
    grid = _filling_grid(problem, problem.num_queries, multiprocessors)
    params = _params(problem, table, MAX_HOST_LEVELS)
    return Plan(Kernel("fixed.cu", name), grid, (BLOCK, 1, 1), params)


@lru_cache(maxsize=1024)
def plan_finish(problem: Problem, multiprocessors: int = 1) -> Plan:
    """What turns the sums in fixed point into the gradient of value."""
    name = f"msda_finish<{_CPP[problem.value_dtype]}>"
    grid = _filling_grid(problem, problem.spatial_size, multiprocessors)
    return Plan(Kernel("fixed.cu", name), grid, (BLOCK, 1, 1), _params(problem, _NO_TABLE, 0))


@lru_cache(maxsize=1024)
def plan_owner(problem: Problem, table: LevelTable) -> Plan:
    """The reproducible gradient of value without sums in memory; `table` holds host facts only."""
    arguments = (*_shape_arguments(problem), _TILE_ELEMENTS // problem.head_dim)
    template = ", ".join([_types(problem), *map(str, arguments)])
    kernel = Kernel("owner.cu", f"msda_owner<{template}>")
    return Plan(kernel, (_tiles(problem), 1, 1), (BLOCK, 1, 1), _params(problem, table))


def _separate_plan(
    problem: Problem, table: LevelTable, multiprocessors: int, reproducible: bool, grids: Grids
) -> Plan | None:
    """The kernel that computes the gradient of value alone, where that is better than all three at once."""
    if reproducible and _owned(problem):
        return plan_owner(problem, table)
    if _sorted(problem, multiprocessors, grids):
        return plan_sorted(problem, table, grids, reproducible)
    return None


def _owned(problem: Problem) -> bool:
    """Whether reproducible gradients of value come from owner.cu."""
    few = problem.num_queries * problem.num_points <= _MOST_POINTS_OWNED
    return few and _specialised(problem, 4) and _tiles(problem) < 2**31


def _tiles(problem: Problem) -> int:
    """How many tiles, of all images and heads, owner.cu has to fill."""
    positions = _TILE_ELEMENTS // problem.head_dim
    return problem.batch * problem.num_heads * -(-problem.spatial_size // positions)


def num_sums(problem: Problem) -> int:
    """Size of the zeroed int64 array that `backward` takes; 0 where owner.cu does without."""
    return 0 if _owned(problem) else num_fixed_sums(problem)


def num_fixed_sums(problem: Problem) -> int:
    """Size of the array for sums in fixed point, as in fixed.cuh."""
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
        and problem.num_levels <= MAX_LEVELS_SPECIALISED
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
    return Plan(kernel, (multiprocessors, 1, 1), (ORDERED_BLOCK, 1, 1), params)


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


def require_cupy(torch_cuda: str | None = None) -> Any:
    """CuPy, or an error that says what to install, for a torch of this CUDA version if given."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        what = '"cupy-msda[cuda12x]" or, for a driver and torch of CUDA 13, "cupy-msda[cuda13x]"'
        if torch_cuda is not None:
            major = torch_cuda.partition(".")[0]
            what = f'"cupy-msda[cuda{major}x]" fits this torch, built for CUDA {major}'
        raise ModuleNotFoundError(
            f"the CUDA kernels run through CuPy, which is not installed: pip install {what}",
            name="cupy",
        ) from error
    return cupy


@contextmanager
def on_stream(device: int, stream: int) -> Iterator[None]:
    """Make `device` and the stream at this address CuPy's current ones."""
    cupy = require_cupy()
    streams = cupy.cuda.Stream
    with (
        cupy.cuda.Device(device),
        streams.from_external(_External(stream)) if stream else streams.null,
    ):
        yield


class _External:
    """A stream of another library, as the protocol that CuPy reads."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        """Protocol version and address."""
        return 0, self._pointer


def forward_arrays(
    problem: Problem,
    table: LevelTable,
    value: Any,
    locations: Any,
    weights: Any,
    grids: Grids = (),
) -> Any:
    """The operator on CUDA arrays of any library but torch, on CuPy's current stream, as a CuPy array."""
    cupy = require_cupy()
    with _device_of(value):
        value, locations, weights = map(_aligned, (value, locations, weights))
        if problem.is_empty:
            return cupy.zeros(problem.output_shape, value.dtype)
        output = cupy.empty(problem.output_shape, value.dtype)
        forward(problem, _aligned_table(table), value, locations, weights, output, grids)
    return output


def backward_arrays(
    problem: Problem,
    table: LevelTable,
    grad_output: Any,
    value: Any,
    locations: Any,
    weights: Any,
    grids: Grids = (),
) -> tuple[Any, Any, Any]:
    """The three gradients on CUDA arrays of any library but torch, as CuPy arrays."""
    cupy = require_cupy()
    with _device_of(value):
        grad, *arrays = [_aligned(array) for array in (grad_output, value, locations, weights)]
        accumulator = cupy.float64 if problem.value_dtype == "float64" else cupy.float32
        of_points = map(cupy.zeros_like if problem.is_empty else cupy.empty_like, arrays[1:])
        gradients = (cupy.zeros(value.shape, accumulator), *of_points)
        if not problem.is_empty:
            backward(problem, _aligned_table(table), (grad, *arrays), gradients, grids=grids)
        return gradients[0].astype(arrays[0].dtype, copy=False), gradients[1], gradients[2]


def forward(
    problem: Problem,
    table: LevelTable,
    value: Any,
    locations: Any,
    weights: Any,
    output: Any,
    grids: Grids = (),
) -> None:
    """Launch the forward on CuPy's current device and stream; arrays C-contiguous and 16-byte aligned."""
    device, multiprocessors = _current_device()
    plan = plan_forward(problem, _host_part(table), multiprocessors, grids)
    arrays = (value, locations, weights, output, *table[2:])
    _launch(plan, device, map(_as_cupy, arrays))


def backward(
    problem: Problem,
    table: LevelTable,
    inputs: tuple[Any, Any, Any, Any],
    gradients: tuple[Any, Any, Any],
    sums: Any = None,
    grids: Grids = (),
) -> None:
    """Launch the backward on CuPy's current device and stream; arrays C-contiguous and 16-byte aligned.

    `inputs` are grad_output, value, locations and weights. Of the gradients, that of value may be
    None, and so may the other two; it is a zeroed float32 (float64 for float64) accumulator, added
    to in no fixed order. With `sums`, a zeroed int64 array of `num_sums` elements (which may be 0),
    it is of the dtype of value instead, written whole, and reproducible bit for bit.
    """
    device, multiprocessors = _current_device()
    case = problem, _host_part(table), multiprocessors
    grad_output, *others = map(_as_cupy, inputs)
    grad_value, *of_points = map(_as_cupy, gradients)
    levels = [_as_cupy(array) for array in table[2:]]
    needs_value, needs_points = (gradient is not None for gradient in gradients[:2])
    separate = _separate_plan(*case, sums is not None, grids) if needs_value else None
    fixed = sums is not None and not _owned(problem)
    added_to = _as_cupy(sums) if fixed else grad_value
    if fixed:
        _launch(plan_scale(*case), device, (grad_output, *others[1:], added_to, *levels))
    if separate is not None:
        _launch(separate, device, (grad_output, *others[1:], added_to, *levels))
    if separate is None or needs_points:
        together = separate is None and needs_value
        plan = plan_backward(*case, together, needs_points, fixed and together, grids)
        to = added_to if together else _as_cupy(None)
        _launch(plan, device, (grad_output, *others, to, *of_points, *levels))
    if fixed:
        _launch(plan_finish(problem, multiprocessors), device, (added_to, grad_value))


def compile_ahead(
    problem: Problem,
    with_backward: bool,
    reproducible: bool,
    device: int | None = None,
    grids: Grids = (),
) -> None:
    """Compile what `forward` and `backward`, with sums or without, will launch on `device` or CuPy's current one."""
    with require_cupy().cuda.Device(device):
        index, multiprocessors = _current_device()
        case = problem, _NO_TABLE, multiprocessors
        plans = [plan_forward(*case, grids)]
        separate = _separate_plan(*case, reproducible, grids)
        fixed = reproducible and not _owned(problem)
        if with_backward:
            plans.append(plan_backward(*case, False, True, grids=grids))
        if with_backward and separate is not None:
            plans.append(separate)
        elif with_backward:
            plans += [plan_backward(*case, True, points, fixed) for points in (True, False)]
        if with_backward and fixed:
            plans += [plan_scale(*case), plan_finish(problem, multiprocessors)]
        for plan in plans:
            load(plan.kernel, index)


def _launch(plan: Plan, device: int, arrays: Iterable[Any]) -> None:
    """Launch on CuPy arrays, which the parameters follow."""
    load(plan.kernel, device)(plan.grid, plan.block, (*arrays, plan.params))


def _host_part(table: LevelTable) -> LevelTable:
    """The table without its device arrays, as a key of the plan."""
    return LevelTable(table.sizes, table.starts)


@cache
def _multiprocessors(device: int) -> int:
    """How many multiprocessors a device has."""
    return int(require_cupy().cuda.Device(device).attributes["MultiProcessorCount"])


def _current_device() -> tuple[int, int]:
    """CuPy's current device and its number of multiprocessors."""
    device = int(require_cupy().cuda.runtime.getDevice())
    return device, _multiprocessors(device)


def _device_of(array: Any) -> Any:
    """A context that makes the device of a DLPack exporter CuPy's current one."""
    return require_cupy().cuda.Device(array.__dlpack_device__()[1])


def _aligned(array: Any, dtype: Any = None) -> Any:
    """A C-contiguous CuPy array on a 16-byte boundary; the array's own memory where it is one."""
    array = require_cupy().ascontiguousarray(_as_cupy(array), dtype)
    return array if array.data.ptr % ALIGNMENT == 0 else array.copy()


def _aligned_table(table: LevelTable) -> LevelTable:
    """The table with its device arrays as the kernels read them: contiguous int64."""
    sizes, starts = (
        None if array is None else _aligned(array, "int64")
        for array in (table.device_sizes, table.device_starts)
    )
    return table._replace(device_sizes=sizes, device_starts=starts)


def _as_cupy(array: Any) -> Any:
    """A CuPy view of any DLPack exporter; a null pointer for None."""
    if array is None:
        return np.intp(0)
    cupy = require_cupy()
    return array if isinstance(array, cupy.ndarray) else cupy.from_dlpack(array)
