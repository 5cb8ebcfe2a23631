# SPDX-License-Identifier: Apache-2.0
"""A model of how long our kernels take on an H200, held against every time that was measured there.

    python benchmarks/kernel_times.py --output benchmarks/results/kernel-times.json

benchmarks/README.md explains the model and has its tables. Work is counted on random points (`gpu_model.py`) and by
what the profiler counted of each version of a kernel's code on detr-encoder. Latency is not modelled.
"""

from __future__ import annotations

import argparse
import json
import re
from functools import lru_cache
from math import ceil, exp, hypot
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu_cases import make_problem
from gpu_model import (
    BINS,
    CHUNK,
    EVERY,
    LINE,
    SECTOR,
    Access,
    Gpu,
    Order,
    additions,
    make_access,
    traffic,
)

from cupy_msda.bench.cases import SHAPES
from cupy_msda.cuda.plans import Device, backward_candidates, forward_candidates
from cupy_msda.problem import Problem

RESULTS = Path(__file__).parent / "results"

# Limits, all measured on the H200 in the session of h200-f604db1.json.
SMS, CLOCK = 132, 1.95e9  # cycles a second under load, by the profiler
START = 1.6  # us before and after the work: dino-decoder's forward, elapsed less the busiest multiprocessor's active
# Lines and shared-memory wavefronts a second: gathers from L1 move 109 of 128 bytes a cycle.
L1 = 109 / 128 * CLOCK * SMS
ISSUE = 4 * CLOCK * SMS  # instructions of warps a second
L2 = 9.46e12  # bytes a second: gathers from 22.75 MB
MEMORY = 4.03e12  # bytes a second: a copy
ADDITIONS = 29.43e9 * LINE  # bytes a second: 16-byte additions to 22.75 MB
L2_SIZE = 60e6
PERSISTENT_BUSIEST = (
    1.16  # cycles of the slowest persistent block by the mean: detr-encoder, sigma 2
)

WARP, BLOCK = 32, 256


class Code(NamedTuple):
    """What one version of a kernel's code costs, counted by the profiler on detr-encoder at sigma 2.

    A stage is what a warp does at a time: a point of each of its lanes.
    """

    stage_wavefronts: float  # of shared memory: the stage's descriptors are written; and shuffles
    read_wavefronts: float  # a warp reads one descriptor for each of its groups
    instructions: tuple[float, float]  # of a stage, with values of 32 and of 16 bits
    stage_lines: int = 2  # of locations, weights and their gradients, for one group
    phases: str = ""  # "wait": they follow one another; "ahead": they overlap in part, as the next loads are under way
    batch: int = 0  # binned: queries of a block
    point_lines: float = 0  # binned: lines of grad_output, locations and weights read for one point


_FORWARD = Code(20, 3.3, (405, 472))
_POINTS = Code(20 + 28, 1.28, (583, 734), 4)  # 28 shuffles exchange the dot products
_BINNED = Code(0, 0, (22.7 * WARP, 24.1 * WARP), phases="wait", batch=256, point_lines=3.25)
CODES: dict[str, dict[str, Code]] = {
    "f604db1": {
        "plain": _FORWARD,
        "persistent": _FORWARD,
        "points": _POINTS,
        "direct": Code(20 + 28, 3.3, (904, 904), 4),
        "binned": _BINNED._replace(stage_wavefronts=2.57 * WARP),
    },
    # Descriptors padded by one in eight: their writes have 12 bank conflicts less.
    "prototype v1": {
        "plain": _FORWARD._replace(stage_wavefronts=8),
        "persistent": _FORWARD._replace(stage_wavefronts=8),
        "points": _POINTS._replace(stage_wavefronts=8 + 28),
    },
}
_STAGED = _BINNED._replace(
    stage_wavefronts=3.65 * WARP, instructions=(25.4 * WARP,) * 2, batch=128, phases="ahead"
)
CODES["prototype v6"] = {"binned": _STAGED._replace(point_lines=2.25)}
CODES["prototype v7s"] = CODES["prototype v6"]
# The kernels at hand, which are close to these prototypes. None has been measured.
TODAY = CODES["prototype v1"] | {
    "query tiles": _FORWARD._replace(stage_wavefronts=8),
    "direct": CODES["f604db1"]["direct"]._replace(stage_wavefronts=8 + 28),
    "binned": CODES["prototype v7s"]["binned"],
}


