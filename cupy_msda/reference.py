# SPDX-License-Identifier: Apache-2.0
"""The operator in array-API calls: the oracle of every backend, and the CPU path without Numba.

Works on NumPy, CuPy and torch arrays; under torch `forward` is differentiable to any order, in
reverse and forward mode. It computes in the dtype of `value`, or in float32 where that is narrower,
so float64 inputs give the exact results that others are compared with.

Reference: Zhu et al., "Deformable DETR", arXiv:2010.04159.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace, device

from cupy_msda.problem import Level


class _Corner(NamedTuple):
    """One corner of the cells that the points of a level fall into, shape (N, Lq, M, P)."""

    rows: Any  # index into value viewed as (N*S*M, D), 0 where the corner is not valid
    valid: Any  # whether the corner lies in the level
    right: bool
    bottom: bool


class _Cells(NamedTuple):
    """The points of one level, shape (N, Lq, M, P)."""

    x_fraction: Any  # from the cell's left edge, in [0, 1)
    y_fraction: Any
    weight: Any  # the attention weight, zero for a point outside
    inside: Any  # whether the point can touch a pixel
    corners: tuple[_Corner, ...]


def forward(
    value: Any, levels: Sequence[Level], sampling_locations: Any, attention_weights: Any
) -> Any:
    """Multi-scale deformable attention, one gather per level and corner.

    Parameters
    ----------
    value : array, shape (N, S, M, D)
    levels : sequence of (H, W, start)
    sampling_locations : array, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
    attention_weights : array, shape (N, Lq, M, L, P)

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

    return _sum_of_levels(samples, value, levels, sampling_locations, attention_weights)


def backward(
    grad_output: Any,
    value: Any,
    levels: Sequence[Level],
    sampling_locations: Any,
    attention_weights: Any,
) -> tuple[Any, Any, Any]:
    """Gradients of `forward` by value, sampling_locations and attention_weights, written out.

    Parameters
    ----------
    grad_output : array, shape (N, Lq, M*D)
    value, levels, sampling_locations, attention_weights
        As `forward` takes them.

    Returns
    -------
    tuple of three arrays
        Each with the shape and dtype of its input.
    """
    xp = array_namespace(value)
    n, s, m, d = value.shape
    lq, p = sampling_locations.shape[1], sampling_locations.shape[4]
    flat = xp.reshape(value, (n * s * m, d))
    if 0 in (*flat.shape, lq, p, len(levels)):
        return tuple(map(xp.zeros_like, (value, sampling_locations, attention_weights)))
    wide = _wide(xp, value)
    grad = xp.astype(xp.reshape(grad_output, (n, lq, m, 1, d)), wide)
    grad_flat = xp.zeros(flat.shape, dtype=wide, device=device(value))
    grad_locations, grad_weights = [], []
    for index, level in enumerate(levels):
        cells = _cells(xp, value, level, sampling_locations, attention_weights, index)
        by_location, by_weight = _gradients_of_points(xp, flat, grad, cells, level)
        grad_locations.append(by_location)
        grad_weights.append(by_weight)
        for corner in cells.corners:
            weight = (cells.weight * _coefficient(cells, corner))[..., None]
            addends = _masked(xp, corner.valid[..., None], weight * grad)
            grad_flat = _add_rows(xp, grad_flat, corner.rows, addends)
    return (
        xp.astype(xp.reshape(grad_flat, value.shape), value.dtype),
        xp.astype(xp.stack(grad_locations, axis=3), sampling_locations.dtype),
        xp.astype(xp.stack(grad_weights, axis=3), attention_weights.dtype),
    )


