# SPDX-License-Identifier: Apache-2.0
"""The list of mutations fits the sources, a sample of them is found, and the tool tells what is not."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests import mutate, processes
from tests.mutate import Case, every_case, mutated, sample
from tests.mutations import Mutation

CASES = every_case()
NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tool forks")
BUDGET = "cupy_msda/budget.py"
CHEAP = ("tests/test_budget.py",)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_mutation_finds_its_text_once(case: Case) -> None:
    assert case.mutation.tests
    assert mutated(case) != (mutate.ROOT / case.file).read_text(encoding="utf-8")


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    assert len(CASES) >= 60
    assert max(Counter(map(str, CASES)).values()) == 1


# The tool forks, which a process with threads, such as one of these tests, must not do.
FAULTS = """
from tests.mutate import Case, run
from tests.mutations import Mutation
def fault(name, new, **known):
    return Case("cupy_msda/budget.py", Mutation(name, "FACTOR = 2.0", new, ("tests/test_budget.py",), **known))
"""


@NEEDS_FORK
def test_a_sample_is_killed() -> None:
    finished = processes.run(
        "import sys; from tests.mutate import main; sys.exit(main())", arguments=["--sample", 3]
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("killed") == 3


@NEEDS_FORK
def test_a_survivor_is_told_and_a_fault_that_is_said_to_survive_and_does_not() -> None:
    program = """
harmless = fault("harmless", "FACTOR = 2.0 + 0")
wrong = fault("wrong", "FACTOR = 20.0", survives="so it is said")
assert run([harmless, fault("fault", "FACTOR = 20.0"), wrong]) == [harmless, wrong]
"""
    finished = processes.run(FAULTS + program)
    assert finished.returncode == 0, finished.stderr
    verdicts = [line.split()[0] for line in finished.stdout.splitlines()]
    assert verdicts == ["SURVIVED", "killed", "killed"]


@NEEDS_FORK
def test_tests_that_do_not_run_are_no_verdict() -> None:
    finished = processes.run(FAULTS + 'print(len(run([fault("broken", "FACTOR = ")])))')
    assert finished.returncode == 0, finished.stderr
    assert "NO VERDICT" in finished.stdout
    assert finished.stdout.endswith("\n1\n")


def test_a_text_that_is_not_found_once_is_refused() -> None:
    for old, found in (("no such text", 0), ("\ndef ", 10)):
        case = Case(BUDGET, Mutation("stale", old, "", CHEAP))
        with pytest.raises(ValueError, match=f"stale must find its text once, got {found}"):
            mutated(case)


def test_a_sample_is_spread_evenly() -> None:
    assert sample(CASES[:10], 2) == [CASES[2], CASES[7]]
    assert sample(CASES[:3], 9) == CASES[:3]
