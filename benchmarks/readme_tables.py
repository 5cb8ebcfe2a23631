# SPDX-License-Identifier: Apache-2.0
"""Write every table between markers in the documents again, from the result file that it names.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cupy_msda.bench import tables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/performance.md", "benchmarks/README.md")
# <!-- table: KIND FILE --> ... <!-- end of table -->
_BETWEEN_MARKERS = re.compile(
    r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL
)

OURS = tables.OURS
ORIGINAL, DEFORMOPS, GRID_SAMPLE = "torch-ms-deform-attn", "deformops", "grid_sample"
# At most eight rows of each table in the README.
README_GPU = (
    "detr-encoder, sigma 2, float32",
    "detr-encoder, sigma 2, float16",
    "detr-encoder, uniform, float32",
    "dino5-encoder, sigma 2, float32",
    "bevformer-sca, uniform, float32",
    "dino-decoder, uniform, float32",
    "rtdetr-decoder, uniform, float32",
    "rfdetr, uniform, float32",
)
README_CPU = (
    "detr-encoder, sigma 2, float32",
    "dino5-encoder, sigma 2, float32",
    "mask2former-1024, sigma 2, float32",
    "bevformer-sca, uniform, float32",
    "dino-decoder, uniform, float32",
    "rtdetr-decoder, uniform, float32",
    "rtdetr-decoder, uniform, bfloat16",
    "rfdetr, uniform, float32",
)
# The names of a profile, which `kernels_us` has, by those of the rows.
_PROFILED = {
    OURS: "ours",
    f"{OURS}, query_order=None": "ours plain",
    f"{OURS}, query_order=[(100, 100)]": "ours grid",
    DEFORMOPS: "deformops",
    ORIGINAL: "original",
}

Results = dict[str, Any]
Row = dict[str, Any]
Case = dict[str, dict[str, Row]]  # by way and implementation


def updated(text: str) -> str:
    """The text with every table as its result file says."""

    def written(match: re.Match[str]) -> str:
        before, kind, file, after = match.groups()
        return f"{before}{TABLES[kind](json.loads((ROOT / file).read_text()))}\n{after}"

    return _BETWEEN_MARKERS.sub(written, text)


def cases(results: Results) -> dict[str, Case]:
    """The rows by case, way and implementation, each with the microseconds of its kernels where they were profiled."""
    found: dict[str, Case] = {}
    for row in results["rows"]:
        case = f"{row['case']}, {row['distribution']}, {row['dtype']}"
        profile = f"{case} | {_PROFILED.get(row['implementation'])} | {row['way']}"
        kernels = results.get("kernels_us", {}).get(profile)
        kernels_us = sum(time for _, _, time in kernels) if kernels else None
        ways = found.setdefault(case, {})
        ways.setdefault(row["way"], {})[row["implementation"]] = row | {"kernels_us": kernels_us}
    return found


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def digits(number: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{number:#.3g}".rstrip(".") if number < 1000 else f"{number:.0f}"


def where(results: Results) -> str:
    """The line above a GPU's table: with what, when, and at which commit it was measured."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = f"{machine['device']}, driver {machine['driver']}, {versions}"
    return f"{text}; {results['date']}, commit {results['commit']}."


def microseconds(row: Row | None, key: str, scale: float = 1.0) -> str:
    """One time; what is wrong has none."""
    if row is None or row[key] is None:
        return ""
    return digits(row[key] * scale) if row["verdict"] == "right" else row["verdict"]


def _three(rows: dict[str, Row], key: str, scale: float = 1.0) -> str:
    """Ours / deformops / torch-ms-deform-attn."""
    ours, *others = (microseconds(rows[name], key, scale) for name in (OURS, DEFORMOPS, ORIGINAL))
    return " / ".join([f"**{ours}**", *others])


