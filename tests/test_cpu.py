# SPDX-License-Identifier: Apache-2.0
"""The Numba kernels against the reference in float64, and calls from several threads."""

from __future__ import annotations

import itertools
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.problem import Level
from tests.non_finite import non_finite_inputs

pytest.importorskip("numba")

from numba.core.caching import NullCache

from cupy_msda import contract
from cupy_msda.cpu import backend, kernels

inf = np.inf
Array = np.ndarray[Any, Any]
Levels = tuple[Level, ...]


def placed(*levels: tuple[int, int, int]) -> Levels:
    """Levels of given (H, W, start)."""
    return tuple(Level(*level) for level in levels)


class Rules(NamedTuple):
    """The keyword arguments of one problem."""

    num_points: tuple[int, ...] | None = None
    interpolation: str = "bilinear"
    value_mask: Array | None = None


class Case(NamedTuple):
    """The arguments of one problem."""

    value: Array
    levels: Levels
    locations: Array
    weights: Array
    grad_output: Array
    rules: Rules = Rules()


def consecutive(*sizes: tuple[int, int]) -> Levels:
    """Levels one after another."""
    levels, start = [], 0
    for height, width in sizes:
        levels.append(Level(height, width, start))
        start += height * width
    return tuple(levels)


def make(
    levels: Levels,
    *,
    n: int = 1,
    m: int = 2,
    d: int = 32,
    lq: int = 30,
    p: int | tuple[int, ...] = 4,
    interpolation: str = "bilinear",
    valid: float | None = None,
    dtype: Any = np.float32,
    point_dtype: Any = None,
    spatial_size: int | None = None,
    seed: int = 0,
) -> Case:
    """A random problem, some of whose points lie outside; `valid`: the part that a mask leaves of value."""
    rng = np.random.default_rng(seed)
    point_dtype = dtype if point_dtype is None else point_dtype
    s = spatial_size or max((h * w + start for h, w, start in levels), default=0)
    per_row = (len(levels), p) if isinstance(p, int) else (sum(p),)
    points = (n, lq, m, *per_row)
    case = Case(
        rng.standard_normal((n, s, m, d)).astype(dtype),
        levels,
        rng.uniform(-0.15, 1.15, (*points, 2)).astype(point_dtype),
        rng.uniform(0, 1 / max(1, math.prod(per_row)), points).astype(point_dtype),
        rng.standard_normal((n, lq, m * d)).astype(dtype),
        Rules(None if isinstance(p, int) else p, interpolation),
    )
    if valid is None:
        return case
    mask = rng.random((n, s)) < valid
    case.value[~mask] = np.nan
    return case._replace(rules=case.rules._replace(value_mask=mask))


def run(case: Case, **options: Any) -> tuple[Array, ...]:
    """The output and the three gradients of the CPU backend, in the dtypes of the inputs."""
    arrays = case.value, case.locations, case.weights
    sizes = [(level.height, level.width) for level in case.levels]
    starts = [level.start for level in case.levels]
    call = contract.check(case.value, sizes, starts, *arrays[1:], **case.rules._asdict())
    options["mask"] = case.rules.value_mask
    output = backend.forward(*call, *arrays, **options)
    results = output, *backend.backward(*call, case.grad_output, *arrays, **options)
    sources = case.grad_output, *arrays
    return tuple(result.astype(a.dtype) for result, a in zip(results, sources, strict=True))


def by_reference(case: Case) -> tuple[Array, ...]:
    """The same from the reference."""
    inputs = case.value, case.levels, case.locations, case.weights
    rules = case.rules._asdict()
    output = reference.forward(*inputs, **rules)
    return (output, *reference.backward(case.grad_output, *inputs, **rules))


def exactly(case: Case) -> tuple[Array, ...]:
    """The same from the reference in float64."""
    wide = [array if isinstance(array, tuple) else array.astype(np.float64) for array in case]
    return by_reference(Case(*wide))


def check(case: Case) -> tuple[Array, ...]:
    """Hold the kernels to the error budget; return their results."""
    results = run(case)
    for actual, same, exact in zip(results, by_reference(case), exactly(case), strict=True):
        assert_within_budget(actual, same, exact)
    return results


