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
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from cupy_msda import MSDeformAttn, __main__, ms_deform_attn_core_pytorch
from cupy_msda.bench import (
    cases,
    constants,
    correctness,
    geometry,
    machine,
    roofline,
    runner,
    tables,
    timing,
)
from cupy_msda.bench import implementations as implementation_file
from cupy_msda.bench.cases import Case, Inputs, Shape
from cupy_msda.bench.constants import Constants
from cupy_msda.bench.implementations import COMPILED, OURS
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
    assert results["schema"] == 4
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
        compared = tables.compared_us(row)
        for clock in ("wall", "cold" if device == "cpu" else "device"):
            low, high = row[f"{clock}_quartiles_us"]
            assert 0 < low <= row[f"{clock}_us"] <= high
        if device == "cuda":
            assert row["cold_us"] is row["cold_quartiles_us"] is None
        if device == "cpu":
            assert row["device_us"] is row["device_quartiles_us"] is row["device_by"] is None
        elif row["implementation"] == OURS:
            assert row["device_by"] == "graph"
        assert row["repeats"] == 4
        assert row["roofline_ms"] == max(row["roofline_terms_ms"].values())
        assert row["roofline_share"] == pytest.approx(1e3 * row["roofline_ms"] / compared)
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
    assert re.search(r"\[1/2, \d+ s, about 120 s left\] tiny, sigma 2, float32\n", said)
    assert re.search(r"\[2/2, \d+ s, about \d+ s left\] tiny, uniform, bfloat16\n", said)
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
            assert row["wall_us"] is row["wall_quartiles_us"] is row["roofline_share"] is None
            assert row["cold_us"] is None
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

    def on_device(function, inputs):
        """Stopwatches with a device, which takes no turn of its own."""
        watches = timing.on_cpu(function, inputs)
        return {
            way: watch._replace(device=lambda: 5.0, device_by="fake", cold=None)
            for way, watch in watches.items()
        }

    functions = {name: named(name) for name in "abc"}
    times = timing.measure(functions, inputs, on_device, timing.Limits(5, math.inf))
    for way in timing.WAYS:
        for name in "abc":
            wall, device, device_by, cold = times[way][name]
            assert len(wall) == 5
            assert min(wall) > 0
            assert (device, device_by, cold) == ([5.0] * 5, "fake", [])
    for repeat in range(5):
        turns = calls[9 * repeat : 9 * repeat + 9]
        assert sorted(turns[::3]) == ["a", "b", "c"]
        assert turns == [name for name in turns[::3] for _ in range(3)]
    times = timing.measure(functions, inputs, timing.on_cpu, timing.Limits(9, 0))
    assert len(times["forward"]["a"].wall) == 3
    assert times["forward"]["a"].device == []
    assert len(times["forward"]["a"].cold) == 3


def test_caches_are_cleared_right_before_a_cold_call(monkeypatch):
    """After the forward whose backward is timed, and outside the time."""
    log = []

    def clear():
        log.append("clear")
        time.sleep(0.05)

    def function(value, locations, weights):
        log.append("forward")
        product = value.sum() + locations.sum() + weights.sum()
        if product.requires_grad:
            product.register_hook(lambda grad: log.append("backward"))
        return product * inputs.grad_output

    inputs = cases.build(Case("rfdetr", "uniform", "float32"), "cpu")
    monkeypatch.setattr(timing, "_clear_caches", clear)
    watches = timing.on_cpu(function, inputs)
    least = {way: min(watches[way].cold() for _ in range(3)) for way in timing.WAYS}
    assert log == ["clear", "forward"] * 3 + ["forward", "clear", "backward"] * 3
    assert 0 < max(least.values()) < 50_000


def test_clearing_writes_over_the_caches(monkeypatch):
    """By each of torch's threads, its own part."""
    monkeypatch.setattr(timing, "_CLEARED_BYTES", 1000)
    timing._buffers.cache_clear()
    timing._clear_caches()
    pool, buffers = timing._buffers()
    timing._buffers.cache_clear()
    assert len(buffers) == len(pool._threads) == torch.get_num_threads()
    assert sum(buffer.sum() for buffer in buffers) == sum(map(len, buffers)) > 900


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


