# SPDX-License-Identifier: Apache-2.0
"""Deterministic gradients of value by binned points: listed in order, accumulated in fixed point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cupy_msda.cuda.compile import assemble
from tests.emulator.cases import (
    SEEDS,
    UNKNOWN,
    assert_fence_is_needed,
    check_value,
    deterministic,
    same_bits,
)
from tests.emulator.encoders import ENCODERS, WALKS, placed
from tests.emulator.launches import backward_binned, backward_fixed_point
from tests.problems import Inputs

CASES = ("f32", "f16", "bf16", "several-images", "eight-points", "d8", "one-pixel-wide")


def binned(inputs: Inputs, **options: Any) -> torch.Tensor:
    """The gradient of value by binned points in fixed point."""
    return backward_binned(inputs, deterministic=True, **options)


def repeated(inputs: Inputs, **options: Any) -> torch.Tensor:
    """The gradient of value, which must be bitwise identical in every order of blocks and lanes."""
    return deterministic(binned, inputs, **options)


@pytest.mark.parametrize("case", CASES)
def test_any_order_of_blocks_and_lanes(case: str) -> None:
    check_value(ENCODERS[case], repeated(ENCODERS[case]))


@pytest.mark.parametrize("case", ["f32", "several-images"])
def test_without_the_numbering_bits_depend_on_the_order(case: str) -> None:
    """Otherwise the test above would show nothing, neither of the list nor of the additions to memory."""
    stable = "sort_points<FIXED>"
    source = assemble("backward_value_binned.cu")
    assert source.count(stable) == 1
    unstable = source.replace(stable, "sort_points<false>")
    for run, options in ((binned, {"source": unstable}), (backward_binned, {})):
        results = [run(ENCODERS[case], seed=seed, **options) for seed in (0, *SEEDS)]
        assert not all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("cells", WALKS.values(), ids=WALKS.keys())
def test_walks_in_fixed_point(cells: Sequence[tuple[float, float]]) -> None:
    inputs = placed(cells, [(8, 8)])
    check_value(inputs, repeated(inputs))


def test_a_crowd_of_one_sign_reaches_no_limit() -> None:
    """The largest gradients and weights of their binades, at a pixel's centre: no sum may wrap or pass for NaN."""
    inputs = placed([(3.0, 4.0)], [(8, 8)], lq=1023)
    largest = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)).item()
    inputs.grad_output.fill_(largest)
    inputs.weights.fill_(largest)
    exact = 1023 * 4 * largest**2
    grad_value = repeated(inputs)
    torch.testing.assert_close(
        grad_value[0, 4 * 8 + 3], torch.full((1, 32), exact), rtol=2**-11, atol=0
    )


@pytest.mark.parametrize("exponents", [(100, 100), (-100, 20), (120, -120)], ids=str)
def test_magnitudes_out_of_the_ordinary(exponents: tuple[int, int]) -> None:
    """Powers of two scale gradient and weights: the sums of any are those of ordinary ones, times both."""
    inputs = ENCODERS["several-images"]
    grad, weight = (2.0**e for e in exponents)
    scaled = inputs._replace(
        grad_output=inputs.grad_output * grad, weights=inputs.weights.mul(weight)
    )
    expected = binned(inputs).double() * grad * weight
    assert same_bits(binned(scaled), expected.float())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("where", ["grad_output", "weights"])
def test_non_finite_inputs_give_nan_at_their_own_pixels(where: str, bad: float) -> None:
    """As the direct backward in fixed point."""
    inputs = ENCODERS["several-images"]
    changed = getattr(inputs, where).clone()
    changed[1, 5, 1] = bad
    non_finite = inputs._replace(**{where: changed})
    expected = backward_fixed_point(non_finite)[0]
    actual = repeated(non_finite)
    assert not expected.isfinite().all()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert actual[~actual.isnan()].isfinite().all()


def test_a_table_on_the_device() -> None:
    inputs = ENCODERS["several-images"]
    unknown: dict[str, Any] = {"table": UNKNOWN, "tables": (inputs.shapes(), None)}
    assert same_bits(binned(inputs, **unknown), binned(inputs))


@pytest.mark.parametrize("case", ["several-images", "d16-two-points"])
def test_under_the_sanitizers(case: str) -> None:
    inputs = ENCODERS[case]
    check_value(inputs, binned(inputs, sanitize=True))


# The second __syncwarp of the numbering is not among them: the lanes meet at the match before anything is read.
FENCES = {
    "numbers-before-counts": ("+ before);\n    __syncwarp();", "+ before);"),
    "bins-before-numbers": ("__syncthreads();\n  if constexpr (STABLE)", "if constexpr (STABLE)"),
    "numbers-before-list": ("(shared);\n    __syncthreads();", "(shared);"),
}


@pytest.mark.parametrize(("fence", "none"), FENCES.values(), ids=FENCES.keys())
def test_a_missing_fence_shows(fence: str, none: str) -> None:
    source = assemble("backward_value_binned.cu")
    assert source.count(fence) == 1
    inputs = placed(WALKS["a-row-of-cells"], [(8, 8)])
    damaged = source.replace(fence, none)
    assert_fence_is_needed(
        lambda seed: binned(inputs, source=damaged, seed=seed, sanitize=True),
        binned(inputs),
    )
