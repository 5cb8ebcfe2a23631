# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels, on NumPy arrays. Numba compiles each once and caches it on disk.

A "row" is one (image, query, head): K points, those of all levels, each with 4 corners, each corner
a D-vector of `value`; by nearest interpolation a point has one pixel. The kernels hold `lanes` channels
of a row in SIMD registers at a time and skip corners that are outside the level or masked instead of
reading them and multiplying by zero.

Forward: a task is a range of consecutive rows, so locations, weights and output stream, and the
processor fetches them ahead by itself; while one row is summed, the cells of a later one are
prefetched. Backward: a task is one (image, level, head), the only one that writes its plane of
grad_value, so nothing is shared and nothing is atomic.

Fused forward: the locations and weights of a row are computed into scratch when its cells are
prefetched. Fused backward: three kernels, one after another, work in the arrays that become the
gradients of offsets and logits: the first writes locations and weights there, the plain backward puts
their gradients in their place, and the last applies the chain rule, row by row.

An atomic counter hands out tasks to the calling thread and to helper threads, as far as these wake
in time. Unlike Numba's threading layers this survives fork and calls from several threads at once.
A task computes the same on every thread: results are bitwise identical for any number of threads.

All in one file, because Numba's disk cache notices changes only in the file of the kernel itself.