def offsets_in_pixels(inputs, references):
    """From references (N or 1, Lq, 1 or M, 1 or L, 1 or P, 2), as fractions."""
    sizes = torch.tensor(inputs.sizes).flip(-1)[:, None]
    return (inputs.locations.double() - torch.from_numpy(references)) * sizes


@pytest.mark.parametrize("sigma", [1, 2, 4])
def test_points_lie_where_their_distribution_says(sigma, monkeypatch):
    monkeypatch.setitem(cases.SHAPES, "tiny", TINY._replace(levels=((30, 40), (15, 20))))
    inputs = cases.build(Case("tiny", f"sigma {sigma}", "float32"), "cpu")
    centres = geometry.pixel_centres(inputs.sizes)
    assert centres.shape == (1500, 2)
    assert centres[0].tolist() == [0.5 / 40, 0.5 / 30]
    assert centres[1].tolist() == [1.5 / 40, 0.5 / 30]
    assert centres[1200 + 20].tolist() == [0.5 / 20, 1.5 / 15]
    offsets = offsets_in_pixels(inputs, centres[None, :, None, None, None])
    for level, count in enumerate(TINY.counts):
        spread = offsets[:, :, :, level, :count].std()
        assert 0.97 * sigma < spread < 1.03 * sigma
    sizes = torch.tensor(inputs.sizes).flip(-1)[:, None]
    pixels = inputs.locations.double() * sizes - 0.5
    assert (pixels - pixels.round()).abs().min() > 0.009


@pytest.mark.parametrize("shape", ["mask2former-512", "detr-encoder"])
def test_directed_points_are_those_of_a_new_module(shape):
    inputs = cases.build(Case(shape, "directed", "float32"), "cpu")
    sizes = cases.SHAPES[shape].levels
    module = MSDeformAttn(n_levels=len(sizes))
    biases = module.sampling_offsets.bias.detach().view(1, 1, 8, len(sizes), 4, 2)
    offsets = offsets_in_pixels(inputs, geometry.pixel_centres(sizes)[None, :, None, None, None])
    # To the margin from the edges between cells comes the rounding of a location to float32.
    assert (offsets - biases).abs().max() < 0.011
    assert offsets.abs().amax((0, 1, 2, 3, 5)).tolist() == pytest.approx([1, 2, 3, 4], abs=0.011)


@pytest.mark.parametrize("shape", ["dino-decoder", "dfine-decoder", "rfdetr"])
def test_points_of_boxes_are_those_of_a_new_module(shape):
    inputs = cases.build(Case(shape, "boxes", "float32"), "cpu")
    sizes, queries, counts = inputs.sizes, cases.SHAPES[shape].queries, cases.SHAPES[shape].counts
    boxes = geometry.boxes(1, queries)
    assert ((boxes[..., :2] - boxes[..., 2:] / 2 > 0) & (boxes[..., 2:] <= 0.5)).all()
    assert (boxes[..., :2] + boxes[..., 2:] / 2 < 1).all()
    heads = cases.SHAPES[shape].heads
    for level, count in enumerate(counts):
        module = MSDeformAttn(d_model=8 * heads, n_levels=1, n_heads=heads, n_points=count)
        biases = module.sampling_offsets.bias.detach().view(heads, 1, count, 2)
        references = torch.from_numpy(boxes)[:, :, None, None, None]
        expected = references[..., :2] + biases / count * references[..., 2:] * 0.5
        off = inputs.locations[:, :, :, level : level + 1, :count] - expected
        width_height = torch.tensor(sizes[level]).flip(-1)
        assert (off * width_height).abs().max() < 0.011
        inside = (expected - references[..., :2]).abs() <= references[..., 2:] / 2 * (1 + 1e-6)
        assert inside.all()


