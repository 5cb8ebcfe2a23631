# SPDX-License-Identifier: Apache-2.0
"""One run: check and time every implementation on every case, print the results and write them to a file."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from cupy_msda import contract, report
from cupy_msda.bench import (
    cases,
    constants,
    correctness,
    gpu_timing,
    implementations,
    machine,
    roofline,
    tables,
    timing,
)
from cupy_msda.bench.cases import Case, Inputs
from cupy_msda.bench.implementations import OURS, Function
from cupy_msda.bench.time_limit import TookTooLongError
from cupy_msda.cuda import launch
from cupy_msda.faults import reason

SCHEMA = 4  # benchmarks/README.md describes it
_LIMITS = {
    ("cpu", True): timing.Limits(15, 8),
    ("cpu", False): timing.Limits(31, 25),
    ("cuda", True): timing.Limits(50, 4),
    ("cuda", False): timing.Limits(50, 3),
}
Row = dict[str, Any]


def run(device: str | None, quick: bool, output: Path) -> int:
    """Run the benchmark, write `output` and a plot beside it; 1 if a result of ours is wrong or missing."""
    obstacle = report.torch_obstacle()
    device = device or ("cpu" if obstacle else "cuda")
    if device == "cuda" and obstacle:
        raise SystemExit(f"cannot run on CUDA: {obstacle}")
    if output.suffix != ".json":
        raise SystemExit(
            f"the results are JSON, and the plot lies beside them: {output} must end in .json"
        )
    results = measure(device, quick, output)
    print(f"\n{tables.caption(results)}\n\n{tables.table(results)}\n\nwrote {output}")
    _plot(results, output.with_suffix(".png"))
    ours = [row for row in results["rows"] if row["implementation"] == OURS]
    return int(any(row["verdict"] != "right" for row in ours))


def as_json(results: Row) -> str:
    """The results with one row, and one entry of every dictionary, a line."""
    parts = []
    for key, value in results.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            entries = (
                f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()
            )
            text = "{\n" + ",\n".join(entries) + "\n }"
        elif isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _plot(results: Row, file: Path) -> None:
    """Draw the plot, or say why there is none: the results are written."""
    try:
        tables.plot(results, file)
    except ImportError as error:
        print(f'no plot ({error}): pip install "cupy-msda[plot]"')
    except Exception as error:
        print(f"no plot ({reason(error)})")
    else:
        print(f"wrote {file}")


def measure(device: str, quick: bool, output: Path) -> Row:
    """The results of all cases, written after each, so that an interrupted run leaves the finished ones."""
    begin = time.perf_counter()
    names, absent = implementations.installed(quick)
    rows: list[Row] = []
    results: Row = {
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "quick": quick,
        "absent": absent,
        "error_budget": correctness.BUDGET,
        "rows": rows,
    }
    _write(results, output)  # before the work, in case the path cannot be written
    found = constants.measure(device)
    results["constants"] = found._asdict()
    _say_start(results, found)
    watch = timing.on_cpu if device == "cpu" else gpu_timing.current_gpu().watch
    limits = _LIMITS[device, quick]
    chosen = cases.select(device, quick)
    started = time.perf_counter()
    for number, case in enumerate(chosen, 1):
        now = time.perf_counter()
        left = _seconds_left(number - 1, len(chosen), now - started, limits)
        print(
            f"[{number}/{len(chosen)}, {now - begin:.0f} s, about {left:.0f} s left] {case}",
            flush=True,
        )
        taking_part = [name for name in names if implementations.applies(name, case, device)]
        rows += _measure_case(case, device, taking_part, watch, limits, found)
        results["seconds"] = round(time.perf_counter() - begin, 1)
        results["machine"]["load_average_after"] = machine.load()
        _write(results, output)
    return results


def _seconds_left(done: int, total: int, seconds: float, limits: timing.Limits) -> float:
    """How long the rest takes if it is like the cases done, or, before the first, if each takes its limit."""
    return (seconds / done if done else limits.seconds) * (total - done)


def _write(results: Row, output: Path) -> None:
    """Write the whole file."""
    try:
        output.write_text(as_json(results))
    except OSError as error:
        raise SystemExit(f"{output} cannot be written: {error}") from error


def _measure_case(
    case: Case,
    device: str,
    names: Sequence[str],
    watch: timing.Watch,
    limits: timing.Limits,
    found: constants.Constants,
) -> list[Row]:
    """The rows of one case; only correct implementations are timed."""
    inputs = cases.build(case, device)
    work = roofline.count(inputs)
    expected = correctness.expect(inputs)
    verdicts: dict[str, Row] = {}
    right: dict[str, Function] = {}
    for name in names:
        verdicts[name], function = _judge(name, inputs, expected)
        if function is not None:
            right[name] = function
        _say_verdict(name, verdicts[name])
    peaks = {name: timing.peak_memory(function, inputs) for name, function in right.items()}
    times = timing.measure(right, inputs, watch, limits)
    planned = _plans(inputs) if device == "cuda" and OURS in right else {}
    rows = []
    for way in timing.WAYS:
        bound = roofline.bound(way, inputs, work, found)
        for name in names:
            rows.append(
                {"case": case.shape, "distribution": case.distribution, "dtype": case.dtype}
                | {"way": way, "implementation": name, **verdicts[name]}
                | _statistics(times[way].get(name), bound)
                | {"peak_bytes": (peaks.get(name) or {}).get(way)}
                | {"plan": planned.get(way) if name == OURS else None}
            )
            _say(rows[-1])
    return rows


def _plans(inputs: Inputs) -> dict[str, str]:
    """By way, which candidate our calls run on the GPU, and why."""
    value, *points = inputs.tensors
    problem, table = contract.check(value, inputs.sizes, None, *points)
    case = problem, table.on_host, None, max(value.get_device(), 0)
    bound = launch.bind_forward(*case), launch.bind_backward(*case, True, True, False)
    return dict(zip(timing.WAYS, (each.plan.reason for each in bound), strict=True))


def _judge(
    name: str, inputs: Inputs, expected: correctness.Expected
) -> tuple[Row, Function | None]:
    """The verdict on an implementation, and the implementation if it is right."""
    try:
        function = implementations.make(name, inputs)
        errors = correctness.errors(function, inputs, expected)
    except TookTooLongError as error:
        return _verdict("left out", str(error)), None
    except Exception as error:  # a baseline may fail in any way; its error is the result
        return _verdict("raised", reason(error)), None
    most = 1 if name == OURS else correctness.BASELINE_BUDGETS
    outside = [f"{part} {error:.2g}" for part, error in errors.items() if not error <= most]
    if outside:
        why = f"errors in units of their budgets: {', '.join(outside)}"
        return _verdict("wrong", why, errors), None
    return _verdict("right", None, errors), function


def _say_verdict(name: str, verdict: Row) -> None:
    """Print a verdict as a line of progress."""
    why = verdict["why"] or f"errors up to {max(verdict['errors'].values()):.2f} of their budgets"
    print(f"  {'check':9}{name:22}{verdict['verdict']}: {why}", flush=True)


def _verdict(verdict: str, why: str | None, errors: dict[str, float] | None = None) -> Row:
    """The part of a row with the verdict; errors in units of their budgets."""
    return {"verdict": verdict, "why": why, "errors": errors}


def _statistics(times: timing.Times | None, bound: roofline.Bound) -> Row:
    """The part of a row with the measurements."""
    wall, device, device_by, cold = times or timing.Times([], [], None, [])
    row: Row = {
        **_quartiles("device", device),
        "device_by": device_by,
        **_quartiles("wall", wall),
        **_quartiles("cold", cold),
        "repeats": len(wall),
        "roofline_ms": bound.milliseconds,
        "roofline_terms_ms": bound.terms,
        "unshared_terms_ms": bound.unshared,
    }
    compared = tables.compared_us(row)
    return row | {"roofline_share": 1e3 * bound.milliseconds / compared if compared else None}


def _quartiles(clock: str, times: Sequence[float]) -> Row:
    """The median and the quartiles by one clock, in microseconds."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist() if times else [None] * 3
    quartiles = None if median is None else [low, high]
    return {f"{clock}_us": median, f"{clock}_quartiles_us": quartiles}


