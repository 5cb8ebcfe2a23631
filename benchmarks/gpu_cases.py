# SPDX-License-Identifier: Apache-2.0
"""Random cells for the shapes of the benchmark, as `traffic.py` and `kernel_times.py` count them."""

from __future__ import annotations

from itertools import accumulate
from math import isqrt
from typing import Any

import numpy as np

from cupy_msda.bench import geometry
from cupy_msda.bench.cases import SHAPES, Shape

UNIFORM, DIRECTED, CAMERAS = "uniform", "directed", "cameras"
# Standard deviations of offsets from the reference in pixels of each level.
SIGMAS = {"sigma 0.5": 0.5, "sigma 2": 2, "sigma 4": 4, "sigma 8": 8, CAMERAS: 1}
OUTSIDE = -2  # a cell without corners


def make_problem(name: str, locations: str) -> dict[str, Any]:
    """What `make_access` takes, but the dtype."""
    shape = SHAPES[name]
    sizes = np.array(shape.levels)
    side = isqrt(shape.queries or 0)
    on_grid = name == "bevformer-sca"  # its queries are a square of the ground
    return {
        "levels": with_starts(sizes),
        "cells": make_cells(shape, locations),
        "images": shape.batch,
        "grids": np.array([(side, side)]) if on_grid else sizes,
        "channels": shape.channels,
    }


def make_cells(shape: Shape, locations: str, seed: int = 0) -> np.ndarray:
    """Cells (N·Lq, M, K, 2), (row, column): around the reference points, or anywhere."""
    random = np.random.default_rng(seed)
    sizes = np.array(shape.levels)
    of_image = int(sizes.prod(axis=1).sum()) if shape.queries is None else shape.queries
    most = max(shape.counts)
    points = (shape.batch * of_image, shape.heads, len(sizes), most, 2)
    if locations == UNIFORM:
        at = random.random(points, np.float32) * sizes[:, None]
    elif locations == DIRECTED:
        steps = np.arange(1, most + 1)[:, None]
        steps = geometry.directions(shape.heads)[:, None, None, ::-1] * steps
        at = _references(shape, locations) * sizes[:, None] + steps
        at = np.broadcast_to(at, points)
    else:
        at = random.standard_normal(points, np.float32) * np.float32(SIGMAS[locations])
        at += _references(shape, locations) * sizes[:, None]
    cells = np.floor(at - 0.5).clip(OUTSIDE, 2**14).astype(np.int16)
    for level, count in enumerate(shape.counts):
        cells[:, :, level, count:] = OUTSIDE
    return cells.reshape(points[0], shape.heads, -1, 2)


def _references(shape: Shape, locations: str) -> np.ndarray:
    """Reference points (N·Lq, 1, 1, 1 or P, 2) as (y, x) fractions: pillars, or the centres of the queries' pixels."""
    if locations == CAMERAS:
        pillars = geometry.bev_in_cameras(isqrt(shape.queries or 0))
        at = np.tile(pillars, (1, 1, max(shape.counts) // pillars.shape[2], 1))[..., ::-1]
        return at.reshape(-1, 1, 1, max(shape.counts), 2).astype(np.float32)
    centres = geometry.pixel_centres(shape.levels)[:, ::-1].astype(np.float32)
    return np.tile(centres, (shape.batch, 1))[:, None, None, None]


def with_starts(sizes: np.ndarray) -> np.ndarray:
    """(L, 3): height, width and start of every level."""
    starts = list(accumulate(sizes.prod(axis=1), initial=0))[:-1]
    return np.column_stack([sizes, starts])
