# SPDX-License-Identifier: Apache-2.0
"""A random problem of a family: shapes, level table, grids, and arrays of anything."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cupy_msda.problem import Grids, Level, LevelTable
from tests.emulator.fused import Fused
from tests.fuzz.families import F16, F64, Family
from tests.problems import Inputs

Rng = np.random.Generator
# Of the numbers: finite; a few not; or any bytes, where only faults and differences between candidates show.
MODES = ("finite", "non-finite", "bytes")
LARGEST = 2**31 - 1


class Table(NamedTuple):
    """A level table: what the host knows, what lies on the device, and the levels as the kernels must read them."""

    sizes: tuple[tuple[int, int], ...]  # valid, for the host's checks
    starts: tuple[int, ...]
    spatial_size: int
    host: LevelTable
    device: tuple[Tensor | None, Tensor | None]
    levels: list[Level]  # empty in place of one that does not fit
    bad: list[int]  # the levels that do not fit

    @property
    def is_given(self) -> bool:
        """Whether the kernels must read what the host's checks saw."""
        return [_emptied(level) for level in _levels_of(self)] == self.levels and not self.bad


class Case(NamedTuple):
    """One call: `inputs` of a plain or a fused one."""

    family: Family
    mode: str
    table: Table
    inputs: Inputs | Fused
    rules: dict[str, Any]
    grids: Grids
    multiprocessors: int
    needs: tuple[bool, bool]
    deterministic: bool
    order: int  # of blocks and lanes


def make_case(family: Family, seed: int, number: int) -> Case:
    """The case of this number."""
    rng = np.random.default_rng([seed, number])
    mode = str(rng.choice(MODES, p=(0.5, 0.25, 0.25)))
    table = _table(rng, len(family.points))
    queries = table.spatial_size if rng.random() < 0.4 else int(rng.integers(1, 90))
    images = int(rng.integers(1, 4))
    rules: dict[str, Any] = {"num_points": list(family.points)}
    if family.nearest:
        rules["interpolation"] = "nearest"
    if family.masked:
        unmasked = rng.random((images, table.spatial_size)) < rng.choice([0.3, 0.9])
        rules["value_mask"] = torch.from_numpy(unmasked)
    make = _fused if family.coordinates else _plain
    return Case(
        family,
        mode,
        table,
        make(rng, _Shape(family, mode, images, queries, table, rules)),
        rules,
        _grids(rng, queries),
        int(rng.choice([1, 1, 3, 1000])),
        ((True, True), (True, False), (False, True))[rng.integers(3)],
        bool(rng.random() < 0.3),
        int(rng.integers(2**32)),
    )


# --- shapes --------------------------------------------------------------------------------------


def _table(rng: Rng, number: int) -> Table:
    """Levels one after another, or overlapping and with gaps; known to the host or not; some do not fit."""
    side = int(rng.choice([3, 9, 14])) if number < 9 else 4
    sizes = rng.integers(0 if rng.random() < 0.2 else 1, side, (number, 2))
    if rng.random() < 0.1:
        sizes[rng.integers(number)] = 1, rng.integers(60, 300)
    areas = sizes.prod(1)
    spatial_size = max(int(areas.sum()), 1)
    starts = areas.cumsum() - areas
    follow = rng.random() > 0.3
    if not follow:
        spatial_size += int(rng.integers(20))
        starts = rng.integers(0, spatial_size - areas + 1)
    kinds = ["host", "starts on device", "device", "sizes on device"]
    kind = str(rng.choice([*kinds, "derived"] if follow else kinds))
    on_device = sizes.copy(), starts.copy()
    if rng.random() < 0.3:
        _damage(rng, on_device[0] if rng.random() < 0.7 else on_device[1])
    host_sizes = tuple((int(h), int(w)) for h, w in sizes)
    host_starts = tuple(map(int, starts))
    knows = kind in {"host", "starts on device"}, kind in {"host", "sizes on device"}
    read_sizes = sizes if knows[0] else on_device[0]
    read_starts = starts if knows[1] else None if kind == "derived" else on_device[1]
    levels, bad = _as_read(read_sizes, read_starts, spatial_size)
    return Table(
        host_sizes,
        host_starts,
        spatial_size,
        LevelTable(host_sizes if knows[0] else None, host_starts if knows[1] else None),
        (
            None if knows[0] else torch.from_numpy(read_sizes),
            None if knows[1] or read_starts is None else torch.from_numpy(read_starts),
        ),
        levels,
        bad,
    )