DETR = consecutive((13, 21), (7, 11), (4, 6), (2, 3))

# The models of the design's list, at about a sixteenth of their pixels.
MODELS = {
    "detr-encoder": {"levels": DETR, "n": 2, "m": 8, "lq": 378},
    "detr-decoder": {"levels": DETR, "n": 2, "m": 8, "lq": 10},
    "dino-decoder": {"levels": DETR, "m": 8, "lq": 40},
    "dino5-encoder": {"levels": consecutive((25, 42), (13, 21), (7, 11), (4, 6), (2, 3)), "lq": 50},
    "mask2former": {"levels": consecutive((4, 4), (8, 8), (16, 16)), "n": 2, "m": 8, "lq": 336},
    "rtdetr-decoder": {"levels": consecutive((20, 20), (10, 10), (5, 5)), "n": 3, "m": 8},
    "dfine-n-decoder": {"levels": consecutive((10, 10), (5, 5)), "n": 2, "m": 8, "d": 16, "p": 6},
    "bevformer-sca": {"levels": consecutive((14, 25), (7, 13), (4, 6), (2, 3)), "n": 6, "p": 8},
    "bevformer-tsa": {"levels": consecutive((25, 25)), "n": 2, "m": 8, "lq": 625},
    "rfdetr": {"levels": consecutive((12, 12)), "n": 2, "m": 16, "d": 16, "p": 2, "lq": 300},
    "msda-triton": {"levels": consecutive((16, 16), (8, 8), (4, 4), (2, 2)), "n": 4, "m": 8},
}


