# SPDX-License-Identifier: Apache-2.0
"""The types that describe one call; no checks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

INT32_MAX = 2**31 - 1
MAX_HOST_LEVELS = 320  # a CUDA launch takes the level table by value, in at most 4 KB
MAX_UNEVEN_LEVELS = 16  # with it, numbers of points that differ
MAX_GRIDS = 16

# The (H, W) grids on which the queries lie one after another. (): queries are taken in the order given.
# None: nothing is known, so the levels are the grids where there are as many queries as positions.
Grids = tuple[tuple[int, int], ...] | None


class Level(NamedTuple):
    """One feature level: H, W and where it starts among the S positions."""

    height: int
    width: int
    start: int


class LevelTable(NamedTuple):
    """The levels, as far as the host knows them (ints); the rest is in arrays on a device.

    `sizes` is None when (H, W) are only in `device_sizes`; `starts` is None when they are only in
    `device_starts` or, with both None, when the kernel derives them from `device_sizes`.
    """

    sizes: tuple[tuple[int, int], ...] | None
    starts: tuple[int, ...] | None
    device_sizes: Any = None
    device_starts: Any = None

    @property
    def on_host(self) -> LevelTable:
        """The part that the host knows, which is hashable."""
        return LevelTable(self.sizes, self.starts)

    @property
    def levels(self) -> tuple[Level, ...] | None:
        """The whole table, or None while a part of it is only on a device."""
        if self.sizes is None or self.starts is None:
            return None
        return _levels(self.sizes, self.starts)


@lru_cache(maxsize=1024)
def _levels(sizes: tuple[tuple[int, int], ...], starts: tuple[int, ...]) -> tuple[Level, ...]:
    """The table level by level."""
    return tuple(Level(h, w, start) for (h, w), start in zip(sizes, starts, strict=True))


NO_TABLE = LevelTable(None, None)


class References(NamedTuple):
    """The reference points of a fused call: (N or 1, Lq, L or 1, 2 or 4)."""

    batch: int
    num_levels: int
    coordinates: int
    dtype: str


class Problem(NamedTuple):
    """Sizes, dtypes and rules of one call (letters as in the README: N, S, M, D, Lq, L, P)."""

    batch: int
    spatial_size: int
    num_heads: int
    head_dim: int
    num_queries: int
    num_levels: int
    num_points: int | tuple[int, ...]  # a tuple: of each level, if they differ
    value_dtype: str
    location_dtype: str
    weight_dtype: str
    interpolation: str = "bilinear"
    has_mask: bool = False
    references: References | None = (
        None  # of a fused call, whose locations are offsets and whose weights are logits
    )

    @property
    def is_empty(self) -> bool:
        """Whether a size is 0, so that every result is zero or has no elements."""
        return 0 in self[:6] or self.row_points == 0

    @property
    def level_points(self) -> tuple[int, ...]:
        """The points of each level."""
        points = self.num_points
        return points if isinstance(points, tuple) else (points,) * self.num_levels

    @property
    def row_points(self) -> int:
        """K, the points of a row (n, q, m): those of all levels."""
        points = self.num_points
        return sum(points) if isinstance(points, tuple) else self.num_levels * points

    @property
    def composed(self) -> Problem:
        """The plain problem that stands for a fused one, with locations and weights in the dtype to compute in."""
        wide = "float64" if self.value_dtype == "float64" else "float32"
        return self._replace(references=None, location_dtype=wide, weight_dtype=wide)

    @property
    def value_elements(self) -> int:
        """N*S*M*D."""
        return self.batch * self.spatial_size * self.num_heads * self.head_dim

    @property
    def point_elements(self) -> int:
        """N*Lq*M*K."""
        return self.batch * self.num_queries * self.num_heads * self.row_points

    @property
    def reference_elements(self) -> int:
        """Of the reference points; 0 where the call is not fused."""
        if self.references is None:
            return 0
        batch, levels, coordinates, _ = self.references
        return batch * self.num_queries * levels * coordinates

    @property
    def output_elements(self) -> int:
        """N*Lq*M*D."""
        return self.batch * self.num_queries * self.num_heads * self.head_dim

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(N, Lq, M*D)."""
        return self.batch, self.num_queries, self.num_heads * self.head_dim
