# SPDX-License-Identifier: Apache-2.0
"""The operator in array-API calls: the oracle of every backend, and the CPU path without Numba.

Works on NumPy, CuPy and torch arrays; under torch `forward` is differentiable to any order, in
reverse and forward mode. It computes in the dtype of `value`, or in float32 where that is narrower,
so float64 inputs give the exact results that others are compared with.

Reference: Zhu et al., "Deformable DETR", arXiv:2010.04159.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

from array_api_compat import array_namespace, device

from cupy_msda.problem import Level


class _Inputs(NamedTuple):
    """The arguments of one call."""

    value: Any
    levels: Sequence[Level]
    locations: Any
    weights: Any
    num_points: Sequence[int] | None
    interpolation: str
    value_mask: Any

    def of_level(self, points: Any, index: int) -> Any:
        """The part of an array of points that belongs to a level, shape (N, Lq, M, P, ...)."""
        if self.num_points is None:
            return points[:, :, :, index]
        first = sum(self.num_points[:index])
        return points[:, :, :, first : first + self.num_points[index]]


class _Corner(NamedTuple):
    """One corner of the cells that the points of a level fall into, shape (N, Lq, M, P)."""

    rows: Any  # index into value viewed as (N*S*M, D), 0 where the corner is not valid
    valid: Any  # whether the corner lies in the level and is not masked
    right: bool
    bottom: bool


class _Cells(NamedTuple):
    """The points of one level, shape (N, Lq, M, P)."""

    x_fraction: Any  # from the cell's left edge, in [0, 1)
    y_fraction: Any
    weight: Any  # the attention weight, zero for a point outside
    inside: Any  # whether the point touches a pixel
    moves: Any  # whether its sample depends on where it lies
    corners: tuple[_Corner, ...]  # one alone for "nearest"


def forward(
    value: Any,
    levels: Sequence[Level],
    sampling_locations: Any,
    attention_weights: Any,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    value_mask: Any = None,
) -> Any:
    """Multi-scale deformable attention, one gather per level and corner.

    Parameters
    ----------
    value : array, shape (N, S, M, D)
    levels : sequence of (H, W, start)
    sampling_locations : array, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
        With `num_points`, of each level: (N, Lq, M, K, 2), level after level.
    attention_weights : array, shape (N, Lq, M, L, P) or (N, Lq, M, K)
    interpolation : "bilinear" or "nearest"
    value_mask : bool array, shape (N, S), or None
        Where it is False, value counts as zero.

    Returns
    -------
    array, shape (N, Lq, M*D), dtype of `value`
    """

    def samples(xp: Any, flat: Any, cells: _Cells, _: int) -> Any:
        sampled = 0
        for corner in cells.corners:
            # Both factors are zero where the corner does not count: infinity must not meet the zero
            # that is gathered there, nor in derivatives of any order.
            weight, coefficient = (
                _masked(xp, corner.valid, factor)
                for factor in (cells.weight, _coefficient(cells, corner))
            )
            sampled = sampled + (weight * coefficient)[..., None] * _gather(xp, flat, corner)
        return sampled

    points = sampling_locations, attention_weights
    inputs = _Inputs(value, levels, *points, num_points, interpolation, value_mask)
    return _sum_of_levels(samples, inputs)


def backward(
    grad_output: Any,
    value: Any,
    levels: Sequence[Level],
    sampling_locations: Any,
    attention_weights: Any,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    value_mask: Any = None,
) -> tuple[Any, Any, Any]:
    """Gradients of `forward` by value, sampling_locations and attention_weights, written out.

    Parameters
    ----------
    grad_output : array, shape (N, Lq, M*D)
    value, levels, sampling_locations, attention_weights, num_points, interpolation, value_mask
        As `forward` takes them.

    Returns
    -------
    tuple of three arrays
        Each with the shape and dtype of its input.
    """
    xp = array_namespace(value)
    points = sampling_locations, attention_weights
    inputs = _Inputs(value, levels, *points, num_points, interpolation, value_mask)
    n, s, m, d = value.shape
    lq = sampling_locations.shape[1]
    flat = xp.reshape(value, (n * s * m, d))
    if 0 in (*flat.shape, *attention_weights.shape):
        return tuple(map(xp.zeros_like, (value, sampling_locations, attention_weights)))
    wide = _wide(xp, value)
    grad = xp.astype(xp.reshape(grad_output, (n, lq, m, 1, d)), wide)
    grad_flat = xp.zeros(flat.shape, dtype=wide, device=device(value))
    grad_locations, grad_weights = [], []
    for index, level in enumerate(levels):
        cells = _cells(xp, inputs, index)
        by_location, by_weight = _gradients_of_points(xp, flat, grad, cells, level)
        grad_locations.append(by_location)
        grad_weights.append(by_weight)
        for corner in cells.corners:
            weight = (cells.weight * _coefficient(cells, corner))[..., None]
            addends = _masked(xp, corner.valid[..., None], weight * grad)
            grad_flat = _add_rows(xp, grad_flat, corner.rows, addends)
    join = xp.stack if num_points is None else xp.concat
    return (
        xp.astype(xp.reshape(grad_flat, value.shape), value.dtype),
        xp.astype(join(grad_locations, axis=3), sampling_locations.dtype),
        xp.astype(join(grad_weights, axis=3), attention_weights.dtype),
    )


def tangent(
    value: Any,
    levels: Sequence[Level],
    sampling_locations: Any,
    attention_weights: Any,
    tangents: tuple[Any, Any, Any],
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    value_mask: Any = None,
) -> Any:
    """The directional derivative of `forward`, written out.

    Parameters
    ----------
    value, levels, sampling_locations, attention_weights, num_points, interpolation, value_mask
        As `forward` takes them.
    tangents : tuple of three arrays
        Directions of value, sampling_locations and attention_weights, with their shapes.

    Returns
    -------
    array, shape (N, Lq, M*D), dtype of `value`
    """
    along_value, along_locations, along_weights = tangents
    points = sampling_locations, attention_weights
    inputs = _Inputs(value, levels, *points, num_points, interpolation, value_mask)

    def changes(xp: Any, flat: Any, cells: _Cells, index: int) -> Any:
        flat_tangent, wide = xp.reshape(along_value, flat.shape), cells.weight.dtype
        along_location = inputs.of_level(along_locations, index)
        by_x, by_y, by_weight = (
            _masked(xp, counts, xp.astype(direction, wide) * unit)
            for counts, direction, unit in (
                (cells.moves, along_location[..., 0], levels[index].width),
                (cells.moves, along_location[..., 1], levels[index].height),
                (cells.inside, inputs.of_level(along_weights, index), 1),
            )
        )
        sampled, moved = 0, 0
        for corner in cells.corners:
            coefficient = _coefficient(cells, corner)[..., None]
            slope = _slope_x(cells, corner) * by_x + _slope_y(cells, corner) * by_y
            pixel = _gather(xp, flat, corner)
            sampled = sampled + coefficient * pixel
            moved = (
                moved + coefficient * _gather(xp, flat_tangent, corner) + slope[..., None] * pixel
            )
        return cells.weight[..., None] * moved + by_weight[..., None] * sampled

    return _sum_of_levels(changes, inputs)


def _sum_of_levels(terms: Callable[[Any, Any, _Cells, int], Any], inputs: _Inputs) -> Any:
    """The sum of `terms` over levels and points, shape (N, Lq, M*D), in the dtype of `value`.

    `terms` takes the array namespace, `value` as rows (N*S*M, D), the cells of a level and its
    index, and returns an array of shape (N, Lq, M, P, D).
    """
    value = inputs.value
    xp = array_namespace(value)
    n, s, m, d = value.shape
    lq, per_row = inputs.weights.shape[1], tuple(inputs.weights.shape[3:])
    flat = xp.reshape(value, (n * s * m, d))
    output = xp.zeros((n, lq, m, d), dtype=_wide(xp, value), device=device(value))
    if 0 not in (*flat.shape, lq, *per_row):
        for index in range(len(inputs.levels)):
            cells = _cells(xp, inputs, index)
            output = output + xp.sum(terms(xp, flat, cells, index), axis=3)
    return xp.astype(xp.reshape(output, (n, lq, m * d)), value.dtype)


def _gradients_of_points(
    xp: Any, flat: Any, grad: Any, cells: _Cells, level: Level
) -> tuple[Any, Any]:
    """Gradients by the locations (N, Lq, M, P, 2) and weights (N, Lq, M, P) of one level."""
    by_weight, by_x, by_y = 0, 0, 0
    for corner in cells.corners:
        dot = _masked(xp, corner.valid, xp.sum(grad * _gather(xp, flat, corner), axis=-1))
        by_weight = by_weight + _coefficient(cells, corner) * dot
        by_x = by_x + _slope_x(cells, corner) * dot
        by_y = by_y + _slope_y(cells, corner) * dot
    by_location = (level.width * cells.weight * by_x, level.height * cells.weight * by_y)
    moved = [_masked(xp, cells.moves, gradient) for gradient in by_location]
    return xp.stack(moved, axis=-1), _masked(xp, cells.inside, by_weight)


def _wide(xp: Any, value: Any) -> Any:
    """The dtype to compute in: that of value, at least float32."""
    return xp.float64 if value.dtype == xp.float64 else xp.float32


def _masked(xp: Any, mask: Any, array: Any) -> Any:
    """`array` where the mask holds, elsewhere exact zero with zero gradient, even for NaN."""
    return xp.where(mask, array, xp.zeros_like(array))


def _cells(xp: Any, inputs: _Inputs, index: int) -> _Cells:
    """The cells of the pixel grid that contain the points of one level; for "nearest", their pixels."""
    level = inputs.levels[index]
    wide = _wide(xp, inputs.value)
    locations = xp.astype(inputs.of_level(inputs.locations, index), wide)
    nearest = inputs.interpolation == "nearest"
    pixels = _nearest_pixels if nearest else _bilinear_cells
    left, top, x_fraction, y_fraction, inside = pixels(xp, locations, level)
    column, row = xp.astype(left, xp.int64), xp.astype(top, xp.int64)
    sides = (False,) if nearest else (False, True)
    corners = tuple(
        _corner(xp, inputs, level, inside, (column + right, row + bottom), right, bottom)
        for bottom in sides
        for right in sides
    )
    if inputs.value_mask is not None:
        inside = reduce(or_, (corner.valid for corner in corners))
    weight = _masked(xp, inside, xp.astype(inputs.of_level(inputs.weights, index), wide))
    moves = xp.zeros_like(inside) if nearest else inside
    return _Cells(x_fraction, y_fraction, weight, inside, moves, corners)


def _bilinear_cells(xp: Any, locations: Any, level: Level) -> tuple[Any, ...]:
    """Left column, upper row, fractions right and down of them, and whether the point is inside."""
    x = locations[..., 0] * level.width - 0.5
    y = locations[..., 1] * level.height - 0.5
    inside = (x > -1) & (y > -1) & (x < level.width) & (y < level.height)
    inside = inside & ((level.height > 0) & (level.width > 0))  # none is inside an empty level
    x, y = _masked(xp, inside, x), _masked(xp, inside, y)
    left, top = xp.floor(x), xp.floor(y)
    return left, top, x - left, y - top, inside


def _nearest_pixels(xp: Any, locations: Any, level: Level) -> tuple[Any, ...]:
    """The same of the nearest pixel by the rule of RT-DETRv2, which moves points outside to the border."""
    x = locations[..., 0] * level.width + 0.5
    y = locations[..., 1] * level.height + 0.5
    inside = ~(xp.isnan(x) | xp.isnan(y))
    inside = inside & ((level.height > 0) & (level.width > 0))
    left = xp.floor(_limited(xp, x, level.width - 1))
    top = xp.floor(_limited(xp, y, level.height - 1))
    zero = xp.zeros_like(x)
    return left, top, zero, zero, inside


def _limited(xp: Any, x: Any, largest: Any) -> Any:
    """X where it lies between 0 and `largest`, else the nearer one of these; 0 for NaN."""
    x = _masked(xp, x > 0, x)
    return xp.where(x > largest, xp.zeros_like(x) + largest, x)


def _corner(
    xp: Any,
    inputs: _Inputs,
    level: Level,
    inside: Any,
    pixel: tuple[Any, Any],
    right: bool,
    bottom: bool,
) -> _Corner:
    """One corner of the cells of a level, which lies at `pixel`: (column, row)."""
    n, s, m = inputs.value.shape[:3]
    on = device(inputs.value)
    image = xp.reshape(xp.arange(n, dtype=xp.int64, device=on), (n, 1, 1, 1))
    head = xp.reshape(xp.arange(m, dtype=xp.int64, device=on), (1, 1, m, 1))
    column, row = pixel
    valid = inside & (column >= 0) & (column < level.width) & (row >= 0) & (row < level.height)
    position = _masked(xp, valid, image * s + level.start + row * level.width + column)
    if inputs.value_mask is not None:
        mask = xp.reshape(inputs.value_mask, (-1,))
        taken = xp.take(mask, xp.reshape(position, (-1,)), axis=0)
        valid = valid & xp.reshape(taken, position.shape)
    return _Corner(_masked(xp, valid, position * m + head), valid, right, bottom)


def _slope_x(cells: _Cells, corner: _Corner) -> Any:
    """The derivative of a corner's coefficient by the horizontal coordinate, in pixels."""
    return (1 if corner.right else -1) * _along_y(cells, corner)


