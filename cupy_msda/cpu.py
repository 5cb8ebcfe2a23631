# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels, on NumPy arrays. Numba compiles them on first call and caches them on disk.

A "row" is one (image, query, head): L*P points, each with 4 corners, each corner a D-vector of
`value`. A row's D channels lie side by side in SIMD registers, `lanes` of them at a time, and every
corner outside its level is skipped, not read and multiplied by zero.

Forward: a task is a stretch of consecutive rows, so locations, weights and output stream, and while
one row is summed the cells of the next are on their way to the cache. Backward: a task is one
(image, level, head), which alone owns a plane of grad_value, so nothing is shared or atomic.

Tasks are handed out by an atomic counter to the calling thread and to helpers from a thread pool.
Unlike Numba's own threading layers this survives fork and calls from several threads at once, and
what a task computes does not depend on who runs it: results are the same for any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_REGISTER_BYTES = 256  # of one row in registers at a time: half of what AVX2 has, an eighth of AVX-512
_LINE_BYTES = 64
_STREAM_AHEAD = 4  # queries between a prefetch of a strided row's data and their use
_GRAIN = 2**17  # multiply-adds per corner that are worth waking a thread for, some 50 microseconds
_SPINS = 20_000  # polls, some 100 microseconds, before a wait for helpers goes to sleep
_HELPERS_INSIDE = 8  # index into the scheduling state, a cache line away from the task counter


