# SPDX-License-Identifier: Apache-2.0
"""Which lines and branches of kernels/ the emulator's tests run, by gcov: writes kernels/COVERAGE.md.

    python -m tests.coverage_of_kernels              all tests of tests/emulator but sanitized ones
    python -m tests.coverage_of_kernels -k binned    arguments go to pytest; then nothing is written

Exit status 1: fewer than 95% of the branches, or one that is missed without a reason in `REASONS`.

Each instantiation of a template has counters of its own. A branch counts as taken if one of them takes it. Where they
differ in branches, since a condition is known at compile time, those with the most count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "kernels" / "COVERAGE.md"
LEAST = 0.95  # of the branches

# Why no test takes a branch: by file and the text of its line.
_PACK = "A branch for each level of the pack: no test takes all of the instantiation with the most levels."
REASONS = {
    ("kernels/point.cuh", "((sum += i++ < level ? POINTS : 0), ...);"): _PACK,
    ("kernels/point.cuh", "((end += POINTS, level += i++ < L && k >= end ? 1 : 0), ...);"): _PACK,
}


class Line(NamedTuple):
    """A line of a kernel file: how often it ran, and how often each of its branches was taken."""

    runs: int
    branches: tuple[int, ...]

    @property
    def missed(self) -> int:
        """Branches that no test takes."""
        return self.branches.count(0)


Lines = dict[tuple[str, int], Line]


def collect(folder: Path, arguments: Sequence[str]) -> None:
    """Run tests whose kernels count into the folder. Sanitized ones are left out: they run the same lines again."""
    compiler = f"{sys.executable} {Path(__file__).with_name('coverage_compiler.py')} {folder}"
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "CXX": compiler, "TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    subprocess.run([*command, *arguments], cwd=ROOT, env=environment, check=True)


def read(folder: Path) -> Lines:
    """The counters in a folder."""
    ours = {f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.cu*")}
    found: dict[tuple[str, int], list[Line]] = defaultdict(list)
    for path in sorted(folder.glob("*.gcda")):
        command = ["gcov", "--json-format", "--branch-probabilities", "--stdout", path.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        for file in json.loads(done.stdout)["files"]:
            if file["file"] in ours:
                for place, line in _lines(file):
                    found[place].append(line)
    return {place: merged(lines) for place, lines in sorted(found.items())}


def _lines(file: dict[str, Any]) -> Iterable[tuple[tuple[str, int], Line]]:
    """The lines of one file in one compilation, once for each function that holds them."""
    for line in file["lines"]:
        branches = tuple(branch["count"] for branch in line["branches"] if not branch["throw"])
        yield (file["file"], line["line_number"]), Line(line["count"], branches)


def merged(lines: Sequence[Line]) -> Line:
    """One line from those of all instantiations."""
    most = max(len(line.branches) for line in lines)
    same = [line.branches for line in lines if len(line.branches) == most]
    return Line(
        sum(line.runs for line in lines),
        tuple(max(counts) for counts in zip(*same, strict=True)),
    )


def report(lines: Lines) -> tuple[str, bool]:
    """The report, and whether enough is covered and the rest has its reasons."""
    rows, missed, unexplained = [], [], False
    for file in sorted({file for file, _ in lines}):
        of_file = [line for (name, _), line in lines.items() if name == file]
        rows.append((file, of_file))
    rows.append(("all", list(lines.values())))
    text = [
        "# Coverage",
        "",
        "Lines and branches of the kernels that the tests in `tests/emulator` run, each template instantiation taken",
        "together. Written by `python -m tests.coverage_of_kernels`, which says how they are counted.",
        "",
        "| file | lines | run | branches | taken |",
        "| --- | --- | --- | --- | --- |",
    ]
    for file, of_file in rows:
        branches = sum(len(line.branches) for line in of_file)
        taken = branches - sum(line.missed for line in of_file)
        run = sum(line.runs > 0 for line in of_file)
        text.append(
            f"| {file} | {len(of_file)} | {run} | {branches} | {_percent(taken, branches)} |"
        )
    share = taken / branches if branches else 1.0
    for (file, number), line in lines.items():
        if line.runs and not line.missed:
            continue
        code = (ROOT / file).read_text(encoding="utf-8").splitlines()[number - 1].strip()
        reason = REASONS.get((file, code), "")
        unexplained |= not reason
        what = f"{line.missed} of {len(line.branches)} branches" if line.runs else "the line"
        missed.append(f"- `{file}:{number}`, {what}: `{code}`  \n  {reason or 'no reason given'}")
    text += ["", "## What no test runs", "", *(missed or ["Nothing."]), ""]
    return "\n".join(text), share >= LEAST and not unexplained


def _percent(part: int, whole: int) -> str:
    """A part as a count and in percent."""
    return f"{part}, {100 * part / whole:.1f}%" if whole else "0"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.coverage_of_kernels", description=__doc__
    )
    parser.add_argument("--keep", type=Path, help="a folder for the counters, or one that has them")
    given, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="coverage-") as temporary:
        folder = given.keep or Path(temporary)
        if not any(folder.glob("*.gcda")):
            collect(folder, arguments or ["tests/emulator", "-k", "not sanit and not fuzz"])
        text, is_enough = report(read(folder))
    print(text)
    if not arguments:
        REPORT.write_text(text, encoding="utf-8")
    return 0 if is_enough else 1


if __name__ == "__main__":
    sys.exit(main())
