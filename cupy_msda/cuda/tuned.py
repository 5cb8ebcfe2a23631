# SPDX-License-Identifier: Apache-2.0
"""Tables of measured winners: which candidate of a plan is the fastest, for a problem on an architecture.

`tuned.json` ships with the package. The table that CUPY_MSDA_TUNED names goes before it, if it was measured with the
kernels at hand. What neither knows is left to the model of plans.py. No table can change the bits of an output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

from cupy_msda.cuda.compile import fingerprint
from cupy_msda.cuda.plans import Choice, Device, queries
from cupy_msda.faults import reason, warn_once
from cupy_msda.problem import Grids, Problem, References

VARIABLE = "CUPY_MSDA_TUNED"
# An entry holds for problems whose values and rows are at most so many times as many, or as few.
_REACH = 2


class Entry(NamedTuple):
    """The fastest candidate of one result of one problem."""

    result: str  # as plans.py names it
    queries: str  # where they lie: see `plans.queries`
    problem: Problem
    candidate: str
    source: str  # what was measured, on what, when

    def as_json(self) -> dict[str, Any]:
        """The entry as a table holds it."""
        return self._asdict() | {"problem": self.problem._asdict()}


Table = Mapping[str, Sequence[Entry]]  # by architecture


def choice(result: str, problem: Problem, device: Device, grids: Grids) -> Choice | None:
    """What the tables say of a result; None if they do not."""
    if problem.is_empty:
        return None
    architecture = f"sm_{device.compute_capability}"
    path = os.environ.get(VARIABLE)
    for table, name in ((_of_user(path) if path else {}, f", {VARIABLE}"), (_shipped(), "")):
        entry = _nearest(table.get(architecture, ()), result, problem, queries(problem, grids))
        if entry is not None:
            return Choice(entry.candidate, f"tuned on {architecture}{name}")
    return None


def _nearest(entries: Sequence[Entry], result: str, problem: Problem, where: str) -> Entry | None:
    """The entry for the nearest problem that has the same kernels: M, D, L, P and dtypes are template arguments.

    Sizes of images vary from call to call, and the times of the candidates change slowly with them: with how rows fill
    the device, and how much of value fits its caches. So an exact match would hardly ever be found.
    """
    of_kernels = [
        entry
        for entry in entries
        if (entry.result, entry.queries) == (result, where)
        and _instantiation(entry.problem) == _instantiation(problem)
    ]
    nearest = min(of_kernels, key=lambda entry: _distance(entry.problem, problem), default=None)
    if nearest is None or _distance(nearest.problem, problem) > _REACH:
        return None
    return nearest


def _instantiation(problem: Problem) -> tuple[Any, ...]:
    """What the kernels are instantiated for."""
    heads = problem.num_heads, problem.head_dim
    if problem.references:  # of one image or of all: the same kernel
        problem = problem._replace(references=problem.references._replace(batch=0))
    return (*heads, problem.num_levels, problem.num_points, *problem[7:])


def _distance(one: Problem, other: Problem) -> float:
    """The larger of the ratios of two problems' positions and of their queries, in all images; at least 1."""
    sizes = (
        (one.batch * one.spatial_size, other.batch * other.spatial_size),
        (one.batch * one.num_queries, other.batch * other.num_queries),
    )
    return max(max(pair) / min(pair) for pair in sizes)


# --- files ---------------------------------------------------------------------------------------


def as_text(table: Table) -> str:
    """A table as `tune` writes it: for the kernels at hand, one entry a line."""
    parts = []
    for architecture, entries in table.items():
        lines = ",\n".join(f"   {json.dumps(entry.as_json())}" for entry in entries)
        parts.append(f"  {json.dumps(architecture)}: [\n{lines}\n  ]")
    joined = ",\n".join(parts)
    return f'{{\n "kernels": "{fingerprint()}",\n "architectures": {{\n{joined}\n }}\n}}\n'


@lru_cache(maxsize=8)
def _of_user(path: str) -> Table:
    """The table at a path; empty, with a warning, if it cannot be read or is for other kernels."""
    try:
        with open(path, encoding="utf-8") as file:
            kernels, table = _parse(file.read())
    except Exception as error:
        warn_once(
            f"{VARIABLE} {path}",
            f"{VARIABLE} must name a table that `python -m cupy_msda tune` wrote, got {path} ({reason(error)}): "
            "it is ignored",
        )
        return {}
    if kernels != fingerprint():
        warn_once(
            f"{VARIABLE} {path}",
            f"{VARIABLE} must name a table for the installed kernels, {fingerprint()}, got {path} for {kernels}: "
            "it is ignored; run `python -m cupy_msda tune` again",
        )
        return {}
    return table


@lru_cache(maxsize=1)
def _shipped() -> Table:
    """The table of the package; empty, with a warning, if it cannot be read."""
    try:
        text = (resources.files("cupy_msda.cuda") / "tuned.json").read_text(encoding="utf-8")
        return _parse(text)[1]
    except Exception as error:
        warn_once(
            "tuned.json",
            f"the package's table of tuned kernels cannot be read ({reason(error)}): the kernels are chosen by the "
            "model; reinstall cupy-msda",
        )
        return {}


def _parse(text: str) -> tuple[str | None, Table]:
    """The fingerprint of the kernels that a table is for, and its entries; an error if it is no table."""
    content = json.loads(text)
    table = {
        architecture: tuple(map(_entry, entries))
        for architecture, entries in content["architectures"].items()
    }
    return content.get("kernels"), table


def _entry(fields: dict[str, Any]) -> Entry:
    """An entry of a table; an error if it is none."""
    given = fields["problem"]
    points, references = given["num_points"], given.get("references")
    problem = Problem(
        **given
        | {
            "num_points": tuple(points) if isinstance(points, list) else points,
            "references": References(*references) if references else None,
        }
    )
    sizes = *problem[:6], problem.row_points, *problem.level_points
    if not all(type(size) is int and size >= 0 for size in sizes) or problem.is_empty:
        raise ValueError(f"the sizes of a problem must be positive integers, got {problem}")
    return Entry(**fields | {"problem": problem})
