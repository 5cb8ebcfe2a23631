# SPDX-License-Identifier: Apache-2.0
"""The Numba kernels against the reference in float64, and calls from several threads."""

from __future__ import annotations

import itertools
import re
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

Array = np.ndarray[Any, Any]
Levels = tuple[Level, ...]


def placed(*levels: tuple[int, int, int]) -> Levels:
    """Levels of given (H, W, start)."""
    return tuple(Level(*level) for level in levels)


class Case(NamedTuple):
    """The arrays of one problem."""

    value: Array
    levels: Levels
    locations: Array
    weights: Array
    grad_output: Array


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
    p: int = 4,
    dtype: Any = np.float32,
    point_dtype: Any = None,
    spatial_size: int | None = None,
    seed: int = 0,
) -> Case:
    """A random problem, some of whose points lie outside."""
    rng = np.random.default_rng(seed)
    point_dtype = dtype if point_dtype is None else point_dtype
    s = spatial_size or max((h * w + start for h, w, start in levels), default=0)
    points = (n, lq, m, len(levels), p)
    return Case(
        rng.standard_normal((n, s, m, d)).astype(dtype),
        levels,
        rng.uniform(-0.15, 1.15, (*points, 2)).astype(point_dtype),
        rng.uniform(0, 1 / max(1, len(levels) * p), points).astype(point_dtype),
        rng.standard_normal((n, lq, m * d)).astype(dtype),
    )


def run(case: Case, **options: Any) -> tuple[Array, ...]:
    """The output and the three gradients of the CPU backend, in the dtypes of the inputs."""
    arrays = case.value, case.locations, case.weights
    sizes = [(level.height, level.width) for level in case.levels]
    starts = [level.start for level in case.levels]
    call = contract.check(case.value, sizes, starts, *arrays[1:])
    output = backend.forward(*call, *arrays, **options)
    results = output, *backend.backward(*call, case.grad_output, *arrays, **options)
    sources = case.grad_output, *arrays
    return tuple(result.astype(a.dtype) for result, a in zip(results, sources, strict=True))


def by_reference(case: Case) -> tuple[Array, ...]:
    """The same from the reference."""
    inputs = case.value, case.levels, case.locations, case.weights
    output = reference.forward(*inputs)
    return (output, *reference.backward(case.grad_output, *inputs))


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


def test_another_number_of_points_on_each_level() -> None:
    """D-FINE's decoder: three, six and three points, filled up with points outside that weigh nothing."""
    case = make(consecutive((20, 20), (10, 10), (5, 5)), n=3, m=8, p=6)
    for level in (0, 2):
        case.locations[:, :, :, level, 3:] = -2
        case.weights[:, :, :, level, 3:] = 0
    output, _, by_locations, by_weights = check(case)
    parts = [
        reference.forward(
            case.value,
            case.levels[level : level + 1],
            case.locations[:, :, :, level : level + 1, :points],
            case.weights[:, :, :, level : level + 1, :points],
        )
        for level, points in enumerate((3, 6, 3))
    ]
    np.testing.assert_allclose(output, sum(parts), atol=1e-6)
    assert not by_locations[:, :, :, ::2, 3:].any()
    assert not by_weights[:, :, :, ::2, 3:].any()


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
def test_non_finite_inputs(dtype: torch.dtype) -> None:
    inputs = non_finite_inputs(dtypes=(dtype, dtype))
    arrays = (tensor.numpy() for tensor in inputs[1:])
    value, locations, weights, grad_output = arrays
    with np.errstate(invalid="ignore"):
        check(Case(value, tuple(inputs.levels), locations, weights, grad_output))


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


@pytest.mark.parametrize("lq", [40, 800])
@pytest.mark.parametrize("levels", [DETR, placed((13, 21, 0), (13, 21, 100))])
def test_results_are_bitwise_identical_for_any_number_of_threads(levels: Levels, lq: int) -> None:
    # Few points and many: planes in place and packed. Overlapping levels: other tasks.
    case = make(levels, n=2, m=3, lq=lq)
    expected = run(case, threads=1)
    for threads in (2, 3, 8):
        for actual, same in zip(run(case, threads=threads), expected, strict=True):
            np.testing.assert_array_equal(actual, same)


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
