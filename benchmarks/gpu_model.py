# SPDX-License-Identifier: Apache-2.0
"""What `traffic.py` and `kernel_times.py` count: orders of the work, L1 caches, binned additions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

LINE, SECTOR = 128, 32
# The binned backward: groups that walk the sorted points of a batch, and the (rows, columns) after which the bins of a
# level repeat. One batch in EVERY is simulated.
WALKERS, EVERY = 32, 5
BINS = 32, 32
DTYPES = {"float32": 4, "float16": 2}

# The work of a block of threads: the next block of a plain grid, or turns with the other blocks on the same SM in one
# contiguous chunk.
PLAIN, CHUNK = "", "chunk"


class Order(NamedTuple):
    """How rows (query, head) are assigned to blocks."""

    tile: tuple[int, int] = (1, 1)  # rows and columns of the query tiles; 1, 1: pixel by pixel
    share: str = PLAIN
    heads_first: bool = True  # all queries of a head, then the next head

    def __str__(self) -> str:
        """The name in the tables; head-major unless it says otherwise."""
        major = "head-major" if self.heads_first else "query-major"
        rows, columns = self.tile
        size = str(rows) if rows == columns else f"{rows} x {columns}"
        tiles = f"tiles of {size}" if columns > 1 else ""
        parts = [major if self == Order() or not self.heads_first else "", self.share, tiles]
        return ", ".join(filter(None, parts))


class Gpu(NamedTuple):
    """A GPU; `sampled` of its SMs are simulated for a plain grid."""

    l1: int = 200  # KB of L1 available to value
    sms: int = 132
    resident: int = 4  # blocks on an SM at a time
    sampled: int = 11


class Cache(NamedTuple):
    """An L1 cache: slots in a ring from the youngest to the oldest; the last index is the ring's end."""

    slot_of: np.ndarray  # by line, -1 where absent
    line_of: np.ndarray
    held: np.ndarray  # bits of the sectors present
    younger: np.ndarray
    older: np.ndarray


class Access(NamedTuple):
    """The gathers: cells (N·Lq, M, K, 2) of (row, column), levels, grids, and strides in sectors."""

    cells: np.ndarray
    levels: np.ndarray  # (L, 3): height, width, start
    grids: np.ndarray  # (G, 2): height, width of the grids on which the queries of an image lie
    points: int  # of a level
    queries: int  # of an image
    image: int
    pixel: int
    head: int
    sectors: int  # of one pixel of one head


@njit
def tiled_query(index: int, sizes: np.ndarray, tile: tuple[int, int]) -> int:
    """The query at `index` of the tiled order; `sizes` (L, 2) are the levels' heights and widths.

    Levels follow one another; a level is cut into bands of `tile[0]` rows, a band into tiles of `tile[1]` columns, each
    in scan order. Bands and tiles at the lower and right edges are smaller, so no index is padding.
    """
    high, wide = tile
    start = 0
    for level in range(sizes.shape[0]):
        height, width = sizes[level, 0], sizes[level, 1]
        if index - start < height * width:
            break
        start += height * width
    offset = index - start
    band = offset // (high * width)
    offset -= band * high * width
    rows = min(high, height - band * high)
    column = offset // (rows * wide)
    offset -= column * rows * wide
    columns = min(wide, width - column * wide)
    y, x = band * high + offset // columns, column * wide + offset % columns
    return start + y * width + x