def gpu_summary(results: Results) -> str:
    """Kernels, a CUDA graph and eager calls on a few shapes."""
    graph, eager = "CUDA graph, both", ("eager, forward", "eager, both")
    head = ("case", "kernels, forward", "kernels, backward", graph, *eager)
    rows = []
    found = cases(results)
    for case in README_GPU:
        forward, backward = found[case]["forward"], found[case]["backward"]
        kernels = [_three(ways, "kernels_us") for ways in (forward, backward)]
        replay = _three(backward, "graph_replay_ms", 1e3)
        loops = [_three(ways, "eager_loop_us") for ways in (forward, backward)]
        rows.append((case, *kernels, replay, *loops))
    return f"{where(results)}\n\n{markdown(head, rows)}"


def gpu_kernels(results: Results) -> str:
    """The time of the kernels of a call, on every shape and way, beside the roofline bound."""
    names = list(_PROFILED)
    rows = []
    for case, ways in cases(results).items():
        for way, found in ways.items():
            ours = found[OURS]
            bound = bound_us(ours)
            share = f"{digits(bound)}, {bound / ours['kernels_us']:.0%}"
            times = [_ratio(found.get(name), ours) for name in names[1:]]
            label = case if way == "forward" else ""
            rows.append((label, way, microseconds(ours, "kernels_us"), share, *times))
    head = ("case", "", OURS, "roofline bound, share", *names[1:])
    return f"{where(results)}\n\n{markdown(head, rows)}"


def bound_us(row: Row) -> float:
    """The roofline bound without its term for a launch, which kernel times do not hold."""
    terms: dict[str, float] = row["roofline_terms_ms"]
    return 1e3 * max(time for term, time in terms.items() if term != "launch")


def _ratio(row: Row | None, ours: Row) -> str:
    """The time of another's kernels and its ratio to ours."""
    time = microseconds(row, "kernels_us")
    if row is None or row["verdict"] != "right":
        return time
    return f"{time}, {row['kernels_us'] / ours['kernels_us']:.1f}x"


def gpu_calls(results: Results) -> str:
    """A call in a CUDA graph and in an eager loop, on every shape."""
    names = (OURS, DEFORMOPS, ORIGINAL)
    rows = []
    for case, ways in cases(results).items():
        for way, found in ways.items():
            label, both = (case, way) if way == "forward" else ("", "forward + backward")
            graphs = [microseconds(found[name], "graph_replay_ms", 1e3) for name in names]
            loops = [microseconds(found[name], "eager_loop_us") for name in names]
            rows.append((label, both, *graphs, *loops))
    head = [f"{kind}: {name}" for kind in ("graph", "eager") for name in names]
    return markdown(("case", "", *head), rows)


def gpu_model(results: Results) -> str:
    """A whole model with its own attention and with ours."""
    attentions = ("own attention", OURS, f"{OURS}, query_order=None")
    numbers = {
        "training_ms": "training step, ms",
        "peak_gib": "peak memory, GiB",
        "inference_ms": "inference, ms",
    }
    found: dict[str, dict[str, Row]] = {}
    for row in results["rows"]:
        found.setdefault(row["dtype"], {})[row["attention"]] = row
    rows = [
        (
            dtype,
            *(" / ".join(digits(of[name][number]) for name in attentions) for number in numbers),
        )
        for dtype, of in found.items()
    ]
    table = markdown((" / ".join(attentions), *numbers.values()), rows)
    return f"{results['model']}. {where(results)}\n\n{table}"


def cpu_summary(results: Results) -> str:
    """Ours and two baselines on a few shapes."""
    names = (OURS, ORIGINAL, GRID_SAMPLE)
    found = cases(results)
    rows = []
    for case in README_CPU:
        ways = (found[case][way] for way in ("forward", "backward"))
        rows.append((case, *(_milliseconds(rows, name) for rows in ways for name in names)))
    head = [f"{way}: {name}" for way in ("forward", "backward") for name in names]
    return f"{tables.caption(results)}\n\n{markdown(('case', *head), rows)}"