def forward(
    value: np.ndarray[Any, Any],
    levels: Sequence[tuple[int, int, int]],
    locations: np.ndarray[Any, Any],
    weights: np.ndarray[Any, Any],
    out: np.ndarray[Any, Any] | None = None,
    *,
    threads: int | None = None,
) -> np.ndarray[Any, Any]:
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
    rows = n * lq * m
    threads = _worthwhile(threads, weights.size * d)
    stretch = min(max(rows // (16 * threads), 64), 1024)
    _share_out(
        _forward_kernel(d, _lanes(d, target.itemsize)),
        threads,
        target.reshape(-1),
        *(array.reshape(-1) for array in inputs),
        _table(levels, points),
        (s, m, lq, rows, stretch),
    )
    if target is not out:
        out[...] = target
    return out


def backward(
    grad_output: np.ndarray[Any, Any],
    value: np.ndarray[Any, Any],
    levels: Sequence[tuple[int, int, int]],
    locations: np.ndarray[Any, Any],
    weights: np.ndarray[Any, Any],
    *,
    threads: int | None = None,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
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
    planes = _planes(levels, s, lq * points)
    scratch = d * max((int(rows) for *_, rows, packed in planes if packed), default=0)
    _share_out(
        _backward_kernel(d, _lanes(d, by_value.itemsize)),
        _worthwhile(threads, weights.size * d),
        tuple(array.reshape(-1) for array in (by_value, *by_points)),
        tuple(array.reshape(-1) for array in inputs),
        _table(levels, points),
        planes,
        (n, s, m, lq, scratch),
    )
    by_value, *by_points = (
        array.astype(source.dtype, copy=False)
        for array, source in zip((by_value, *by_points), sources, strict=True)
    )
    return by_value, by_points[0], by_points[1]


def _widened(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float16 as float32, which the kernels compute in; anything else as it is."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _table(levels: Sequence[tuple[int, int, int]], points: int) -> np.ndarray[Any, Any]:
    """(H, W, start, P) of each level; an empty one has a size that no point is inside of."""
    rows = [(h, w, start, points) if h * w else (-1, -1, 0, points) for h, w, start in levels]
    return np.array(rows, np.int64)


def _planes(
    levels: Sequence[tuple[int, int, int]], spatial_size: int, points: int
) -> np.ndarray[Any, Any]:
    """The parts of a head's grad_value that tasks own: (first level, end, first row, rows, packed).

    One per level; levels that overlap share one, since two tasks must not add to one cell. A plane
    with more points than rows pays for being packed: copied to where its rows lie side by side.
    """
    spans = sorted((start, start + h * w) for h, w, start in levels if h * w)
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
        planes = [(0, len(levels), 0, spatial_size)]
    else:
        planes = [(i, i + 1, start, h * w) for i, (h, w, start) in enumerate(levels)]
    return np.array([(*p, points * (p[1] - p[0]) > p[3] > 0) for p in planes], np.int64)


def _lanes(head_dim: int, itemsize: int) -> int:
    """How many channels to hold in registers at once: the largest divisor of D that fits."""
    most = min(head_dim, _REGISTER_BYTES // itemsize)
    return next(lanes for lanes in range(most, 0, -1) if head_dim % lanes == 0)


# Threads ------------------------------------------------------------------------------------------


def _new_pool() -> None:
    """Make the thread pool; its threads start when they are first asked for."""
    global _pool  # noqa: PLW0603
    _pool = ThreadPoolExecutor(max(os.cpu_count() or 1, config.NUMBA_NUM_THREADS), "cupy_msda")


_pool: ThreadPoolExecutor
_new_pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_pool)  # threads do not survive a fork


def _worthwhile(threads: int | None, work: int) -> int:
    """How many threads to use for `work` multiply-adds per corner."""
    most = config.NUMBA_NUM_THREADS if threads is None else threads
    return int(max(1, min(most, work // _GRAIN)))


def _share_out(kernel: Any, threads: int, *arguments: Any) -> None:
    """Run the tasks of `kernel` in this thread and in helpers, as far as those wake in time."""
    state = np.zeros(2 * _HELPERS_INSIDE, np.int64)
    helpers: list[Future[None]] = []
    try:
        for _ in range(threads - 1):
            helpers.append(_pool.submit(kernel, state, *arguments))
    except RuntimeError:
        pass  # no thread to be had, as at interpreter exit: this one does all the tasks
    kernel(state, *arguments)
    # Tasks have all been taken now. Helpers that come later find none; those inside are polled,
    # since going to sleep and waking again would take longer than what they have left to do.
    if helpers and not _settled(state):
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    for helper in helpers:
        helper.cancel()


# SIMD ---------------------------------------------------------------------------------------------


class _Lanes(types.Type):  # type: ignore[misc]
    """`width` numbers of `dtype` side by side: one LLVM vector, in as many registers as it takes."""

    def __init__(self, dtype: Any, width: int) -> None:
        self.dtype, self.width = dtype, width
        super().__init__(f"Lanes({dtype} x {width})")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
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


@intrinsic(prefer_literal=True)
def _zeros(context: Any, array: Any, width: Any) -> Any:
    """`width` zeros of the dtype of `array`; `width` is a compile-time constant."""
    del context
    lanes = _Lanes(array.dtype, width.literal_value)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del builder, signature, arguments
        return ir.Constant(context.get_value_type(lanes), None)

    return lanes(array, width), emit


@intrinsic
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


@intrinsic
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


@intrinsic
def _times(context: Any, a: Any, b: Any) -> Any:
    """a * b, number by number."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.fmul(*arguments)

    return a(a, b), emit


@intrinsic
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


@intrinsic
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
            vectors = [builder.fadd(*(_shuffled(builder, v, v, h) for h in halves)) for v in vectors]
        for even, odd in ([0, 1, 4, 5], [2, 3, 6, 7]), ([0, 2, 4, 6], [1, 3, 5, 7]):
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [
                builder.fadd(_shuffled(builder, *pair, even), _shuffled(builder, *pair, odd))
                for pair in pairs
            ]
        index = [ir.Constant(ir.IntType(32), i) for i in range(4)]
        return cgutils.pack_array(builder, [builder.extract_element(vectors[0], i) for i in index])

    return types.UniTuple(a.dtype, 4)(a, b, c, d), emit


@intrinsic
def _prefetch_line(context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index], which need not exist: a hint never faults."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], function)
        address = _address(context, builder, signature.args[0], *arguments)
        read, keep_close, data = i32(0), i32(3), i32(1)
        builder.call(prefetch, [builder.bitcast(address, byte), read, keep_close, data])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@intrinsic
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
_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled  # type: ignore[untyped-decorator]
def _settled(state: Any) -> bool:
    """Whether all helpers have left their kernel, or do so while we poll."""
    for _ in range(_SPINS):
        if _fetch_add(state, _HELPERS_INSIDE, 0) == 0:
            return True
    return False


@_inlined  # type: ignore[untyped-decorator]
def _prefetch(array: Any, first: Any, count: Any) -> None:
    """Ask for the cache lines of array[first:first + count]."""
    for index in range(first, first + count, _LINE_BYTES // array.itemsize):
        _prefetch_line(array, index)


@_inlined  # type: ignore[untyped-decorator]
def _locate(value: Any, locations: Any, point: Any, level: Any) -> Any:
    """Pixel coordinates (x, y) of a point, and whether it can touch a pixel: never if one is NaN."""
    real = value.dtype.type
    height, width, edge = real(level[0]), real(level[1]), real(-1)
    x = real(locations[2 * point]) * width - real(0.5)
    y = real(locations[2 * point + 1]) * height - real(0.5)
    return x, y, (x > edge) & (y > edge) & (x < width) & (y < height)


@_inlined  # type: ignore[untyped-decorator]
def _prefetch_cells(
    plane: Any, origin: Any, pitch: Any, head_dim: Any, table: Any, locations: Any, point: Any
) -> None:
    """Ask for the corners, inside the level or not, of the points from `point` on."""
    for index in range(len(table)):
        level = table[index]
        for _ in range(level[3]):
            x, y, inside = _locate(plane, locations, point, level)
            point += 1
            if inside:
                cell = level[2] + np.int64(np.floor(y)) * level[1] + np.int64(np.floor(x))
                upper = origin + cell * pitch
                lower = upper + level[1] * pitch
                _prefetch(plane, upper, head_dim)
                _prefetch(plane, upper + pitch, head_dim)
                _prefetch(plane, lower, head_dim)
                _prefetch(plane, lower + pitch, head_dim)


@_inlined  # type: ignore[untyped-decorator]
def _sample(
    total: Any, value: Any, origin: Any, pitch: Any, table: Any, locations: Any, weights: Any, point: Any
) -> Any:
    """`total` and the samples of a row, for the channels that `origin` points to."""
    real = value.dtype.type
    for index in range(len(table)):
        level = table[index]
        height, width = level[0], level[1]
        for _ in range(level[3]):
            x, y, inside = _locate(value, locations, point, level)
            weight = real(weights[point])
            point += 1
            if inside:
                left, top = np.floor(x), np.floor(y)
                column, row = np.int64(left), np.int64(top)
                right, lower = x - left, weight * (y - top)
                left, upper = real(1) - right, weight * (real(1) - (y - top))
                at = origin + (level[2] + row * width + column) * pitch
                if row >= 0:
                    if column >= 0:
                        total = _plus(total, upper * left, _load(total, value, at))
                    if column + 1 < width:
                        total = _plus(total, upper * right, _load(total, value, at + pitch))
                at += width * pitch
                if row + 1 < height:
                    if column >= 0:
                        total = _plus(total, lower * left, _load(total, value, at))
                    if column + 1 < width:
                        total = _plus(total, lower * right, _load(total, value, at + pitch))
    return total


@cache
def _forward_kernel(head_dim: int, lanes: int) -> Any:
    """The forward kernel for D channels, `lanes` at a time."""

    @_compiled  # type: ignore[untyped-decorator]
    def forward(state, out, value, locations, weights, table, sizes):  # type: ignore[no-untyped-def]
        spatial_size, num_heads, num_queries, rows, stretch = sizes
        points = len(weights) // rows
        pitch = num_heads * head_dim
        _fetch_add(state, _HELPERS_INSIDE, 1)
        while True:
            first = _fetch_add(state, 0, 1) * stretch
            if first >= rows:
                break
            for row in range(first, min(first + stretch, rows)):
                after = min(row + 1, rows - 1)
                image, head = after // (num_queries * num_heads), after % num_heads
                origin = image * spatial_size * pitch + head * head_dim
                _prefetch_cells(value, origin, pitch, head_dim, table, locations, after * points)
                image, head = row // (num_queries * num_heads), row % num_heads
                origin = image * spatial_size * pitch + head * head_dim
                for channel in range(0, head_dim, lanes):
                    at = origin + channel
                    zeros = _zeros(value, lanes)
                    total = _sample(zeros, value, at, pitch, table, locations, weights, row * points)
                    _store(out, row * head_dim + channel, total)
        _fetch_add(state, _HELPERS_INSIDE, -1)

    return forward


@_inlined  # type: ignore[untyped-decorator]
def _copy_rows(zeros: Any, lanes: Any, head_dim: Any, rows: Any, source: Any, target: Any) -> None:
    """Copy D-vectors between two (array, index of the first, pitch)."""
    array, index, pitch = source
    target_array, target_index, target_pitch = target
    for row in range(rows):
        for channel in range(0, head_dim, lanes):
            part = _load(zeros, array, index + row * pitch + channel)
            _store(target_array, target_index + row * target_pitch + channel, part)


@_inlined  # type: ignore[untyped-decorator]
def _scatter(
    nothing: Any, counts: Any, grad: Any, share: Any, value: Any, by_value: Any, at: Any
) -> Any:
    """Add share * grad to a corner of by_value; return grad * value there, to be summed over D."""
    if not counts:
        return nothing
    _store(by_value, at, _plus(_load(grad, by_value, at), share, grad))
    return _times(grad, _load(grad, value, at))


@_inlined  # type: ignore[untyped-decorator]
def _scatter_row(  # noqa: PLR0913, PLR0917
    nothing: Any, lanes: Any, head_dim: Any, row: Any, plane: Any, table: Any, inputs: Any,
    gradients: Any, point: Any
) -> None:
    """All gradients that the points of one row make, from `point` on."""
    value, by_value, origin, pitch = plane
    grad_output, locations, weights = inputs
    by_locations, by_weights = gradients
    real = value.dtype.type
    for index in range(len(table)):
        level = table[index]
        height, width = level[0], level[1]
        for _ in range(level[3]):
            x, y, inside = _locate(value, locations, point, level)
            weight = real(weights[point])
            by_x, by_y, by_weight = real(0), real(0), real(0)
            if inside:
                floor_x, floor_y = np.floor(x), np.floor(y)
                column, line = np.int64(floor_x), np.int64(floor_y)
                right, lower = x - floor_x, y - floor_y
                left, upper = real(1) - right, real(1) - lower
                near, far = column >= 0, column + 1 < width
                above, below = line >= 0, line + 1 < height
                at_1 = origin + (level[2] + line * width + column) * pitch
                at_3 = at_1 + width * pitch
                dot_1, dot_2, dot_3, dot_4 = real(0), real(0), real(0), real(0)
                for channel in range(0, head_dim, lanes):
                    grad = _load(nothing, grad_output, row * head_dim + channel)
                    at = at_1 + channel
                    share = weight * upper
                    product_1 = _scatter(
                        nothing, above & near, grad, share * left, value, by_value, at
                    )
                    product_2 = _scatter(
                        nothing, above & far, grad, share * right, value, by_value, at + pitch
                    )
                    at = at_3 + channel
                    share = weight * lower
                    product_3 = _scatter(
                        nothing, below & near, grad, share * left, value, by_value, at
                    )
                    product_4 = _scatter(
                        nothing, below & far, grad, share * right, value, by_value, at + pitch
                    )
                    sums = _sums(product_1, product_2, product_3, product_4)
                    dot_1 += sums[0]
                    dot_2 += sums[1]
                    dot_3 += sums[2]
                    dot_4 += sums[3]
                by_weight = upper * (left * dot_1 + right * dot_2) + lower * (
                    left * dot_3 + right * dot_4
                )
                by_x = real(width) * weight * (upper * (dot_2 - dot_1) + lower * (dot_4 - dot_3))
                by_y = real(height) * weight * (left * (dot_3 - dot_1) + right * (dot_4 - dot_2))
            by_weights[point] = by_weight
            by_locations[2 * point] = by_x
            by_locations[2 * point + 1] = by_y
            point += 1


@cache
def _backward_kernel(head_dim: int, lanes: int) -> Any:
    """The backward kernel for D channels, `lanes` at a time."""

    @_compiled  # type: ignore[untyped-decorator]
    def backward(state, gradients, inputs, table, planes, sizes):  # type: ignore[no-untyped-def]
        by_value, by_locations, by_weights = gradients
        grad_output, value, locations, weights = inputs
        batch, spatial_size, num_heads, num_queries, scratch = sizes
        points = table[0, 3]
        packed_value = np.empty(scratch, value.dtype)
        packed_by_value = np.empty(scratch, value.dtype)
        zeros = _zeros(value, lanes)
        _fetch_add(state, _HELPERS_INSIDE, 1)
        while True:
            task = _fetch_add(state, 0, 1)
            image = task // (len(planes) * num_heads)
            if image >= batch:
                break
            # Neighbouring tasks are different heads: their rows share no cache line.
            head = task % num_heads
            part = planes[task // num_heads % len(planes)]
            first_row, rows = part[2], part[3]
            levels = table[part[0] : part[1]]
            pitch = num_heads * head_dim
            origin = image * spatial_size * pitch + head * head_dim
            mine = origin + first_row * pitch
            source, target = value, by_value
            packed = part[4] != 0
            if packed:
                _copy_rows(zeros, lanes, head_dim, rows, (value, mine, pitch), (packed_value, 0, head_dim))
                packed_by_value[: rows * head_dim] = 0
                source, target = packed_value, packed_by_value
                origin, pitch = -first_row * head_dim, head_dim
            for query in range(num_queries):
                row = (image * num_queries + query) * num_heads + head
                point = (row * len(table) + part[0]) * points
                count = len(levels) * points
                ahead = _STREAM_AHEAD * num_heads
                stream = point + ahead * len(table) * points
                _prefetch(locations, 2 * stream, 2 * count)
                _prefetch(by_locations, 2 * stream, 2 * count)
                _prefetch(weights, stream, count)
                _prefetch(by_weights, stream, count)
                _prefetch(grad_output, (row + ahead) * head_dim, head_dim)
                if not packed and query + 1 < num_queries:
                    after = point + num_heads * len(table) * points
                    _prefetch_cells(source, origin, pitch, head_dim, levels, locations, after)
                    _prefetch_cells(target, origin, pitch, head_dim, levels, locations, after)
                plane = source, target, origin, pitch
                _scatter_row(zeros, lanes, head_dim, row, plane, levels, (grad_output, locations, weights), (by_locations, by_weights), point)
            if packed:
                _copy_rows(zeros, lanes, head_dim, rows, (packed_by_value, 0, head_dim), (by_value, mine, num_heads * head_dim))
        _fetch_add(state, _HELPERS_INSIDE, -1)

    return backward
