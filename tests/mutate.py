# SPDX-License-Identifier: Apache-2.0
"""Mutation testing: put one fault after another into a copy of the tree, and see that its tests fail.

    python -m tests.mutate                 all faults of tests/mutations
    python -m tests.mutate --sample 5      some, evenly spread over the list
    python -m tests.mutate bias lost-tail  those with these names
    python -m tests.mutate --list

The tests of all chosen faults must pass on the unchanged copy first. Exit status 1: a fault survived.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
PARTS = ("cupy_msda", "kernels", "tests", "pyproject.toml", "README.md")
IMPORTED = ("numpy", "torch", "hypothesis")  # by most tests
SECONDS = 300  # a fault may also make its tests hang
PASSED, FAILED = 0, 1  # exit status of pytest; any other but this is no verdict
HUNG = -1  # it took too long


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
    """Run tests in the tree: pytest's exit status, or HUNG, and the output.

    `scratch`: of a mutation, where compiled kernels go, those of Numba among them, which no other run may find.
    """
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        process = os.fork()  # of one that has imported what takes seconds, and nothing of the tree
        if process == 0:
            _run_forked(tree, tests, scratch, log.fileno())
        status = _wait(process, None if scratch is None else SECONDS)
        log.seek(0)
        return status, log.read().decode(errors="replace")


def _run_forked(tree: Path, tests: Sequence[str], scratch: Path | None, log: int) -> NoReturn:
    """Be a process that runs tests."""
    status: int = HUNG
    try:
        os.setsid()
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(tree)
        # A file of the same second and length would be taken for the one that was compiled before.
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
        if scratch is not None:
            scratch.mkdir(parents=True)
            os.environ |= {"TMPDIR": str(scratch), "NUMBA_CACHE_DIR": str(scratch / "numba")}
            tempfile.tempdir = None
        sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
        status = int(pytest.main([*options, *tests]))
        sys.stdout.flush()
    except BaseException:  # this process must not go on as the tool
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(process: int, seconds: float | None) -> int:
    """The exit status of a process; HUNG, after an end to all that it started, if it takes longer."""
    end = math.inf if seconds is None else time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return HUNG


def verdict(case: Case, tree: Path, scratch: Path) -> str:
    """What becomes of it: "killed" if its tests fail or hang, "SURVIVED", or "NO VERDICT" if they did not run."""
    path, text = tree / case.file, (ROOT / case.file).read_text(encoding="utf-8")
    path.write_text(mutated(case), encoding="utf-8")
    try:
        status, output = run_tests(tree, case.mutation.tests, scratch)
    finally:
        path.write_text(text, encoding="utf-8")
        shutil.rmtree(scratch, ignore_errors=True)
    if status in {FAILED, HUNG} or status < 0:  # a signal ended them
        return "killed"
    if status == PASSED:
        return "SURVIVED"
    print(output)
    return "NO VERDICT"


def run(cases: Sequence[Case]) -> list[Case]:
    """Print what becomes of each mutation; those that do not do what the list says."""
    wrong = []
    for name in IMPORTED:
        importlib.import_module(name)
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
            found = verdict(case, tree, Path(folder, "scratch", str(number)))
            known = f" (known: {case.mutation.survives})" if case.mutation.survives else ""
            print(f"{found:10} {time.monotonic() - begin:5.1f} s  {case}{known}", flush=True)
            if found != ("SURVIVED" if case.mutation.survives else "killed"):
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
