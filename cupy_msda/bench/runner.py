# SPDX-License-Identifier: Apache-2.0
"""One run: check and time every implementation on every case, say so, and write it down."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cupy_msda
from cupy_msda import report
from cupy_msda.bench import cases, constants, gate, implementations, roofline, tables, timing
from cupy_msda.bench.cases import Case, Problem
from cupy_msda.bench.implementations import OURS, Function

SCHEMA = 1
_LIMITS = {
    ("cpu", True): timing.Limits(15, 8),
    ("cpu", False): timing.Limits(25, 12),
    ("cuda", True): timing.Limits(50, 4),
    ("cuda", False): timing.Limits(50, 3),
}
_DISTRIBUTIONS = (
    "torch",
    "numpy",
    "numba",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "triton",
    "torch-ms-deform-attn",
    "deformops",
)

Row = dict[str, Any]


def run(device: str | None, quick: bool, output: Path) -> int:
    """Run the benchmark and write `output` and a picture beside it; 1 if a result of ours is wrong or missing."""
    obstacle = report.torch_obstacle()
    device = device or ("cpu" if obstacle else "cuda")
    if device == "cuda" and obstacle:
        raise SystemExit(f"cannot run on CUDA: {obstacle}")
    if not output.parent.is_dir():
        raise SystemExit(f"{output} cannot be written: {output.parent} is no folder")
    results = measure(device, quick, output)
    print(f"\n{tables.table(results)}\n\nwrote {output}")
    _plot(results, output.with_suffix(".png"))
    ours = [row for row in results["rows"] if row["implementation"] == OURS]
    return int(any(row["verdict"] != "right" for row in ours))


def _plot(results: Row, file: Path) -> None:
    """Draw the picture, or say what it needs."""
    try:
        tables.plot(results, file)
    except ImportError as error:
        print(f'no plot ({error}): pip install "cupy-msda[plot]"')
    else:
        print(f"wrote {file}")


def measure(device: str, quick: bool, output: Path) -> Row:
    """The results of all cases; the file grows with each, so that a run that is cut short leaves something."""
    begin = time.perf_counter()
    machine = _machine(device)
    print("  ".join(f"{key} {value}" for key, value in machine.items() if key != "versions"))
    found = constants.measure(device)
    print("measured  " + _words(found), flush=True)
    names, absent = implementations.installed(quick)
    print("\n".join(f"without   {name}: {why}" for name, why in absent.items()))
    rows: list[Row] = []
    results = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "quick": quick,
        "constants": found._asdict(),
        "absent": absent,
        "rows": rows,
    }
    watch = timing.timer(device)
    limits = _LIMITS[device, quick]
    chosen = cases.select(device, quick)
    for number, case in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}, {time.perf_counter() - begin:.0f} s] {case}", flush=True)
        taking_part = [name for name in names if implementations.applies(name, case)]
        rows += _measure_case(case, device, taking_part, watch, limits, found)
        results["seconds"] = round(time.perf_counter() - begin, 1)
        machine["load_average_after"] = _load()
        output.write_text(json.dumps(results, indent=1) + "\n")
    if device == "cpu" and (machine["load_average_after"] or 0) > machine["threads"] + 0.5:
        print("the machine was busy with other work, which slows the peers' OpenMP threads most")
    return results


def _measure_case(
    case: Case,
    device: str,
    names: Sequence[str],
    watch: timing.Timer,
    limits: timing.Limits,
    found: constants.Constants,
) -> list[Row]:
    """The rows of one case: those that are right are timed."""
    problem = cases.build(case, device)
    work = roofline.count(problem)
    expected = gate.expect(problem)
    verdicts: dict[str, Row] = {}
    right: dict[str, Function] = {}
    for name in names:
        verdicts[name], function = _judge(name, problem, expected)
        if function is not None:
            right[name] = function
        _say_verdict(name, verdicts[name])
    peaks = {name: timing.peak_memory(function, problem) for name, function in right.items()}
    times = timing.measure(right, problem, watch, limits)
    rows = []
    for way in timing.WAYS:
        floor = roofline.floor(way, problem, work, found)
        for name in names:
            rows.append(
                {"case": case.shape, "distribution": case.distribution, "dtype": case.dtype}
                | {"way": way, "implementation": name, **verdicts[name]}
                | _statistics(times[way].get(name, []), floor)
                | {"peak_bytes": (peaks.get(name) or {}).get(way)}
            )
            _say(rows[-1])
    return rows


def _judge(name: str, problem: Problem, expected: gate.Expected) -> tuple[Row, Function | None]:
    """The verdict on an implementation, and the implementation if it is right."""
    try:
        function = implementations.make(name, problem)
        errors = gate.errors(function, problem, expected)
    except Exception as error:  # a peer may fail in any way; its error is the result
        lines = f"{type(error).__name__}: {error}".splitlines()
        return _verdict("raised", lines[0]), None
    outside = [f"{part} {error:.2g}" for part, error in errors.items() if not error <= 1]
    if outside:
        return _verdict("wrong", f"errors in units of their budgets: {', '.join(outside)}"), None
    return _verdict("right", None, errors), function


def _say_verdict(name: str, verdict: Row) -> None:
    """A verdict as a line of progress."""
    errors = verdict["errors"] or {}
    why = verdict["why"] or f"errors up to {max(errors.values()):.2f} of their budgets"
    print(f"  {'check':9}{name:22}{verdict['verdict']}: {why}", flush=True)


def _verdict(verdict: str, why: str | None, errors: dict[str, float] | None = None) -> Row:
    """The part of a row that judges; errors in units of their budgets."""
    return {"verdict": verdict, "why": why, "errors": errors}


def _statistics(times: Sequence[float], floor: roofline.Floor) -> Row:
    """The part of a row that measures."""
    row: Row = {
        "median_ms": None,
        "quartiles_ms": None,
        "repeats": len(times),
        "floor_ms": floor.milliseconds,
        "floor_terms_ms": floor.terms,
        "unshared_terms_ms": floor.unshared,
        "share": None,
    }
    if times:
        low, median, high = (float(np.quantile(times, part)) for part in (0.25, 0.5, 0.75))
        row |= {"median_ms": median, "quartiles_ms": [low, high]}
        row["share"] = floor.milliseconds / median
    return row


def _say(row: Row) -> None:
    """A row as a line of progress."""
    if row["median_ms"] is None:
        return
    low, high = row["quartiles_ms"]
    text = f"{row['median_ms']:9.3f} ms [{low:.3f}, {high:.3f}] of {row['repeats']:2}"
    text += f"   floor {row['share']:.1%} of it"
    if row["peak_bytes"] is not None:
        text += f"   peak {row['peak_bytes'] / 1e6:.1f} MB"
    print(f"  {row['way']:9}{row['implementation']:22}{text}", flush=True)


def _words(found: constants.Constants) -> str:
    """The constants in a line."""
    parts = [f"copy {rate / 1e9:.0f} GB/s in {reach / 1e6:.1f} MB" for reach, rate in found.copy]
    parts.append(f"{found.multiply_adds / 1e9:.0f} G multiply-adds/s")
    for label, rate in (
        ("gather from L1", found.gather),
        ("from L2", found.gather_l2),
        ("scatter", found.scatter),
    ):
        parts += [f"{label} {rate / 1e9:.0f} GB/s"] if rate else []
    parts += [f"launch {1e6 * found.launch:.1f} us"] if found.launch else []
    return ", ".join(parts)


def _machine(device: str) -> Row:
    """What the figures hold for."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "driver": dict(report.environment())["driver"] if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average_before": _load(),
        "versions": _versions(),
    }


def _processor() -> str:
    """The processor's name, and its kind where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} processors"


def _load() -> float | None:
    """Processes that ran in the last minute: OpenMP's threads wait busily, so others slow the peers most."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _versions() -> dict[str, str]:
    """Python and what is installed of what takes part."""
    found = {"python": platform.python_version(), "cupy_msda": cupy_msda.__version__}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
