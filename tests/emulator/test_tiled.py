# SPDX-License-Identifier: Apache-2.0
"""Gradients of value by output-stationary tiles: bitwise identical in any order of blocks and lanes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.cuda.compile import assemble
from cupy_msda.problem import Level, LevelTable
from tests.emulator.cases import (
    BAD_TABLES,
    BF16,
    BY_STARTS,
    CORNERS,
    F16,
    F32,
    F64,
    FOUR,
    MODELS,
    SEEDS,
    SPECIALISED,
    SPLIT_K,
    THREE,
    UNKNOWN,
    assert_fence_is_needed,
    bits,
    check_value,
    copied,
    crowd,
    deterministic,
    on,
    problem,
    without,
)
from tests.emulator.launches import (
    backward,
    backward_tiled,
)
from tests.problems import Inputs, random_inputs

TILED = {
    "detr-decoder": SPLIT_K["detr-decoder"],
    "dino-decoder-f16": SPLIT_K["dino-decoder-f16"],
    "rtdetr-decoder-bf16": SPLIT_K["rtdetr-decoder-bf16"],
    "dfine-decoder": SPLIT_K["dfine-decoder"],
    "rfdetr-f16": MODELS["rfdetr-f16"],
    "d8-f16": SPECIALISED["d8-f16"],
    "d64-bf16": SPECIALISED["d64-bf16"],
    "d128": SPECIALISED["d128"],
    "one-pixel": SPECIALISED["one-pixel"],
    "six-tiles": SPECIALISED["inside-only"],
    "rounds": problem(1, FOUR, 2, 8, 1100, 4),  # of 2048 points each
    "rounds-of-odd-points": problem(1, ((20, 40), (5, 3)), 1, 8, 450, 5, (F16, F32, F32)),
}


def tiled(inputs: Inputs, **options: Any) -> torch.Tensor:
    """The gradient of value by tiles, which must be bitwise identical in every order of blocks and lanes."""
    return deterministic(backward_tiled, inputs, **options)


@on(TILED)
def test_tiles(inputs: Inputs) -> None:
    check_value(inputs, tiled(inputs))


@pytest.mark.parametrize("case", ["detr-decoder", "rounds", "six-tiles"])
def test_direct_additions_do_depend_on_the_order(case: str) -> None:
    """Otherwise the test above would show nothing."""
    plain = [backward(TILED[case], seed=seed)[0] for seed in (0, *SEEDS)]
    assert not all(torch.equal(other, plain[0]) for other in plain[1:])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_query_in_one_cell_of_a_tile(dtype: torch.dtype) -> None:
    inputs = crowd(1600, 2, 8, 4, dtype)
    grad_value = tiled(inputs)
    check_value(inputs, grad_value)
    grad_value[0, CORNERS] = 0
    assert not bits(grad_value).any()  # of poisoned memory


# Levels of (2, THREE): (8, 8), (4, 4), (2, 2) in memory for 200 positions.
STARTS = {
    "gaps": (130, 20, 0),
    "overlap": (60, 70, 66),
    "same-start": (100, 100, 100),
    "across-tiles": (90, 120, 126),
}


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("on_device", [False, True], ids=["", "on-device"])
def test_levels_anywhere_in_the_tiles(starts: tuple[int, ...], on_device: bool) -> None:
    inputs = random_inputs(THREE, n=2, m=3, d=32, lq=40, p=4, s=200)
    levels = [Level(*size, start) for size, start in zip(THREE, starts, strict=True)]
    options: dict[str, Any] = {"table": LevelTable(THREE, starts)}
    if on_device:
        options = {"table": UNKNOWN, "tables": (inputs.shapes(), torch.tensor(starts))}
    grad_value = tiled(inputs, **options)
    same, exact = (
        reference.backward(case.grad_output, case.value, levels, case.locations, case.weights)[0]
        for case in (inputs, inputs.to(F64))
    )
    assert_within_budget(grad_value, same, exact)
    unused = torch.ones(200, dtype=torch.bool)
    for (h, w), start in zip(THREE, starts, strict=True):
        unused[start : start + h * w] = False
    assert unused.sum() > 60
    assert not bits(grad_value[:, unused]).any()


@BY_STARTS
def test_starts_derived_on_the_device(derived: bool) -> None:
    inputs = TILED["detr-decoder"]
    tables = (inputs.shapes(), None if derived else inputs.starts())
    actual = backward_tiled(inputs, table=UNKNOWN, tables=tables)
    assert torch.equal(actual, backward_tiled(inputs))


@BY_STARTS
@pytest.mark.parametrize("bad", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_levels_that_do_not_fit_add_nothing(derived: bool, bad) -> None:
    """As the plain kernel: grad_value is that of the levels which do fit."""
    inputs = TILED["detr-decoder"]
    sizes = inputs.shapes()
    sizes[bad[0]] = bad[1]
    options: dict[str, Any] = {"tables": (sizes, None if derived else inputs.starts())}
    plain = backward(inputs, table=UNKNOWN, **options)[0]
    actual = backward_tiled(inputs, table=UNKNOWN, sanitize=True, **options)
    assert torch.equal(actual == 0, plain == 0)
    torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-5)


def test_points_that_do_not_count() -> None:
    """Under the sanitizers: NaN, infinite and far locations add nothing, whatever their weight."""
    inputs = copied(TILED["six-tiles"])
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf, 1e30, -3e38, 2.0, -1.0)):
        inputs.locations[0, i::9, 0, i % 2, i % 3, i % 2] = bad
        inputs.weights[0, i::9, 0, i % 2, i % 3] = torch.nan
    grad_value = backward_tiled(inputs, sanitize=True)
    assert grad_value.isfinite().all()
    inputs.weights.nan_to_num_(1.0)
    check_value(inputs, grad_value)


@pytest.mark.parametrize("case", ["dino-decoder-f16", "d128", "rounds-of-odd-points"])
def test_under_the_sanitizers(case: str) -> None:
    check_value(TILED[case], backward_tiled(TILED[case], sanitize=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["grad_output", "weights"])
def test_non_finite_inputs_show(bad: float, where: str) -> None:
    """As the plain kernel, NaN for NaN and infinity for infinity; the rest as without it."""
    zero, inputs = copied(TILED["detr-decoder"]), copied(TILED["detr-decoder"])
    for case, number in ((zero, 0.0), (inputs, bad)):
        getattr(case, where)[1, 3, 4 if where == "grad_output" else 1] = number
    plain, actual = backward(inputs)[0], tiled(inputs)
    finite = plain.isfinite()
    assert not finite.all()
    assert torch.equal(actual.isnan(), plain.isnan())
    assert torch.equal(actual[~finite].nan_to_num(), plain[~finite].nan_to_num())
    assert torch.equal(actual[finite], backward_tiled(zero)[finite])


FENCES = {
    "table-and-zeros": ("__syncthreads();", 0),
    "counts": ("__syncthreads();", 1),
    "list": ("__syncthreads();", 2),
    "queue": ("__syncwarp();", 0),
}


@pytest.mark.parametrize(("fence", "number"), FENCES.values(), ids=FENCES)
def test_a_missing_fence_shows(fence: str, number: int) -> None:
    """Two fences are not among these, since nothing shows without them in the emulator.

    At the second __syncwarp the lanes have met for the vote before it, and at the last __syncthreads the warps have
    come equally far.
    """
    inputs = problem(1, ((3, 5), (2, 2)), 1, 8, 600, 8)
    damaged = without(assemble("backward_value_tiled.cu"), fence, number)
    assert_fence_is_needed(  # under the sanitizers: it may read anywhere
        lambda seed: backward_tiled(inputs, source=damaged, seed=seed, sanitize=True),
        backward_tiled(inputs),
    )
