# SPDX-License-Identifier: Apache-2.0
"""Tables of measured winners: which candidate a call takes, and what happens to a table that is of no use."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from cupy_msda import faults
from cupy_msda.cuda import compile as compiler
from cupy_msda.cuda import launch, plans, tuned
from cupy_msda.cuda.plans import Choice, Device
from cupy_msda.cuda.tuned import Entry
from cupy_msda.problem import NO_TABLE, Problem, References

H200 = Device(132, "90")
DINO5 = Problem(1, 89023, 8, 32, 89023, 5, 4, *["float32"] * 3)
ENCODER = Problem(2, 1000, 8, 32, 1000, 4, 4, *["float32"] * 3)
PLAIN = "plain, split-K 1"
FOUR = "persistent, 4 per multiprocessor"


def entry(candidate, result="forward", problem=ENCODER, queries="levels"):
    return Entry(result, queries, problem, candidate, "a test")


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Write a user's table of sm_90, or any text; name it by the environment."""
    monkeypatch.setattr(faults, "_told", set())
    monkeypatch.setattr(tuned, "_shipped", dict)
    path = tmp_path / "tuned.json"

    def to_file(content):
        text = content if isinstance(content, str) else tuned.as_text({"sm_90": content})
        path.write_text(text)
        monkeypatch.setenv("CUPY_MSDA_TUNED", str(path))
        tuned._of_user.cache_clear()
        return path

    yield to_file
    tuned._of_user.cache_clear()


def candidate_of(problem=ENCODER, result="forward", device=H200, grids=None):
    """What the tables choose."""
    found = tuned.choice(result, problem, device, grids)
    return found and found.candidate


# --- what a plan does with a choice --------------------------------------------------------------


def test_a_plan_takes_the_chosen_candidate_and_says_why():
    plan = plans.plan_forward(DINO5, NO_TABLE, H200, None, Choice(FOUR, "tuned on sm_90"))
    assert plan.launches[0].grid == (4 * 132, 1, 1)
    assert plan.reason == f"{FOUR}: tuned on sm_90"
    model = plans.plan_forward(DINO5, NO_TABLE, H200)
    assert model.launches[0].grid == (132, 1, 1)
    assert model.reason == "persistent, 1 per multiprocessor: model"


@pytest.mark.parametrize("name", ["plain, split-K 2", "generic, D = 32", "nonsense"])
def test_what_is_no_candidate_of_the_problem_is_left_to_the_model(name):
    plan = plans.plan_forward(DINO5, NO_TABLE, H200, None, Choice(name, "tuned"))
    assert plan.reason == "persistent, 1 per multiprocessor: model"


def test_the_candidates_of_an_encoder():
    request = {"needs_value": True, "needs_points": True, "deterministic": False}
    persistent = [f"persistent, {n} per multiprocessor" for n in (1, 2, 4)]
    rows = [*persistent, PLAIN]

    def names(candidates):
        return list(map(str, candidates))

    def backwards(**changed):
        return names(plans.backward_candidates(DINO5, H200, None, **request | changed))

    assert names(plans.forward_candidates(DINO5, H200, None)) == [*rows, "query tiles"]
    points = [*rows, "plain, split-K 2"]
    assert backwards(needs_value=False) == points
    plain, binned = points[3:], [f"binned; points {name}" for name in points]
    assert backwards() == binned + plain
    assert backwards(needs_points=False) == ["binned", *plain]
    assert backwards(deterministic=True) == binned


@pytest.mark.parametrize("grids", [(), None])
def test_without_known_grids_nothing_is_tiled(grids):
    decoder = DINO5._replace(num_queries=89022)
    candidates = (
        *plans.forward_candidates(decoder, H200, grids),
        *plans.backward_candidates(decoder, H200, grids, True, True, False),
    )
    assert {(candidate.kernel, candidate.value) for candidate in candidates} == {("plain", "")}


def test_every_candidate_has_a_plan_of_its_own():
    for needs, result in plans.BACKWARDS.items():
        candidates = plans.backward_candidates(DINO5, H200, None, *needs, False)
        reasons, launched = set(), set()
        for candidate in candidates:
            value, points = needs
            choice = Choice(str(candidate), result)
            plan = plans.plan_backward(
                DINO5, NO_TABLE, H200, needs_value=value, needs_points=points, choice=choice
            )
            reasons.add(plan.reason)
            launched.add(
                tuple(
                    (step.kernel, step.grid)
                    for step in plan.launches
                    if isinstance(step, plans.Launch)
                )
            )
        assert reasons == {f"{candidate}: {result}" for candidate in candidates}
        assert len(launched) == len(candidates)


# --- which entry a problem finds -----------------------------------------------------------------