Reference: Zhu et al., "Deformable DETR", arXiv:2010.04159.
"""

# Numba's own types are partial, differ between versions, and do not cover compiled code.
# mypy: disable-error-code="attr-defined, import-untyped, misc, no-untyped-call, untyped-decorator"

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from itertools import pairwise
from math import factorial
from queue import SimpleQueue
from threading import Thread
from time import sleep
from typing import Any

import numpy as np
from llvmlite import ir
from numba import config, extending, njit, types
from numba.core import cgutils

from cupy_msda.cpu.cache import disk_cache
from cupy_msda.cpu.threads import limit

_Array = np.ndarray[Any, Any]

_REGISTER_BYTES = 512  # of one row at a time, less: the registers of AVX2, a quarter of AVX-512's
_LINE_BYTES = 64
_CELLS_AHEAD = 2  # rows between the prefetch of a row's cells and their use
_POINTS_AHEAD = 16  # points in these rows of the forward, which would be over before memory answers
_STREAM_AHEAD = 4  # rows of a backward task between the prefetch of streamed data and its use
_GRAIN = 2**17  # multiply-adds per corner worth waking a thread for, about 50 microseconds
_SPINS = 20_000  # polls for helpers before sleeping, about 100 microseconds
_HELPERS_INSIDE = 8  # index into the scheduling state, a cache line away from the task counter


def forward(
    value: _Array,
    levels: Sequence[tuple[int, int, int]],
    locations: _Array,
    weights: _Array,
    *,
    num_points: Sequence[int],
    interpolation: str = "bilinear",
    mask: _Array | None = None,
    threads: int | None = None,
) -> _Array:
    """Multi-scale deformable attention of validated, C-contiguous NumPy arrays of one dtype.

    Parameters
    ----------
    value : array, shape (N, S, M, D), float32 or float64
    levels : sequence of (H, W, start), within S
    locations : array, shape (N, Lq, M, L, P, 2) or (N, Lq, M, K, 2), (x, y) as fractions of the level
    weights : array, shape (N, Lq, M, L, P) or (N, Lq, M, K)
    num_points : sequence of ints, the points of each level; K is their sum
    interpolation : "bilinear" or "nearest"
    mask : bool array, shape (N, S), optional
        Where it is False, `value` is not read and counts as zero.
    threads : int, optional
        The number of threads, the calling one included; None: what `cupy_msda.cpu.threads.limit` finds.

    Returns
    -------
    array, shape (N, Lq, M*D)
        Deterministic: bitwise identical for any number of threads.
    """
    n, s, m, d = value.shape
    lq = locations.shape[1]
    if value.size == 0 or weights.size == 0:
        return np.zeros((n, lq, m * d), value.dtype)
    out = np.empty((n, lq, m * d), value.dtype)
    rows = lq * m
    threads = _worthwhile(threads, weights.size * d)
    stretch = min(max(n * rows // (16 * threads), 64), 1024)
    _share_out(
        forward_kernel(d, value.itemsize, interpolation == "nearest", mask is not None),
        threads,
        out.reshape(-1),
        _read_only(value, locations, weights),
        mask if mask is None else _read_only(mask)[0],
        _table(tuple(levels), tuple(num_points)),
        (n, s, m, rows, stretch),
    )
    return out


def backward(
    grad_output: _Array,
    value: _Array,
    levels: Sequence[tuple[int, int, int]],
    locations: _Array,
    weights: _Array,
    *,
    num_points: Sequence[int],
    interpolation: str = "bilinear",
    mask: _Array | None = None,
    threads: int | None = None,
) -> tuple[_Array, _Array, _Array]:
    """Gradients of `forward` by value, locations and weights.

    Parameters
    ----------
    grad_output : array, shape (N, Lq, M*D)
    value, levels, locations, weights, num_points, interpolation, mask, threads
        As `forward` takes them.

    Returns
    -------
    tuple of three arrays
        Each with the shape of its input. Deterministic, as `forward`.
    """
    if value.size == 0 or weights.size == 0:
        return np.zeros_like(value), np.zeros_like(locations), np.zeros_like(weights)
    points, by_points = (locations, weights), (np.empty_like(locations), np.empty_like(weights))
    rules = tuple(num_points), interpolation, mask, threads
    by_value = _scatter_points(grad_output, value, tuple(levels), points, by_points, *rules)
    return by_value, *by_points


def _scatter_points(
    grad_output: _Array,
    value: _Array,
    levels: tuple[tuple[int, int, int], ...],
    points: tuple[_Array, _Array],
    by_points: tuple[_Array, _Array],
    num_points: tuple[int, ...],
    interpolation: str,
    mask: _Array | None,
    threads: int | None,
) -> _Array:
    """The gradient of value; those of locations and weights are written to `by_points`, which may be `points`."""
    locations, weights = points
    n, s, m, d = value.shape
    lq = locations.shape[1]
    # The system hands out fresh zeros page by page when a task touches them; zeros_like would fill.
    by_value = np.zeros(value.shape, value.dtype)
    parts, packed = _parts(levels, num_points, s, lq)
    _share_out(
        backward_kernel(d, value.itemsize, interpolation == "nearest", mask is not None),
        _worthwhile(threads, weights.size * d),
        tuple(array.reshape(-1) for array in (by_value, *by_points)),
        _read_only(grad_output, value, locations, weights),
        mask if mask is None else _read_only(mask)[0],
        _table(levels, num_points),
        parts,
        (n, s, m, lq, d * packed),
    )
    return by_value


def fused_forward(
    value: _Array,
    levels: Sequence[tuple[int, int, int]],
    reference_points: _Array,
    offsets: _Array,
    logits: _Array,
    *,
    num_points: Sequence[int],
    offset_scale: float,
    interpolation: str = "bilinear",
    mask: _Array | None = None,
    threads: int | None = None,
) -> _Array:
    """`forward` at the locations and with the weights that `cupy_msda.fused` derives; neither is stored.

    Parameters
    ----------
    value, levels, num_points, interpolation, mask, threads
        As `forward` takes them.
    reference_points : array, shape (N or 1, Lq, L or 1, 2 or 4)
    offsets : array, shape (N, Lq, M, L, P, 2) or (N, Lq, M, K, 2)
    logits : array, shape (N, Lq, M, L, P) or (N, Lq, M, K)
    offset_scale : float, of offsets from boxes

    Returns
    -------
    array, shape (N, Lq, M*D)
        Deterministic, as `forward`.
    """
    n, s, m, d = value.shape
    lq = offsets.shape[1]
    if value.size == 0 or logits.size == 0:
        return np.zeros((n, lq, m * d), value.dtype)
    out = np.empty((n, lq, m * d), value.dtype)
    rows = lq * m
    threads = _worthwhile(threads, logits.size * d)
    stretch = min(max(n * rows // (16 * threads), 64), 1024)
    _share_out(
        fused_forward_kernel(d, value.itemsize, interpolation == "nearest", mask is not None),
        threads,
        out.reshape(-1),
        _read_only(value, reference_points, offsets, logits),
        mask if mask is None else _read_only(mask)[0],
        _table(tuple(levels), tuple(num_points)),
        (n, s, m, rows, stretch, *_reference_sizes(reference_points)),
        float(offset_scale),
    )
    return out


def fused_backward(  # noqa: PLR0913 - the arguments of the operator
    grad_output: _Array,
    value: _Array,
    levels: Sequence[tuple[int, int, int]],
    reference_points: _Array,
    offsets: _Array,
    logits: _Array,
    *,
    num_points: Sequence[int],
    offset_scale: float,
    interpolation: str = "bilinear",
    mask: _Array | None = None,
    threads: int | None = None,
) -> tuple[_Array, _Array, _Array, _Array]:
    """Gradients of `fused_forward` by value, reference points, offsets and logits.

    Parameters
    ----------
    grad_output : array, shape (N, Lq, M*D)
    value, levels, reference_points, offsets, logits, and the rest
        As `fused_forward` takes them.

    Returns
    -------
    tuple of four arrays
        Each with the shape of its input. Deterministic, as `forward`.
    """
    n, _, m, d = value.shape
    lq, levels, num_points = offsets.shape[1], tuple(levels), tuple(num_points)
    if value.size == 0 or logits.size == 0:
        by_value, by_references = np.zeros_like(value), np.zeros_like(reference_points)
        return by_value, by_references, np.zeros_like(offsets), np.zeros_like(logits)
    template = d, value.itemsize, interpolation == "nearest", mask is not None
    locate, _, chain = fused_backward_kernel(*template)
    workers = _worthwhile(threads, logits.size * d)
    stretch = max(lq // (16 * workers), 1)
    sizes = n, m, lq, stretch, *_reference_sizes(reference_points)
    inputs = _read_only(reference_points, offsets, logits)
    given = inputs, _table(levels, num_points), sizes, float(offset_scale)
    # They hold locations and weights, then the gradients of these, at last those of offsets and logits.
    points = np.empty_like(offsets), np.empty_like(logits)
    flat = points[0].reshape(-1), points[1].reshape(-1)
    _share_out(locate, workers, flat, *given)
    rules = num_points, interpolation, mask, threads
    by_value = _scatter_points(grad_output, value, levels, points, points, *rules)
    by_references = np.empty_like(reference_points)
    _share_out(chain, workers, (by_references.reshape(-1), *flat), *given)
    return by_value, by_references, *points


def _reference_sizes(reference_points: _Array) -> tuple[int, int, int]:
    """(N or 1, L or 1, 2 or 4)."""
    return reference_points.shape[0], *reference_points.shape[2:]


def _read_only(*arrays: _Array) -> tuple[_Array, ...]:
    """Flat views that are read-only whatever the arrays are: for Numba that is part of the type."""
    views = tuple(array.reshape(-1) for array in arrays)
    for view in views:
        view.flags.writeable = False
    return views


@lru_cache(maxsize=1024)
def _table(levels: tuple[tuple[int, int, int], ...], num_points: tuple[int, ...]) -> _Array:
    """(H, W, start, P) of each level; an empty level has a size with no point inside."""
    rows = [
        (h, w, start, points) if h * w else (-1, -1, 0, points)
        for (h, w, start), points in zip(levels, num_points, strict=True)
    ]
    return np.array(rows, np.int64)


@lru_cache(maxsize=1024)
def _parts(
    levels: tuple[tuple[int, int, int], ...],
    num_points: tuple[int, ...],
    spatial_size: int,
    num_queries: int,
) -> tuple[_Array, int]:
    """The parts of a head's grad_value, one task each, and the most positions of a packed part.

    A part is (first level, end, first position, positions, first point of a row, points, packed): one
    level, or all levels if some overlap, since two tasks must not add to one cell. Packed: its rows are
    copied to contiguous scratch, which pays off for a part with more points than positions.
    """
    spans = sorted((start, start + h * w) for h, w, start in levels if h * w)
    parts = [(i, i + 1, start, h * w) for i, (h, w, start) in enumerate(levels)]
    if any(end > start for (_, end), (start, _) in pairwise(spans)):
        parts = [(0, len(levels), 0, spatial_size)]
    rows = []
    for first, end, start, positions in parts:
        points = sum(num_points[first:end])
        packed = num_queries * points > positions > 0
        rows.append((first, end, start, positions, sum(num_points[:first]), points, packed))
    return np.array(rows, np.int64), max(row[3] * row[-1] for row in rows)


def _lanes(head_dim: int, itemsize: int) -> int:
    """The number of channels held in registers at once: the largest divisor of D that leaves one free."""
    most = min(head_dim, _REGISTER_BYTES // itemsize - 1)
    return next(lanes for lanes in range(most, 0, -1) if head_dim % lanes == 0)


# Threads ------------------------------------------------------------------------------------------


# Queue of pending jobs: [kernel, its arguments], emptied when the kernel has ended.
# A queue and plain threads, since an executor's futures take longer than some calls.
_jobs: SimpleQueue[list[Any]]
_helpers: list[Thread]


def _forget_helpers() -> None:
    """Drop all helpers; needed after a fork, which threads do not survive."""
    global _jobs, _helpers
    _jobs, _helpers = SimpleQueue(), []


_forget_helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def _help(jobs: SimpleQueue[list[Any]]) -> None:
    """Do one job after another until the process ends."""
    while True:
        _do(jobs.get())


def _do(job: list[Any]) -> None:
    """Run the kernel of a job that has not ended yet."""
    unfinished = tuple(job)  # one atomic read: the thread that posted it may empty it at any time
    if unfinished:
        kernel, arguments = unfinished
        with suppress(MemoryError):  # no room for scratch: the other threads do the work
            kernel(*arguments)


def _worthwhile(threads: int | None, work: int) -> int:
    """The number of threads for `work` multiply-adds per corner."""
    useful = work // _GRAIN
    if useful < 2:
        return 1
    return max(1, min(limit() if threads is None else threads, useful))


def _share_out(kernel: Any, threads: int, *arguments: Any) -> None:
    """Run the tasks of `kernel` in this thread and in the helpers that wake in time."""
    state = np.zeros(2 * _HELPERS_INSIDE, np.int64)
    job = [kernel, (state, *arguments)]
    with suppress(RuntimeError):  # no thread can start, as at interpreter exit
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
    # All tasks are taken, so a helper that wakes now finds none. Poll before sleeping: the helpers
    # inside are nearly done, and a sleep would take longer.
    while threads > 1 and not _settled(state):
        sleep(1e-4)


# SIMD ---------------------------------------------------------------------------------------------


_intrinsic: Any = extending.intrinsic  # its types do not fit functions that it turns into others


class _Lanes(types.Type):
    """`width` numbers of `dtype` side by side, as LLVM vectors of decreasing powers of two: 20 = 16 + 4.

    One vector of 20 would be taken apart, number by number, at every branch.
    """

    def __init__(self, dtype: Any, width: int) -> None:
        self.dtype, self.width = dtype, width
        powers = (1 << bit for bit in reversed(range(width.bit_length())))
        self.widths = [power for power in powers if width & power]
        super().__init__(f"Lanes({dtype} x {width})")


@extending.register_model(_Lanes)
class _LanesModel(extending.models.PrimitiveModel):
    """Tells Numba the LLVM type of `_Lanes`."""

    def __init__(self, manager: Any, lanes: Any) -> None:
        number = manager.lookup(lanes.dtype).get_value_type()
        vectors = [ir.VectorType(number, width) for width in lanes.widths]
        super().__init__(manager, lanes, ir.LiteralStructType(vectors))


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """LLVM pointer to an element of a one-dimensional contiguous array, unchecked."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _places(context: Any, builder: Any, lanes: Any, array_type: Any, array: Any, index: Any) -> Any:
    """LLVM pointers from array[index] on, one to each vector of `lanes`."""
    address = _address(context, builder, array_type, array, index)
    places = []
    for vector in context.get_value_type(lanes).elements:
        places.append(builder.bitcast(address, vector.as_pointer()))
        address = builder.gep(address, [ir.Constant(ir.IntType(64), vector.count)])
    return places