def test_a_camera_sees_what_lies_before_it():
    camera = geometry.Camera((1.0, 2.0, 1.5), 90.0, 1000, (800, 450))  # looks to the left
    points = [(1, 12, 1.5), (2, 12, 1.5), (1, 22, -0.5), (1, 1, 1.5)]
    located = geometry.project(camera, np.array(points, float)) * geometry.IMAGE
    # Ahead; a metre to the right, 10 metres ahead; two metres below, 20 metres ahead; behind.
    expected = [(800, 450), (900, 450), (800, 550), (-2 * 1600, -2 * 928)]
    np.testing.assert_allclose(located, expected)


def test_the_pillars_of_the_grid_by_hand():
    pillars = geometry.bev_in_cameras(100).reshape(6, 100, 100, 4, 2)
    # Cell (row 69, column 49): 19.968 m ahead of the lidar and 0.512 m to its left; the second height, -13/6 m.
    front = geometry.CAMERAS["front"]
    yaw = math.radians(front.yaw)
    ahead, left, up = 0.94 + 19.968 - 1.70, 0.512 - 0.02, 1.84 - 13 / 6 - 1.51
    depth = ahead * math.cos(yaw) + left * math.sin(yaw)
    right = ahead * math.sin(yaw) - left * math.cos(yaw)
    expected = (816 + 1266 * right / depth) / 1600, (492 - 1266 * up / depth) / 928
    np.testing.assert_allclose(pillars[0, 69, 49, 1], expected)
    assert (pillars[3, 69, 49] == -2).all()  # behind the camera that looks back


def test_each_camera_sees_its_share_of_the_grid():
    """The share of its field of view in the circle: 65 of 360 degrees, and 89 of the camera at the back."""
    pillars = geometry.bev_in_cameras(100)
    inside = ((pillars > 0) & (pillars < 1)).all(-1)
    seen = dict(zip(geometry.CAMERAS, inside.any(-1).mean(-1), strict=True))
    for name, share in seen.items():
        angle = 2 * math.degrees(math.atan(800 / geometry.CAMERAS[name].focal))
        # A square reaches further than a circle along its diagonals; the camera does not stand in its middle.
        assert share == pytest.approx(angle / 360, rel=0.16)
    assert inside.mean() == pytest.approx(0.18376, abs=1e-5)
    cameras = inside.any(-1).sum(0)
    assert cameras.mean() == pytest.approx(1.1213, abs=1e-4)
    assert cameras.max() == 2


def test_points_of_the_cameras_lie_by_their_pillars():
    inputs = cases.build(Case("bevformer-sca", "cameras", "float32"), "cpu")
    queries = slice(0, None, 16)
    part = inputs._replace(locations=inputs.locations[:, queries])
    pillars = geometry.bev_in_cameras(100)[:, queries, None, None]
    references = np.concatenate([pillars, pillars], axis=-2)  # two points of each height
    offsets = offsets_in_pixels(part, references)
    for level in range(4):
        assert 0.99 < offsets[:, :, :, level].std() < 1.01
        assert offsets[:, :, :, level].abs().max() < 6.5
    inside = ((inputs.locations > 0) & (inputs.locations < 1)).all(-1)
    assert inside.float().mean() == pytest.approx(0.1836, abs=0.001)


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
        encoder = cases.SHAPES[case.shape].queries is None
        fits = case.distribution.startswith("sigma") or case.distribution == "directed"
        assert case.distribution == "uniform" or encoder == fits
    float32 = [case.shape for case in chosen if case.dtype == "float32"]
    assert len(list(groupby(float32))) == len(set(float32))


def test_every_shape_is_measured_on_both_kinds_of_device():
    for device in ("cpu", "cuda"):
        assert {case.shape for case in cases.select(device, False)} == set(cases.SHAPES)


def test_what_samples_first_is_left_out_of_large_cases_on_a_cpu():
    large, small = (cases.Case(name, "uniform", "float32") for name in ("bevformer-sca", "rfdetr"))

    def taking_part(case, device):
        return [
            name
            for name in implementation_file._MAKERS
            if implementation_file.applies(name, case, device)
        ]

    everything = list(implementation_file._MAKERS)
    assert taking_part(small, "cpu") == everything
    assert taking_part(large, "cpu") == [OURS, "torch-ms-deform-attn"]
    assert taking_part(large, "cuda") == [name for name in everything if name != COMPILED]
    compiled = cases.Case("dino-decoder", "uniform", "float32")
    assert taking_part(compiled, "cuda") == everything


