# SPDX-License-Identifier: Apache-2.0
"""python -m cupy_msda bench: what it measures, what it refuses to measure, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch

from cupy_msda import __main__, ms_deform_attn_core_pytorch
from cupy_msda.bench import cases, constants, correctness, machine, roofline, runner, tables, timing
from cupy_msda.bench import implementations as implementation_file
from cupy_msda.bench.cases import Case, Inputs, Shape
from cupy_msda.bench.constants import Constants
from cupy_msda.bench.implementations import OURS
from cupy_msda.cuda import launch

ROOT = Path(__file__).resolve().parents[1]
TINY = Shape(2, ((5, 7), (3, 4)), None, (2, 3), heads=2, channels=8)
CASES = (Case("tiny", "sigma 2", "float32"), Case("tiny", "uniform", "bfloat16"))
RATES = Constants(copy=((100, 1e3), (1000, 2e3)), multiply_adds=1e4)


@pytest.fixture
def tiny(monkeypatch):
    """A benchmark of one small shape, without compiling anything."""
    monkeypatch.setitem(cases.SHAPES, "tiny", TINY)
    monkeypatch.setattr(cases, "select", lambda device, quick: CASES)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(runner._LIMITS, (device, True), timing.Limits(4, 60))
    rates = constants.measure
    monkeypatch.setattr(constants, "measure", lambda on: RATES if on == "cpu" else rates(on))


def plant(monkeypatch, name, function):
    """Put an implementation beside the others, or in the place of one."""
    monkeypatch.setitem(implementation_file._MAKERS, name, lambda inputs: function(inputs.sizes))


def scaled_output(sizes):
    return lambda v, x, a: ms_deform_attn_core_pytorch(v, sizes, x, a) * 1.001


def raising(sizes):
    def function(*tensors):
        raise NotImplementedError("not for these\nin any way")

    return function


def run(tmp_path, device="cpu"):
    """Exit status and results."""
    output = tmp_path / "results.json"
    status = runner.run(device, True, output)
    return status, json.loads(output.read_text())


def check_results(results, device):
    """What every complete file of these cases holds."""
    assert results["schema"] == 3
    assert results["machine"]["device"]
    versions = results["machine"]["versions"]
    assert {"python", "cupy_msda", "torch", "numpy"} <= versions.keys()
    assert versions["torch"] == torch.__version__
    rows = results["rows"]
    keys = {(row["case"], row["distribution"], row["dtype"], row["way"]) for row in rows}
    assert keys == {(*case, way) for case in CASES for way in timing.WAYS}
    for row in rows:
        if row["implementation"] in implementation_file._MODULES and row["verdict"] != "right":
            continue  # another project's kernels, which the benchmark need not find right
        assert row["verdict"] == "right"
        low, high = row["quartiles_ms"]
        assert 0 < low <= row["median_ms"] <= high
        assert row["repeats"] == 4
        assert row["roofline_ms"] == max(row["roofline_terms_ms"].values())
        assert row["roofline_share"] == pytest.approx(row["roofline_ms"] / row["median_ms"])
        most = 1 if row["implementation"] == OURS else correctness.BASELINE_BUDGETS
        assert all(error <= most for error in row["errors"].values())
        assert (row["peak_bytes"] is None) == (device == "cpu")
        assert (row["plan"] is None) == (device == "cpu" or row["implementation"] != OURS)


def test_run_measures_all_that_is_installed(tiny, tmp_path, capsys):
    status, results = run(tmp_path)
    assert status == 0
    check_results(results, "cpu")
    names = {row["implementation"] for row in results["rows"]}
    assert {OURS, "grid_sample"} <= names
    assert names | results["absent"].keys() == set(implementation_file._MAKERS)
    said = capsys.readouterr().out
    assert "[2/2, " in said
    assert tables.table(results) in said
    assert tables.caption(results) in said
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_run_on_a_gpu(tiny, tmp_path):
    status, results = run(tmp_path, "cuda")
    assert status == 0
    check_results(results, "cuda")
    rates = results["constants"]
    assert all(rates[name] > 0 for name in ("gather", "gather_l2", "scatter", "launch"))
    assert rates["gather"] > rates["gather_l2"] > rates["copy"][0][1]


def test_rows_name_the_candidate_that_ran(driver_device):
    """In the words of the plan that the call took from the cache."""
    inputs = cases.build(Case("rfdetr", "uniform", "float32"), "cpu")
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    output = implementation_file._ours(inputs)(*leaves)
    output.backward(inputs.grad_output)
    planned = runner._plans(inputs)
    assert planned == {"forward": "plain, split-K 1: model", "backward": "plain, split-K 1: model"}
    caches = launch.bind_forward.cache_info(), launch.bind_backward.cache_info()
    assert [(cache.hits, cache.misses) for cache in caches] == [(1, 1), (1, 1)]


def test_the_version_of_torch_names_its_build(monkeypatch):
    """As on PyPI, where the metadata of 2.11.0+cu130 says 2.11.0."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert machine.describe("cpu")["versions"]["torch"] == "2.11.0+cu130"