def _vectors(builder: Any, lanes: Any) -> list[Any]:
    """The LLVM vectors of lanes."""
    return [builder.extract_value(lanes, i) for i in range(len(lanes.type.elements))]


def _joined(builder: Any, lanes: Any) -> Any:
    """The numbers of lanes in one vector, whose width is a power of two of at least four, then zeros."""
    *larger, joined = _vectors(builder, lanes)
    for vector in reversed(larger):
        padded = _padded(builder, joined, vector.type.count)
        joined = _shuffled(builder, vector, padded, range(2 * vector.type.count))
    return _padded(builder, joined, 4)


def _padded(builder: Any, vector: Any, width: int) -> Any:
    """A vector with zeros after it, `width` numbers or more."""
    count = vector.type.count
    order = [min(i, count) for i in range(max(width, count))]  # `count`: the first of the zeros
    return _shuffled(builder, vector, ir.Constant(vector.type, None), order)


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
    """The numbers from array[index] on, as many as `like` has."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places = _places(context, builder, like, signature.args[1], *arguments[1:])
        loaded = [builder.load(place, align=array.dtype.bitwidth // 8) for place in places]
        return cgutils.make_anonymous_struct(builder, loaded)

    return like(like, array, types.int64), emit


@_intrinsic
def _store(context: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Write `lanes` to array[index] and the elements after it."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places = _places(context, builder, lanes, signature.args[0], *arguments[:2])
        for vector, place in zip(_vectors(builder, arguments[2]), places, strict=True):
            builder.store(vector, place, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), emit


@_intrinsic
def _times(context: Any, a: Any, b: Any) -> Any:
    """a * b, number by number."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        pairs = zip(*(_vectors(builder, lanes) for lanes in arguments), strict=True)
        return cgutils.make_anonymous_struct(builder, [builder.fmul(*pair) for pair in pairs])

    return a(a, b), emit