def _milliseconds(rows: dict[str, Row], name: str) -> str:
    """A median, and its ratio to ours."""
    time = tables.compared_us(rows[name]) if name in rows else None
    if time is None:
        return rows[name]["verdict"] if name in rows else ""
    ours = tables.compared_us(rows[OURS])
    return f"{digits(time / 1e3)} ms" + (f", {time / ours:.1f}x" if ours and name != OURS else "")


def cpu(results: Results) -> str:
    """Everything, as a run prints it."""
    return f"{tables.caption(results)}\n\n{tables.table(results)}"


def fused(results: Results) -> str:
    """Fused calls beside what they replace."""
    names = ("fused", "torch, then cupy_msda", "torch, then torch-ms-deform-attn", "fused, padded")
    rows = []
    for case, found in results["cases"].items():
        times, peaks = found["microseconds"], found["peak_bytes"]
        for way in ("forward", "forward+backward"):
            ours = times[names[0]][way]
            cells = [_compared(times[name][way], ours) if name in times else "" for name in names]
            rows.append((case, way, *cells))
        memory = [f"{peaks[name] / 2**20:.1f} MiB" if name in peaks else "" for name in names]
        rows.append((case, "peak memory", *memory))
    return f"{tables.caption(results)}\n\n{markdown(('case', '', *names), rows)}"


def _compared(time_us: float, ours_us: float) -> str:
    """A time, and its ratio to ours."""
    ratio = f", {time_us / ours_us:.2f}x" if time_us != ours_us else ""
    return f"{digits(time_us / 1e3)} ms{ratio}"


def kernel_model(results: Results) -> str:
    """The time of each kernel by the model, as measured, their ratio and the limit; then what the model misses."""
    kernels = ("plain", "persistent", "points", "direct", "binned")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    causes: dict[str, list[str]] = {}
    for row in results["rows"]:
        case = f"{row['case']}, {row['locations']}, {row['dtype']}"
        text = f"{digits(row['us'])} / {digits(row['measured_us'])} = {row['ratio']:.2f}"
        missed = row["cause"] is not None
        lines.setdefault((case, row["code"]), {})[row["kernel"]] = f"**{text}**" if missed else text
        if missed:
            causes.setdefault(row["cause"], []).append(f"{row['kernel']}, {case}, {row['code']}")
    table = [
        (*labels, *(line.get(kernel, "") for kernel in kernels)) for labels, line in lines.items()
    ]
    notes = [f"* {'; '.join(rows)}: {cause}." for cause, rows in causes.items()]
    title = "Bold: off by more than 20%. Probable causes:"
    return "\n".join([markdown(("case", "code", *kernels), table), "", title, "", *notes])


def kernel_forecast(results: Results) -> str:
    """What the model forecasts for the kernels at hand: encoders, then few queries."""
    parts = []
    for name in ("encoders", "few_queries"):
        cases: dict[str, dict[str, str]] = {}
        for row in results[name]:
            case = f"{row['case']}, {row['locations']}, {row['dtype']}"
            column = (
                row["kernel"] if name == "encoders" else f"{row['kernel']}, {row['block']} threads"
            )
            cases.setdefault(case, {})[column] = digits(row["us"])
        columns = list(next(iter(cases.values())))
        rows = [(case, *(times[column] for column in columns)) for case, times in cases.items()]
        parts.append(markdown(("case", *columns), rows))
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[Results], str]] = {
    "gpu_summary": gpu_summary,
    "gpu_kernels": gpu_kernels,
    "gpu_calls": gpu_calls,
    "gpu_model": gpu_model,
    "kernel_model": kernel_model,
    "kernel_forecast": kernel_forecast,
    "cpu_summary": cpu_summary,
    "cpu": cpu,
    "fused": fused,
}


def main() -> None:
    """Write the documents."""
    for name in DOCUMENTS:
        document = ROOT / name
        document.write_text(updated(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