TOLERANCE = 0.2
# What the model misses by more, by (case, kernel), with the probable cause.
_SPILLS = (
    "a thread spills 16 bytes (with three levels 40), the last of a row's stages has 4 points for 8 lanes, and the "
    "ranges are uneven: with four times as many blocks dino5-encoder at sigma 4 took 589 µs"
)
_NOT_L1 = (
    "with padded descriptors L1 has 6% less to do, and the time fell by 1%: latency binds, not L1"
)
_SMALL_LEVEL = (
    "a quarter of the additions go to the 64 pixels of the last level, and additions to few rows are slow: 3.0 G "
    "rows/s to 35 rows in place of 29.4"
)
_FEW_WARPS = (
    "80 blocks leave 52 multiprocessors idle, and 8 warps on each of the others hide little latency"
)
UNEXPLAINED = {
    ("dino5-encoder, sigma 2, float32", "points"): _SPILLS,
    ("dino5-encoder, sigma 4, float32", "points"): _SPILLS,
    ("mask2former-1024, sigma 4, float32", "points"): _SPILLS,
    ("detr-encoder, sigma 4, float32", "points"): _NOT_L1,
    ("sweep-100, uniform, float32", "direct"): _SMALL_LEVEL,
    ("sweep-10000, uniform, float32", "direct"): _SMALL_LEVEL,
    ("rtdetr-decoder, uniform, float32", "direct"): _FEW_WARPS,
    ("rfdetr, uniform, float32", "direct"): _FEW_WARPS,
}


class Run(NamedTuple):
    """One kernel on one case; `split`: the groups that share the points of a row."""

    case: str
    locations: str
    dtype: str
    kernel: str
    split: int = 1
    block: int = BLOCK


@lru_cache(maxsize=1)
def problem_of(case: str, locations: str) -> dict[str, Any]:
    """What `make_access` takes; runs of one case follow one another."""
    return make_problem(case, locations)


def group_lanes(run: Run) -> int:
    """Lanes of a group: 16 bytes of value each, in the backward four channels."""
    size = 4 if run.dtype == "float32" else 2
    forward = run.kernel in ("plain", "query tiles", "persistent")
    return SHAPES[run.case].channels * (size if forward else 4) // 16