@_intrinsic
def _plus(context: Any, total: Any, factor: Any, lanes: Any) -> Any:
    """Total + factor * lanes for a scalar factor, fused where the machine can."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        totals, vectors = (_vectors(builder, arguments[i]) for i in (0, 2))
        sums = []
        for start, vector in zip(totals, vectors, strict=True):
            empty = ir.Constant(vector.type, ir.Undefined)
            first = builder.insert_element(empty, arguments[1], ir.Constant(ir.IntType(32), 0))
            factors = _shuffled(builder, first, empty, [0] * vector.type.count)
            product = builder.fmul(factors, vector, flags=("contract",))
            sums.append(builder.fadd(start, product, flags=("contract",)))
        return cgutils.make_anonymous_struct(builder, sums)

    return lanes(total, lanes.dtype, lanes), emit


@_intrinsic
def _sums(context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sums of four vectors: each is folded in halves to four numbers, those by a transpose."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        vectors = [_joined(builder, lanes) for lanes in arguments]
        width = vectors[0].type.count
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
        # Into the second-level cache: it supports more outstanding lines than the first.
        read, second_level, data = i32(0), i32(2), i32(1)
        builder.call(prefetch, [builder.bitcast(address, byte), read, second_level, data])
        return context.get_dummy_value()

    return types.void(array, types.int64), emit


@_intrinsic
def _per_line(context: Any, array: Any) -> Any:
    """Elements of `array` per cache line, as a constant: `array.itemsize` would be read from memory."""
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

# No fast-math: NaN and infinity keep their meaning, and coordinates round as written.
_inlined = njit(forceinline=True, error_model="numpy")


def _compiled(name: str, *signature: Any) -> Any:
    """Decorator: compiles a function, for Python callers and for arguments of these types alone.

    The name makes its own file in Numba's disk cache.
    """

    def compile_(function: Any) -> Any:
        if config.DISABLE_JIT:
            raise RuntimeError("NUMBA_DISABLE_JIT is set")
        function.__qualname__ = name
        kernel = njit(nogil=True, error_model="numpy")(function)
        kernel._cache = disk_cache(function)
        kernel.compile(signature)
        kernel.disable_compile()
        return kernel

    return compile_


_MASK = types.Array(types.boolean, 1, "C", readonly=True)
_INTEGERS = types.int64[::1]
_TABLE = types.int64[:, ::1]


def _arrays(itemsize: int, count: int, *, readonly: bool) -> Any:
    """The type of a tuple of flat arrays of float32 or float64."""
    real = types.float64 if itemsize == 8 else types.float32
    return types.UniTuple(types.Array(real, 1, "C", readonly=readonly), count)


@_compiled("settled", _INTEGERS)
def _settled(state: Any) -> bool:
    """Whether all helpers leave their kernel before the polls run out."""
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
def _prefetch_vector(array: Any, first: Any, count: Any) -> None:
    """Ask for the cache lines of a D-vector, which begins at a multiple of D = `count`."""
    line = _per_line(array)
    _prefetch(array, first, count)
    last_begin = line - (count & -count)  # the latest that it can begin in a line
    if (last_begin + count - 1) // line >= (count + line - 1) // line:
        _prefetch_line(array, first + count - 1)


@_inlined
def _level(table: Any, index: Any) -> Any:
    """(H, W, start, P) of a level."""
    return table[index, 0], table[index, 1], table[index, 2], table[index, 3]


@_inlined
def _locate(locations: Any, point: Any, height: Any, width: Any) -> Any:
    """Pixel coordinates (x, y) of a point, and whether it can touch a pixel: False for NaN."""
    real = type(height)
    x = locations[2 * point] * width - real(0.5)
    y = locations[2 * point + 1] * height - real(0.5)
    return x, y, (x > real(-1)) & (y > real(-1)) & (x < width) & (y < height)


@_inlined
def _cell(x: Any, y: Any) -> Any:
    """Column and row of the cell at (x, y), and the coefficients of its left, right, upper, lower side."""
    one = type(x)(1)
    floor_x, floor_y = np.floor(x), np.floor(y)
    right, lower = x - floor_x, y - floor_y
    return np.int64(floor_x), np.int64(floor_y), one - right, right, one - lower, lower


@_inlined
def _counts(mask: Any, position: Any) -> Any:
    """Whether a position of `value` counts; without a mask (None) all do, which costs nothing."""
    if mask is None:
        return True
    return mask[position]


@_inlined
def _prefetch_cells(plane: Any, head_dim: Any, table: Any, locations: Any, point: Any) -> None:
    """Ask for the corners, inside the level or not, of a row whose points begin with `point`.

    A plane is one head's part of an array: (array, index of its first number, row pitch).
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
                for line in (at, at + columns * pitch):
                    _prefetch_vector(array, line, head_dim)
                    _prefetch_vector(array, line + pitch, head_dim)


@_inlined
def _sample(
    total: Any, plane: Any, mask: Any, table: Any, locations: Any, weights: Any, point: Any
) -> Any:
    """`total` plus the samples of a row, whose points begin with `point`.

    `mask` is (array or None, index of the image's first position).
    """
    value, origin, pitch = plane
    real = value.dtype.type
    for index in range(len(table)):
        rows, columns, start, points = _level(table, index)
        height, width = real(rows), real(columns)
        first = origin + start * pitch
        for _ in range(points):
            x, y, inside = _locate(locations, point, height, width)
            weight = weights[point]
            point += 1
            if inside:
                column, row, left, right, upper, lower = _cell(x, y)
                near, far = column >= 0, column + 1 < columns
                cell = row * columns + column
                at, position = first + cell * pitch, mask[1] + start + cell
                # Both sides written out: a helper for a side made the kernel take twice as long.
                if row >= 0:
                    side = weight * upper
                    if near and _counts(mask[0], position):
                        total = _plus(total, side * left, _load(total, value, at))
                    if far and _counts(mask[0], position + 1):
                        total = _plus(total, side * right, _load(total, value, at + pitch))
                at += columns * pitch
                position += columns
                if row + 1 < rows:
                    side = weight * lower
                    if near and _counts(mask[0], position):
                        total = _plus(total, side * left, _load(total, value, at))
                    if far and _counts(mask[0], position + 1):
                        total = _plus(total, side * right, _load(total, value, at + pitch))
    return total


@_inlined
def _nearest(locations: Any, point: Any, rows: Any, columns: Any, real: Any) -> Any:
    """The cell that a point has by nearest interpolation, and whether it has one: not if it is NaN."""
    zero, half, height, width = real(0), real(0.5), real(rows), real(columns)
    x = locations[2 * point] * width + half
    y = locations[2 * point + 1] * height + half
    inside = columns > 0 and not (np.isnan(x) or np.isnan(y))
    # Clamped before and after: the integer of a large number is undefined, the real of a size is rounded.
    column = min(np.int64(min(max(x, zero), width)), columns - 1) if inside else 0
    row = min(np.int64(min(max(y, zero), height)), rows - 1) if inside else 0
    return row * columns + column, inside


@_inlined
def _prefetch_nearest(plane: Any, head_dim: Any, table: Any, locations: Any, point: Any) -> None:
    """As `_prefetch_cells`, for nearest interpolation."""
    array, origin, pitch = plane
    for index in range(len(table)):
        rows, columns, start, points = _level(table, index)
        for _ in range(points):
            cell, inside = _nearest(locations, point, rows, columns, array.dtype.type)
            point += 1
            if inside:
                _prefetch(array, origin + (start + cell) * pitch, head_dim)


