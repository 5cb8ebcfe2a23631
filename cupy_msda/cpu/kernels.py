# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels, on NumPy arrays. Numba compiles them on first call and caches them on disk.

A "row" is one (image, query, head): L*P points, each with 4 corners, each corner a D-vector of
`value`. A row's D channels lie side by side in SIMD registers, `lanes` of them at a time, and every
corner outside its level is skipped, not read and multiplied by zero.

Forward: a task is a stretch of consecutive rows, so locations, weights and output stream, and while
one row is summed the cells of the next are on their way to the cache. Backward: a task is one
(image, level, head), which alone owns a plane of grad_value, so nothing is shared or atomic.

An atomic counter hands out tasks to the calling thread and to helper threads, as far as these wake
in time. Unlike Numba's own threading layers this survives fork and calls from several threads at
once. What a task computes does not depend on who runs it: results are the same for any number of
threads.

All in one file, because Numba's disk cache notices a change only in the file of the kernel itself.
"""

# Numba's own types are partial, differ between versions, and say nothing of what it compiles.
# mypy: disable-error-code="attr-defined, import-untyped, misc, no-untyped-call, untyped-decorator"

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from itertools import pairwise
from queue import SimpleQueue
from threading import Thread
from time import sleep
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, extending, njit, types
from numba.core import cgutils

_Array = np.ndarray[Any, Any]

_REGISTER_BYTES = 256  # of one row at a time: half the registers of AVX2, an eighth of AVX-512's
_LINE_BYTES = 64
_CELLS_AHEAD = 2  # rows between the prefetch of the cells that a row samples and their use
_STREAM_AHEAD = 4  # rows of a task between the prefetch of what is read once and its use
_GRAIN = 2**17  # multiply-adds per corner that are worth waking a thread for, some 50 microseconds
_SPINS = 20_000  # polls, some 100 microseconds, before a wait for helpers goes to sleep
_HELPERS_INSIDE = 8  # index into the scheduling state, a cache line away from the task counter


def forward(
    value: _Array,
    levels: Sequence[tuple[int, int, int]],
    locations: _Array,
    weights: _Array,
    out: _Array | None = None,
    *,
    threads: int | None = None,
) -> _Array:
    """Multi-scale deformable attention of validated, C-contiguous NumPy arrays.

    Parameters
    ----------
    value : array, shape (N, S, M, D), float16, float32 or float64
        float16 is widened in a temporary copy and the result rounded once.
    levels : sequence of (H, W, start), within S
    locations : array, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
        float32 or the dtype of `value`, like `weights`.
    weights : array, shape (N, Lq, M, L, P)
    out : array, shape (N, Lq, M*D), dtype of `value`, optional
    threads : int, optional
        How many may work on it, the calling one included; None: NUMBA_NUM_THREADS.

    Returns
    -------
    array, shape (N, Lq, M*D), dtype of `value`
        `out` if given. The same bits for any number of threads.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    n, s, m, d = value.shape
    lq, points = locations.shape[1], locations.shape[4]
    if out is None:
        out = np.empty((n, lq, m * d), value.dtype)
    if value.size == 0 or weights.size == 0:
        out[...] = 0
        return out
    inputs = [_widened(array) for array in (value, locations, weights)]
    target = out if out.dtype == inputs[0].dtype else np.empty(out.shape, inputs[0].dtype)
    rows = lq * m
    threads = _worthwhile(threads, weights.size * d)
    stretch = min(max(n * rows // (16 * threads), 64), 1024)
    _share_out(
        _forward_kernel(d, target.itemsize),
        threads,
        target.reshape(-1),
        tuple(array.reshape(-1) for array in inputs),
        _table(tuple(levels), points),
        (n, s, m, rows, stretch),
    )
    if target is not out:
        out[...] = target
    return out


def backward(
    grad_output: _Array,
    value: _Array,
    levels: Sequence[tuple[int, int, int]],
    locations: _Array,
    weights: _Array,
    *,
    threads: int | None = None,
) -> tuple[_Array, _Array, _Array]:
    """Gradients of `forward` by value, locations and weights.

    Parameters
    ----------
    grad_output : array, shape (N, Lq, M*D), dtype of `value`
    value, levels, locations, weights, threads
        As `forward` takes them.

    Returns
    -------
    tuple of three arrays
        Each with the shape and dtype of what it belongs to. Sums are in float32 (float64 for
        float64) and in a fixed order: the same bits for any number of threads.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    n, s, m, d = value.shape
    lq, points = locations.shape[1], locations.shape[4]
    sources = (value, locations, weights)
    inputs = [_widened(array) for array in (grad_output, *sources)]
    if value.size == 0 or weights.size == 0:
        return np.zeros_like(value), np.zeros_like(locations), np.zeros_like(weights)
    # Fresh zeros come from the system, page by page when a task touches them; zeros_like would fill.
    by_value = np.zeros(value.shape, inputs[1].dtype)
    by_points = [np.empty(array.shape, array.dtype) for array in inputs[2:]]
    parts, packed = _parts(tuple(levels), s, lq * points)
    _share_out(
        _backward_kernel(d, by_value.itemsize),
        _worthwhile(threads, weights.size * d),
        tuple(array.reshape(-1) for array in (by_value, *by_points)),
        tuple(array.reshape(-1) for array in inputs),
        _table(tuple(levels), points),
        parts,
        (n, s, m, lq, d * packed),
    )
    by_value, *by_points = (
        array.astype(source.dtype, copy=False)
        for array, source in zip((by_value, *by_points), sources, strict=True)
    )
    return by_value, by_points[0], by_points[1]


def _widened(array: _Array) -> _Array:
    """float16 as float32, which the kernels compute in; anything else as it is."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


@lru_cache(maxsize=1024)
def _table(levels: tuple[tuple[int, int, int], ...], points: int) -> _Array:
    """(H, W, start, P) of each level; an empty one has a size that no point is inside of."""
    rows = [(h, w, start, points) if h * w else (-1, -1, 0, points) for h, w, start in levels]
    return np.array(rows, np.int64)


@lru_cache(maxsize=1024)
def _parts(
    levels: tuple[tuple[int, int, int], ...], spatial_size: int, points: int
) -> tuple[_Array, int]:
    """What tasks own of a head's grad_value: (first level, end, first position, positions, packed).

    And how many positions are packed at most.

    One level each; all of them if some overlap, since two tasks must not add to one cell. A part
    with more points than positions pays for being packed: copied to where these lie side by side.
    """
    spans = sorted((start, start + h * w) for h, w, start in levels if h * w)
    parts = [(i, i + 1, start, h * w) for i, (h, w, start) in enumerate(levels)]
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        parts = [(0, len(levels), 0, spatial_size)]
    rows = [(*part, points * (part[1] - part[0]) > part[3] > 0) for part in parts]
    return np.array(rows, np.int64), max(positions * packed for *_, positions, packed in rows)


def _lanes(head_dim: int, itemsize: int) -> int:
    """How many channels to hold in registers at once: the largest divisor of D that fits."""
    most = min(head_dim, _REGISTER_BYTES // itemsize)
    return next(lanes for lanes in range(most, 0, -1) if head_dim % lanes == 0)


# Threads ------------------------------------------------------------------------------------------


# What waits to be helped with: each job is [kernel, its arguments], or empty once that is over.
# A queue and plain threads, since an executor's futures cost more than some calls take.
_jobs: SimpleQueue[list[Any]]
_helpers: list[Thread]


def _forget_helpers() -> None:
    """Start anew without helpers, as after a fork, which threads do not survive."""
    global _jobs, _helpers
    _jobs, _helpers = SimpleQueue(), []


_forget_helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def _help(jobs: SimpleQueue[list[Any]]) -> None:
    """Do one job after the other, for as long as the process lives."""
    while True:
        _do(jobs.get())


def _do(job: list[Any]) -> None:
    """Run the kernel of a job that is not over yet."""
    unfinished = tuple(job)  # at once: its owner may empty it at any time
    if unfinished:
        kernel, arguments = unfinished
        with suppress(MemoryError):  # without room for its scratch, a helper is no help
            kernel(*arguments)


def _worthwhile(threads: int | None, work: int) -> int:
    """How many threads to use for `work` multiply-adds per corner."""
    most = config.NUMBA_NUM_THREADS if threads is None else threads
    return int(max(1, min(most, work // _GRAIN)))


def _share_out(kernel: Any, threads: int, *arguments: Any) -> None:
    """Run the tasks of `kernel` in this thread and in helpers, as far as those wake in time."""
    state = np.zeros(2 * _HELPERS_INSIDE, np.int64)
    job = [kernel, (state, *arguments)]
    with suppress(RuntimeError):  # no thread to be had, as at interpreter exit
        while len(_helpers) < threads - 1:
            helper = Thread(target=_help, args=(_jobs,), name="cupy_msda", daemon=True)
            helper.start()
            _helpers.append(helper)
    for _ in range(threads - 1):
        _jobs.put(job)
    try:
        kernel(state, *arguments)
    finally:
        job.clear()
    # All tasks have been taken: helpers that come now find none. Those inside are polled first,
    # since they are nearly done and to sleep and wake would take longer.
    while threads > 1 and not _settled(state):
        sleep(1e-4)


# SIMD ---------------------------------------------------------------------------------------------


_intrinsic: Any = extending.intrinsic  # its types do not fit functions that it turns into others


class _Lanes(types.Type):
    """`width` numbers of `dtype` side by side: one LLVM vector, in as many registers as it takes."""

    def __init__(self, dtype: Any, width: int) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(f"Lanes({dtype} x {width})")


@extending.register_model(_Lanes)
class _LanesModel(extending.models.PrimitiveModel):
    """Tells Numba the LLVM type of `_Lanes`."""

    def __init__(self, manager: Any, lanes: Any) -> None:
        number = manager.lookup(lanes.dtype).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(number, lanes.width))


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """LLVM pointer to an element of a one-dimensional contiguous array, unchecked."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _shuffled(builder: Any, a: Any, b: Any, order: Sequence[int]) -> Any:
    """The numbers of vectors a and b, as of one, in the order given."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), list(order))
    return builder.shuffle_vector(a, b, mask)


@_intrinsic(prefer_literal=True)
def _zeros(context: Any, array: Any, width: Any) -> Any:
    """`width` zeros of the dtype of `array`; `width` is a compile-time constant."""
    del context
    lanes = _Lanes(array.dtype, width.literal_value)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del builder, signature, arguments
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(array, width), emit


@_intrinsic
def _load(context: Any, like: Any, array: Any, index: Any) -> Any:
    """As many numbers as `like` has, from array[index] on."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = context.get_value_type(like)
        address = _address(context, builder, signature.args[1], *arguments[1:])
        loaded = builder.load(builder.bitcast(address, vector.as_pointer()))
        loaded.align = array.dtype.bitwidth // 8
        return loaded

    return like(like, array, types.int64), emit


@_intrinsic
def _store(context: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Write `lanes` to array[index] and what follows."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = context.get_value_type(lanes)
        address = _address(context, builder, signature.args[0], *arguments[:2])
        stored = builder.store(arguments[2], builder.bitcast(address, vector.as_pointer()))
        stored.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), emit


@_intrinsic
def _times(context: Any, a: Any, b: Any) -> Any:
    """a * b, number by number."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.fmul(*arguments)

    return a(a, b), emit


@_intrinsic
def _plus(context: Any, total: Any, factor: Any, lanes: Any) -> Any:
    """Total + factor * lanes for a scalar factor, fused where the machine can."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del signature
        empty = ir.Constant(context.get_value_type(lanes), ir.Undefined)
        first = builder.insert_element(empty, arguments[1], ir.Constant(ir.IntType(32), 0))
        factors = _shuffled(builder, first, empty, [0] * lanes.width)
        product = builder.fmul(factors, arguments[2], flags=("contract",))
        return builder.fadd(arguments[0], product, flags=("contract",))

    return lanes(total, lanes.dtype, lanes), emit


@_intrinsic
def _sums(context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sum of the numbers of each of four, folded in halves and the last four by a transpose."""
    del context

    def emit(context: Any, builder: Any, signature: Any, vectors: Any) -> Any:
        del context, signature
        width = 4
        while width < a.width:
            width *= 2
        zero = ir.Constant(vectors[0].type, None)
        order = [min(i, a.width) for i in range(width)]  # a.width: the first number of `zero`
        vectors = [_shuffled(builder, vector, zero, order) for vector in vectors]
        while width > 4:
            width //= 2
            halves = range(width), range(width, 2 * width)
            vectors = [
                builder.fadd(*(_shuffled(builder, v, v, h) for h in halves)) for v in vectors
            ]
        for even, odd in ([0, 1, 4, 5], [2, 3, 6, 7]), ([0, 2, 4, 6], [1, 3, 5, 7]):
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [
                builder.fadd(_shuffled(builder, *pair, even), _shuffled(builder, *pair, odd))
                for pair in pairs
            ]
        index = [ir.Constant(ir.IntType(32), i) for i in range(4)]
        return cgutils.pack_array(builder, [builder.extract_element(vectors[0], i) for i in index])

    return types.UniTuple(a.dtype, 4)(a, b, c, d), emit


@_intrinsic
def _prefetch_line(context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index], which need not exist: a hint never faults."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], function)
        address = _address(context, builder, signature.args[0], *arguments)
        # Into the second level: it keeps more lines on their way at once than the first.
        read, second_level, data = i32(0), i32(2), i32(1)
        builder.call(prefetch, [builder.bitcast(address, byte), read, second_level, data])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@_intrinsic
def _per_line(context: Any, array: Any) -> Any:
    """How many elements of `array` a cache line holds, a constant: its itemsize is read from memory."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del builder, arguments
        return context.get_constant(signature.return_type, _LINE_BYTES * 8 // array.dtype.bitwidth)

    return types.int64(array), emit


@_intrinsic
def _fetch_add(context: Any, array: Any, index: Any, increment: Any) -> Any:
    """array[index], to which `increment` is added in the same atomic step."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], *arguments[:2])
        return builder.atomic_rmw("add", address, arguments[2], "acq_rel")

    return types.int64(array, types.int64, types.int64), emit


# Kernels ------------------------------------------------------------------------------------------

# No fast-math: NaN and infinity keep their meaning, and coordinates round as they are written.
_inlined = njit(forceinline=True, error_model="numpy")


def _compiled(function: Any) -> Any:
    """`function` as a kernel to call from Python, compiled on first call."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no directory that a cache could be in can be written
        return njit(nogil=True, error_model="numpy")(function)


@_compiled
def _settled(state: Any) -> bool:
    """Whether all helpers have left their kernel, or do so while we poll."""
    polls = 0
    while polls < _SPINS and _fetch_add(state, _HELPERS_INSIDE, 0) > 0:
        polls += 1
    return polls < _SPINS


@_inlined
def _prefetch(array: Any, first: Any, count: Any) -> None:
    """Ask for the cache lines of array[first:first + count]."""
    for index in range(first, first + count, _per_line(array)):
        _prefetch_line(array, index)


@_inlined
def _level(table: Any, index: Any) -> Any:
    """(H, W, start, P) of a level."""
    return table[index, 0], table[index, 1], table[index, 2], table[index, 3]


@_inlined
def _locate(locations: Any, point: Any, height: Any, width: Any) -> Any:
    """Pixel coordinates (x, y) of a point, and whether it can touch a pixel: never if one is NaN.

    They are in the dtype of `height` and `width`.
    """
    real = type(height)
    x = real(locations[2 * point]) * width - real(0.5)
    y = real(locations[2 * point + 1]) * height - real(0.5)
    return x, y, (x > real(-1)) & (y > real(-1)) & (x < width) & (y < height)


@_inlined
def _prefetch_cells(plane: Any, head_dim: Any, table: Any, locations: Any, point: Any) -> None:
    """Ask for the corners, inside the level or not, of the points of a row from `point` on.

    A plane is what one head sees of an array: (array, index of its first number, row pitch).
    """
    array, origin, pitch = plane
    for index in range(len(table)):
        rows, columns, start, points = _level(table, index)
        height, width = array.dtype.type(rows), array.dtype.type(columns)
        for _ in range(points):
            x, y, inside = _locate(locations, point, height, width)
            point += 1
            if inside:
                cell = start + np.int64(np.floor(y)) * columns + np.int64(np.floor(x))
                at = origin + cell * pitch
                _prefetch(array, at, head_dim)
                _prefetch(array, at + pitch, head_dim)
                at += columns * pitch
                _prefetch(array, at, head_dim)
                _prefetch(array, at + pitch, head_dim)


@_inlined
def _sample(total: Any, plane: Any, table: Any, locations: Any, weights: Any, point: Any) -> Any:
    """`total` plus the samples of a row, whose points begin with `point`."""
    value, origin, pitch = plane
    real = value.dtype.type
    for index in range(len(table)):
        rows, columns, start, points = _level(table, index)
        height, width = real(rows), real(columns)
        first = origin + start * pitch
        for _ in range(points):
            x, y, inside = _locate(locations, point, height, width)
            weight = real(weights[point])
            point += 1
            if inside:
                floor_x, floor_y = np.floor(x), np.floor(y)
                column, row = np.int64(floor_x), np.int64(floor_y)
                right, lower = x - floor_x, y - floor_y
                left, upper = real(1) - right, real(1) - lower
                near, far = column >= 0, column + 1 < columns
                at = first + (row * columns + column) * pitch
                if row >= 0:
                    share = weight * upper
                    if near:
                        total = _plus(total, share * left, _load(total, value, at))
                    if far:
                        total = _plus(total, share * right, _load(total, value, at + pitch))
                at += columns * pitch
                if row + 1 < rows:
                    share = weight * lower
                    if near:
                        total = _plus(total, share * left, _load(total, value, at))
                    if far:
                        total = _plus(total, share * right, _load(total, value, at + pitch))
    return total


@cache
def _forward_kernel(head_dim: int, itemsize: int) -> Any:
    """The forward kernel for D channels of `itemsize` bytes."""
    lanes = _lanes(head_dim, itemsize)

    @_compiled
    def forward(state: Any, out: Any, inputs: Any, table: Any, sizes: Any) -> None:
        value, locations, weights = inputs
        batch, spatial_size, num_heads, rows, stretch = sizes  # rows of one image
        points = len(weights) // (batch * rows)  # of one row, K = L*P
        pitch = num_heads * head_dim
        stretches = (rows + stretch - 1) // stretch
        zeros = _zeros(value, lanes)
        _fetch_add(state, _HELPERS_INSIDE, 1)
        while True:
            task = _fetch_add(state, 0, 1)
            image = task // stretches
            if image >= batch:
                break
            begin = task % stretches * stretch
            end = min(begin + stretch, rows) + image * rows
            head = begin % num_heads
            origin = image * spatial_size * pitch
            for row in range(begin + image * rows, end):
                here = origin + head * head_dim
                head = head + 1 if head + 1 < num_heads else 0
                if row + _CELLS_AHEAD < end:
                    after = origin + (head + _CELLS_AHEAD - 1) % num_heads * head_dim
                    point = (row + _CELLS_AHEAD) * points
                    _prefetch_cells((value, after, pitch), head_dim, table, locations, point)
                stream = row + _STREAM_AHEAD
                _prefetch(locations, 2 * stream * points, 2 * points)
                _prefetch(weights, stream * points, points)
                _prefetch(out, stream * head_dim, head_dim)
                for channel in range(0, head_dim, lanes):
                    plane = value, here + channel, pitch
                    total = _sample(zeros, plane, table, locations, weights, row * points)
                    _store(out, row * head_dim + channel, total)
        _fetch_add(state, _HELPERS_INSIDE, -1)

    return forward


@_inlined
def _copy_rows(zeros: Any, lanes: Any, head_dim: Any, rows: Any, source: Any, target: Any) -> None:
    """Copy `rows` D-vectors from plane to plane."""
    source_array, source_at, source_pitch = source
    target_array, target_at, target_pitch = target
    for _ in range(rows):
        for channel in range(0, head_dim, lanes):
            part = _load(zeros, source_array, source_at + channel)
            _store(target_array, target_at + channel, part)
        source_at += source_pitch
        target_at += target_pitch


@_inlined
def _scatter(
    zeros: Any, valid: Any, grad: Any, share: Any, value: Any, by_value: Any, at: Any
) -> Any:
    """Add share * grad to a corner of by_value; return grad * value there, to be summed over D."""
    if not valid:
        return zeros
    _store(by_value, at, _plus(_load(zeros, by_value, at), share, grad))
    return _times(grad, _load(zeros, value, at))


@_inlined
def _scatter_row(
    zeros: Any,
    channels: Any,
    planes: Any,
    table: Any,
    inputs: Any,
    gradients: Any,
    row: Any,
    point: Any,
) -> None:
    """All gradients that a row makes, whose points begin with `point`; `planes` share their layout."""
    lanes, head_dim = channels
    value, by_value, origin, pitch = planes
    grad_output, locations, weights = inputs
    by_locations, by_weights = gradients
    real = value.dtype.type
    for index in range(len(table)):
        rows, columns, start, points = _level(table, index)
        height, width = real(rows), real(columns)
        first = origin + start * pitch
        for _ in range(points):
            x, y, inside = _locate(locations, point, height, width)
            by_x, by_y, by_weight = real(0), real(0), real(0)
            if inside:
                weight = real(weights[point])
                floor_x, floor_y = np.floor(x), np.floor(y)
                column, line = np.int64(floor_x), np.int64(floor_y)
                right, lower = x - floor_x, y - floor_y
                left, upper = real(1) - right, real(1) - lower
                near, far = column >= 0, column + 1 < columns
                above, below = line >= 0, line + 1 < rows
                at = first + (line * columns + column) * pitch
                down = columns * pitch
                # Corners 1 to 4: top left, top right, bottom left, bottom right.
                share_1, share_2 = weight * upper * left, weight * upper * right
                share_3, share_4 = weight * lower * left, weight * lower * right
                dot_1, dot_2, dot_3, dot_4 = real(0), real(0), real(0), real(0)
                for channel in range(0, head_dim, lanes):
                    grad = _load(zeros, grad_output, row * head_dim + channel)
                    at_1 = at + channel
                    at_3 = at_1 + down
                    sums = _sums(
                        _scatter(zeros, above & near, grad, share_1, value, by_value, at_1),
                        _scatter(zeros, above & far, grad, share_2, value, by_value, at_1 + pitch),
                        _scatter(zeros, below & near, grad, share_3, value, by_value, at_3),
                        _scatter(zeros, below & far, grad, share_4, value, by_value, at_3 + pitch),
                    )
                    dot_1 += sums[0]
                    dot_2 += sums[1]
                    dot_3 += sums[2]
                    dot_4 += sums[3]
                by_weight = upper * (left * dot_1 + right * dot_2)
                by_weight += lower * (left * dot_3 + right * dot_4)
                by_x = width * weight * (upper * (dot_2 - dot_1) + lower * (dot_4 - dot_3))
                by_y = height * weight * (left * (dot_3 - dot_1) + right * (dot_4 - dot_2))
            by_weights[point] = by_weight
            by_locations[2 * point] = by_x
            by_locations[2 * point + 1] = by_y
            point += 1


@cache
def _backward_kernel(head_dim: int, itemsize: int) -> Any:
    """The backward kernel for D channels of `itemsize` bytes."""
    lanes = _lanes(head_dim, itemsize)

    @_compiled
    def backward(
        state: Any, gradients: Any, inputs: Any, table: Any, parts: Any, sizes: Any
    ) -> None:
        by_value, by_locations, by_weights = gradients
        grad_output, value, locations, weights = inputs
        batch, spatial_size, num_heads, num_queries, scratch = sizes
        row_points = len(table) * table[0, 3]  # K = L*P
        packed_value = np.empty(scratch, value.dtype)
        packed_by_value = np.empty(scratch, value.dtype)
        zeros = _zeros(value, lanes)
        _fetch_add(state, _HELPERS_INSIDE, 1)
        while True:
            # Neighbouring tasks differ in the head, so that what they write shares no cache line.
            task = _fetch_add(state, 0, 1)
            image, head = task // (num_heads * len(parts)), task % num_heads
            if image >= batch:
                break
            part = parts[task // num_heads % len(parts)]
            first_row, rows, packed = part[2], part[3], part[4] != 0
            levels = table[part[0] : part[1]]
            part_points = len(levels) * table[0, 3]
            origin = (image * spatial_size * num_heads + head) * head_dim
            pitch = num_heads * head_dim
            here = origin + first_row * pitch
            source, target = value, by_value
            if packed:
                packed_plane = packed_value, 0, head_dim
                _copy_rows(zeros, lanes, head_dim, rows, (value, here, pitch), packed_plane)
                packed_by_value[: rows * head_dim] = 0
                source, target = packed_value, packed_by_value
                origin, pitch = -first_row * head_dim, head_dim
            planes = source, target, origin, pitch
            for query in range(num_queries):
                row = (image * num_queries + query) * num_heads + head
                point = row * row_points + part[0] * table[0, 3]
                if not packed and query + _CELLS_AHEAD < num_queries:
                    after = point + _CELLS_AHEAD * num_heads * row_points
                    _prefetch_cells((source, origin, pitch), head_dim, levels, locations, after)
                    _prefetch_cells((target, origin, pitch), head_dim, levels, locations, after)
                stream = point + _STREAM_AHEAD * num_heads * row_points
                _prefetch(locations, 2 * stream, 2 * part_points)
                _prefetch(by_locations, 2 * stream, 2 * part_points)
                _prefetch(weights, stream, part_points)
                _prefetch(by_weights, stream, part_points)
                _prefetch(grad_output, (row + _STREAM_AHEAD * num_heads) * head_dim, head_dim)
                _scatter_row(
                    zeros,
                    (lanes, head_dim),
                    planes,
                    levels,
                    (grad_output, locations, weights),
                    (by_locations, by_weights),
                    row,
                    point,
                )
            if packed:
                packed_plane = packed_by_value, 0, head_dim
                by_value_plane = by_value, here, num_heads * head_dim
                _copy_rows(zeros, lanes, head_dim, rows, packed_plane, by_value_plane)
        _fetch_add(state, _HELPERS_INSIDE, -1)

    return backward