def _damage(rng: Rng, numbers: Any) -> None:
    """Put anything in place of one number."""
    anything = [-1, LARGEST, 2**31, 2**32 + 1, 2**62, -(2**63), 2**63 - 1]
    anything += [int(rng.integers(-(2**63), 2**63)), int(rng.integers(0, 40))]
    numbers.reshape(-1)[rng.integers(numbers.size)] = anything[rng.integers(len(anything))]


def _as_read(sizes: Any, starts: Any, spatial_size: int) -> tuple[list[Level], list[int]]:
    """The levels by the rule of levels.cuh, and the numbers of those that do not fit."""
    levels, bad, end = [], [], 0
    for number, (height, width) in enumerate(sizes.tolist()):
        start = end if starts is None else int(starts[number])
        end = (end + height * width + 2**63) % 2**64 - 2**63  # it wraps
        fits = 0 <= height <= LARGEST and 0 <= width <= LARGEST
        if not (fits and 0 <= start <= spatial_size - height * width):
            bad.append(number)
        size = (height, width) if number not in bad else (0, 0)
        levels.append(_emptied(Level(*size, start)))
    return levels, bad


def _emptied(level: Level) -> Level:
    """The level; without pixels, always the same one."""
    return level if level.height * level.width else Level(0, 1, 0)