@_inlined
def _sample_nearest(
    total: Any, plane: Any, mask: Any, table: Any, locations: Any, weights: Any, point: Any
) -> Any:
    """As `_sample`, for nearest interpolation."""
    value, origin, pitch = plane
    for index in range(len(table)):
        rows, columns, start, points = _level(table, index)
        for _ in range(points):
            cell, inside = _nearest(locations, point, rows, columns, value.dtype.type)
            weight = weights[point]
            point += 1
            if inside and _counts(mask[0], mask[1] + start + cell):
                pixel = _load(total, value, origin + (start + cell) * pitch)
                total = _plus(total, weight, pixel)
    return total


def _name(kind: str, head_dim: int, itemsize: int, nearest: bool, masked: bool) -> str:
    """What a kernel is called, on disk too."""
    variant = "_nearest" * nearest + "_masked" * masked
    return f"{kind}{variant}_{head_dim}_{itemsize}"


@cache
def forward_kernel(
    head_dim: int, itemsize: int, nearest: bool = False, masked: bool = False
) -> Any:
    """The forward kernel for D channels of `itemsize` bytes, one interpolation, with a mask or without."""
    lanes = _lanes(head_dim, itemsize)
    inputs = _arrays(itemsize, 3, readonly=True)
    out = _arrays(itemsize, 1, readonly=False).dtype
    mask_type = _MASK if masked else types.none
    name = _name("forward", head_dim, itemsize, nearest, masked)

    @_compiled(name, _INTEGERS, out, inputs, mask_type, _TABLE, types.UniTuple(types.int64, 5))
    def forward(state: Any, out: Any, inputs: Any, mask: Any, table: Any, sizes: Any) -> None:
        if nearest:
            sample, prefetch = _sample_nearest, _prefetch_nearest
        else:
            sample, prefetch = _sample, _prefetch_cells
        value, locations, weights = inputs
        batch, spatial_size, num_heads, rows, stretch = sizes  # rows of one image
        points = len(weights) // (batch * rows)  # of one row, K
        pitch = num_heads * head_dim
        stretches = (rows + stretch - 1) // stretch
        ahead = max(_CELLS_AHEAD, _POINTS_AHEAD // points)
        zeros = _zeros(value, lanes)
        _fetch_add(state, _HELPERS_INSIDE, 1)
        while True:
            task = _fetch_add(state, 0, 1)
            image = task // stretches
            if image >= batch:
                break
            begin = task % stretches * stretch
            end = min(begin + stretch, rows) + image * rows
            begin += image * rows
            origin, first = image * spatial_size * pitch, image * spatial_size
            head = after = begin % num_heads
            for row in range(begin - ahead, end):
                later = row + ahead
                if later < end:
                    plane = value, origin + after * head_dim, pitch
                    prefetch(plane, head_dim, table, locations, later * points)
                    after = after + 1 if after + 1 < num_heads else 0
                if row < begin:
                    continue
                here = origin + head * head_dim
                head = head + 1 if head + 1 < num_heads else 0
                for channel in range(0, head_dim, lanes):
                    plane = value, here + channel, pitch
                    total = sample(
                        zeros, plane, (mask, first), table, locations, weights, row * points
                    )
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
    zeros: Any, valid: Any, grad: Any, coefficient: Any, value: Any, by_value: Any, at: Any
) -> Any:
    """Add coefficient * grad to a corner of by_value; return grad * value there, to be summed over D."""
    if not valid:
        return zeros
    _store(by_value, at, _plus(_load(zeros, by_value, at), coefficient, grad))
    return _times(grad, _load(zeros, value, at))


@_inlined
def _scatter_cell(
    zeros: Any,
    channels: Any,
    planes: Any,
    grad_output: Any,
    here: Any,
    valid: Any,
    coefficients: Any,
) -> Any:
    """Add a point's part of grad_value to the corners of its cell; return their dot products.

    Corners in the order top left, top right, bottom left, bottom right; `here` is the index of the
    row's first number in `grad_output`.
    """
    lanes, head_dim = channels
    value, by_value, at, pitch, down = planes
    zero = value.dtype.type(0)
    dot_1, dot_2, dot_3, dot_4 = zero, zero, zero, zero
    for channel in range(0, head_dim, lanes):
        grad = _load(zeros, grad_output, here + channel)
        top = at + channel
        bottom = top + down
        sums = _sums(
            _scatter(zeros, valid[0], grad, coefficients[0], value, by_value, top),
            _scatter(zeros, valid[1], grad, coefficients[1], value, by_value, top + pitch),
            _scatter(zeros, valid[2], grad, coefficients[2], value, by_value, bottom),
            _scatter(zeros, valid[3], grad, coefficients[3], value, by_value, bottom + pitch),
        )
        dot_1 += sums[0]
        dot_2 += sums[1]
        dot_3 += sums[2]
        dot_4 += sums[3]
    return dot_1, dot_2, dot_3, dot_4


@_inlined
def _unmasked(mask: Any, position: Any, columns: Any, valid: Any) -> Any:
    """Which corners of the cell that begins at `position` are valid and not masked, and whether any is."""
    if mask is None:
        return valid, True
    below = position + columns
    first = valid[0] and mask[position]
    second = valid[1] and mask[position + 1]
    third = valid[2] and mask[below]
    fourth = valid[3] and mask[below + 1]
    return (first, second, third, fourth), first | second | third | fourth