def _slope_y(cells: _Cells, corner: _Corner) -> Any:
    """The derivative of a corner's coefficient by the vertical coordinate, in pixels."""
    return (1 if corner.bottom else -1) * _along_x(cells, corner)


def _along_x(cells: _Cells, corner: _Corner) -> Any:
    """The horizontal interpolation weight of a corner."""
    return cells.x_fraction if corner.right else 1 - cells.x_fraction


def _along_y(cells: _Cells, corner: _Corner) -> Any:
    """The vertical interpolation weight of a corner."""
    return cells.y_fraction if corner.bottom else 1 - cells.y_fraction


def _coefficient(cells: _Cells, corner: _Corner) -> Any:
    """The bilinear coefficient of a corner."""
    return _along_y(cells, corner) * _along_x(cells, corner)


def _gather(xp: Any, flat: Any, corner: _Corner) -> Any:
    """The corner's D-vectors, shape (N, Lq, M, P, D), zero where the corner is not valid."""
    rows = xp.take(flat, xp.reshape(corner.rows, (-1,)), axis=0)
    rows = xp.reshape(rows, (*corner.rows.shape, flat.shape[1]))
    return _masked(xp, corner.valid[..., None], xp.astype(rows, _wide(xp, flat)))


def _add_rows(xp: Any, target: Any, rows: Any, addends: Any) -> Any:
    """Add each (..., D) row of `addends` to the row of `target` that `rows` names; repeats add up."""
    rows = xp.reshape(rows, (-1,))
    addends = xp.reshape(addends, (-1, target.shape[1]))
    if hasattr(target, "index_add"):  # torch
        return target.index_add(0, rows, addends)
    # The array API has no scatter-add; NumPy and CuPy have this one.
    xp.add.at(target, rows, addends)
    return target
