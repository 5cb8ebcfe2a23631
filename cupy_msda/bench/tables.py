# SPDX-License-Identifier: Apache-2.0
"""A result file as a Markdown table and as a plot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = "cupy_msda"  # as `implementations` names it, which needs torch
_COLOURS = ("#d62728", "#1f77b4", "#17a2b8", "#2ca02c", "#9467bd")
_WAYS = ("forward", "backward")  # as in `timing`

Results = dict[str, Any]
Clock = Callable[[Results], "float | None"]  # a row to its median, or None: not measured


def caption(results: Results) -> str:
    """Machine, versions and date of a run, and the other load on the machine."""
    machine = results["machine"]
    threads = machine["threads"]
    parts = [f"{machine['device']}, {threads} thread{'s' if threads > 1 else ''}"]
    parts += [f"driver {machine['driver']}"] if machine["driver"] else []
    parts += [f"{name} {version}" for name, version in machine["versions"].items()]
    before, after = machine["load_average_before"], machine["load_average_after"]
    text = f"{', '.join(parts)}; {results['date'][:10]}, load average {before} before and {after} after."
    if machine["driver"]:
        text += " Device times."
    elif (after or 0) > threads + 1:
        text += " The machine was busy with other work: not to be relied on."
    return text


def compared_us(row: Results) -> float | None:
    """The median that is compared: of the device where there is one, else of the clock. None: not measured."""
    found: float | None = row["device_us"] if row["device_us"] is not None else row["wall_us"]
    return found


def cold_us(row: Results) -> float | None:
    """The median with cleared caches, which only CPUs have; results of schema 3 have none."""
    found: float | None = row.get("cold_us")
    return found


def table(results: Results) -> str:
    """A row for each case and way: our median, the roofline bound as a part of it, and each baseline's ratio to it.

    Another where our time with cold caches was measured, too.
    """
    baselines = [name for name in _implementations(results) if name != OURS]
    lines = ["| case | | " + " | ".join([OURS, "roofline / time", *baselines]) + " |"]
    lines.append("| --- " * (4 + len(baselines)) + "|")
    for case in _cases(results):
        for way in _WAYS:
            rows = _rows(results, case, way)
            label = case if way == _WAYS[0] else ""
            others = (_baseline(rows, name, compared_us) for name in baselines)
            lines.append(_line(label, way, *_ours(rows[OURS]), *others))
            cold = cold_us(rows[OURS])
            if cold is not None:
                others = (_baseline(rows, name, cold_us) for name in baselines)
                lines.append(_line("", f"{way}, cold", _time(cold), "", *others))
    return "\n".join(lines)


def _line(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def _ours(row: Results) -> tuple[str, str]:
    """Our time, and the roofline bound as a part of it."""
    time = compared_us(row)
    if time is None:
        return row["verdict"], ""
    return _time(time), f"{row['roofline_share']:.0%}"


def _baseline(rows: dict[str, Results], name: str, clock: Clock) -> str:
    """A baseline's time and its ratio to ours."""
    if name not in rows:
        return ""
    theirs, ours = clock(rows[name]), clock(rows[OURS])
    if theirs is None:
        return str(rows[name]["verdict"])
    return _time(theirs) + (f", {theirs / ours:.1f}x" if ours else "")


def _time(microseconds: float) -> str:
    """Milliseconds to three digits."""
    milliseconds = microseconds / 1e3
    digits = f"{milliseconds:.3g}" if milliseconds < 1000 else f"{milliseconds:.0f}"
    return f"{digits} ms"


def _implementations(results: Results) -> list[str]:
    """The implementations, in the order of the run."""
    return list(dict.fromkeys(row["implementation"] for row in results["rows"]))


def _case(row: Results) -> str:
    """The name of a row's case."""
    return f"{row['case']}, {row['distribution']}, {row['dtype']}"


def _cases(results: Results) -> list[str]:
    """The cases, in the order of the run."""
    return list(dict.fromkeys(map(_case, results["rows"])))


def _rows(results: Results, case: str, way: str) -> dict[str, Results]:
    """The rows of one case and way, by implementation."""
    found = (row for row in results["rows"] if _case(row) == case and row["way"] == way)
    return {row["implementation"]: row for row in found}


def plot(results: Results, file: Path) -> None:
    """Plot medians, quartiles and the roofline bound for both ways; ImportError without matplotlib.

    Where a device was timed, hollow marks are wall times.
    """
    from matplotlib.figure import Figure

    cases = _cases(results)
    figure = Figure((11, 1.6 + 0.42 * len(cases)), layout="constrained")
    panels = figure.subplots(1, len(_WAYS), sharey=True)
    for axes, way in zip(panels, _WAYS, strict=True):
        for name, colour in zip(_implementations(results), _COLOURS, strict=False):
            _draw_times(axes, results, way, name, colour)
        for height, case in enumerate(cases):
            bound = _rows(results, case, way)[OURS]["roofline_ms"]
            axes.plot([bound], [height], "|", color="black", markersize=13, label="roofline")
        axes.set(title=way, xscale="log", xlabel="milliseconds")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(cases)), cases)
    panels[0].set_ylim(len(cases) - 0.5, -0.5)
    figure.suptitle(results["machine"]["device"])
    marks, labels = panels[0].get_legend_handles_labels()
    legend = dict(zip(labels, marks, strict=True))  # one mark of each label
    figure.legend(
        list(legend.values()),
        list(legend),
        loc="outside lower center",
        ncols=len(legend),
        frameon=False,
    )
    figure.savefig(file, dpi=110)


def _draw_times(axes: Any, results: Results, way: str, name: str, colour: str) -> None:
    """The marks of one implementation in one panel."""
    for height, case in enumerate(_cases(results)):
        row = _rows(results, case, way).get(name)
        if row is None or row["wall_us"] is None:
            continue
        clock = "wall" if row["device_us"] is None else "device"
        low, high = (time / 1e3 for time in row[f"{clock}_quartiles_us"])
        axes.plot([low, high], [height] * 2, color=colour, linewidth=2.5, alpha=0.5)
        axes.plot([row[f"{clock}_us"] / 1e3], [height], "o", color=colour, label=name)
        if clock == "device":
            hollow = {"markerfacecolor": "none", "label": "wall time"}
            axes.plot([row["wall_us"] / 1e3], [height], "o", color=colour, **hollow)