def test_wrong_and_raising_baselines_are_reported_and_not_timed(
    tiny, monkeypatch, tmp_path, capsys
):
    plant(monkeypatch, "wrong", scaled_output)
    plant(monkeypatch, "raising", raising)
    status, results = run(tmp_path)
    assert status == 0
    for name, verdict, why in (
        ("wrong", "wrong", "errors in units of their budgets: output "),
        ("raising", "raised", "NotImplementedError: not for these"),
    ):
        rows = [row for row in results["rows"] if row["implementation"] == name]
        float32 = [row for row in rows if row["dtype"] == "float32"]
        assert len(float32) == len(timing.WAYS)
        for row in float32:
            assert row["verdict"] == verdict
            assert row["why"].startswith(why)
            assert "\n" not in row["why"]
            assert row["median_ms"] is row["roofline_share"] is None
            assert row["repeats"] == 0
    assert "raised: NotImplementedError: not for these" in capsys.readouterr().out
    assert (tmp_path / "results.png").exists()


@pytest.mark.parametrize("function", [scaled_output, raising])
def test_run_fails_if_ours_is_wrong(function, tiny, monkeypatch, tmp_path):
    plant(monkeypatch, OURS, function)
    status, results = run(tmp_path)
    assert status == 1
    assert "wrong" in tables.table(results) or "raised" in tables.table(results)


def with_gradient_times(factor, index):
    """grid_sample, whose gradient of one input is off by a factor."""

    def of_sizes(sizes):
        def function(*tensors):
            changed = list(tensors)
            part = factor * changed[index]
            changed[index] = part + (changed[index] - part).detach()
            return ms_deform_attn_core_pytorch(changed[0], sizes, *changed[1:])

        return function

    return of_sizes


@pytest.mark.parametrize("index", [0, 1, 2])
def test_correctness_check_finds_wrong_gradients(index, tiny):
    inputs = cases.build(CASES[0], "cpu")
    expected = correctness.expect(inputs)
    name = correctness.RESULTS[1 + index]
    right = correctness.errors(with_gradient_times(1.0, index)(TINY.levels), inputs, expected)
    assert max(right.values()) <= 1
    wrong = correctness.errors(with_gradient_times(1.001, index)(TINY.levels), inputs, expected)
    assert [each for each, error in wrong.items() if error > 1] == [name]
    broken = correctness.errors(with_gradient_times(math.nan, index)(TINY.levels), inputs, expected)
    assert broken[name] == math.inf


def test_correctness_check_takes_a_part_of_many_queries(monkeypatch):
    monkeypatch.setattr(correctness, "_QUERIES", 4)
    monkeypatch.setitem(cases.SHAPES, "tiny", TINY)
    inputs = cases.build(CASES[0], "cpu")  # 47 queries
    expected = correctness.expect(inputs)
    assert expected.queries.tolist() == [0, 15, 23, 24, 25, 26, 30, 46]
    right = correctness.errors(implementation_file._ours(inputs), inputs, expected)
    assert max(right.values()) <= 1


def test_in_each_repeat_all_take_turns():
    calls = []
    inputs = cases.build(Case("rfdetr", "uniform", "float32"), "cpu")

    def named(name):
        def function(value, locations, weights):
            calls.append(name)
            return (value.sum() + locations.sum() + weights.sum()) * inputs.grad_output

        return function

    watched = []

    def watch(call):
        watched.append(call())
        return float(len(watched))

    functions = {name: named(name) for name in "abc"}
    times = timing.measure(functions, inputs, watch, timing.Limits(5, math.inf))
    assert [len(times[way][name]) for way in timing.WAYS for name in "abc"] == [5] * 6
    for repeat in range(5):
        turns = calls[9 * repeat : 9 * repeat + 9]
        assert sorted(turns[::3]) == ["a", "b", "c"]
        assert turns == [name for name in turns[::3] for _ in range(3)]
    assert len(timing.measure(functions, inputs, watch, timing.Limits(9, 0))["forward"]["a"]) == 3