def test_a_run_on_a_gpu_has_time_for_everything_in_six_minutes():
    """The limits of all cases, and half as much again for their inputs, checks and captures."""
    chosen = cases.select("cuda", False)
    measured = len(chosen) * runner._LIMITS["cuda", False].seconds
    compiled = {
        case.shape for case in chosen if implementation_file.applies(COMPILED, case, "cuda")
    }
    assert compiled == set(implementation_file.COMPILED_ON_CUDA)
    assert 1.5 * measured + len(compiled) * implementation_file.COMPILE_SECONDS["cuda"] < 6 * 60


def test_progress_estimates_the_rest():
    limits = timing.Limits(50, 3)
    assert runner._seconds_left(0, 40, 0.0, limits) == 120
    assert runner._seconds_left(10, 40, 50.0, limits) == 150
    assert runner._seconds_left(39, 40, 78.0, limits) == 2


def row(implementation, median, way="forward", **more):
    return {
        "case": "shape",
        "distribution": "uniform",
        "dtype": "float32",
        "way": way,
        "implementation": implementation,
        "verdict": "right",
        "device_us": None,
        "wall_us": median and 1e3 * median,
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


def test_cold_times_have_rows_of_their_own():
    rows = [row(OURS, 0.5, cold_us=1e3), row("baseline", 1.5, cold_us=2e3)]
    rows += [row("other", None, verdict="raised", cold_us=None)]
    rows += [row(OURS, 2.0, "backward", cold_us=None), row("baseline", 3.0, "backward")]
    assert tables.table({"rows": rows}).splitlines()[2:] == [
        "| shape, uniform, float32 | forward | 0.5 ms | 40% | 1.5 ms, 3.0x | raised |",
        "|  | forward, cold | 1 ms |  | 2 ms, 2.0x | raised |",
        "|  | backward | 2 ms | 10% | 3 ms, 1.5x |  |",
    ]


def test_times_of_a_device_are_compared_where_there_is_one():
    rows = [row(OURS, 0.5, device_us=100.0), row("baseline", 0.4, device_us=250.0)]
    rows += [row(OURS, 2.0, "backward"), row("baseline", 3.0, "backward")]
    lines = tables.table({"rows": rows}).splitlines()
    assert lines[2:] == [
        "| shape, uniform, float32 | forward | 0.1 ms | 40% | 0.25 ms, 2.5x |",
        "|  | backward | 2 ms | 10% | 3 ms, 1.5x |",
    ]


def test_the_plot_shows_times_of_the_device_and_wall_times(tmp_path):
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    on_device = {"device_us": 100.0, "device_quartiles_us": [90.0, 110.0], "roofline_ms": 0.05}
    by_clock = {"wall_quartiles_us": [350.0, 450.0], "roofline_ms": 0.05}
    rows = [row(OURS, 0.5, **on_device), row(OURS, 0.4, "backward", **by_clock)]
    drawn = []

    class Figure(figures.Figure):
        def savefig(self, file, **options):
            super().savefig(file, **options)
            drawn.extend(self.axes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "Figure", Figure)
        tables.plot({"machine": {"device": "Some GPU"}, "rows": rows}, tmp_path / "plot.png")
    marks = [
        {
            (float(line.get_xdata()[0]), line.get_markerfacecolor() == "none")
            for line in axes.lines
            if line.get_marker() == "o"
        }
        for axes in drawn
    ]
    assert marks == [{(0.1, False), (0.5, True)}, {(0.4, False)}]


def test_caption_of_results():
    machine = {"device": "Some GPU", "driver": "580.1", "threads": 2, "versions": {"torch": "2.13"}}
    machine |= {"load_average_before": 0.1, "load_average_after": 1.5}
    text = tables.caption({"machine": machine, "date": "2026-11-23T08:00:00+00:00"})
    said = "Some GPU, 2 threads, driver 580.1, torch 2.13; 2026-11-23, load average 0.1 before and 1.5 after."
    assert text == f"{said} Device times."
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
