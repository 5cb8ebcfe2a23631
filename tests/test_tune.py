# SPDX-License-Identifier: Apache-2.0
"""python -m cupy_msda tune: on an emulated device, with planted times."""

from __future__ import annotations

import ctypes
import itertools
import json
import re

import pytest
import torch

from cupy_msda import __main__, ms_deform_attn, report
from cupy_msda.bench import cases, gpu_timing, machine, timing, tune
from cupy_msda.bench.cases import Shape
from cupy_msda.cuda import launch, plans, tuned
from cupy_msda.problem import Problem
from tests.emulated_device import emulated_device, forget

TINY = {"batch": 2, "levels": [[7, 9], [3, 5]], "queries": None, "heads": 2, "channels": 16}
TWO = "persistent, 2 per multiprocessor"
FOUR = "persistent, 4 per multiprocessor"
PLAIN = "plain, split-K 1"


class Bench:
    """The command on an emulated device; `times` in microseconds by candidate, one after another, else 2."""

    def __init__(self, monkeypatch, tmp_path, device):
        self.times, self.faults, self.ran, self.grad_outputs = {}, {}, [], []
        self.device, self.shapes, self.output = (
            device,
            tmp_path / "shapes.json",
            tmp_path / "t.json",
        )
        self.shapes.write_text(json.dumps({"tiny": TINY}))
        self._build, self._run = cases.build, launch.run
        monkeypatch.setattr(cases, "SHAPES", dict(cases.SHAPES))
        monkeypatch.setattr(cases, "build", lambda case, _: self._build(case, "cpu"))
        monkeypatch.setattr(machine, "describe", lambda _: {"device": "Emulated"})
        monkeypatch.setattr(report, "torch_obstacle", lambda: None)
        monkeypatch.setattr(gpu_timing, "current_gpu", lambda: self)
        monkeypatch.setattr(launch, "run", self._launch)
        monkeypatch.setattr(tune, "_DTYPES", ("float32",))

    def _launch(self, bound, arguments, stream):
        """Run a plan, and what was planted for its candidate after it."""
        self._run(bound, arguments, stream)
        name = bound.plan.reason.rpartition(":")[0]
        self.ran.append(name)
        self.grad_outputs.append(arguments.pointer("grad_output"))
        self.faults.get(name, lambda _: None)(arguments)

    def device_us(self, prepare):
        prepare()()
        return next(self.times.get(self.ran[-1], itertools.repeat(2.0)))

    def __call__(self, *arguments):
        """Exit status and table."""
        command = ["tune", "--shapes", str(self.shapes), "--output", str(self.output), *arguments]
        status = __main__.main(command)
        return status, tuned._of_user.__wrapped__(str(self.output)).get("sm_90", ())


@pytest.fixture
def bench(monkeypatch, tmp_path):
    with emulated_device(monkeypatch, 1) as device:
        yield Bench(monkeypatch, tmp_path, device)


def of(entries, result):
    """The entry of a result."""
    (found,) = (entry for entry in entries if entry.result == result)
    return found


def times(*milliseconds):
    return itertools.cycle(milliseconds)