def one_level(points):
    """A level of 2 x 3 pixels, D = 4, one query with points at pixel coordinates."""
    pixels = torch.tensor(points, dtype=torch.float64).view(1, 1, 1, 1, -1, 2)
    locations = ((pixels + 0.5) / torch.tensor([3, 2])).float()
    return Inputs(
        ((2, 3),), torch.zeros(1, 6, 1, 4), locations, locations[..., 0], torch.zeros(1, 1, 4)
    )


def test_work_is_counted_corner_by_corner():
    points = [(0.5, 0.5), (-0.5, -0.5), (1.5, 0.5), (9, 9), (2.5, 0.5)]
    assert roofline.count(one_level(points)) == (4 + 1 + 4 + 0 + 2, 6)
    assert roofline.count(one_level([(0.5, 0.5)] * 2)) == (8, 4)
    two = cases.build(Case("sweep-100", "uniform", "float32"), "cpu")
    work = roofline.count(two)
    assert work.rows <= work.corners <= 4 * two.weights.numel()


def test_roofline_bound_worked_by_hand():
    inputs = one_level([(0.5, 0.5), (-0.5, -0.5)])
    work = roofline.Work(corners=5, rows=4)
    # Bytes: 4 rows of 16, locations 16, weights 8, output 16; the backward also writes value's 96 and points' 24.
    forward = roofline.bound("forward", inputs, work, RATES)
    assert forward.terms == {"memory": 104 / 1e3 * 1e3, "arithmetic": 5 * 4 / 1e4 * 1e3}
    assert forward.milliseconds == 104
    assert forward.unshared == {}
    backward = roofline.bound("backward", inputs, work, RATES)
    assert backward.terms == {"memory": 224.0, "arithmetic": 4.0}

    on_gpu = RATES._replace(gather=100.0, gather_l2=50.0, scatter=10.0, launch=1.0)
    forward = roofline.bound("forward", inputs, work, on_gpu)
    assert forward.terms == {"memory": 104, "arithmetic": 2, "gather": 800, "launch": 1000}
    assert forward.unshared == {"gather from L2": 1600}
    half = inputs._replace(value=inputs.value.half())
    backward = roofline.bound("backward", half, work, on_gpu)
    assert backward.terms["gather"] == 400
    assert backward.unshared == {"gather from L2": 800, "scatter": 8000}


def test_copy_rate_is_that_of_the_cache_in_reach():
    rates = [roofline.copy_rate(RATES, reach) for reach in (1, 100, 999, 1000, 10**9)]
    assert rates == [1e3, 1e3, 1e3, 2e3, 2e3]


def test_constants_of_a_cpu():
    found = constants.measure("cpu")
    assert [reach for reach, _ in found.copy] == sorted({reach for reach, _ in found.copy})
    assert all(rate > 1e7 for _, rate in found.copy)
    assert found.multiply_adds > 1e7
    assert found.gather is None


def test_constants_of_a_gpu_compile():
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="needs CuPy for NVRTC")
    for architecture in (75, 90):
        program = nvrtc.createProgram(constants._SOURCE, "constants.cu", (), ())
        nvrtc.compileProgram(program, ("-std=c++17", f"-arch=sm_{architecture}"))
        assert "warning" not in nvrtc.getProgramLog(program)
        nvrtc.destroyProgram(program)


def test_points_lie_where_their_distribution_says(monkeypatch):
    monkeypatch.setitem(cases.SHAPES, "tiny", TINY._replace(levels=((30, 40), (15, 20))))
    inputs = cases.build(CASES[0], "cpu")
    sizes = torch.tensor(inputs.sizes).flip(-1)[:, None]
    centre = torch.tensor([0.5 / 40, 0.5 / 30])  # of the first query
    offsets = (inputs.locations[:, 0] - centre) * sizes
    inside = offsets[:, :, 0, :2]
    assert inside.abs().max() < 12
    centres = cases._pixel_centres(inputs.sizes)
    assert centres.shape == (1500, 2)
    offsets = (inputs.locations - centres[:, None, None, None]) * sizes
    spread = offsets[:, :, :, 1].std()
    assert 1.9 < spread < 2.1
    pixels = inputs.locations.double() * sizes - 0.5
    assert (pixels - pixels.round()).abs().min() > 0.009