@njit
def tiled_order(sizes: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """Every query, in the tiled order."""
    total = 0
    for level in range(sizes.shape[0]):
        total += sizes[level, 0] * sizes[level, 1]
    order = np.empty(total, np.int64)
    for index in range(total):
        order[index] = tiled_query(index, sizes, tile)
    return order


def make_work(order: Order, access: Access) -> np.ndarray:
    """The rows, as (image·Lq + query)·M + head, in the order of the work: image by image."""
    queries, (total, heads) = access.queries, access.cells.shape[:2]
    tiled = order.tile[1] > 1 and queries == access.grids.prod(axis=1).sum()
    by_query = tiled_order(access.grids, order.tile) if tiled else np.arange(queries)
    rows = by_query[:, None] * heads + np.arange(heads)
    of_image = (rows.T if order.heads_first else rows).ravel()
    return (np.arange(0, total, queries)[:, None] * heads + of_image).ravel()


def assign(share: str, blocks: int, gpu: Gpu) -> list[np.ndarray]:
    """The blocks of work of each SM: one row per step of its resident blocks of threads, -1 for idle."""
    every, resident = np.arange(blocks), gpu.resident
    dealt = [every[sm :: gpu.sms] for sm in range(gpu.sms)]
    parts = dealt if share == PLAIN else np.array_split(every, gpu.sms)
    return [_padded(part, -(-part.size // resident) * resident, resident) for part in parts]


def _padded(blocks: np.ndarray, length: int, width: int) -> np.ndarray:
    """The blocks padded with -1 to `length`, in rows of `width`."""
    padding = np.full(length - blocks.size, -1)
    return np.concatenate([blocks, padding]).reshape(-1, width)


def make_access(
    levels: np.ndarray,
    cells: np.ndarray,
    dtype: str,
    heads_outside: bool = False,
    images: int = 1,
    grids: np.ndarray | None = None,
    channels: int = 32,
) -> Access:
    """Gathers from value (N, S, M, D), or (N, M, S, D) with `heads_outside`. No grids: the levels are the grids."""
    sectors, heads = channels * DTYPES[dtype] // SECTOR, cells.shape[1]
    size = int(levels[:, :2].prod(axis=1).sum())
    pixel, head = (sectors, size * sectors) if heads_outside else (heads * sectors, sectors)
    grids = levels[:, :2] if grids is None else grids
    points, queries = cells.shape[2] // len(levels), cells.shape[0] // images
    return Access(
        cells, levels, grids, points, queries, size * heads * sectors, pixel, head, sectors
    )


def new_cache(lines: int, capacity: int) -> Cache:
    """An empty cache of `capacity` lines for a memory of `lines` lines."""
    ring = np.arange(capacity + 1)
    return Cache(
        np.full(lines, -1, np.int32),
        np.full(capacity, -1, np.int32),
        np.zeros(capacity, np.uint8),
        np.roll(ring, 1).astype(np.int32),
        np.roll(ring, -1).astype(np.int32),
    )


@njit
def touch(cache: Cache, line: int, sectors: int) -> int:
    """Read sectors of a line; return how many come from L2."""
    end = cache.line_of.size
    slot = cache.slot_of[line]
    if slot < 0:
        slot = cache.younger[end]  # the oldest of all
        if cache.line_of[slot] >= 0:
            cache.slot_of[cache.line_of[slot]] = -1
        cache.slot_of[line], cache.line_of[slot], cache.held[slot] = slot, line, 0
    missed = sectors & ~cache.held[slot]
    cache.held[slot] |= sectors
    if cache.older[end] != slot:
        younger, older, first = cache.younger[slot], cache.older[slot], cache.older[end]
        cache.older[younger], cache.younger[older] = older, younger
        cache.older[end], cache.younger[slot] = slot, end
        cache.older[slot], cache.younger[first] = first, slot
    count = 0
    while missed:
        count += missed & 1
        missed >>= 1
    return count


@njit
def gather(cache: Cache, access: Access, row: int, point: int) -> tuple[int, int]:
    """Read the corners of one point; return the sectors read and those that come from L2."""
    heads = access.cells.shape[1]
    query, head = row // heads, row % heads
    height, width, start = access.levels[point // access.points]
    first = query // access.queries * access.image + head * access.head
    y, x = access.cells[query, head, point]
    read = missed = 0
    for corner in range(4):
        i, j = y + corner // 2, x + corner % 2
        if 0 <= i < height and 0 <= j < width:
            sector = (start + i * width + j) * access.pixel + first
            bits = ((1 << access.sectors) - 1) << (sector % (LINE // SECTOR))
            missed += touch(cache, sector // (LINE // SECTOR), bits)
            read += access.sectors
    return read, missed


@njit
def run_sm(cache: Cache, access: Access, work: np.ndarray, steps: np.ndarray, rows: int) -> Any:
    """Run one SM's work, `rows` per block; return the sectors read and those that come from L2."""
    read = missed = 0
    for step in range(steps.shape[0]):
        for point in range(access.cells.shape[2]):
            for block in steps[step]:
                if block < 0:
                    continue
                for row in work[block * rows : (block + 1) * rows]:
                    more = gather(cache, access, row, point)
                    read, missed = read + more[0], missed + more[1]
    return read, missed


@njit
def _column(x: int, y: int, height: int, width: int) -> int:
    """The corners inside the level of a cell at row y in column x: rows of grad_value to add to."""
    return ((y >= 0) + (y < height - 1)) * (0 <= x < width)


@njit
def flushed_rows(
    access: Access,
    work: np.ndarray,
    batch: int,
    walkers: int,
    fold: tuple[int, int],
    every: int,
) -> tuple[int, int]:
    """Rows added to memory: one per corner inside its level, and with segmented reduction of sorted points.

    The points of each `batch` rows of work are sorted by (head, level, y mod fold[0], x mod fold[1])
    and divided among walkers. A walker holds the sums of one cell. At the next cell it adds both
    columns to memory, or only the left one if that cell is the neighbour to the right. One batch in
    `every` is counted.
    """
    heads, points = access.cells.shape[1:3]
    direct = summed = 0
    keys = np.empty(batch * points, np.int64)
    for first in range(0, work.size, batch * every):
        count = 0
        for place, row in enumerate(work[first : first + batch]):
            for point in range(points):
                y, x = access.cells[row // heads, row % heads, point]
                height, width, _ = access.levels[point // access.points]
                if -1 <= y < height and -1 <= x < width:
                    direct += _column(x, y, height, width) + _column(x + 1, y, height, width)
                    bin_ = ((row % heads) * 16 + point // access.points) << 14 | ((y + 1) % fold[0])
                    bin_ = bin_ << 14 | ((x + 1) % fold[1])
                    keys[count] = (bin_ << 16) | (place * points + point)
                    count += 1
        keys[:count].sort()
        stretch = -(-count // walkers)
        for begin in range(0, count, max(stretch, 1)):
            summed += _walk(access, work[first:], keys[begin : min(begin + stretch, count)])
    return direct, summed


@njit
def _walk(access: Access, work: np.ndarray, keys: np.ndarray) -> int:
    """Rows that one walker adds to memory for its sorted points."""
    heads, points = access.cells.shape[1:3]
    rows, last = 0, (-1, -1, -9, -9)
    for key in keys:
        row, point = work[(key & 0xFFFF) // points], (key & 0xFFFF) % points
        y, x = access.cells[row // heads, row % heads, point]
        height, width, _ = access.levels[point // access.points]
        here = (row % heads, point // access.points, y, x)
        if here != last:
            rows += _column(x + 1, y, height, width)
            if here[:3] != last[:3] or x != last[3] + 1:
                rows += _column(x, y, height, width)
            last = here
    return rows


def sample(share: str, gpu: Gpu) -> np.ndarray:
    """The SMs to simulate: a random sample for a plain grid; all where each SM's work lies in other levels."""
    every = np.random.default_rng(0).permutation(gpu.sms)
    return every[: gpu.sampled] if share == PLAIN else every


def traffic(access: Access, order: Order, gpu: Gpu, rows: int) -> tuple[float, float, float]:
    """Megabytes that the gathers read from L1 and from L2, with blocks of `rows` rows.

    Third, what the busiest of the simulated SMs reads, as a multiple of their mean.
    """
    images = access.cells.shape[0] // access.queries
    work = make_work(order, access)
    blocks = -(-work.size // rows)
    steps = assign(order.share, blocks, gpu)
    lines = images * access.image * SECTOR // LINE + 1
    reads, missed, done = [], 0, 0
    for sm in sample(order.share, gpu):
        cache = new_cache(lines, gpu.l1 * 1000 // LINE)
        more = run_sm(cache, access, work, steps[sm], rows)
        reads.append(more[0])
        missed, done = missed + more[1], done + (steps[sm] >= 0).sum()
    megabytes, mean = SECTOR / 1e6 * blocks / done, sum(reads) / len(reads)
    return sum(reads) * megabytes, missed * megabytes, max(reads) / mean if mean else 1.0


def additions(
    access: Access, order: Order, batch: int, fold: tuple[int, int], every: int
) -> tuple[float, float]:
    """Rows of D channels that the backward adds to memory: directly, and summed within batches of `batch` rows."""
    work = make_work(order, access)
    done = sum(work[first : first + batch].size for first in range(0, work.size, batch * every))
    direct, summed = flushed_rows(access, work, batch, WALKERS, fold, every)
    return direct * work.size / done, summed * work.size / done