def test_every_result_gets_its_fastest_candidate_by_median_and_calls_use_it(
    bench, monkeypatch, capsys
):
    binned = f"binned; points {TWO}"
    # By its mean, or by its best, another one would win.
    bench.times = {TWO: times(1.0, 1.0, 99.0), FOUR: times(1.5), PLAIN: times(0.1, 3.0, 3.0)}
    bench.times |= {binned: times(1.0), "binned": times(1.0)}
    status, entries = bench()
    assert status == 0
    winners = {entry.result: entry.candidate for entry in entries}
    assert winners == {
        "forward": TWO,
        "backward": binned,
        "backward of value": "binned",
        "backward of points": TWO,
    }
    forward = of(entries, "forward")
    assert forward.problem == Problem(2, 78, 2, 16, 78, 2, 4, *["float32"] * 3)
    assert forward.queries == "levels"
    assert forward.source.startswith("Emulated, 20")
    assert f"sigma 2: persistent, 1 per multiprocessor: 2.0 us; {TWO}: 1.0 us;" in forward.source
    said = capsys.readouterr().out
    assert "[1/1, 0 s] tiny, sigma 2, float32" in said
    assert f"1.0 us  {TWO}  <-" in said
    assert f"CUPY_MSDA_TUNED={bench.output} uses it" in said

    monkeypatch.setenv("CUPY_MSDA_TUNED", str(bench.output))
    forget()
    inputs = bench._build(cases.Case("tiny", "sigma 2", "float32"), "cpu")
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    bench.ran.clear()
    ms_deform_attn(leaves[0], inputs.sizes, None, *leaves[1:]).backward(inputs.grad_output)
    assert bench.ran == [TWO, binned]


def test_in_each_repeat_all_take_turns(bench, monkeypatch):
    monkeypatch.setattr(tune, "_WRITTEN", {"forward": ("output",)})
    monkeypatch.setattr(tune, "_LIMITS", timing.Limits(6, 60))
    bench()
    assert len(bench.ran) == 5 + 6 * 5  # each once for its check, untimed
    turns = [bench.ran[i : i + 5] for i in range(0, len(bench.ran), 5)]
    assert all(set(turn) == set(turns[0]) for turn in turns)
    assert len(set(map(tuple, turns))) > 1


def test_a_slow_device_repeats_the_least(bench, monkeypatch):
    monkeypatch.setattr(tune, "_WRITTEN", {"forward": ("output",)})
    monkeypatch.setattr(tune, "_LIMITS", timing.Limits(50, 0))
    bench()
    assert len(bench.ran) == 5 + tune._LEAST * 5


def nudge(name):
    """Another last bit of the first element of an array."""

    def fault(arguments):
        ctypes.c_uint32.from_address(arguments.pointer(name)).value ^= 1

    return fault


def spoil(name):
    """An error of the first element of an array, which is compared."""

    def fault(arguments):
        ctypes.c_float.from_address(arguments.pointer(name)).value += 1

    return fault


def refuse(_):
    raise RuntimeError("no such kernel\nin any way")


@pytest.mark.parametrize(
    ("result", "candidate", "fault", "why"),
    [
        ("forward", FOUR, nudge("output"), "output has other bits than by the first candidate"),
        ("forward", "persistent, 1 per multiprocessor", spoil("output"), "the error of output is "),
        ("forward", PLAIN, refuse, "RuntimeError: no such kernel"),
        ("backward of value", "binned", spoil("grad_value"), "the error of grad_value is "),
        ("backward of points", TWO, nudge("grad_weights"), "grad_weights has other bits"),
    ],
)
def test_a_wrong_candidate_is_left_out_and_told(
    bench, monkeypatch, capsys, result, candidate, fault, why
):
    monkeypatch.setattr(tune, "_WRITTEN", {result: tune._WRITTEN[result]})
    bench.times = {candidate: times(0.1)}
    bench.faults = {candidate: fault}
    status, (entry,) = bench()
    assert status == 1
    assert candidate != entry.candidate
    assert f"{candidate}: " not in entry.source
    said = capsys.readouterr().out
    assert f"  {result}: {candidate} is left out: " in said
    assert why in said
    assert "\nin any way" not in said


def test_what_is_timed_has_the_gradient_of_every_output(bench, monkeypatch):
    """The check has that of the compared queries alone, also where the last candidate raises."""
    monkeypatch.setattr(tune, "_WRITTEN", {"forward": ("output",)})
    bench.faults = {PLAIN: refuse}
    bench()
    (checked,), timed = set(bench.grad_outputs[:5]), set(bench.grad_outputs[5:])
    assert len(timed) == 1
    assert checked not in timed