def test_levels_with_fewer_points_are_filled_with_points_outside(tiny):
    inputs = cases.build(CASES[1], "cpu")
    assert inputs.value.dtype == inputs.weights.dtype == torch.bfloat16
    assert inputs.locations.dtype == torch.float32
    assert (inputs.locations[:, :, :, 0, 2] == -2).all()
    assert (inputs.weights[:, :, :, 0, 2] == 0).all()
    total = inputs.weights.float().sum((-1, -2))
    torch.testing.assert_close(total, torch.ones_like(total), atol=0.02, rtol=0)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_known_and_grouped_by_shape(device, quick):
    chosen = cases.select(device, quick)
    assert len(set(chosen)) == len(chosen)
    for case in chosen:
        queries = cases.SHAPES[case.shape].queries
        assert case.distribution == "uniform" or queries is None
    float32 = [case.shape for case in chosen if case.dtype == "float32"]
    assert len(list(groupby(float32))) == len(set(float32))


def test_every_shape_is_measured_on_both_kinds_of_device():
    for device in ("cpu", "cuda"):
        assert {case.shape for case in cases.select(device, False)} == set(cases.SHAPES)


def test_what_samples_first_is_left_out_of_large_cases_on_a_cpu():
    large, small = (cases.Case(name, "uniform", "float32") for name in ("bevformer-sca", "rfdetr"))
    for name in implementation_file._MAKERS:
        assert implementation_file.applies(name, large, "cuda")
        assert implementation_file.applies(name, small, "cpu")
    on_cpu = [
        name
        for name in implementation_file._MAKERS
        if implementation_file.applies(name, large, "cpu")
    ]
    assert on_cpu == [OURS, "torch-ms-deform-attn"]


def row(implementation, median, way="forward", **more):
    return {
        "case": "shape",
        "distribution": "uniform",
        "dtype": "float32",
        "way": way,
        "implementation": implementation,
        "verdict": "right",
        "median_ms": median,
        "roofline_share": median and 0.2 / median,
        **more,
    }


def test_table_of_results():
    rows = [row(OURS, 0.5), row("baseline", 1.234), row("other", None, verdict="raised")]
    rows += [row(OURS, 2.0, "backward"), row("baseline", 4321.0, "backward")]
    assert tables.table({"rows": rows}).splitlines() == [
        "| case | | cupy_msda | roofline / time | baseline | other |",
        "| --- | --- | --- | --- | --- | --- |",
        "| shape, uniform, float32 | forward | 0.5 ms | 40% | 1.23 ms, 2.5x | raised |",
        "|  | backward | 2 ms | 10% | 4321 ms, 2160.5x |  |",
    ]


def test_caption_of_results():
    machine = {"device": "Some GPU", "driver": "580.1", "threads": 2, "versions": {"torch": "2.13"}}
    machine |= {"load_average_before": 0.1, "load_average_after": 1.5}
    text = tables.caption({"machine": machine, "date": "2026-11-23T08:00:00+00:00"})
    said = "Some GPU, 2 threads, driver 580.1, torch 2.13; 2026-11-23, load average 0.1 before and 1.5 after."
    assert text == said
    machine |= {"driver": None, "load_average_after": 3.1}
    text = tables.caption({"machine": machine, "date": "2026-11-23T08:00:00+00:00"})
    assert text.endswith("3.1 after. The machine was busy with other work: not to be relied on.")


def test_tables_of_the_readme_are_those_of_the_result_files():
    path = ROOT / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(script._BETWEEN_MARKERS.findall(text)) >= 1
    assert script.updated(text) == text
    assert script.updated(re.sub(r" ms, \d", " ms, 9", text)) == text


def test_without_matplotlib_there_is_no_plot(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _ = run(tmp_path)
    assert status == 0
    assert not (tmp_path / "results.png").exists()
    said = capsys.readouterr().out
    assert re.search(r'no plot \(.+\): pip install "cupy-msda\[plot\]"', said)


def test_output_that_cannot_be_written_is_refused_at_once(tmp_path):
    for output, message in (
        ("absent/out.json", r"out\.json cannot be written: .*No such file"),
        ("out.png", r"out\.png must end in \.json"),
    ):
        with pytest.raises(SystemExit, match=message):
            __main__.main(["bench", "--output", str(tmp_path / output)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why CUDA cannot run; here it can")
def test_cuda_is_refused_where_it_cannot_run(tmp_path):
    with pytest.raises(SystemExit, match=r"cannot run on CUDA: .*install"):
        __main__.main(["bench", "--device", "cuda", "--output", str(tmp_path / "out.json")])


def test_bench_says_what_to_install():
    code = (
        "import sys, runpy; sys.modules['torch'] = None; "
        "runpy.run_module('cupy_msda', run_name='__main__', alter_sys=True)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, "bench"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ,
        timeout=60,
    )
    assert finished.returncode == 1
    assert "bench: torch must be installed: pip install" in finished.stderr
    assert "Traceback" not in finished.stderr