def _grids(rng: Rng, queries: int) -> Grids:
    """No grids, the levels, or grids that hold the queries."""
    kind = rng.random()
    if kind < 0.5:
        return None if kind < 0.3 else ()
    grids: list[tuple[int, int]] = []
    left = queries
    while left and len(grids) < 15:
        height = int(rng.integers(1, left + 1))
        width = int(rng.integers(1, left // height + 1))
        grids.append((height, width))
        left -= height * width
        if rng.random() < 0.1:
            grids.append((0, int(rng.integers(LARGEST))))
    return (*grids[:15], (1, queries - sum(h * w for h, w in grids[:15])))


# --- arrays --------------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """What all arrays of a case depend on."""

    family: Family
    mode: str
    images: int
    queries: int
    table: Table
    rules: dict[str, Any]

    @property
    def points(self) -> tuple[int, int, int, int]:
        """Of the attention weights."""
        return self.images, self.queries, self.family.heads, sum(self.family.points)


def _plain(rng: Rng, shape: _Shape) -> Inputs:
    """The arrays of a plain call."""
    _, of_locations, of_weights = shape.family.dtypes
    x, y = _pixels(rng, shape)
    width, height = _sizes_of_points(shape)
    at = np.stack([(x + 0.5) / width, (y + 0.5) / height], axis=-1)
    locations = _with_bytes(rng, torch.from_numpy(at).to(of_locations))
    locations[~_is_settled(locations, shape)] = torch.nan
    value, grad_output = _value_and_grad(rng, shape)
    weights = _numbers(rng, shape.mode, shape.points, of_weights)
    return Inputs(shape.table.sizes, value, locations, weights, grad_output)


def _fused(rng: Rng, shape: _Shape) -> Fused:
    """The arrays of a fused call, whose points lie where those of a plain one would, within the dtypes."""
    family = shape.family
    _, of_references, of_offsets, of_logits = family.dtypes
    x, y = _pixels(rng, shape)
    sizes = np.stack(_sizes_of_points(shape), axis=-1)
    numbers = _numbers_of_levels(family)
    images = 1 if rng.random() < 0.3 else shape.images
    levels = len(family.points) if family.by_level else 1
    references = rng.uniform(0.1, 0.9, (images, shape.queries, levels, family.coordinates))
    references = torch.from_numpy(references).to(of_references)
    centers = (
        references.double().expand(-1, -1, len(family.points), -1).numpy()[:, :, None, numbers]
    )
    of_level = np.array([family.points[number] for number in numbers])[:, None]
    step = 1 / sizes if family.coordinates == 2 else centers[..., 2:] * 0.5 / of_level
    at = (np.stack([x, y], axis=-1) + 0.5) / sizes - centers[..., :2]
    offsets = _with_bytes(rng, torch.from_numpy(at / step).to(of_offsets))
    # As `_is_settled`, of a sum that kernels and reference round in other places.
    pixels = (centers[..., :2] + offsets.double().numpy() * step) * sizes + 0.5
    with np.errstate(invalid="ignore"):  # of infinities
        offsets[torch.from_numpy(np.abs(pixels - np.round(pixels)) < 1e-3)] = 1e4
    value, grad_output = _value_and_grad(rng, shape)
    logits = _numbers(rng, shape.mode, shape.points, of_logits, most=4)
    return Fused(
        *(shape.table.sizes, _levels_of(shape.table), value, references),
        *(offsets, logits, grad_output, shape.rules),
    )


def _levels_of(table: Table) -> list[Level]:
    """The levels as the host's checks see them."""
    return [Level(h, w, start) for (h, w), start in zip(table.sizes, table.starts, strict=True)]


def _value_and_grad(rng: Rng, shape: _Shape) -> tuple[Tensor, Tensor]:
    """Value, with NaN where it is masked, and the gradient of the output."""
    family, mode, images, queries, table, rules = shape
    positions = images, table.spatial_size, family.heads, family.channels
    value = _numbers(rng, mode, positions, family.dtypes[0])
    if "value_mask" in rules:
        value[~rules["value_mask"]] = torch.nan
    rows = images, queries, family.heads * family.channels
    return value, _numbers(rng, mode, rows, family.dtypes[0])


def _numbers(
    rng: Rng, mode: str, shape: tuple[int, ...], dtype: torch.dtype, most: int = 12
) -> Tensor:
    """An array of the mode; finite numbers are not so large that a sum of products overflows."""
    if mode == "bytes":
        return _bytes(rng, shape, dtype)
    scale = 2.0 ** rng.integers(-3, 3 if dtype == F16 else most)
    numbers = torch.from_numpy(rng.standard_normal(shape) * scale).to(dtype)
    if mode == "non-finite" and rng.random() < 0.7:
        bad = torch.from_numpy(rng.random(shape) < rng.choice([0.002, 0.1]))
        kinds = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
        numbers[bad] = kinds[torch.from_numpy(rng.integers(3, size=int(bad.sum())))]
    return numbers


def _bytes(rng: Rng, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits."""
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.frombuffer(bytearray(rng.bytes(count)), dtype=dtype).reshape(shape).clone()


def _with_bytes(rng: Rng, coordinates: Tensor) -> Tensor:
    """The same, with any bits in place of some."""
    some = torch.from_numpy(rng.random(coordinates.shape) < rng.choice([0, 0.05, 0.5]))
    return torch.where(some, _bytes(rng, tuple(coordinates.shape), coordinates.dtype), coordinates)


# --- where the points lie ------------------------------------------------------------------------


def _pixels(rng: Rng, shape: _Shape) -> tuple[Any, Any]:
    """x and y in pixels: inside, anywhere near the level, on pixels and quarters, crowded in one cell, or far away."""
    far = [np.inf, -np.inf, np.nan, 1e30, -1e30, 2.0**22, 2.0**31, -(2.0**31), 1e-40, 2.0**63]

    def along(size: Any) -> Any:
        inside = rng.uniform(0, np.maximum(size - 1, 0))
        near = rng.uniform(-1.5, size + 0.5)
        quarters = np.floor(rng.uniform(-8, 4 * size + 8)) / 4
        crowd = np.minimum(rng.uniform(0, 3, shape.points), size) - 0.5
        special = rng.choice(far, shape.points)
        chosen = rng.choice(5, shape.points, p=shares)
        return np.choose(chosen, [inside, near, quarters, crowd, special])

    # One kind alone in half of the cases: where all points of a warp lie inside, it takes another path.
    mixed = rng.choice([0, 1, 4], 5) + np.eye(5)[1]
    kinds = mixed if rng.random() < 0.5 else np.eye(5)[rng.integers(4)]
    shares = kinds / kinds.sum()
    width, height = _sizes_of_points(shape)
    return along(width), along(height)


def _numbers_of_levels(family: Family) -> list[int]:
    """The level of each point of a row."""
    return [level for level, count in enumerate(family.points) for _ in range(count)]


def _sizes_of_points(shape: _Shape) -> tuple[Any, Any]:
    """W and H of the level of each point, at least 1, in the shape of the attention weights."""
    sizes = [(max(level.width, 1), max(level.height, 1)) for level in shape.table.levels]
    of_points = np.array([sizes[number] for number in _numbers_of_levels(shape.family)], float)
    return tuple(np.broadcast_to(of_points[:, side], shape.points) for side in (0, 1))


def _is_settled(locations: Tensor, shape: _Shape) -> Tensor:
    """Whether float32 puts a point on the same side of, or exactly on, each pixel as exact arithmetic does.

    Elsewhere its cell, and so its gradient, is a matter of rounding.
    """
    if shape.family.dtypes[0] == F64:
        return torch.ones(locations.shape, dtype=torch.bool)
    half = 0.5 if shape.family.nearest else -0.5
    sizes = torch.from_numpy(np.stack(_sizes_of_points(shape), axis=-1))
    exact, rounded = locations.double() * sizes + half, locations.float() * sizes.float() + half
    same = exact.floor() == rounded.double().floor()
    on_pixel = (exact == exact.floor()) == (rounded == rounded.floor())
    return (same & on_pixel) | ~exact.isfinite()
