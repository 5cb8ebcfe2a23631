# SPDX-License-Identifier: Apache-2.0
"""A model of the memory traffic of encoders on an H100-like GPU, for several orders of the work.

    python benchmarks/traffic.py [--shapes NAME ...] [--l1 KB] [--sms N] [--output FILE]

Modelled: the 32-byte sectors of `value` that the forward's gathers move from L2 to L1, and the rows of D channels that
the backward adds to memory, directly or after a segmented reduction over 128 queries of a head sorted by bilinear cell
(one batch in five). Each multiprocessor (SM) has its own L1: fully associative, least recently used, 128-byte lines
filled sector by sector. Block b of a plain grid runs on SM b mod `--sms`; its resident blocks run in lock step, point
by point. A sample of the SMs is simulated for a plain grid, all SMs where each has its own part of the work.

Not modelled: cache sets (the real L1 hashes addresses), the real replacement policy, blocks that drift apart, and time,
which is for `kernel_times.py`. Locations, weights and outputs are left out: any order reads and writes them once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_cases import CAMERAS, DIRECTED, UNIFORM, make_problem
from gpu_model import BINS, CHUNK, DTYPES, EVERY, Gpu, Order, additions, make_access, traffic

from cupy_msda.bench.cases import SHAPES
from cupy_msda.cuda.compile import BINNED_QUERIES, BLOCK

ENCODERS = (
    *("detr-encoder", "mask2former-1024", "mask2former-512", "dino5-encoder"),
    *("bevformer-tsa", "bevformer-sca"),
)
LOCATIONS = (UNIFORM, "sigma 0.5", "sigma 2", "sigma 4", "sigma 8", DIRECTED)

TILES = [(1, 1), (8, 8), (16, 16)]
ORDERS = [Order(heads_first=False), *map(Order, TILES)]
ORDERS += [Order(tile, CHUNK) for tile in TILES]
BEST = Order((16, 16), CHUNK)


def figures(problem: dict[str, Any], dtype: str, order: Order, gpu: Gpu) -> dict[str, float]:
    """The traffic of a forward."""
    access = make_access(dtype=dtype, **problem)
    row_lanes = access.sectors * 2  # of 16 bytes
    read, missed, busiest = traffic(access, order, gpu, BLOCK // row_lanes)
    return {"read_mb": round(read, 2), "l2_mb": round(missed, 2), "busiest": round(busiest, 2)}


def forward_rows(names: list[str], gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Every shape, spread, dtype and order."""
    for about, problem in problems(names):
        for dtype in DTYPES:
            for order in (*ORDERS, block_tiles(dtype)):
                labels = {"dtype": dtype, "order": str(order)}
                yield about | labels | figures(problem, dtype, order, gpu)


def block_tiles(dtype: str) -> Order:
    """A tile of 8 columns for each block, as forward.cu's msda_forward_tiled at D = 32."""
    return Order((BLOCK // (8 * DTYPES[dtype] * 2), 8))


def variant_rows(name: str, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """The order with the least traffic, and variants that differ from it in one respect."""
    orders = [Order((4, 4), CHUNK), Order((32, 32), CHUNK), BEST._replace(heads_first=False)]
    changes = [{"l1": 64}, {"l1": 128}, {"l1": 224}, {"resident": 2}, {"resident": 8}]
    for about, problem in problems([name]):
        for dtype in DTYPES:
            variants = [(str(order), problem, order, gpu) for order in (BEST, *orders)]
            variants += [
                (f"{c}"[2:-1].replace("'", ""), problem, BEST, gpu._replace(**c)) for c in changes
            ]
            outside = problem | {"heads_outside": True}
            variants += [("value (N, M, S, D)", outside, BEST, gpu)]
            for text, changed, order, on in variants:
                found = figures(changed, dtype, order, on)
                yield about | {"dtype": dtype, "order": text} | found


def backward_rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """Every shape, spread and order: gradients are float32 whatever the dtype."""
    for about, problem in problems(names):
        access = make_access(dtype="float32", **problem)
        for order in ORDERS[:4]:
            direct, summed = additions(access, order, BINNED_QUERIES, BINS, EVERY)
            row_mb = problem["channels"] * 4 / 1e6
            moved = {"direct_mb": round(direct * row_mb, 1), "binned_mb": round(summed * row_mb, 1)}
            yield about | {"order": str(order)} | moved


def problems(names: list[str]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The labels of a row of results, and what `make_access` takes."""
    for name in names:
        for locations in (UNIFORM, CAMERAS) if SHAPES[name].queries else LOCATIONS:
            yield {"shape": name, "locations": locations}, make_problem(name, locations)


def table(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Markdown: a line for each shape, dtype and locations, a column for each order and figure."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        key = ", ".join(row[name] for name in ("shape", "dtype", "locations") if name in row)
        lines.setdefault(key, {})[row["order"]] = " / ".join(f"{row[c]:.4g}" for c in columns)
    orders = list(dict.fromkeys(row["order"] for row in rows))
    text = [["", *orders], ["---"] * (len(orders) + 1)]
    text += [[key, *(line.get(order, "") for order in orders)] for key, line in lines.items()]
    return f"\n{title} (model)\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in text)


def main() -> None:
    """Print the tables and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    for name, default in Gpu()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default, help="as in `Gpu`")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    gpu = Gpu(*(getattr(arguments, name) for name in Gpu._fields))
    rows = {
        "forward": list(forward_rows(arguments.shapes, gpu)),
        "variants": list(variant_rows(arguments.shapes[0], gpu)),
        "backward": list(backward_rows(arguments.shapes)),
    }
    title = "Forward: MB from L2 / the busiest SM's reads by the mean"
    print(table(title, rows["forward"], ("l2_mb", "busiest")))
    print(table("Variants: MB from L2", rows["variants"], ("l2_mb",)))
    title = "Backward: MB added, direct / binned"
    print(table(title, rows["backward"], ("direct_mb", "binned_mb")))
    if arguments.output:
        about = {"model": "not measured on a GPU", **gpu._asdict()}
        arguments.output.write_text(json.dumps(about | rows) + "\n")


if __name__ == "__main__":
    main()
