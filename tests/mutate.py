# SPDX-License-Identifier: Apache-2.0
"""Mutation testing: put one fault after another into a copy of the tree, and see that its tests fail.

    python -m tests.mutate                 all faults of mutations.py
    python -m tests.mutate --sample 5      some, evenly spread over the list
    python -m tests.mutate bias lost-tail  those with these names
    python -m tests.mutate --list

The tests of all chosen faults must pass on the unchanged copy first. Exit status 1: a fault survived.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
PARTS = ("cupy_msda", "kernels", "tests", "pyproject.toml", "README.md")
SECONDS = 300  # a fault may also make its tests hang
PASSED, FAILED = 0, 1  # exit status of pytest; any other is no verdict


class Case(NamedTuple):
    """A mutation of a file."""

    file: str
    mutation: Mutation

    def __str__(self) -> str:
        return f"{self.file}: {self.mutation.name}"


def every_case() -> list[Case]:
    """All mutations, in the order of their files."""
    return [Case(file, mutation) for file, given in MUTATIONS.items() for mutation in given]


def sample(cases: Sequence[Case], count: int) -> list[Case]:
    """So many of them, evenly spread: always the same ones."""
    count = min(count, len(cases))
    return [cases[(2 * i + 1) * len(cases) // (2 * count)] for i in range(count)]


def mutated(case: Case, root: Path = ROOT) -> str:
    """The text of the file with the fault.

    Raises
    ------
    ValueError
        The file does not hold the old text exactly once.
    """
    text = (root / case.file).read_text(encoding="utf-8")
    if (found := text.count(case.mutation.old)) != 1:
        raise ValueError(f"{case} must find its text once, got {found}: {case.mutation.old!r}")
    return text.replace(case.mutation.old, case.mutation.new)


def copy_tree(to: Path) -> None:
    """What the tests need."""
    skipped = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, to / part, ignore=skipped)
        else:
            shutil.copy(ROOT / part, to / part)


def run_tests(tree: Path, tests: Sequence[str], scratch: Path | None) -> tuple[int, str]:
    """Run tests in the tree: pytest's exit status, -1 after the time limit, and the output.

    `scratch`: where compiled kernels go, those of Numba among them, which no other run may find.
    """
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if scratch is not None:
        scratch.mkdir(parents=True)
        environment |= {"TMPDIR": str(scratch), "NUMBA_CACHE_DIR": str(scratch / "numba")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    try:
        done = subprocess.run(
            [*command, *tests],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, ""
    return done.returncode, done.stdout + done.stderr


def is_killed(case: Case, tree: Path, scratch: Path) -> bool:
    """Whether the tests of a mutation fail with it, or hang.

    Raises
    ------
    RuntimeError
        They did not run.
    """
    path, text = tree / case.file, (ROOT / case.file).read_text(encoding="utf-8")
    path.write_text(mutated(case), encoding="utf-8")
    try:
        status, output = run_tests(tree, case.mutation.tests, scratch)
    finally:
        path.write_text(text, encoding="utf-8")
        shutil.rmtree(scratch, ignore_errors=True)
    if status not in {PASSED, FAILED, -1}:
        raise RuntimeError(f"{case}: its tests must run, got pytest's status {status}:\n{output}")
    return status != PASSED


def run(cases: Sequence[Case]) -> list[Case]:
    """Print what becomes of each mutation; those that do not do what the list says."""
    wrong = []
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Path(folder, "tree")
        tree.mkdir()
        copy_tree(tree)
        tests = sorted({test for case in cases for test in case.mutation.tests})
        status, output = run_tests(tree, tests, None)
        if status != PASSED:
            raise RuntimeError(f"the tests must pass without a fault:\n{output}")
        for number, case in enumerate(cases):
            begin = time.monotonic()
            killed = is_killed(case, tree, Path(folder, "scratch", str(number)))
            verdict = "killed" if killed else "SURVIVED"
            known = f" (known: {case.mutation.survives})" if case.mutation.survives else ""
            print(f"{verdict:8} {time.monotonic() - begin:5.1f} s  {case}{known}", flush=True)
            if killed == bool(case.mutation.survives):
                wrong.append(case)
    return wrong


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("names", nargs="*", help="of mutations or their files; by default all")
    parser.add_argument("--sample", type=int, help="only so many, evenly spread")
    parser.add_argument("--list", action="store_true", help="only tell which there are")
    given = parser.parse_args()
    cases = every_case()
    for case in cases:
        mutated(case)
    if given.names:
        cases = [case for case in cases if {case.mutation.name, case.file} & set(given.names)]
    if given.sample:
        cases = sample([case for case in cases if not case.mutation.survives], given.sample)
    if given.list:
        print(*cases, sep="\n")
        return 0
    wrong = run(cases)
    print(f"{len(cases)} mutations; otherwise than in the list: {len(wrong)}")
    print(*(f"  {case}" for case in wrong), sep="\n")
    return min(len(wrong), 1)


if __name__ == "__main__":
    sys.exit(main())