def test_nothing_right_is_no_entry(monkeypatch, tmp_path):
    with emulated_device(monkeypatch, 1, runs=False) as device:  # results stay poisoned
        assert Bench(monkeypatch, tmp_path, device)() == (1, ())


def test_a_result_without_a_choice_is_no_entry(bench):
    """Odd D: the generic kernels alone."""
    bench.shapes.write_text(json.dumps({"odd": TINY | {"channels": 5}}))
    assert bench() == (0, ())
    assert not bench.ran


def test_given_grids_are_tuned_for_calls_that_name_them(bench, monkeypatch):
    monkeypatch.setattr(tune, "_WRITTEN", {"forward": ("output",)})
    bench.shapes.write_text(json.dumps({"bev": TINY | {"queries": 80, "grids": [[8, 10]]}}))
    _, (entry,) = bench()
    assert entry.queries == plans.queries(entry.problem, ((8, 10),)) == "grids"
    assert "uniform: " in entry.source


# --- which shapes ----------------------------------------------------------------------------------


def test_shapes_by_name_in_every_dtype():
    jobs = tune.select("rfdetr,detr-encoder")
    assert [job.case[:2] for job in jobs[::3]] == [
        ("rfdetr", "uniform"),
        ("detr-encoder", "sigma 2"),
    ]
    assert [job.case.dtype for job in jobs] == ["float32", "float16", "bfloat16"] * 2
    assert len(tune.select(None)) == 3 * len(cases.SHAPES)


def test_shapes_of_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr(cases, "SHAPES", dict(cases.SHAPES))
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"mine": TINY | {"grids": [[6, 13]]}}))
    job = tune.select(str(file))[0]
    assert job.case.shape == "mine"
    assert job.grids == ((6, 13),)
    assert cases.SHAPES["mine"] == Shape(2, ((7, 9), (3, 5)), None, 4, 2, 16)


BAD_FILES = {
    "{": "JSONDecodeError",
    "[]": "AttributeError",
    '{"a": {}}': "KeyError: 'levels'",
    '{"a": {"batch": 1, "levels": [[1]], "queries": 1}}': "ValueError",
    '{"a": {"batch": "1", "levels": [[1, 1]], "queries": 1}}': "sizes must be positive integers",
    '{"a": {"batch": 1, "levels": [[1, 0]], "queries": 1}}': "sizes must be positive integers",
    '{"a": {"batch": 1, "levels": [[1, 1]], "queries": 7, "grids": [[2, 3]]}}': "query_order must",
}


@pytest.mark.parametrize(("text", "why"), BAD_FILES.items())
def test_a_file_without_shapes_is_refused(text, why, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(text)
    start = r"--shapes must be names or a JSON file like .*bad\.json: "
    with pytest.raises(SystemExit, match=f"{start}.*{re.escape(why)}"):
        tune.select(str(file))


def test_unknown_names_are_refused():
    with pytest.raises(SystemExit, match=r"names among detr-encoder, .*, got mine, yours"):
        tune.select("detr-encoder,mine,yours")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why CUDA cannot run; here it can")
def test_tune_is_refused_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match=r"cannot tune: .*install"):
        __main__.main(["tune", "--output", str(tmp_path / "out.json")])


def test_an_output_that_cannot_be_written_is_refused_before_the_work(bench):
    bench.output = bench.output / "absent" / "t.json"
    with pytest.raises(SystemExit, match=r"absent/t\.json cannot be written"):
        bench()
    assert not bench.ran


@pytest.mark.gpu
def test_tune_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_DTYPES", ("float32",))
    output = tmp_path / "t.json"
    assert __main__.main(["tune", "--shapes", "mask2former-512", "--output", str(output)]) == 0
    ((architecture, entries),) = tuned._of_user.__wrapped__(str(output)).items()
    assert architecture.startswith("sm_")
    assert {entry.result for entry in entries} == {"forward", *plans.BACKWARDS.values()}
