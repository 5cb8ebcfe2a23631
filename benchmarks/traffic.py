# SPDX-License-Identifier: Apache-2.0
"""A model of the memory traffic of an encoder on an H100-like GPU, for several orders of the work.

    python benchmarks/traffic.py [--shapes NAME ...] [--l1 KB] [--sms N] [--output FILE]

Modelled: the 32-byte sectors of `value` that the forward's gathers move from L2 to L1, and the
128-byte rows that the backward adds to memory, directly or after a segmented reduction over 128 rows
of work sorted by bilinear cell (one batch in five). Each multiprocessor (SM) has its own L1: fully
associative, least recently used, 128-byte lines filled sector by sector. Block b of a plain grid runs
on SM b mod `--sms`; its resident blocks run in lock step, point by point. A sample of the SMs is
simulated for a plain grid, all SMs where each has its own part of the work. Roofline bounds in
microseconds use the constants of a design study: model, not measured on a GPU.

Not modelled: cache sets (the real L1 hashes addresses), the real replacement policy, latency, blocks
that drift apart, instructions. The streams of locations, weights and outputs, read or written once,
count in the bounds alone. HBM: compulsory traffic only; where `value` exceeds the 50 MB L2, one head
of it does not. Shapes of real models; locations as models have them or random, as in
`cupy_msda/bench/geometry.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu_model import (
    BESIDE,
    BINS,
    CHUNK,
    DTYPES,
    OWN,
    RATES,
    Gpu,
    M,
    Order,
    backward,
    forward,
    make_access,
)

from cupy_msda.bench import geometry

DETR = ((100, 167), (50, 84), (25, 42), (13, 21))


class Shape(NamedTuple):
    """The sizes of one call; no queries: every pixel is a query."""

    levels: tuple[tuple[int, int], ...]
    queries: int = 0
    points: int = 4
    images: int = 1
    grids: tuple[tuple[int, int], ...] = ()  # where they are not the levels


SHAPES = {
    "detr-encoder": Shape(DETR),
    "mask2former-1024": Shape(((32, 32), (64, 64), (128, 128))),
    "mask2former-512": Shape(((16, 16), (32, 32), (64, 64))),
    "dino5-encoder": Shape(((200, 334), *DETR)),
    "bevformer-tsa": Shape(((200, 200),)),
    "bevformer-sca": Shape(
        ((116, 200), (58, 100), (29, 50), (15, 25)), 10000, 8, 6, grids=((100, 100),)
    ),
    "detr-decoder": Shape(DETR, 300),
}
UNIFORM, DIRECTED, CAMERAS = "uniform", "directed", "cameras"
# Standard deviations of offsets from the reference in pixels of each level.
SIGMAS = {"sigma 0.5": 0.5, "sigma 2": 2, "sigma 4": 4, "sigma 8": 8, CAMERAS: 1}
LOCATIONS = (UNIFORM, "sigma 0.5", "sigma 2", "sigma 4", "sigma 8", DIRECTED)


def make_cells(shape: Shape, locations: str, seed: int = 0) -> np.ndarray:
    """Cells (N·Lq, M, K, 2), (row, column): around the reference points, or anywhere."""
    random = np.random.default_rng(seed)
    sizes = np.array(shape.levels)
    queries = shape.images * (shape.queries or int(sizes.prod(axis=1).sum()))
    points = (queries, M, len(sizes), shape.points, 2)
    if locations == UNIFORM:
        at = random.random(points, np.float32) * sizes[:, None]
    elif locations == DIRECTED:
        steps = np.arange(1, shape.points + 1)[:, None]
        steps = geometry.directions(M)[:, None, None, ::-1] * steps
        at = _references(shape, locations, random) * sizes[:, None] + steps
        at = np.broadcast_to(at, points)
    else:
        at = random.standard_normal(points, np.float32) * np.float32(SIGMAS[locations])
        at += _references(shape, locations, random) * sizes[:, None]
    cells = np.floor(at - 0.5).clip(-2, 2**14).astype(np.int16)
    return cells.reshape(queries, M, -1, 2)


def _references(shape: Shape, locations: str, random: np.random.Generator) -> np.ndarray:
    """Reference points (N·Lq, 1, 1, 1 or P, 2) as (y, x) fractions: pillars, random points or pixels' centres."""
    if locations == CAMERAS:
        pillars = geometry.bev_in_cameras(shape.grids[0][0])
        at = np.tile(pillars, (1, 1, shape.points // pillars.shape[2], 1))[..., ::-1]
        return at.reshape(-1, 1, 1, shape.points, 2).astype(np.float32)
    if shape.queries:
        return random.random((shape.queries, 2), np.float32)[:, None, None, None]
    centres = geometry.pixel_centres(shape.levels)[:, ::-1].astype(np.float32)
    return centres[:, None, None, None]


def with_starts(sizes: np.ndarray) -> np.ndarray:
    """(L, 3): height, width and start of every level."""
    starts = list(accumulate(sizes.prod(axis=1), initial=0))[:-1]
    return np.column_stack([sizes, starts])


ORDERS = [Order(heads_first=False), Order(), Order(8), Order(16)]
ORDERS += [Order(tile, CHUNK) for tile in (1, 8, 16)]
BEST = Order(16, CHUNK)


def forward_rows(names: list[str], gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Every shape, spread, dtype and order."""
    for about, problem in problems(names):
        for dtype in DTYPES:
            access = make_access(dtype=dtype, **problem)
            for order in ORDERS:
                result = forward(access, order, gpu)
                yield about | {"dtype": dtype, "order": str(order)} | result


def variant_rows(name: str, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """The best order and variants that differ from it in one respect."""
    orders = [Order(4, CHUNK), Order(32, CHUNK), Order(16, OWN), Order(16, BESIDE), Order(1, OWN)]
    orders += [Order(16, CHUNK, False)]
    changes = [{"l1": 64}, {"l1": 128}, {"l1": 224}, {"resident": 2}, {"resident": 8}]
    for about, problem in problems([name]):
        for dtype in DTYPES:
            access = make_access(dtype=dtype, **problem)
            variants = [(str(BEST), access, BEST, gpu)]
            variants += [(str(order), access, order, gpu) for order in orders]
            variants += [
                (f"{c}"[2:-1].replace("'", ""), access, BEST, gpu._replace(**c)) for c in changes
            ]
            outside = make_access(dtype=dtype, heads_outside=True, **problem)
            variants += [("value (N, M, S, D)", outside, BEST, gpu)]
            for text, *what in variants:
                yield about | {"dtype": dtype, "order": text} | forward(*what)


def backward_rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """Every shape, spread and order: gradients are float32 whatever the dtype."""
    for about, problem in problems(names):
        access = make_access(dtype="float32", **problem)
        for order in (*ORDERS[:2], Order(4), *ORDERS[2:4]):
            yield about | {"order": str(order)} | backward(access, order)


def problems(names: list[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The labels of a row of results, and what `make_access` takes."""
    for name in names:
        shape = SHAPES[name]
        levels = with_starts(np.array(shape.levels))
        grids = np.array(shape.grids) if shape.grids else None
        for locations in (UNIFORM, CAMERAS) if shape.grids else LOCATIONS:
            cells = make_cells(shape, locations)
            problem = {"levels": levels, "cells": cells, "images": shape.images, "grids": grids}
            yield {"shape": name, "locations": locations}, problem


def table(title: str, rows: list[dict[str, Any]], figures: tuple[str, ...]) -> str:
    """Markdown: a line for each shape, dtype and locations, a column for each order and figure."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        key = ", ".join(row[name] for name in ("shape", "dtype", "locations") if name in row)
        lines.setdefault(key, {})[row["order"]] = " / ".join(f"{row[f]:.4g}" for f in figures)
    columns = list(dict.fromkeys(row["order"] for row in rows))
    text = [["", *columns], ["---"] * (len(columns) + 1)]
    text += [[key, *(line[column] for column in columns)] for key, line in lines.items()]
    return f"\n{title} (model)\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in text)


def main() -> None:
    """Print the tables and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    for name, default in Gpu()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default, help="as in `Gpu`")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    gpu = Gpu(*(getattr(arguments, name) for name in Gpu._fields))
    on_grids = [name for name in arguments.shapes if not SHAPES[name].queries or SHAPES[name].grids]
    rows = {
        "forward": list(forward_rows(arguments.shapes, gpu)),
        "variants": list(variant_rows(arguments.shapes[0], gpu)),
        "backward": list(backward_rows(on_grids)),
    }
    print(
        table(
            "Forward: MB from L2 / roofline bound in microseconds / the busiest SM's reads by the mean",
            rows["forward"],
            ("l2_mb", "us", "busiest"),
        )
    )
    print(table("Variants: MB from L2", rows["variants"], ("l2_mb",)))
    figures = ("direct_mb", *(f"{name}_mb" for name in BINS), "us")
    title = f"Backward: MB added, direct / binned by {' / '.join(BINS)}, microseconds of the last"
    print(table(title, rows["backward"], figures))
    if arguments.output:
        about = {"model": "not measured on a GPU", **gpu._asdict(), "bytes_a_second": RATES}
        arguments.output.write_text(json.dumps(about | rows) + "\n")


if __name__ == "__main__":
    main()
