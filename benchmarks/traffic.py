# SPDX-License-Identifier: Apache-2.0
"""A model of the memory traffic of an encoder on an H100-like GPU, for several orders of the work.

    python benchmarks/traffic.py [--shapes NAME ...] [--l1 KB] [--sms N] [--output FILE]

Modelled: the 32-byte sectors of `value` that the forward's gathers move from L2 to L1, and the
128-byte rows that the backward adds to memory, directly or after a segmented reduction over 256 rows
of work sorted by bilinear cell (one batch in five). Each multiprocessor (SM) has its own L1: fully
associative, least recently used, 128-byte lines filled sector by sector. Block b of a plain grid runs
on SM b mod `--sms`; its resident blocks run in lock step, point by point. A sample of the SMs is
simulated for a plain grid, all SMs where each has its own part of the work. Roofline bounds in
microseconds use the constants of a design study: model, not measured on a GPU.

Not modelled: cache sets (the real L1 hashes addresses), the real replacement policy, latency, blocks
that drift apart, instructions. The streams of locations, weights and outputs, read or written once,
count in the bounds alone. HBM: compulsory traffic only; where `value` exceeds the 50 MB L2, one head
of it does not. One image; shapes of real models; random locations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

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
    P,
    backward,
    forward,
    make_access,
)

DETR = ((100, 167), (50, 84), (25, 42), (13, 21))
# Levels, and the number of queries; 0: every pixel is a query.
SHAPES: dict[str, tuple[tuple[tuple[int, int], ...], int]] = {
    "detr-encoder": (DETR, 0),
    "mask2former-1024": (((32, 32), (64, 64), (128, 128)), 0),
    "mask2former-512": (((16, 16), (32, 32), (64, 64)), 0),
    "dino5-encoder": (((200, 334), *DETR), 0),
    "bevformer-tsa": (((200, 200),), 0),
    "detr-decoder": (DETR, 300),
}
DIRECTED = (
    -1.0
)  # Deformable-DETR's initial offsets: point p lies p + 1 pixels off in the head's direction
# Standard deviation of offsets from the reference in pixels of each level; None: uniform over the image.
SIGMAS: tuple[float | None, ...] = (None, 0.5, 2, 4, 8, DIRECTED)


def make_cells(sizes: np.ndarray, queries: int, sigma: float | None, seed: int = 0) -> np.ndarray:
    """Random cells (Lq, M, K, 2), (row, column), around the reference points or anywhere."""
    random = np.random.default_rng(seed)
    shape = (queries or sizes.prod(axis=1).sum(), M, len(sizes), P, 2)
    if sigma is None:
        at = random.random(shape, np.float32) * sizes[:, None]
    elif sigma == DIRECTED:
        angles = 2 * np.pi * np.arange(M) / M
        towards = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        towards /= np.abs(towards).max(axis=-1, keepdims=True)
        steps = towards[:, None, None] * np.arange(1, P + 1)[:, None]
        at = _references(sizes, queries, random)[:, None, None, None] * sizes[:, None] + steps
        at = np.broadcast_to(at, shape)
    else:
        at = random.standard_normal(shape, np.float32) * np.float32(sigma)
        at += _references(sizes, queries, random)[:, None, None, None] * sizes[:, None]
    cells = np.floor(at - 0.5).clip(-2, 2**14).astype(np.int16)
    return cells.reshape(shape[0], M, -1, 2)


def _references(sizes: np.ndarray, queries: int, random: np.random.Generator) -> np.ndarray:
    """Reference points (Lq, 2) as (y, x) fractions: pixels' centres, or random for other queries."""
    if queries:
        return random.random((queries, 2), np.float32)
    centres = [
        np.stack(np.meshgrid((np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / w, indexing="ij"), -1)
        for h, w in sizes
    ]
    return np.concatenate([each.reshape(-1, 2) for each in centres]).astype(np.float32)


def with_starts(sizes: np.ndarray) -> np.ndarray:
    """(L, 3): height, width and start of every level."""
    starts = list(accumulate(sizes.prod(axis=1), initial=0))[:-1]
    return np.column_stack([sizes, starts])


ORDERS = [Order(heads_first=False), Order(), Order(8), Order(16)]
ORDERS += [Order(tile, CHUNK) for tile in (1, 8, 16)]
BEST = Order(16, CHUNK)


def forward_rows(names: list[str], gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Every shape, spread, dtype and order."""
    for about, levels, cells in problems(names):
        for dtype in DTYPES:
            access = make_access(levels, cells, dtype)
            for order in ORDERS:
                result = forward(access, order, gpu)
                yield about | {"dtype": dtype, "order": str(order)} | result


def variant_rows(name: str, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """The best order and variants that differ from it in one respect."""
    orders = [Order(4, CHUNK), Order(32, CHUNK), Order(16, OWN), Order(16, BESIDE), Order(1, OWN)]
    orders += [Order(16, CHUNK, False)]
    changes = [{"l1": 64}, {"l1": 128}, {"l1": 224}, {"resident": 2}, {"resident": 8}]
    for about, levels, cells in problems([name]):
        for dtype in DTYPES:
            access = make_access(levels, cells, dtype)
            variants = [(str(BEST), access, BEST, gpu)]
            variants += [(str(order), access, order, gpu) for order in orders]
            variants += [
                (f"{c}"[2:-1].replace("'", ""), access, BEST, gpu._replace(**c)) for c in changes
            ]
            outside = make_access(levels, cells, dtype, heads_outside=True)
            variants += [("value (N, M, S, D)", outside, BEST, gpu)]
            for text, *what in variants:
                yield about | {"dtype": dtype, "order": text} | forward(*what)


def backward_rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """Every shape, spread and order: gradients are float32 whatever the dtype."""
    for about, levels, cells in problems(names):
        access = make_access(levels, cells, "float32")
        for order in (*ORDERS[:2], Order(4), *ORDERS[2:4]):
            yield about | {"order": str(order)} | backward(access, order)


def problems(names: list[str]) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """The labels of a row of results, the levels, and the cells of the points."""
    for name in names:
        sizes = np.array(SHAPES[name][0])
        for sigma in SIGMAS:
            locations = {None: "uniform", DIRECTED: "directed"}.get(sigma, f"sigma {sigma}")
            cells = make_cells(sizes, SHAPES[name][1], sigma)
            yield {"shape": name, "locations": locations}, with_starts(sizes), cells


def table(title: str, rows: list[dict[str, Any]], figures: tuple[str, ...]) -> str:
    """Markdown: a line for each shape, dtype and locations, a column for each order and figure."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        key = ", ".join(row[name] for name in ("shape", "dtype", "locations") if name in row)
        lines.setdefault(key, {})[row["order"]] = " / ".join(f"{row[f]:.0f}" for f in figures)
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
    encoders = [name for name in arguments.shapes if not SHAPES[name][1]]
    rows = {
        "forward": list(forward_rows(arguments.shapes, gpu)),
        "variants": list(variant_rows(arguments.shapes[0], gpu)),
        "backward": list(backward_rows(encoders)),
    }
    print(
        table(
            "Forward: MB from L2 / roofline bound in microseconds", rows["forward"], ("l2_mb", "us")
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
