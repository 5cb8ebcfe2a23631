# SPDX-License-Identifier: Apache-2.0
"""What a fused call stands for, in array-API calls: locations and weights, and the way back of their gradients.

    location = (x, y) + offset / (W, H)                            reference points (x, y)
    location = (x, y) + offset / P * (w, h) * offset_scale         reference points (x, y, w, h)
    weight   = softmax of the logits over all K points of a (query, head)

P is the number of points of the level. Works on NumPy, CuPy and torch arrays, under torch differentiable to any order.

References: Zhu et al., "Deformable DETR", arXiv:2010.04159; for levels of different P, Peng et al., "D-FINE",
arXiv:2410.13842.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace, device


class FusedPoints(NamedTuple):
    """The points of a fused call, all arrays in the dtype to compute in."""

    reference_points: Any  # (N or 1, Lq, L or 1, 2 or 4)
    offsets: Any  # (N, Lq, M, L, P, 2) or, with `num_points`, (N, Lq, M, K, 2)
    logits: Any  # (N, Lq, M, L, P) or (N, Lq, M, K)
    sizes: Any  # (L, 2): (W, H) of each level
    num_points: Sequence[int] | None
    offset_scale: float

    @property
    def boxes(self) -> Any:
        """(w, h) of the reference points; without elements if these have none."""
        return self.reference_points[..., 2:]


def locations_and_weights(points: FusedPoints) -> tuple[Any, Any]:
    """Sampling locations and attention weights, with the shapes of offsets and logits."""
    xp = array_namespace(points.offsets)
    centers = _of_points(xp, points, points.reference_points[..., :2])
    return centers + _scaled(xp, points, points.offsets), _softmax(xp, points.logits)


def gradients(
    points: FusedPoints, weights: Any, by_locations: Any, by_weights: Any
) -> tuple[Any, Any, Any]:
    """Gradients of reference points, offsets and logits from those of locations and weights."""
    xp = array_namespace(points.offsets)
    by_offsets = _scaled(xp, points, by_locations)
    by_references = _of_references(xp, points, by_locations)
    if points.boxes.shape[-1]:
        steps = points.offsets / _num_points(xp, points) * points.offset_scale
        by_boxes = _of_references(xp, points, by_locations * steps)
        by_references = xp.concat([by_references, by_boxes], axis=-1)
    products, axes = weights * by_weights, tuple(range(3, len(weights.shape)))
    by_logits = products - weights * xp.sum(products, axis=axes, keepdims=True)
    return by_references, by_offsets, by_logits


def _scaled(xp: Any, points: FusedPoints, offsets: Any) -> Any:
    """Offsets as differences of locations; also, since that is linear, the way back of gradients."""
    if points.boxes.shape[-1]:
        boxes = _of_points(xp, points, points.boxes)
        return offsets / _num_points(xp, points) * boxes * points.offset_scale
    # An empty level has no points inside, whose gradients of zero must stay zero.
    sizes = xp.maximum(points.sizes, xp.ones_like(points.sizes))
    return offsets / _of_points(xp, points, sizes)


def _softmax(xp: Any, logits: Any) -> Any:
    """The softmax over all points of a row."""
    if 0 in logits.shape:  # without points there is no maximum
        return logits
    if hasattr(xp, "softmax"):  # torch's, whose gradient is one kernel
        return xp.reshape(xp.softmax(xp.flatten(logits, 3), -1), logits.shape)
    axes = tuple(range(3, len(logits.shape)))
    powers = xp.exp(logits - xp.max(logits, axis=axes, keepdims=True))
    return powers / xp.sum(powers, axis=axes, keepdims=True)


def _of_points(xp: Any, points: FusedPoints, of_levels: Any) -> Any:
    """(L, C) or (N or 1, Lq, L or 1, C), as it broadcasts with offsets."""
    if len(of_levels.shape) == 4:
        of_levels = of_levels[:, :, None]  # an axis for the heads
    if points.num_points is None:
        return of_levels[..., None, :]
    *others, levels, channels = of_levels.shape
    if levels == 1:
        return of_levels
    parts = [
        xp.broadcast_to(of_levels[..., level : level + 1, :], (*others, number, channels))
        for level, number in enumerate(points.num_points)
    ]
    return xp.concat(parts, axis=-2)


def _num_points(xp: Any, points: FusedPoints) -> Any:
    """P of each point's level, as it broadcasts with offsets."""
    if points.num_points is None:
        return points.offsets.shape[4]
    like = {"dtype": points.offsets.dtype, "device": device(points.offsets)}
    return xp.concat([xp.full((number, 1), number, **like) for number in points.num_points])


def _of_references(xp: Any, points: FusedPoints, of_points: Any) -> Any:
    """The sum over the points that share a reference point, from the shape of offsets to (N or 1, Lq, L or 1, 2)."""
    batch, _, levels, _ = points.reference_points.shape
    if points.num_points is None:
        of_levels = xp.sum(of_points, axis=(2, 4))
    else:
        ends = [sum(points.num_points[: level + 1]) for level in range(len(points.num_points))]
        parts = [
            xp.sum(of_points[:, :, :, end - number : end], axis=(2, 3))
            for end, number in zip(ends, points.num_points, strict=True)
        ]
        of_levels = xp.stack(parts, axis=2)
    if levels == 1:
        of_levels = xp.sum(of_levels, axis=2, keepdims=True)
    return xp.sum(of_levels, axis=0, keepdims=True) if batch == 1 else of_levels