def tangent(
    value: Any,
    levels: Sequence[Level],
    sampling_locations: Any,
    attention_weights: Any,
    tangents: tuple[Any, Any, Any],
) -> Any:
    """The directional derivative of `forward`, written out.

    Parameters
    ----------
    value, levels, sampling_locations, attention_weights
        As `forward` takes them.
    tangents : tuple of three arrays
        Directions of value, sampling_locations and attention_weights, with their shapes.

    Returns
    -------
    array, shape (N, Lq, M*D), dtype of `value`
    """
    along_value, along_locations, along_weights = tangents

    def changes(xp: Any, flat: Any, cells: _Cells, index: int) -> Any:
        flat_tangent, wide = xp.reshape(along_value, flat.shape), cells.weight.dtype
        by_x, by_y, by_weight = (
            _masked(xp, cells.inside, xp.astype(direction, wide) * unit)
            for direction, unit in (
                (along_locations[:, :, :, index, :, 0], levels[index].width),
                (along_locations[:, :, :, index, :, 1], levels[index].height),
                (along_weights[:, :, :, index], 1),
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

    return _sum_of_levels(changes, value, levels, sampling_locations, attention_weights)


def _sum_of_levels(
    terms: Callable[[Any, Any, _Cells, int], Any],
    value: Any,
    levels: Sequence[Level],
    locations: Any,
    weights: Any,
) -> Any:
    """The sum of `terms` over levels and points, shape (N, Lq, M*D), in the dtype of `value`.

    `terms` takes the array namespace, `value` as rows (N*S*M, D), the cells of a level and its
    index, and returns an array of shape (N, Lq, M, P, D).
    """
    xp = array_namespace(value)
    n, s, m, d = value.shape
    lq, p = locations.shape[1], locations.shape[4]
    flat = xp.reshape(value, (n * s * m, d))
    output = xp.zeros((n, lq, m, d), dtype=_wide(xp, value), device=device(value))
    if 0 not in (*flat.shape, lq, p):
        for index, level in enumerate(levels):
            cells = _cells(xp, value, level, locations, weights, index)
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
    masked = [_masked(xp, cells.inside, gradient) for gradient in (*by_location, by_weight)]
    return xp.stack(masked[:2], axis=-1), masked[2]


def _wide(xp: Any, value: Any) -> Any:
    """The dtype to compute in: that of value, at least float32."""
    return xp.float64 if value.dtype == xp.float64 else xp.float32


def _masked(xp: Any, mask: Any, array: Any) -> Any:
    """`array` where the mask holds, elsewhere exact zero with zero gradient, even for NaN."""
    return xp.where(mask, array, xp.zeros_like(array))


def _cells(xp: Any, value: Any, level: Level, locations: Any, weights: Any, index: int) -> _Cells:
    """The cells of the pixel grid that contain the points of one level."""
    height, width, start = level
    wide = _wide(xp, value)
    x = xp.astype(locations[:, :, :, index, :, 0], wide) * width - 0.5
    y = xp.astype(locations[:, :, :, index, :, 1], wide) * height - 0.5
    inside = (x > -1) & (y > -1) & (x < width) & (y < height)
    inside = inside & ((height > 0) & (width > 0))  # no point is inside an empty level
    x, y = _masked(xp, inside, x), _masked(xp, inside, y)
    left, top = xp.floor(x), xp.floor(y)
    column, row = xp.astype(left, xp.int64), xp.astype(top, xp.int64)

    n, s, m = value.shape[:3]
    on = device(value)
    image = xp.reshape(xp.arange(n, dtype=xp.int64, device=on), (n, 1, 1, 1))
    head = xp.reshape(xp.arange(m, dtype=xp.int64, device=on), (1, 1, m, 1))
    corners = []
    for bottom in (False, True):
        for right in (False, True):
            cx, cy = column + int(right), row + int(bottom)
            valid = inside & (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
            rows = (image * s + start + cy * width + cx) * m + head
            corners.append(_Corner(_masked(xp, valid, rows), valid, right, bottom))
    weight = _masked(xp, inside, xp.astype(weights[:, :, :, index], wide))
    return _Cells(x - left, y - top, weight, inside, tuple(corners))


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