@_inlined
def _scatter_row(
    zeros: Any,
    channels: Any,
    planes: Any,
    mask: Any,
    table: Any,
    inputs: Any,
    gradients: Any,
    row: Any,
    point: Any,
) -> None:
    """All gradients of a row, whose points begin with `point`; `planes` share their layout."""
    value, by_value, origin, pitch = planes
    grad_output, locations, weights = inputs
    by_locations, by_weights = gradients
    real = value.dtype.type
    for index in range(len(table)):
        rows, columns, start, points = _level(table, index)
        height, width = real(rows), real(columns)
        first, down = origin + start * pitch, columns * pitch
        for _ in range(points):
            x, y, inside = _locate(locations, point, height, width)
            by_x, by_y, by_weight = real(0), real(0), real(0)
            if inside:
                weight = weights[point]
                column, line, left, right, upper, lower = _cell(x, y)
                near, far = column >= 0, column + 1 < columns
                above, below = line >= 0, line + 1 < rows
                valid = above & near, above & far, below & near, below & far
                cell = mask[1] + start + line * columns + column
                valid, touched = _unmasked(mask[0], cell, columns, valid)
                top, bottom = weight * upper, weight * lower
                coefficients = top * left, top * right, bottom * left, bottom * right
                corner = value, by_value, first + line * down + column * pitch, pitch, down
                here = row * channels[1]
                dots = _scatter_cell(
                    zeros, channels, corner, grad_output, here, valid, coefficients
                )
                by_weight = upper * (left * dots[0] + right * dots[1])
                by_weight += lower * (left * dots[2] + right * dots[3])
                by_x = width * weight * (upper * (dots[1] - dots[0]) + lower * (dots[3] - dots[2]))
                by_y = height * weight * (left * (dots[2] - dots[0]) + right * (dots[3] - dots[1]))
                if not touched:  # zero even if the weight is infinite
                    by_x, by_y = real(0), real(0)
            by_weights[point] = by_weight
            by_locations[2 * point] = by_x
            by_locations[2 * point + 1] = by_y
            point += 1


@_inlined
def _scatter_row_nearest(
    zeros: Any,
    channels: Any,
    planes: Any,
    mask: Any,
    table: Any,
    inputs: Any,
    gradients: Any,
    row: Any,
    point: Any,
) -> None:
    """As `_scatter_row`, for nearest interpolation."""
    value, by_value, origin, pitch = planes
    grad_output, locations, weights = inputs
    by_locations, by_weights = gradients
    lanes, head_dim = channels
    real = value.dtype.type
    for index in range(len(table)):
        rows, columns, start, points = _level(table, index)
        for _ in range(points):
            cell, inside = _nearest(locations, point, rows, columns, real)
            by_weight = real(0)
            if inside and _counts(mask[0], mask[1] + start + cell):
                at = origin + (start + cell) * pitch
                for channel in range(0, head_dim, lanes):
                    grad = _load(zeros, grad_output, row * head_dim + channel)
                    product = _scatter(
                        zeros, True, grad, weights[point], value, by_value, at + channel
                    )
                    by_weight += _sums(product, zeros, zeros, zeros)[0]
            by_weights[point] = by_weight
            by_locations[2 * point] = real(0)
            by_locations[2 * point + 1] = real(0)
            point += 1


@_inlined
def _scatter_rows(
    scatter_row: Any,
    prefetch: Any,
    zeros: Any,
    channels: Any,
    planes: Any,
    mask: Any,
    levels: Any,
    inputs: Any,
    gradients: Any,
    task: Any,
) -> None:
    """All gradients of a task: of the rows of one (image, head), as far as they lie in `levels`.

    `scatter_row` and `prefetch` are the interpolation's. `task` is (rows, points, packed): of the rows
    (first, step, end), from one to the next of the same head, and of their points (first, step, number in
    `levels`).
    """
    rows, points, packed = task
    value, by_value, origin, pitch = planes
    grad_output, locations, weights = inputs
    by_locations, by_weights = gradients
    row, row_step, end = rows
    point, point_step, count = points
    head_dim = channels[1]
    while row < end:
        if not packed and row + _CELLS_AHEAD * row_step < end:
            after = point + _CELLS_AHEAD * point_step
            prefetch((value, origin, pitch), head_dim, levels, locations, after)
            prefetch((by_value, origin, pitch), head_dim, levels, locations, after)
        stream = point + _STREAM_AHEAD * point_step
        _prefetch(locations, 2 * stream, 2 * count)
        _prefetch(by_locations, 2 * stream, 2 * count)
        _prefetch(weights, stream, count)
        _prefetch(by_weights, stream, count)
        _prefetch(grad_output, (row + _STREAM_AHEAD * row_step) * head_dim, head_dim)
        scatter_row(zeros, channels, planes, mask, levels, inputs, gradients, row, point)
        row += row_step
        point += point_step


@cache
def backward_kernel(
    head_dim: int, itemsize: int, nearest: bool = False, masked: bool = False
) -> Any:
    """The backward kernel, as `forward_kernel`."""
    lanes = _lanes(head_dim, itemsize)
    inputs = _arrays(itemsize, 4, readonly=True)
    gradients = _arrays(itemsize, 3, readonly=False)
    mask_type = _MASK if masked else types.none
    sizes = types.UniTuple(types.int64, 5)
    name = _name("backward", head_dim, itemsize, nearest, masked)

    @_compiled(name, _INTEGERS, gradients, inputs, mask_type, _TABLE, _TABLE, sizes)
    def backward(
        state: Any, gradients: Any, inputs: Any, mask: Any, table: Any, parts: Any, sizes: Any
    ) -> None:
        if nearest:
            scatter_row, prefetch = _scatter_row_nearest, _prefetch_nearest
        else:
            scatter_row, prefetch = _scatter_row, _prefetch_cells
        by_value, by_locations, by_weights = gradients
        grad_output, value, locations, weights = inputs
        batch, spatial_size, num_heads, num_queries, scratch = sizes
        pitch = num_heads * head_dim
        row_points = len(weights) // (batch * num_queries * num_heads)  # K
        packed_value = np.empty(scratch, value.dtype)
        packed_by_value = np.empty(scratch, value.dtype)
        zeros = _zeros(value, lanes)
        _fetch_add(state, _HELPERS_INSIDE, 1)
        while True:
            # Neighbouring tasks differ in the head, so that their writes share no cache line.
            task = _fetch_add(state, 0, 1)
            image, head = task // (num_heads * len(parts)), task % num_heads
            if image >= batch:
                break
            part = parts[task // num_heads % len(parts)]
            first, positions, packed = part[2], part[3], part[6] != 0
            origin = (image * spatial_size * num_heads + head) * head_dim
            here = origin + first * pitch
            planes = value, by_value, origin, pitch
            if packed:
                source, target = (value, here, pitch), (packed_value, 0, head_dim)
                _copy_rows(zeros, lanes, head_dim, positions, source, target)
                packed_by_value[: positions * head_dim] = 0
                planes = packed_value, packed_by_value, -first * head_dim, head_dim
            row = image * num_queries * num_heads + head
            rows = row, num_heads, row + num_queries * num_heads
            points = row * row_points + part[4], num_heads * row_points, part[5]
            _scatter_rows(
                scatter_row,
                prefetch,
                zeros,
                (lanes, head_dim),
                planes,
                (mask, image * spatial_size),
                table[part[0] : part[1]],
                (grad_output, locations, weights),
                (by_locations, by_weights),
                (rows, points, packed),
            )
            if packed:
                source, target = (packed_by_value, 0, head_dim), (by_value, here, pitch)
                _copy_rows(zeros, lanes, head_dim, positions, source, target)
        _fetch_add(state, _HELPERS_INSIDE, -1)

    return backward


# Fused kernels ------------------------------------------------------------------------------------


@_intrinsic
def _get(context: Any, array: Any, index: Any) -> Any:
    """array[index], unchecked: a check for negative indices would keep loops from vector instructions."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, signature.args[0], *arguments))

    return array.dtype(array, types.int64), emit


@_intrinsic
def _put(context: Any, array: Any, index: Any, number: Any) -> Any:
    """Write a number to array[index], unchecked."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _address(context, builder, signature.args[0], *arguments[:2]))
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), emit