def _say_start(results: Row, found: constants.Constants) -> None:
    """Print the machine, its rates and the absent baselines."""
    facts = results["machine"].items()
    print("  ".join(f"{key} {value}" for key, value in facts if key != "versions"))
    print("measured  " + _words(found), flush=True)
    for name, why in results["absent"].items():
        print(f"without   {name}: {why}")


def _say(row: Row) -> None:
    """Print a row as a line of progress."""
    if not row["repeats"]:
        return
    clocks = [clock for clock in ("device", "wall", "cold") if row[f"{clock}_us"] is not None]
    text = ", ".join(_clock_words(row, clock) for clock in clocks)
    text += f" of {row['repeats']:2}   {row['roofline_share']:.1%} of roofline"
    if row["peak_bytes"] is not None:
        text += f"   peak {row['peak_bytes'] / 1e6:.1f} MB"
    print(f"  {row['way']:9}{row['implementation']:22}{text}", flush=True)


def _clock_words(row: Row, clock: str) -> str:
    """A median and its quartiles."""
    low, high = row[f"{clock}_quartiles_us"]
    return f"{clock} {row[f'{clock}_us']:10.1f} us [{low:.1f}, {high:.1f}]"


def _words(found: constants.Constants) -> str:
    """The rates in a line."""
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