@lru_cache(maxsize=64)
def gathered(run: Run) -> tuple[float, float]:
    """Bytes that the gathers take from L2, and corners inside their levels."""
    access = access_of(run)
    if run.kernel == "binned":
        return 0.0, corners(access)
    rows = run.block // (group_lanes(run) * run.split)
    order = Order()
    if run.kernel == "query tiles":
        order = Order((rows // 8, 8))
    elif run.kernel in ("persistent", "points"):
        order, rows = Order((16, 16), CHUNK), BLOCK // group_lanes(run)
    return float(traffic(access, order, Gpu(), rows)[1]) * 1e6, corners(access)


def access_of(run: Run) -> Access:
    """The gathers of a run."""
    dtype = "float32" if run.dtype == "float32" else "float16"
    return make_access(dtype=dtype, **problem_of(run.case, run.locations))


def corners(access: Access) -> float:
    """Corners inside their levels, of all points."""
    inside = 1
    for axis in range(2):
        size = np.repeat(access.levels[:, axis], access.points)
        at = access.cells[..., axis]
        counts = ((at >= 0) & (at < size)).astype(np.int8) + ((at >= -1) & (at < size - 1))
        inside = inside * counts
    return float(inside.sum())


def busiest(run: Run, code: Code) -> float:
    """The blocks of the busiest multiprocessor by the mean."""
    shape = SHAPES[run.case]
    if run.kernel in ("persistent", "points"):
        return PERSISTENT_BUSIEST
    queries = shape.queries or sum(h * w for h, w in shape.levels)
    rows = code.batch or run.block // (group_lanes(run) * run.split)
    blocks = shape.batch * shape.heads * ceil(queries / rows)
    return ceil(blocks / SMS) * SMS / blocks


class Limits(NamedTuple):
    """Microseconds that the work takes at each rate."""

    l1: float
    issue: float
    l2: float
    memory: float
    additions: float


def limits(run: Run, code: Code) -> Limits:
    """The limits of a kernel on a case."""
    shape, access = SHAPES[run.case], access_of(run)
    size = 4 if run.dtype == "float32" else 2
    rows, points = access.cells[..., 0, 0].size, access.cells[..., 0].size
    group, (missed, inside) = group_lanes(run), gathered(run)
    group_stages = rows * run.split * ceil(points // rows / run.split / group)
    added = 4 * shape.channels * inside
    if run.kernel == "binned":
        group_stages = points / group
        added = 4 * shape.channels * additions(access, Order((16, 16)), code.batch, BINS, EVERY)[1]
    stages = group_stages * group / WARP
    pixel = shape.channels * size
    value = access.image * SECTOR * shape.batch
    touched = value * (1 - exp(-inside * pixel / value))  # by corners anywhere
    streams = points * (8 + size) * code.stage_lines / 2 + rows * pixel

    wavefronts = stages * code.stage_wavefronts + points * group / WARP * code.read_wavefronts
    if run.kernel == "binned":
        lines = points * code.point_lines + added / LINE
        from_l2 = streams + points * SECTOR + rows * pixel
        in_memory = streams + 2 * touched * 4 / size
    else:
        lines = inside + missed / LINE + group_stages * code.stage_lines + rows
        from_l2 = missed + streams
        in_memory = streams + touched
    if run.kernel == "direct":
        in_memory += 2 * touched * 4 / size
    elif run.kernel in ("persistent", "points"):
        # Multiprocessors in different heads share L2; what does not fit it is read again.
        in_memory = streams + max(touched, missed * max(0.0, 1 - L2_SIZE / value))
    return Limits(
        l1=1e6 * (lines + wavefronts) / L1,
        issue=1e6 * stages * code.instructions[size == 2] / ISSUE,
        l2=1e6 * from_l2 / L2,
        memory=1e6 * in_memory / MEMORY if in_memory > L2_SIZE else 0.0,
        additions=1e6 * added / ADDITIONS if run.kernel in ("direct", "binned") else 0.0,
    )


def forecast(run: Run, code: Code) -> dict[str, Any]:
    """Microseconds of a kernel, and the limits behind them."""
    found = limits(run, code)
    time = max(found)
    if code.phases:
        sort, add = max(found.l1, found.issue), max(found.additions, found.l2, found.memory)
        time = sort + add if code.phases == "wait" else hypot(sort, add)
    most = max(found._asdict(), key=found._asdict().get)
    us = START + busiest(run, code) * time
    terms = {name: round(us, 2) for name, us in found._asdict().items()}
    return {"us": round(us, 2), "limit": most, "busiest": round(busiest(run, code), 3), **terms}


# --- what was measured ---------------------------------------------------------------------------

_KERNELS = {
    "msda_forward_ordered": "persistent",
    "msda_forward": "plain",
    "msda_backward_ordered": "points",
    "msda_backward": "direct",
    "msda_sorted": "binned",
}


def measured() -> dict[tuple[Run, str], float]:
    """Microseconds of every kernel of ours that was measured, by run and code."""
    found: dict[tuple[Run, str], float] = {}
    kernels = json.loads((RESULTS / "h200-f604db1.json").read_text())["kernels_us"]
    for profile, of_call in kernels.items():
        case, implementation, _ = profile.split(" | ")
        for text, _, us in of_call if implementation.startswith("ours") else ():
            name = re.match(r"void (\w+)<.*?(\d+(?:, \d+)*)", text)
            if name and name[1] in _KERNELS:
                numbers = [int(number) for number in name[2].split(", ")]
                split = numbers[4] if len(numbers) > 4 else 1
                run = Run(*case.split(", "), _KERNELS[name[1]], split)
                found[run, "f604db1"] = us
    variants = json.loads((RESULTS / "h200-f604db1-variants.json").read_text())["rows"]
    for case, kernel, code, us in variants:
        found[Run(*case.split(", "), kernel), code] = us
    return dict(sorted(found.items()))


def encoders() -> list[Run]:
    """The candidates of today's kernels on encoders, case by case."""
    cases = list(dict.fromkeys(run[:3] for run, _ in measured() if run.kernel == "persistent"))
    kernels = ("plain", "query tiles", "persistent", "points", "direct", "binned")
    return [Run(*case, kernel) for case in cases for kernel in kernels]


def few_queries() -> list[Run]:
    """Today's kernels on few queries, in blocks of 256 and of 64 threads, with the split-K of the plans."""
    runs = []
    for name, shape in SHAPES.items():
        if 0 < (shape.queries or 0) < 1000:
            size = sum(h * w for h, w in shape.levels)
            sizes = (shape.queries, len(shape.levels), max(shape.counts))
            types = ("float32",) * 3
            problem = Problem(shape.batch, size, shape.heads, shape.channels, *sizes, *types)
            case, device = (name, "uniform", "float32"), Device(SMS, "90")
            forward = forward_candidates(problem, device, ())[0].number
            backward = backward_candidates(problem, device, (), True, True, False)[0].number
            for kernel, split in (("plain", forward), ("direct", backward)):
                runs += [Run(*case, kernel, split, block) for block in (BLOCK, 64)]
    return runs


def rows_measured() -> list[dict[str, Any]]:
    """The forecast of every kernel that was measured, beside its time."""
    rows = []
    for (run, code), us in measured().items():
        row = run._asdict() | {"code": code} | forecast(run, CODES[code][run.kernel])
        ratio = round(row["us"] / us, 3)
        key = ", ".join(run[:3]), run.kernel
        cause = None if abs(ratio - 1) <= TOLERANCE else UNEXPLAINED.get(key, "unknown")
        rows.append(row | {"measured_us": us, "ratio": ratio, "cause": cause})
    return rows


def main() -> None:
    """Write the forecast of every kernel that was measured, and of today's candidates."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    results = {"rows": rows_measured()}
    for name, runs in (("encoders", encoders()), ("few_queries", few_queries())):
        results[name] = [run._asdict() | forecast(run, TODAY[run.kernel]) for run in runs]
    text = ",\n".join(
        f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]"
        for name, rows in results.items()
    )
    print(text)
    if arguments.output:
        arguments.output.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
