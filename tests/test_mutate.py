# SPDX-License-Identifier: Apache-2.0
"""The list of mutations fits the sources, a sample of them is found, and the tool tells what is not."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from tests import mutate
from tests.mutate import Case, every_case, mutated, run, sample
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


@NEEDS_FORK
def test_a_sample_is_killed() -> None:
    assert run(sample([case for case in CASES if not case.mutation.survives], 3)) == []


@NEEDS_FORK
def test_a_survivor_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """And a wrong entry: a fault that is said to survive, and does not."""
    harmless = Case(BUDGET, Mutation("harmless", "FACTOR = 2.0", "FACTOR = 2.0 + 0", CHEAP))
    fault = Mutation("fault", "FACTOR = 2.0", "FACTOR = 20.0", CHEAP)
    wrong = Case(BUDGET, fault._replace(name="wrong", survives="so it is said"))
    assert run([harmless, Case(BUDGET, fault), wrong]) == [harmless, wrong]
    verdicts = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert verdicts == ["SURVIVED", "killed", "killed"]


@NEEDS_FORK
def test_tests_that_do_not_run_are_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(BUDGET, Mutation("broken", "FACTOR = 2.0", "FACTOR = ", CHEAP))
    assert run([case]) == [case]
    assert "NO VERDICT" in capsys.readouterr().out


def test_a_text_that_is_not_found_once_is_refused() -> None:
    for old, found in (("no such text", 0), ("\ndef ", 10)):
        case = Case(BUDGET, Mutation("stale", old, "", CHEAP))
        with pytest.raises(ValueError, match=f"stale must find its text once, got {found}"):
            mutated(case)


def test_a_sample_is_spread_evenly() -> None:
    assert sample(CASES[:10], 2) == [CASES[2], CASES[7]]
    assert sample(CASES[:3], 9) == CASES[:3]
