# SPDX-License-Identifier: Apache-2.0
"""Run every candidate of a case under the sanitizers, and compare."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.cuda import plans
from cupy_msda.cuda.plans import Candidate, Choice
from tests.emulator import fused, launches
from tests.emulator.fused import Fused
from tests.fuzz.cases import Case, make_case
from tests.fuzz.families import FAMILIES

SECONDS = 900  # for one case, its compilations on a busy machine included: more is a hang
Gradients = Sequence[Tensor | None]


def check(family: str, seed: int, number: int, *, with_backward: bool = True) -> None:
    """Check a case.

    Raises
    ------
    AssertionError
        It fails; the message ends with the command that repeats it.
    """
    try:
        with _time_limit(SECONDS):
            case = make_case(FAMILIES[family], seed, number)
            _check_forward(case)
            if with_backward:
                _check_backward(case)
    except Exception as error:
        again = f"python -m tests.fuzz --family {family} --seed {seed} --case {number}"
        raise AssertionError(f"{type(error).__name__}: {error}\nto repeat it: {again}") from error


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the main thread, which also ends a program that it waits for."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"a case must end within {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- the forward ---------------------------------------------------------------------------------


def _check_forward(case: Case) -> None:
    """All candidates' outputs are bitwise identical, and what the reference has."""
    problem, device = _problem(case), launches.device(case.multiprocessors)
    candidates = plans.forward_candidates(problem, device, case.grids)
    first, *others = (_forward(case, candidate) for candidate in candidates)
    for candidate, output in zip(candidates[1:], others, strict=True):
        assert _same(output, first), f"{candidate} and {candidates[0]} give different outputs"
    if _touches_bad(case):
        assert first.isnan().all(), "a level that does not fit must show as NaN in every output"
    elif case.mode != "bytes":
        _check_output(case, first)


def _forward(case: Case, candidate: Candidate) -> Tensor:
    """The output by a candidate."""
    run: Any = fused.forward if case.family.coordinates else launches.forward
    return run(case.inputs, choice=Choice(str(candidate), "fuzz"), **_options(case))


def _check_output(case: Case, output: Tensor) -> None:
    """The output must stay within the error budget."""
    if isinstance(case.inputs, Fused):
        if case.table.is_given:
            fused.check_forward(case.inputs, output)
        return
    same, exact = (
        reference.forward(of.value, case.table.levels, of.locations, of.weights, **case.rules)
        for of in (case.inputs, case.inputs.to(torch.float64))
    )
    assert_within_budget(output, same, exact)


# --- the backward --------------------------------------------------------------------------------


def _check_backward(case: Case) -> None:
    """Each candidate's gradients are what the reference has; only those of value may differ between candidates."""
    needs_value = case.needs[0]
    deterministic = case.deterministic and needs_value and not case.family.coordinates
    device, request = launches.device(case.multiprocessors), (*case.needs, deterministic)
    candidates = plans.backward_candidates(_problem(case), device, case.grids, *request)
    first: Gradients | None = None
    for candidate in candidates:
        gradients = _backward(case, candidate, deterministic, case.order)
        if deterministic:
            again = _backward(case, candidate, deterministic, case.order + 1)
            assert all(map(_same, again, gradients)), f"{candidate}: not deterministic"
        if case.mode != "bytes":
            _check_gradients(case, candidate, gradients, deterministic)
        first = first or gradients
        compared = slice(0 if deterministic else 1, None)
        assert all(map(_same, gradients[compared], first[compared])), (
            f"{candidate} and {candidates[0]} give different gradients"
        )


def _backward(case: Case, candidate: Candidate, deterministic: bool, order: int) -> Gradients:
    """The gradients by a candidate; fused: that of reference points where those of points are needed."""
    options = _options(case) | {"choice": Choice(str(candidate), "fuzz"), "seed": order}
    if isinstance(case.inputs, Fused):
        return fused.backward(case.inputs, needs=(*case.needs, case.needs[1]), **options)
    return launches.backward(
        case.inputs,
        needs=case.needs,
        deterministic=deterministic,
        max_points_tiled=plans.MAX_POINTS_TILED,
        **options,
    )


def _check_gradients(
    case: Case, candidate: Candidate, gradients: Gradients, deterministic: bool
) -> None:
    """Gradients must stay within the error budget, and be NaN at points of a level that does not fit."""
    if isinstance(case.inputs, Fused):
        if case.table.is_given:
            fused.check_backward(case.inputs, gradients)
        return
    results = [
        reference.backward(
            of.grad_output, of.value, case.table.levels, of.locations, of.weights, **case.rules
        )
        for of in (case.inputs, case.inputs.to(torch.float64))
    ]
    for number, (actual, same, exact) in enumerate(zip(gradients, *results, strict=True)):
        if actual is None:
            continue
        if number == 0 and deterministic and candidate.value != "tiled":
            # Fixed point has NaN in place of infinity.
            exact[~same.isfinite()] = same[~same.isfinite()] = torch.nan
        elif number > 0:
            for of_level in (same, exact):
                of_level[:, :, :, _points_of(case, case.table.bad)] = torch.nan
        assert_within_budget(actual, same, exact)


# --- both ----------------------------------------------------------------------------------------


def _options(case: Case) -> dict[str, Any]:
    """How a candidate runs."""
    options = {
        "multiprocessors": case.multiprocessors,
        "grids": case.grids,
        "table": case.table.host,
        "tables": case.table.device,
        "seed": case.order,
        "sanitize": True,
    }
    return options if case.family.coordinates else options | {"rules": case.rules}


def _problem(case: Case) -> Any:
    """The problem, through the contract."""
    if isinstance(case.inputs, Fused):
        return case.inputs.problem[0]
    return launches.checked(case.inputs, case.rules)[0]


def _points_of(case: Case, levels: Sequence[int]) -> list[int]:
    """The points of a row that lie on these levels."""
    points = case.family.points
    return [k for level in levels for k in range(sum(points[:level]), sum(points[: level + 1]))]


def _touches_bad(case: Case) -> bool:
    """Whether a row has a point on a level that does not fit."""
    return bool(_points_of(case, case.table.bad))


def _same(actual: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two results are bitwise identical, where every NaN counts as the same."""
    if actual is None or expected is None:
        return actual is expected
    both_nan = actual.isnan() & expected.isnan()
    return bool((both_nan | (actual == expected) & (actual.signbit() == expected.signbit())).all())