def test_an_entry_holds_for_problems_of_up_to_twice_and_half_the_size(write):
    write([entry(FOUR)])
    for sizes, found in (
        ({}, True),
        ({"spatial_size": 2000, "num_queries": 2000}, True),
        ({"spatial_size": 500, "num_queries": 500}, True),
        ({"batch": 1}, True),
        ({"spatial_size": 2001, "num_queries": 2001}, False),
        ({"spatial_size": 499, "num_queries": 499}, False),
        ({"batch": 5}, False),
        ({"batch": 0}, False),
    ):
        assert (candidate_of(ENCODER._replace(**sizes)) == FOUR) == found


@pytest.mark.parametrize(
    "changed",
    [
        *({"num_heads": 4}, {"head_dim": 16}, {"num_levels": 3}, {"num_points": 2}),
        *({"value_dtype": "float16"}, {"location_dtype": "float64"}, {"weight_dtype": "float16"}),
        *({"interpolation": "nearest"}, {"has_mask": True}),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_an_entry_holds_for_its_own_kernels(write, changed):
    write([entry(FOUR)])
    assert candidate_of(ENCODER._replace(**changed)) is None


def test_an_entry_holds_for_the_points_of_each_level(write):
    uneven = ENCODER._replace(num_points=(3, 6, 0, 3), has_mask=True)
    write([entry(FOUR, problem=uneven)])
    assert candidate_of(uneven) == candidate_of(uneven._replace(batch=3)) == FOUR
    assert candidate_of(uneven._replace(num_points=(3, 6, 3, 0))) is None
    assert candidate_of() is None


def test_an_entry_of_a_fused_problem_holds_for_its_own_kernels(write):
    """Whether all images share their reference points is no matter of the kernel."""
    fused = ENCODER._replace(references=References(2, 4, 2, "float32"))
    write([entry(FOUR, problem=fused)])
    assert candidate_of() is None
    shared = fused.references._replace(batch=1)
    assert candidate_of(fused) == candidate_of(fused._replace(references=shared)) == FOUR
    for change in ({"num_levels": 1}, {"coordinates": 4}, {"dtype": "float16"}):
        assert candidate_of(fused._replace(references=shared._replace(**change))) is None


def test_an_entry_holds_for_its_result_its_queries_and_its_architecture(write):
    write([entry(FOUR)])
    assert candidate_of() == FOUR
    assert candidate_of(result="backward") is None
    assert candidate_of(device=Device(132, "100")) is None
    for grids in ((), ((20, 50),)):
        assert candidate_of(grids=grids) is None
    write([entry(FOUR, queries="grids"), entry(PLAIN, queries="order")])
    assert candidate_of(grids=((20, 50),)) == FOUR
    assert candidate_of(grids=()) == PLAIN


def test_the_nearest_entry_holds(write):
    larger = ENCODER._replace(spatial_size=1800, num_queries=1800)
    write([entry(FOUR), entry(PLAIN, problem=larger)])
    assert candidate_of(larger) == candidate_of(larger._replace(batch=3)) == PLAIN
    assert candidate_of() == FOUR


# --- the tables ------------------------------------------------------------------------------------


def test_the_users_table_goes_before_the_shipped_one(write, monkeypatch):
    monkeypatch.setattr(
        tuned, "_shipped", lambda: {"sm_90": (entry(FOUR), entry(FOUR, "backward"))}
    )
    write([entry(PLAIN)])
    assert tuned.choice("forward", ENCODER, H200, None) == (
        PLAIN,
        "tuned on sm_90, CUPY_MSDA_TUNED",
    )
    assert tuned.choice("backward", ENCODER, H200, None) == (FOUR, "tuned on sm_90")
    monkeypatch.delenv("CUPY_MSDA_TUNED")
    assert candidate_of() == FOUR


def test_calls_take_what_the_table_says_and_the_log_says_so(write, idle_device, caplog):
    caplog.set_level(logging.DEBUG, "cupy_msda")
    problem = ENCODER._replace(spatial_size=951, num_queries=951)  # which no other test plans
    both = f"binned; points {FOUR}"
    write([entry(PLAIN), entry(both, "backward"), entry(FOUR, "backward of points")])
    launch.bind_forward(problem, NO_TABLE, None, 0)
    launch.bind_backward(problem, NO_TABLE, None, 0, True, True, False)
    launch.bind_backward(problem, NO_TABLE, None, 0, False, True, False)
    launch.bind_backward(problem, NO_TABLE, None, 0, True, False, False)
    said = [record.getMessage() for record in caplog.records]
    for line, candidate in zip(said, (PLAIN, both, FOUR), strict=False):
        assert line.endswith(f"({candidate}: tuned on sm_90, CUPY_MSDA_TUNED)")
    assert said[-1].endswith("(binned: model)")


def test_deterministic_calls_take_an_entry_that_keeps_their_bits():
    """The kernel of the gradient of value stays the model's; that of the others is the table's."""
    kept, lost = f"binned; points {FOUR}", PLAIN
    for name, expected in ((kept, f"{kept}: tuned"), (lost, "binned; points persistent, 1 per")):
        choice = Choice(name, "tuned")
        plan = plans.plan_backward(DINO5, NO_TABLE, H200, deterministic=True, choice=choice)
        assert plan.reason.startswith(expected)
        assert plan.reason.endswith("; deterministic: fixed point")


NO_TABLES = {
    "no-json": "{",
    "a-list": "[]",
    "empty": "",
    "no-architectures": "{}",
    "no-entries": '{"architectures": {"sm_90": 3}}',
    "no-problem": '{"architectures": {"sm_90": [{"result": "forward"}]}}',
    "sizes": tuned.as_text({"sm_90": [entry(FOUR, problem=ENCODER._replace(batch=0))]}),
    "deep": 10_000 * "[",
}


@pytest.mark.parametrize("text", NO_TABLES.values(), ids=NO_TABLES.keys())
def test_a_table_that_cannot_be_read_costs_one_warning(write, text):
    path = write(text)
    with pytest.warns(RuntimeWarning) as told:
        assert candidate_of() is None
    (warning,) = told
    assert str(warning.message).startswith(
        "CUPY_MSDA_TUNED must name a table that `python -m cupy_msda tune` wrote, got " + str(path)
    )
    tuned._of_user.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert candidate_of() is None


def test_a_table_that_is_not_there_costs_a_warning(write, monkeypatch, tmp_path):
    write([])
    monkeypatch.setenv("CUPY_MSDA_TUNED", str(tmp_path / "absent"))
    with pytest.warns(RuntimeWarning, match=r"got \S+absent \(FileNotFoundError"):
        assert candidate_of() is None


def test_a_table_for_other_kernels_is_ignored_with_a_warning(write, monkeypatch):
    path = write([entry(FOUR)])
    measured = compiler.fingerprint()
    monkeypatch.setattr(tuned, "fingerprint", lambda: "0123")
    with pytest.warns(RuntimeWarning, match=rf"kernels, 0123, got {path} for {measured}"):
        assert candidate_of() is None


def test_the_fingerprint_changes_with_every_source_and_constant(monkeypatch):
    found = compiler.fingerprint()
    assert found == compiler.fingerprint.__wrapped__()
    for file in ("generic.cu", "point.cuh"):
        assemble = compiler.assemble

        def changed(name, file=file, assemble=assemble):
            return assemble(name).replace(f'"kernels/{file}"\n', f'"kernels/{file}"\n\n', 1)

        with monkeypatch.context() as patch:
            patch.setattr(compiler, "assemble", changed)
            assert compiler.fingerprint.__wrapped__() != found


# --- the table that ships ------------------------------------------------------------------------


def test_shipped_entries_are_read_and_name_candidates():
    """On the device that they were measured on; each problem once, with what was measured."""
    (architecture, entries), *others = tuned._shipped().items()
    assert (architecture, others) == ("sm_90", [])
    assert len({found[:3] for found in entries}) == len(entries)
    needs = {result: pair for pair, result in plans.BACKWARDS.items()}
    for found in entries:
        assert found.queries == plans.queries(found.problem, None) == "levels"
        if found.result == plans.FORWARD:
            candidates = plans.forward_candidates(found.problem, H200, None)
        else:
            of = needs[found.result]
            candidates = plans.backward_candidates(found.problem, H200, None, *of, False)
        assert found.candidate in map(str, candidates)
        assert " us" in found.source
        assert "NVIDIA H200, 2026-11-27, commit f604db1" in found.source


def test_a_large_encoder_takes_what_was_measured():
    assert candidate_of(DINO5) == PLAIN
    assert candidate_of(DINO5, "backward of points") == FOUR
    # Which candidate wins depends on the points there, which no plan knows.
    assert candidate_of(DINO5._replace(spatial_size=22223, num_queries=22223, num_levels=4)) is None


def test_a_shipped_table_that_cannot_be_read_costs_one_warning():
    code = f"""
import warnings
from importlib import resources
from pathlib import Path
from cupy_msda.cuda import tuned
from cupy_msda.problem import Problem
resources.files = lambda package: Path("/absent")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        assert tuned.choice("forward", Problem{tuple(DINO5)!r}, tuned.Device(132, "90"), None) is None
(warning,) = told
assert "table of tuned kernels cannot be read (FileNotFoundError" in str(warning.message)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_table_holds_one_entry_a_line():
    text = tuned.as_text({"sm_90": [entry(FOUR), entry(PLAIN, "backward")]})
    assert json.loads(text)["kernels"] == compiler.fingerprint()
    assert sum('"candidate"' in line for line in text.splitlines()) == 2
