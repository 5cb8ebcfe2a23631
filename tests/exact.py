# SPDX-License-Identifier: Apache-2.0
"""The operator and its gradients in double-double arithmetic: what float64 results are judged against.

A float64 result cannot be judged by another one, which may have the larger error. Here a number is
the sum of two float64, some 106 bits together, made by IEEE additions and products alone, so that it
is the same on every processor. Only the results are rounded to float64. Errors before that are some
2**-60 of the largest term of a sum: small in the norm in which `tests.budget` measures.

References
----------
Dekker, "A floating-point technique for extending the available precision", 1971 (products).
Knuth, "The Art of Computer Programming", volume 2 (the sum of two).
Demmel and Nguyen, "Fast reproducible floating-point summation", 2013 (sums of many).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupy_msda.problem import Level

Array = np.ndarray[Any, np.dtype[Any]]
SPLITTER = 2.0**27 + 1  # splits the 53 bits of a float64 into halves


class Wide(NamedTuple):
    """Numbers as high + low, where low is at most half a unit in the last place of high."""

    high: Any
    low: Any


class Corner(NamedTuple):
    """One corner of the cells that the points of a level fall into, shape (Lq, P)."""

    rows: Array  # positions in (S, D), 0 where the corner is not valid
    valid: Array
    along_x: Wide  # interpolation weights
    along_y: Wide
    right: bool
    bottom: bool


def forward(value: Any, levels: Sequence[Level], locations: Any, weights: Any) -> Array:
    """The output; arguments as `reference.forward` takes them, on the host."""
    value, locations, weights = (np.asarray(a, np.float64) for a in (value, locations, weights))
    n, _, m, d = value.shape
    output = np.zeros((n, locations.shape[1], m, d))
    with np.errstate(invalid="ignore", over="ignore"):
        for image, head in np.ndindex(n, m):
            one = image, slice(None), head
            output[one] = _forward(value[one], levels, locations[one], weights[one])
    return output.reshape(*output.shape[:2], m * d)


def backward(
    grad_output: Any, value: Any, levels: Sequence[Level], locations: Any, weights: Any
) -> tuple[Array, Array, Array]:
    """The three gradients; arguments as `reference.backward` takes them, on the host."""
    value, locations, weights = (np.asarray(a, np.float64) for a in (value, locations, weights))
    n, _, m, d = value.shape
    grad_output = np.asarray(grad_output, np.float64).reshape(n, locations.shape[1], m, d)
    gradients = np.zeros(value.shape), np.zeros(locations.shape), np.zeros(weights.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for image, head in np.ndindex(n, m):
            one = image, slice(None), head
            of_one = _backward(grad_output[one], value[one], levels, locations[one], weights[one])
            for gradient, result in zip(gradients, of_one, strict=True):
                gradient[one] = result
    return gradients


def _forward(value: Array, levels: Sequence[Level], locations: Array, weights: Array) -> Array:
    """One image and head: value (S, D), locations (Lq, L, P, 2), weights (Lq, L, P) to (Lq, D)."""
    output = _zeros((len(locations), value.shape[1]))
    for index, level in enumerate(levels):
        inside, corners = _cells(level, locations[:, index])
        weight = np.where(inside, weights[:, index], 0)
        for corner in corners:
            share = _times(_multiply(corner.along_x, corner.along_y), weight)
            terms = _times(_expanded(share), _gather(value, corner))
            output = _add(output, _sum(terms, lambda part: part.sum(axis=1)))
    return np.asarray(output.high)


def _backward(
    grad: Array, value: Array, levels: Sequence[Level], locations: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """One image and head: grad (Lq, D); gradients of value, locations and weights."""
    by_value = _zeros(value.shape)
    by_locations, by_weights = np.zeros(locations.shape), np.zeros(weights.shape)
    for index, level in enumerate(levels):
        inside, corners = _cells(level, locations[:, index])
        weight = np.where(inside, weights[:, index], 0)
        by_x, by_y, by_weight = (_zeros(weight.shape) for _ in range(3))
        for corner in corners:
            dot = _sum(
                _two_product(grad[:, None], _gather(value, corner)), lambda part: part.sum(axis=-1)
            )
            slope_x, slope_y = _multiply(corner.along_y, dot), _multiply(corner.along_x, dot)
            by_x = _add(by_x, _times(slope_x, 1 if corner.right else -1))
            by_y = _add(by_y, _times(slope_y, 1 if corner.bottom else -1))
            share = _multiply(corner.along_x, corner.along_y)
            by_weight = _add(by_weight, _multiply(share, dot))
            by_value = _add(by_value, _scatter(value.shape, corner, _times(share, weight), grad))
        by_locations[:, index, :, 0] = _times(_times(by_x, weight), level.width).high
        by_locations[:, index, :, 1] = _times(_times(by_y, weight), level.height).high
        by_weights[:, index] = by_weight.high
        by_locations[:, index][~inside] = by_weights[:, index][~inside] = 0
    return by_value.high, by_locations, by_weights


def _cells(level: Level, locations: Array) -> tuple[Array, Iterator[Corner]]:
    """Which points (Lq, P) of a level are inside, and those corners of their cells that have pixels.

    The position rounded to float64 decides the cell; how far from its edges the point lies is wide.
    """
    height, width, start = level
    x, y = (
        _add(_two_product(locations[..., axis], float(size)), Wide(-0.5, 0.0))
        for axis, size in enumerate((width, height))
    )
    inside = (x.high > -1) & (y.high > -1) & (x.high < width) & (y.high < height)
    inside &= (height > 0) & (width > 0)
    x, y = (Wide(*(np.where(inside, part, 0.0) for part in wide)) for wide in (x, y))
    left, top = np.floor(x.high), np.floor(y.high)
    along_x, along_y = _ramps(x, left), _ramps(y, top)

    def corners() -> Iterator[Corner]:
        for bottom, right in np.ndindex(2, 2):
            column, row = left.astype(np.int64) + right, top.astype(np.int64) + bottom
            valid = inside & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            rows = np.where(valid, start + row * width + column, 0)
            if valid.any():
                yield Corner(
                    rows, valid, along_x[right], along_y[bottom], bool(right), bool(bottom)
                )

    return inside, corners()


def _ramps(position: Wide, cell: Array) -> tuple[Wide, Wide]:
    """The interpolation weights of a cell's two edges."""
    fraction = _add(position, Wide(-cell, 0.0))
    return _add(Wide(1.0, 0.0), Wide(-fraction.high, -fraction.low)), fraction


