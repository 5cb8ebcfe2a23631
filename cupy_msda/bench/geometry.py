# SPDX-License-Identifier: Apache-2.0
"""Where the models of the benchmark sample: reference points and offsets, in NumPy, for it and for the traffic model.

Positions are (x, y) as fractions of a level or image: (0, 0) top-left, (1, 1) bottom-right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pixel_centres(levels: Sequence[tuple[int, int]]) -> Array:
    """The references of an encoder: the centre of each pixel of each level, shape (S, 2)."""
    grids = [
        np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), axis=-1)
        for h, w in levels
    ]
    return np.concatenate([grid.reshape(-1, 2) for grid in grids])


def directions(heads: int) -> Array:
    """The direction of each head, on the unit square, shape (M, 2).

    MSDeformAttn's initial bias: point k = 1, 2, ... lies k times this from its reference, in pixels of its level.
    """
    angles = 2 * np.pi * np.arange(heads) / heads
    towards = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    scaled: Array = towards / np.abs(towards).max(axis=-1, keepdims=True)
    return scaled


def boxes(batch: int, queries: int) -> Array:
    """The references of a decoder: random boxes inside the image, (x, y, w, h), shape (N, Lq, 4).

    Sides are log-uniform from 2% to 50% of the image, independently: an assumption, no statistics of a data set.
    """
    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(np.log(0.02), np.log(0.5), (batch, queries, 2)))
    centres = sides / 2 + (1 - sides) * random.random((batch, queries, 2))
    return np.concatenate([centres, sides], axis=-1)


class Camera(NamedTuple):
    """A level pinhole camera on a car: metres forward, left, up; degrees to the left of forward; pixels."""

    position: tuple[float, float, float]
    yaw: float
    focal: float
    centre: tuple[float, float]


# The car n015 of nuScenes (Caesar et al., arXiv:1903.11027): `calibrated_sensor` of its set v1.0-mini, rounded. Pitch
# and roll are below one degree there, and zero here.
CAMERAS = {
    "front": Camera((1.70, 0.02, 1.51), 0.3, 1266, (816, 492)),
    "front right": Camera((1.55, -0.49, 1.50), -56.4, 1261, (808, 495)),
    "front left": Camera((1.52, 0.49, 1.51), 55.2, 1273, (827, 480)),
    "back": Camera((0.03, 0.00, 1.58), 179.9, 809, (829, 482)),
    "back left": Camera((1.04, 0.48, 1.59), 108.6, 1257, (792, 493)),
    "back right": Camera((1.01, -0.48, 1.56), -110.8, 1260, (807, 501)),
}
LIDAR = (0.94, 0.0, 1.84)  # of the same car; the grid's origin
# BEVFormer (Li et al., arXiv:2203.17270), configuration "base": images padded to a multiple of 32, the grid around the
# lidar, and in each of its cells a pillar of reference points, in metres above the lidar.
IMAGE = (1600, 928)
EXTENT = 102.4
PILLAR = tuple(-5 + 8 * (part + 0.5) / 8 for part in np.linspace(0, 7, 4))
_OUTSIDE = -2.0


def bev_in_cameras(side: int) -> Array:
    """The pillars of a grid of side x side cells in each camera's image, shape (6, side * side, 4, 2).

    The grid is row-major: along a row, to the right of the car; from row to row, forward. A point behind a camera is at
    (-2, -2). The others are clipped to [-2, 3], which leaves them outside.
    """
    steps = EXTENT * ((np.arange(side) + 0.5) / side - 0.5)
    forward, right, up = np.meshgrid(steps, steps, PILLAR, indexing="ij")
    points = np.stack([LIDAR[0] + forward, LIDAR[1] - right, LIDAR[2] + up], axis=-1)
    images = [project(camera, points.reshape(-1, len(PILLAR), 3)) for camera in CAMERAS.values()]
    return np.stack(images)


def project(camera: Camera, points: Array) -> Array:
    """Points of the car's frame, shape (..., 3), in the camera's image, shape (..., 2)."""
    forward, left, up = np.moveaxis(points - camera.position, -1, 0)
    yaw = np.radians(camera.yaw)
    depth = forward * np.cos(yaw) + left * np.sin(yaw)
    right = forward * np.sin(yaw) - left * np.cos(yaw)
    seen = depth > 1e-5  # BEVFormer's own bound
    ahead = np.where(seen, depth, 1)[..., None]
    pixels = camera.centre + camera.focal * np.stack([right, -up], axis=-1) / ahead
    located = np.clip(pixels / IMAGE, _OUTSIDE, 1 - _OUTSIDE)
    found: Array = np.where(seen[..., None], located, _OUTSIDE)
    return found