@_intrinsic
def _power_of_two(context: Any, exponent: Any) -> Any:
    """2**exponent as float32, for a float32 that is an integer from -126 to 127."""
    del context

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        i32 = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], i32), i32(127))
        return builder.bitcast(builder.shl(biased, i32(23)), ir.FloatType())

    return exponent(exponent), emit


def _exp(x: Any) -> Any:
    """e**x for x <= 0, as compiled code; NaN for NaN."""


@extending.overload(_exp, jit_options={"forceinline": True})
def _exp_of(x: Any) -> Any:
    """By a polynomial in float32, of which LLVM computes several at once: half the time of the library's."""
    real = np.float32
    half, lowest = real(0.5), real(-87)  # below are numbers smaller than the least normal one: zero
    per_octave, high, low = real(1.4426950), real(0.693359375), real(-2.12194440e-4)
    c7, c6, c5, c4, c3, c2 = (real(1 / factorial(n)) for n in range(7, 1, -1))
    one = real(1)

    def float32(x: Any) -> Any:
        near = x if x > lowest else lowest
        octaves = np.floor(near * per_octave + half)
        r = x - octaves * high - octaves * low
        power = (((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2) * r + one
        power = (power * r + one) * _power_of_two(octaves)
        return real(0) if x < lowest else power

    def float64(x: Any) -> Any:
        return np.exp(x)

    return float32 if x == types.float32 else float64


@_inlined
def _softmax(logits: Any, first: Any, count: Any, weights: Any, at: Any) -> None:
    """Write the softmax of `count` logits to weights[at:]; NaN if one is NaN or all are -infinity."""
    largest = _get(logits, first)
    for i in range(1, count):
        largest = max(largest, _get(logits, first + i))
    for i in range(count):
        _put(weights, at + i, _exp(_get(logits, first + i) - largest))
    total = weights.dtype.type(0)
    for i in range(count):
        total += _get(weights, at + i)
    for i in range(count):
        _put(weights, at + i, _get(weights, at + i) / total)


@_inlined
def _steps(references: Any, at: Any, coordinates: Any, level: Any, scale: Any) -> Any:
    """(divisors, factors) in x and y: an offset moves a point by offset / divisor * factor[0] * factor[1]."""
    rows, columns, _, points = level
    real = references.dtype.type
    if coordinates == 2:
        one = real(1)
        # An empty level has no points inside, whose gradients of zero must stay zero.
        return (real(max(columns, 1)), real(max(rows, 1))), (one, one, one)
    factors = references[at + 2], references[at + 3], real(scale)
    divisor = real(max(points, 1))
    return (divisor, divisor), factors


@_inlined
def _place(
    references: Any,
    at: Any,
    sizes: Any,
    scale: Any,
    table: Any,
    offsets: Any,
    first: Any,
    locations: Any,
    target: Any,
) -> None:
    """Write the locations of a row, whose points begin with `first` in `offsets`, from `target` on.

    Its reference points begin at index `at`; `sizes` are their (N or 1, L or 1, 2 or 4).
    """
    _, levels, coordinates = sizes
    for index in range(len(table)):
        level = _level(table, index)
        divisors, factors = _steps(references, at, coordinates, level, scale)
        x, y = references[at], references[at + 1]
        for i in range(level[3]):
            here, there = 2 * (first + i), 2 * (target + i)
            step_x = _get(offsets, here) / divisors[0] * factors[0] * factors[2]
            step_y = _get(offsets, here + 1) / divisors[1] * factors[1] * factors[2]
            _put(locations, there, x + step_x)
            _put(locations, there + 1, y + step_y)
        first += level[3]
        target += level[3]
        if levels > 1:
            at += coordinates


@cache
def fused_forward_kernel(
    head_dim: int, itemsize: int, nearest: bool = False, masked: bool = False
) -> Any:
    """The forward kernel of fused calls, as `forward_kernel`.

    Scratch holds the points of a few rows, from the row that is summed to the last whose cells are prefetched.
    """
    lanes = _lanes(head_dim, itemsize)
    inputs = _arrays(itemsize, 4, readonly=True)
    out = _arrays(itemsize, 1, readonly=False).dtype
    mask_type = _MASK if masked else types.none
    name = _name("fused_forward", head_dim, itemsize, nearest, masked)
    sizes = types.UniTuple(types.int64, 8)

    @_compiled(name, _INTEGERS, out, inputs, mask_type, _TABLE, sizes, types.float64)
    def forward(
        state: Any, out: Any, inputs: Any, mask: Any, table: Any, sizes: Any, scale: Any
    ) -> None:
        if nearest:
            sample, prefetch = _sample_nearest, _prefetch_nearest
        else:
            sample, prefetch = _sample, _prefetch_cells
        value, references, offsets, logits = inputs
        batch, spatial_size, num_heads, rows, stretch = sizes[:5]  # rows of one image
        images, levels, coordinates = sizes[5:]
        count = len(logits) // (batch * rows)  # of one row, K
        ahead = max(_CELLS_AHEAD, _POINTS_AHEAD // count)
        locations = np.empty(2 * count * (ahead + 1), value.dtype)
        weights = np.empty(count * (ahead + 1), value.dtype)
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
            end = min(begin + stretch, rows)
            origin, first = image * spatial_size * pitch, image * spatial_size
            for row in range(begin - ahead, end):
                later = row + ahead
                if later < end:
                    scratch = later % (ahead + 1) * count
                    point = (image * rows + later) * count
                    query = image % images * (rows // num_heads) + later // num_heads
                    at = query * levels * coordinates
                    _place(
                        references, at, sizes[5:], scale, table, offsets, point, locations, scratch
                    )
                    _softmax(logits, point, count, weights, scratch)
                    plane = value, origin + later % num_heads * head_dim, pitch
                    prefetch(plane, head_dim, table, locations, scratch)
                if row >= begin:
                    scratch = row % (ahead + 1) * count
                    here = origin + row % num_heads * head_dim
                    target = (image * rows + row) * head_dim
                    for channel in range(0, head_dim, lanes):
                        plane = value, here + channel, pitch
                        total = sample(
                            zeros, plane, (mask, first), table, locations, weights, scratch
                        )
                        _store(out, target + channel, total)
        _fetch_add(state, _HELPERS_INSIDE, -1)

    return forward


@cache
def _locate_kernel(itemsize: int) -> Any:
    """The kernel that writes the locations and weights of all rows to arrays."""
    points = _arrays(itemsize, 2, readonly=False)
    inputs = _arrays(itemsize, 3, readonly=True)
    sizes = types.UniTuple(types.int64, 7)

    @_compiled(f"locate_{itemsize}", _INTEGERS, points, inputs, _TABLE, sizes, types.float64)
    def locate(state: Any, points: Any, inputs: Any, table: Any, sizes: Any, scale: Any) -> None:
        locations, weights = points
        references, offsets, logits = inputs
        batch, num_heads, num_queries, stretch, images, levels, coordinates = sizes
        count = len(logits) // (batch * num_queries * num_heads)  # of one row, K
        _fetch_add(state, _HELPERS_INSIDE, 1)
        while True:
            begin = _fetch_add(state, 0, 1) * stretch
            if begin >= batch * num_queries:
                break
            for query in range(begin, min(begin + stretch, batch * num_queries)):
                at = query % (images * num_queries) * levels * coordinates
                for row in range(query * num_heads, (query + 1) * num_heads):
                    point = row * count
                    _place(
                        references, at, sizes[4:], scale, table, offsets, point, locations, point
                    )
                    _softmax(logits, point, count, weights, point)
        _fetch_add(state, _HELPERS_INSIDE, -1)

    return locate


@_inlined
def _chain_softmax(weights: Any, by_weights: Any, point: Any) -> None:
    """Gradients of a row's weights, from by_weights[point] on, become those of its logits."""
    mean = weights.dtype.type(0)
    for i in range(len(weights)):
        mean += weights[i] * _get(by_weights, point + i)
    for i in range(len(weights)):
        change = _get(by_weights, point + i) - mean
        _put(by_weights, point + i, weights[i] * change)


@_inlined
def _chain_locations(
    references: Any,
    at: Any,
    sizes: Any,
    scale: Any,
    table: Any,
    offsets: Any,
    by_locations: Any,
    point: Any,
    sums: Any,
) -> None:
    """Gradients of a row's locations become those of its offsets; `sums` gathers those of its reference points."""
    _, levels, coordinates = sizes
    target = 0
    for index in range(len(table)):
        level = _level(table, index)
        divisors, factors = _steps(references, at, coordinates, level, scale)
        step_x = factors[0] * factors[2] / divisors[0]
        step_y = factors[1] * factors[2] / divisors[1]
        sum_x, sum_y, sum_w, sum_h = 0.0, 0.0, 0.0, 0.0
        for here in range(2 * point, 2 * (point + level[3]), 2):
            by_x, by_y = _get(by_locations, here), _get(by_locations, here + 1)
            sum_x += by_x
            sum_y += by_y
            if coordinates == 4:
                sum_w += by_x * _get(offsets, here)
                sum_h += by_y * _get(offsets, here + 1)
            _put(by_locations, here, by_x * step_x)
            _put(by_locations, here + 1, by_y * step_y)
        point += level[3]
        sums[target] += sum_x
        sums[target + 1] += sum_y
        if coordinates == 4:
            sums[target + 2] += sum_w / divisors[0] * factors[2]
            sums[target + 3] += sum_h / divisors[1] * factors[2]
        if levels > 1:
            at += coordinates
            target += coordinates


@cache
def _chain_kernel(itemsize: int) -> Any:
    """The kernel that turns gradients of locations and weights into those of what they come from, in place.

    A task is a range of queries, in all images that share their reference points.
    """
    gradients = _arrays(itemsize, 3, readonly=False)
    inputs = _arrays(itemsize, 3, readonly=True)
    sizes = types.UniTuple(types.int64, 7)

    @_compiled(f"chain_{itemsize}", _INTEGERS, gradients, inputs, _TABLE, sizes, types.float64)
    def chain(state: Any, gradients: Any, inputs: Any, table: Any, sizes: Any, scale: Any) -> None:
        by_references, by_locations, by_weights = gradients
        references, offsets, logits = inputs
        batch, num_heads, num_queries, stretch, images, levels, coordinates = sizes
        count = len(logits) // (batch * num_queries * num_heads)  # of one row, K
        weights = np.empty(count, logits.dtype)
        sums = np.empty(levels * coordinates, np.float64)
        _fetch_add(state, _HELPERS_INSIDE, 1)
        while True:
            begin = _fetch_add(state, 0, 1) * stretch
            if begin >= images * num_queries:
                break
            for query in range(begin, min(begin + stretch, images * num_queries)):
                at = query * len(sums)
                sums[:] = 0
                for same in range(query, batch * num_queries, images * num_queries):
                    for row in range(same * num_heads, (same + 1) * num_heads):
                        point = row * count
                        _softmax(logits, point, count, weights, 0)
                        _chain_softmax(weights, by_weights, point)
                        _chain_locations(
                            references,
                            at,
                            sizes[4:],
                            scale,
                            table,
                            offsets,
                            by_locations,
                            point,
                            sums,
                        )
                for i in range(len(sums)):
                    by_references[at + i] = sums[i]
        _fetch_add(state, _HELPERS_INSIDE, -1)

    return chain


@cache
def fused_backward_kernel(
    head_dim: int, itemsize: int, nearest: bool = False, masked: bool = False
) -> tuple[Any, Any, Any]:
    """The kernels of a fused backward, in the order in which they run."""
    backward = backward_kernel(head_dim, itemsize, nearest, masked)
    return _locate_kernel(itemsize), backward, _chain_kernel(itemsize)