def _gather(value: Array, corner: Corner) -> Array:
    """The corner's rows of value, shape (Lq, P, D), zero where it is not valid."""
    return np.where(corner.valid[..., None], value[corner.rows], 0.0)


def _scatter(shape: tuple[int, ...], corner: Corner, share: Wide, grad: Array) -> Wide:
    """The sums over points of share (Lq, P) times grad (Lq, D), by the row of the corner."""
    valid = corner.valid
    share = Wide(share.high[valid], share.low[valid])
    terms = _times(_expanded(share), grad[np.nonzero(valid)[0]])
    columns = np.arange(shape[1])
    places = (corner.rows[valid][:, None] * shape[1] + columns).ravel()

    def add_up(part: Array) -> Array:
        return np.bincount(places, part.ravel(), math.prod(shape)).reshape(shape)

    return _sum(terms, add_up)


def _sum(terms: Wide, add_up: Callable[[Array], Array]) -> Wide:
    """Sums of terms, where `add_up` adds what it is given in any order.

    Each term is rounded to a grid so coarse that float64 holds every partial sum on it: no rounding.
    What is left of a term is below 2**-51 of that bound, so plain sums of it are enough.
    """
    sizes = np.abs(terms.high)
    largest = float(np.max(sizes, initial=0, where=np.isfinite(sizes)))
    _, bits = math.frexp(largest * max(2, sizes.size))  # no partial sum reaches 2**bits
    shift = 1.5 * 2.0 ** (bits + 1)  # its last place is the grid's spacing, 2**(bits - 51)
    on_grid = (terms.high + shift) - shift
    return _two_sum(add_up(on_grid), add_up((terms.high - on_grid) + terms.low))


def _zeros(shape: tuple[int, ...]) -> Wide:
    """Zeros."""
    return Wide(np.zeros(shape), np.zeros(shape))


def _expanded(wide: Wide) -> Wide:
    """With a last axis of size 1."""
    return Wide(wide.high[..., None], wide.low[..., None])


def _add(one: Wide, other: Wide) -> Wide:
    """The sum of wide numbers."""
    high, low = _two_sum(one.high, other.high)
    return _two_sum(high, low + (one.low + other.low))


def _multiply(one: Wide, other: Wide) -> Wide:
    """The product of wide numbers."""
    high, low = _two_product(one.high, other.high)
    return _two_sum(high, low + (one.high * other.low + one.low * other.high))


def _times(one: Wide, other: Any) -> Wide:
    """The product with float64 numbers."""
    high, low = _two_product(one.high, other)
    return _two_sum(high, low + one.low * other)


def _two_sum(a: Any, b: Any) -> Wide:
    """The sum of two float64 without error."""
    high = a + b
    of_b = high - a
    return Wide(high, (a - (high - of_b)) + (b - of_b))


def _two_product(a: Any, b: Any) -> Wide:
    """The product of two float64 without error."""
    high = a * b
    (a1, a2), (b1, b2) = _split(a), _split(b)
    return Wide(high, a2 * b2 - (((high - a1 * b1) - a2 * b1) - a1 * b2))


def _split(a: Any) -> tuple[Any, Any]:
    """A float64 as the sum of two of 26 bits."""
    scaled = SPLITTER * a
    high = scaled - (scaled - a)
    return high, a - high