@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_models(name: str) -> None:
    check(make(**MODELS[name]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lq", [5, 200])
@pytest.mark.parametrize("p", [(3, 6, 3), (0, 5, 2), (4, 0, 1), (2, 3, 0), (0, 0, 3), (4, 4, 4)])
def test_another_number_of_points_on_each_level(p: tuple[int, ...], lq: int, dtype: Any) -> None:
    check(make(DETR[:3], n=2, p=p, lq=lq, dtype=dtype))


def test_another_number_of_points_on_levels_that_overlap() -> None:
    check(make(placed((6, 8, 0), (4, 5, 20), (3, 3, 49)), p=(3, 6, 1)))


@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
@pytest.mark.parametrize("levels", [DETR[:3], DETR[:1]], ids=len)
def test_points_level_after_level_are_the_same_memory(levels: Levels, interpolation: str) -> None:
    case = make(levels, n=2, interpolation=interpolation)
    n, lq, m, _, _ = case.weights.shape
    flat = case._replace(
        locations=case.locations.reshape(n, lq, m, -1, 2),
        weights=case.weights.reshape(n, lq, m, -1),
        rules=case.rules._replace(num_points=(4,) * len(levels)),
    )
    for actual, same in zip(run(flat), run(case), strict=True):
        np.testing.assert_array_equal(actual, same.reshape(actual.shape))


def test_points_that_pad_a_level_change_nothing() -> None:
    """D-FINE's decoder: three, six and three points, filled up with points outside."""
    padded = make(consecutive((20, 20), (10, 10), (5, 5)), n=3, m=8, p=6)
    kept = np.arange(6) < np.array([3, 6, 3])[:, None]
    padded.locations[:, :, :, ~kept] = -2
    ragged = padded._replace(
        locations=padded.locations[:, :, :, kept],
        weights=padded.weights[:, :, :, kept],
        rules=Rules(num_points=(3, 6, 3)),
    )
    output, by_value, by_locations, by_weights = run(padded)
    expected = output, by_value, by_locations[:, :, :, kept], by_weights[:, :, :, kept]
    for actual, same in zip(run(ragged), expected, strict=True):
        np.testing.assert_array_equal(actual, same)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("valid", [None, 0.7])
@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
@pytest.mark.parametrize("p", [4, (3, 0, 6)])
@pytest.mark.parametrize("lq", [4, 60])
def test_every_combination_of_rules(
    lq: int, p: int | tuple[int, ...], interpolation: str, valid: float | None, dtype: Any
) -> None:
    """Within the budget, and bitwise identical for any number of threads."""
    case = make(
        DETR[:3],
        n=2,
        m=8,
        lq=lq,
        p=p,
        interpolation=interpolation,
        valid=valid,
        dtype=dtype,
    )
    check(case)
    expected = run(case, threads=1)
    for threads in (2, 3):
        for actual, same in zip(run(case, threads=threads), expected, strict=True):
            np.testing.assert_array_equal(actual, same)


def discrete(case: Case) -> Array:
    """The output by the rule of Hugging Face's RT-DETRv2, method "discrete"."""
    n, lq, m = case.weights.shape[:3]
    image, _, head = np.ogrid[:n, :lq, :m]
    output = np.zeros((n, lq, m, case.value.shape[3]), case.value.dtype)
    for index, (height, width, start) in enumerate(case.levels):
        for point in range(case.weights.shape[4]):
            u, v = np.moveaxis(case.locations[:, :, :, index, point], -1, 0)
            column = (u * width + 0.5).astype(np.int64).clip(0, width - 1)
            row = (v * height + 0.5).astype(np.int64).clip(0, height - 1)
            pixels = case.value[image, start + row * width + column, head]
            output += case.weights[:, :, :, index, point, None] * pixels
    return output.reshape(n, lq, -1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_is_the_discrete_rule(dtype: Any) -> None:
    case = make(DETR, n=2, m=3, lq=100, interpolation="nearest", dtype=dtype)
    exact = Case(*(a if isinstance(a, tuple) else a.astype(np.float64) for a in case))
    output, _, by_locations, _ = check(case)
    assert_within_budget(output, discrete(case), discrete(exact))
    assert not by_locations.any()


@pytest.mark.parametrize("size", [(4, 8), (1, 8), (4, 1), (1, 1)])
def test_nearest_at_the_edges_of_a_pixel_and_of_the_level(size: tuple[int, int]) -> None:
    # Products and sums with powers of two are exact in float32.
    height, width = size
    steps = [-inf, -9, -1.5, -0.5, 0, *np.arange(0.25, 9, 0.25), 20, 1e30, inf]
    x, y = (grid.ravel() for grid in np.meshgrid(steps, steps))
    case = make(placed((height, width, 0)), m=1, lq=x.size, p=1, interpolation="nearest")
    locations = np.stack([x / width, y / height], axis=-1)
    case = case._replace(locations=locations.reshape(case.locations.shape).astype(np.float32))
    case.weights[...] = 1
    column, row = (
        np.trunc(np.clip(at + 0.5, 0, most - 1)).astype(int)
        for at, most in ((x, width), (y, height))
    )
    output = check(case)[0]
    np.testing.assert_array_equal(output[0], case.value[0, row * width + column, 0])


def test_nearest_of_no_place_contributes_nothing() -> None:
    case = make(DETR, lq=60, interpolation="nearest")
    nowhere = np.random.default_rng(1).random(case.weights.shape) < 0.3
    case.locations[nowhere, 0] = np.nan
    case.weights[nowhere] = np.inf
    clean = case._replace(weights=np.where(nowhere, np.float32(0), case.weights))
    clean.locations[nowhere] = np.nan
    results = check(case)
    for actual, expected in zip(results, run(clean), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert not results[3][nowhere].any()


def test_nearest_on_an_empty_level_contributes_nothing() -> None:
    case = make(placed((0, 3, 0), (4, 5, 0), (3, 0, 20)), interpolation="nearest")
    case.weights[:, :, :, ::2] = np.nan
    results = check(case)
    assert np.isfinite(results[0]).all()
    assert not results[3][:, :, :, ::2].any()


def test_nearest_in_the_last_column_of_a_level_wider_than_a_float_counts() -> None:
    # 2**24 + 3, the last column, is 2**24 + 4 in float32: of the next level.
    width = 2**24 + 4
    value = np.zeros((1, width + 1, 1, 1), np.float32)
    value[0, -2:, 0, 0] = 1, 10
    locations, weights = np.full((1, 1, 1, 2, 1, 2), inf, np.float32), np.ones((1, 1, 1, 2, 1))
    levels, rules = placed((1, width, 0), (1, 1, width)), Rules(interpolation="nearest")
    case = Case(value, levels, locations, weights.astype(np.float32), value[:, :1, 0], rules)
    assert run(case)[0] == 11


@pytest.mark.parametrize("lq", [20, 300])
@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
def test_a_masked_position_is_a_zero_that_takes_no_gradient(interpolation: str, lq: int) -> None:
    case = make(DETR, n=2, lq=lq, interpolation=interpolation, valid=0.5)
    mask = case.rules.value_mask
    assert mask is not None
    results = check(case)
    assert all(np.isfinite(result).all() for result in results)
    assert not results[1][~mask].any()
    filled = case._replace(
        value=np.where(mask[:, :, None, None], case.value, np.float32(0)),
        rules=Rules(interpolation=interpolation),
    )
    same, exact = by_reference(filled), exactly(filled)
    for by_value in (same[1], exact[1]):
        by_value[~mask] = 0
    for expected in zip(results, same, exact, strict=True):
        assert_within_budget(*expected)


@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
def test_a_point_on_masked_positions_alone_is_outside(interpolation: str) -> None:
    case = make(consecutive((4, 8)), lq=40, interpolation=interpolation, valid=1)
    mask = case.rules.value_mask
    assert mask is not None
    mask[:, :16] = False  # the upper half
    case.locations[..., :2, 1] = 0.25
    case.weights[..., :2] = np.inf
    case.value[:, :16] = np.inf
    results = check(case)
    assert all(np.isfinite(result).all() for result in results)
    assert not results[2][..., :2, :].any()
    assert not results[3][..., :2].any()


@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
def test_a_mask_of_nothing_and_of_everything(interpolation: str) -> None:
    case = make(DETR, lq=200, interpolation=interpolation)
    whole, none = (np.full(case.value.shape[:2], valid) for valid in (True, False))
    masked = case._replace(rules=case.rules._replace(value_mask=whole))
    for actual, same in zip(run(masked), run(case), strict=True):
        np.testing.assert_array_equal(actual, same)
    masked = case._replace(rules=case.rules._replace(value_mask=none))
    assert not any(result.any() for result in run(masked))


@pytest.mark.parametrize("d", [1, 20, 30, 64, 71, 144, 256])
def test_any_head_dim(d: int) -> None:
    check(make(DETR, d=d))


@pytest.mark.parametrize("d", [20, 71])
def test_vectors_are_powers_of_two(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM takes a vector of any other width apart at every branch, number by number."""
    monkeypatch.setattr(kernels, "disk_cache", lambda function: NullCache())
    kernel = kernels.forward_kernel.__wrapped__(d, 4)
    (written,) = kernel.inspect_llvm().values()
    widths = {int(width) for width in re.findall(r"<(\d+) x float>", written)}
    assert max(widths) == 1 << d.bit_length() - 1
    assert all(width & (width - 1) == 0 for width in widths)


@pytest.mark.parametrize("d", [16, 71])
@pytest.mark.parametrize(
    ("dtype", "point_dtype"),
    [
        (np.float16, np.float16),
        (np.float16, np.float32),
        (np.float64, np.float64),
        (np.float64, np.float32),
    ],
)
def test_dtypes(dtype: Any, point_dtype: Any, d: int) -> None:
    check(make(DETR, d=d, dtype=dtype, point_dtype=point_dtype))


def test_a_half_location_is_widened_before_it_is_scaled() -> None:
    levels = consecutive((1, 167))
    case = make(levels, dtype=np.float16, m=1, d=16, lq=50)
    widened = case._replace(locations=case.locations.astype(np.float32))
    np.testing.assert_array_equal(run(case)[0], run(widened)[0])


def test_large_batch() -> None:
    check(make(consecutive((4, 5), (2, 3)), n=154, lq=3))


@pytest.mark.parametrize("sizes", [((1, 9), (1, 1)), ((9, 1), (1, 2))])
def test_one_pixel_high_or_wide(sizes: tuple[tuple[int, int], ...]) -> None:
    check(make(consecutive(*sizes), lq=60))


@pytest.mark.parametrize("lq", [3, 200])
def test_levels_that_overlap_or_leave_gaps(lq: int) -> None:
    # Positions 0 to 9 and 58 to 69 belong to no level; the second level lies inside the first.
    levels = placed((6, 8, 10), (4, 5, 20), (3, 3, 49), (2, 4, 70))
    results = check(make(levels, spatial_size=90, lq=lq))
    assert not results[1][:, :10].any()
    assert not results[1][:, 78:].any()


@pytest.mark.parametrize("lq", [3, 200])
def test_levels_that_share_one_position(lq: int) -> None:
    """They are one task, since each would write its own sum of that position."""
    check(make(placed((6, 8, 0), (4, 5, 47), (3, 3, 66)), lq=lq))


def test_every_query_on_one_cell() -> None:
    case = make(consecutive((6, 7), (3, 4)), lq=500)
    case.locations[...] = 0.4
    check(case)


def test_points_at_the_edges_of_the_level() -> None:
    # Powers of two: the coordinates below are exact in float32.
    height, width = 4, 8
    steps = [np.array([-1.25, -1, -0.5, 0, 0.5, n - 1.5, n - 1, n - 0.5, n, n + 1]) for n in (8, 4)]
    x, y = (grid.ravel() for grid in np.meshgrid(*steps))
    locations = np.stack([(x + 0.5) / width, (y + 0.5) / height], axis=-1)
    case = make(placed((height, width, 0)), m=1, lq=x.size, p=1)
    output, _, by_locations, by_weights = check(
        case._replace(locations=locations.reshape(case.locations.shape).astype(np.float32))
    )
    outside = ~((x > -1) & (x < width) & (y > -1) & (y < height))
    for result in (output, by_locations, by_weights):
        assert not result[0, outside].any()


def test_all_points_outside() -> None:
    case = make(DETR)
    case.locations[...] = np.where(case.locations < 0.5, case.locations - 3, case.locations + 3)
    assert not any(result.any() for result in run(case))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -1e30])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("lq", [5, 400])
def test_a_location_that_is_no_place_contributes_nothing(bad: float, axis: int, lq: int) -> None:
    case = make(DETR, lq=lq)
    nowhere = np.random.default_rng(1).random(case.weights.shape) < 0.3
    case.locations[nowhere, axis] = bad
    case.weights[nowhere] = np.nan
    clean = case._replace(weights=np.where(nowhere, np.float32(0), case.weights))
    clean.locations[nowhere] = 5
    for actual, expected in zip(run(case), run(clean), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert not run(case)[2][nowhere].any()
    assert not run(case)[3][nowhere].any()


def test_infinite_cells_beyond_the_border_are_not_read() -> None:
    # Left of the first column lies, in memory, the last one; above and below, other levels.
    levels = placed((5, 6, 40), (5, 6, 80))
    case = make(levels, spatial_size=120, m=1, lq=200)
    rng = np.random.default_rng(2)
    image = np.full((5, 6, 1, 32), np.inf, np.float32)
    image[:, :3] = rng.standard_normal((5, 3, 1, 32))
    case.value[...] = np.inf
    for _, _, start in levels:
        case.value[0, start : start + 30] = image.reshape(30, 1, 32)
    x = rng.uniform(-0.99, 1.99, case.weights.shape)  # between the edge and the third column
    y = rng.uniform(-0.99, 4.99, case.weights.shape)
    case.locations[..., 0], case.locations[..., 1] = (x + 0.5) / 6, (y + 0.5) / 5
    results = check(case)
    assert all(np.isfinite(result).all() for result in results)


def test_nan_and_infinity_inside_go_where_they_go_in_the_reference() -> None:
    case = make(DETR, lq=60)
    case.value[0, 17, 0, 3] = np.nan
    case.weights[0, 7, 1, 0, 0] = np.nan
    case.grad_output[0, 11, 5] = np.nan
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
def test_non_finite_inputs(interpolation: str, masked: bool, dtype: torch.dtype) -> None:
    inputs = non_finite_inputs(dtypes=(dtype, dtype))
    arrays = (tensor.numpy() for tensor in inputs[1:])
    value, locations, weights, grad_output = arrays
    mask = np.random.default_rng(3).random(value.shape[:2]) < 0.6 if masked else None
    rules = Rules(interpolation=interpolation, value_mask=mask)
    with np.errstate(invalid="ignore"):
        check(Case(value, tuple(inputs.levels), locations, weights, grad_output, rules))


EMPTY: dict[str, dict[str, Any]] = {
    "N": {"levels": DETR, "n": 0},
    "Lq": {"levels": DETR, "lq": 0},
    "M": {"levels": DETR, "m": 0},
    "D": {"levels": DETR, "d": 0},
    "P": {"levels": DETR, "p": 0},
    "L": {"levels": (), "spatial_size": 7},
    "S": {"levels": placed((0, 3, 0), (0, 0, 0))},
    "H": {"levels": placed((0, 3, 0), (4, 5, 0))},
    "W": {"levels": placed((4, 5, 0), (3, 0, 20))},
}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", EMPTY)
def test_empty_dimensions(name: str, dtype: Any) -> None:
    case = make(**EMPTY[name], dtype=dtype)
    if name not in ("H", "W"):
        assert not any(result.any() for result in run(case))
        return
    check(case)
    # A point in the empty level is outside: it contributes nothing, whatever its weight.
    nothing = 0 if name == "H" else 1
    case.weights[:, :, :, nothing] = 0
    expected = run(case)
    case.weights[:, :, :, nothing] = np.nan
    for actual, same in zip(run(case), expected, strict=True):
        np.testing.assert_array_equal(actual, same)
    assert not run(case)[3][:, :, :, nothing].any()


def test_one_compilation_whatever_the_layout_of_the_inputs() -> None:
    """Read-only as memory-mapped arrays are, not aligned, not contiguous."""
    case = make(DETR, d=24)
    expected = run(case)

    def read_only(array: Array) -> Array:
        view = array.view()
        view.flags.writeable = False
        return view

    def misaligned(array: Array) -> Array:
        memory = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
        memory[...] = array
        return memory

    for layouts in itertools.product(
        (np.asarray, read_only, misaligned, np.asfortranarray), repeat=4
    ):
        arrays = case.value, case.locations, case.weights, case.grad_output
        value, *points, grad = (f(array) for f, array in zip(layouts, arrays, strict=True))
        results = run(Case(value, case.levels, *points, grad))
        for actual, same in zip(results, expected, strict=True):
            np.testing.assert_array_equal(actual, same)
    for kernel in (kernels.forward_kernel(24, 4), kernels.backward_kernel(24, 4)):
        assert len(kernel.signatures) == 1
    assert case.value.flags.writeable


@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
@pytest.mark.parametrize("valid", [None, 0.5])
def test_one_compilation_for_an_interpolation_with_a_mask_or_without(
    valid: float | None, interpolation: str
) -> None:
    """Whatever the points of each level and the layout of the mask."""
    case = make(DETR, n=2, d=24, interpolation=interpolation, valid=valid)
    run(make(DETR, d=24, p=(3, 6, 0, 3), interpolation=interpolation, valid=valid))
    expected, mask = run(case), case.rules.value_mask
    if mask is not None:
        read_only = mask.view()
        read_only.flags.writeable = False
        for layout in (read_only, np.asfortranarray(mask), np.repeat(mask, 2, axis=1)[:, ::2]):
            same = run(case._replace(rules=case.rules._replace(value_mask=layout)))
            for actual, one in zip(same, expected, strict=True):
                np.testing.assert_array_equal(actual, one)
    template = 24, 4, interpolation == "nearest", valid is not None
    for kernel in (kernels.forward_kernel(*template), kernels.backward_kernel(*template)):
        assert len(kernel.signatures) == 1


@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
@pytest.mark.parametrize("valid", [None, 0.5])
def test_what_is_compiled_ahead_is_not_compiled_again(
    valid: float | None, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(DETR, d=19, interpolation=interpolation, valid=valid)
    shapes = case.value.shape, case.locations.shape, "float32", None
    rules = None, interpolation, valid is not None, None
    backend.compile_ahead(contract.check_described(*shapes, *rules), with_backward=True)
    monkeypatch.delattr(kernels, "_compiled")
    check(case)


@pytest.mark.parametrize("p", [4, (3, 0, 6)])
@pytest.mark.parametrize("valid", [None, 0.7])
@pytest.mark.parametrize("interpolation", contract.INTERPOLATIONS)
def test_the_reference_without_numba(
    interpolation: str,
    valid: float | None,
    p: int | tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "backend", lambda: reference)
    case = make(DETR[:3], n=2, p=p, interpolation=interpolation, valid=valid)
    for actual, same in zip(run(case), by_reference(case), strict=True):
        np.testing.assert_array_equal(actual, same)


def test_read_only_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(DETR)
    case.value.flags.writeable = False
    seen = []
    real = kernels.forward

    def spy(value: Array, *arguments: Any, **options: Any) -> Array:
        seen.append(value)
        return real(value, *arguments, **options)

    monkeypatch.setattr(kernels, "forward", spy)
    run(case)
    assert np.shares_memory(seen[0], case.value)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("lq", [40, 800])
@pytest.mark.parametrize("levels", [DETR, placed((13, 21, 0), (13, 21, 100))])
def test_results_are_bitwise_identical_for_any_number_of_threads(levels: Levels, lq: int) -> None:
    # Few points and many: planes in place and packed. Overlapping levels: other tasks.
    case = make(levels, n=2, m=3, lq=lq)
    expected = run(case, threads=1)
    for threads in (2, 3, 8):
        for actual, same in zip(run(case, threads=threads), expected, strict=True):
            np.testing.assert_array_equal(actual, same)


def test_a_call_ends_when_its_helpers_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of their tasks may take longer than those of the calling thread."""
    caller, inside, left = threading.current_thread(), threading.Event(), []

    def kernel(state: Array) -> None:
        if threading.current_thread() is caller:
            assert inside.wait(60)
            return
        state[kernels._HELPERS_INSIDE] += 1
        inside.set()
        time.sleep(0.1)
        left.append(True)
        state[kernels._HELPERS_INSIDE] -= 1

    kernels._share_out(kernel, 2)
    assert left


def test_little_work_wakes_no_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = []
    monkeypatch.setattr(kernels, "_share_out", lambda _, threads, *__: shared.append(threads))
    run(make(DETR[:1], lq=2), threads=4)
    run(make(DETR, n=2, m=8, lq=100), threads=4)
    assert shared == [1, 1, 4, 4]


def test_calls_from_several_threads_at_once() -> None:
    cases = [make(DETR, n=2, m=8, lq=100 + i, seed=i) for i in range(4)]
    expected = [run(case, threads=1) for case in cases]
    with ThreadPoolExecutor(len(cases)) as callers:
        for _ in range(10):
            for results, same in zip(
                callers.map(lambda case: run(case, threads=4), cases), expected, strict=True
            ):
                for actual, one in zip(results, same, strict=True):
                    np.testing.assert_array_equal(actual, one)


def test_more_than_2_to_the_31_elements() -> None:
    # Zeros that nobody touches take address space and no memory; the gradient takes as much.
    m, d = 8, 256
    s = 2**31 // (m * d) + 100
    try:
        value = np.zeros((2, s, m, d), np.float32)[:1]
    except MemoryError:
        pytest.skip("17 GiB of address space are not to be had")
    small = make(placed((5, 6, 0), (4, 4, 30)), m=m, d=d, lq=4)
    value[0, -46:] = small.value
    levels = tuple(Level(h, w, start + s - 46) for h, w, start in small.levels)
    large = small._replace(value=value, levels=levels)
    results, expected = run(large), run(small)
    np.testing.assert_array_equal(results[0], expected[0])
    np.testing.assert_array_equal(results[1][0, -46:], expected[1][0])
    for actual, same in zip(results[2:], expected[2:], strict=True):
        np.testing.assert_array_equal(actual, same)
