# SPDX-License-Identifier: Apache-2.0
"""Gradients of value by sorted points that are the same in every run: listed in order, summed in fixed point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cupy_msda.cuda.compile import assemble
from cupy_msda.problem import LevelTable
from tests.emulator.emulator import EmulatorError
from tests.emulator.launches import backward_fixed, backward_sorted, backward_sorted_fixed
from tests.emulator.test_tile_scheduler import ENCODERS, WALKS, assert_value, placed
from tests.problems import Inputs

SEEDS = range(1, 4)
CASES = ("f32", "f16", "bf16", "several-images", "eight-points", "d8", "one-pixel-wide")


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they agree bit for bit, NaN with itself too."""
    whole = torch.int16 if actual.element_size() == 2 else torch.int32
    return torch.equal(actual.view(whole), expected.view(whole))


def reproduced(inputs: Inputs, **options: Any) -> torch.Tensor:
    """The gradient of value, which must be the same in every order of blocks and lanes."""
    result = backward_sorted_fixed(inputs, **options)
    for seed in SEEDS:
        assert same_bits(backward_sorted_fixed(inputs, seed=seed, **options), result)
    return result


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_in_any_order(case: str) -> None:
    assert_value(ENCODERS[case], reproduced(ENCODERS[case]))


@pytest.mark.parametrize("case", ["f32", "several-images"])
def test_without_the_numbers_bits_depend_on_the_order(case: str) -> None:
    """Else the test above would show nothing: neither of the list nor of the sums in memory."""
    stable = "sort_points<P, FIXED>"
    source = assemble("backward_value_binned.cu")
    assert source.count(stable) == 1
    unstable = source.replace(stable, "sort_points<P, false>")
    for run, options in ((backward_sorted_fixed, {"source": unstable}), (backward_sorted, {})):
        results = [run(ENCODERS[case], seed=seed, **options) for seed in (0, *SEEDS)]
        assert not all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize("cells", WALKS.values(), ids=WALKS.keys())
def test_walks_in_quanta(cells: Sequence[tuple[float, float]]) -> None:
    inputs = placed(cells, [(8, 8)])
    assert_value(inputs, reproduced(inputs))


def test_a_crowd_of_one_sign_reaches_no_limit() -> None:
    """The largest gradients and weights of their binades, at a pixel's centre: no sum may wrap or pass for NaN."""
    inputs = placed([(3.0, 4.0)], [(8, 8)], lq=1023)
    largest = torch.nextafter(torch.tensor(2.0), torch.tensor(0.0)).item()
    inputs.grad_output.fill_(largest)
    inputs.weights.fill_(largest)
    exact = 1023 * 4 * largest**2
    grad_value = reproduced(inputs)
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
    expected = backward_sorted_fixed(inputs).double() * grad * weight
    assert same_bits(backward_sorted_fixed(scaled), expected.float())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("where", ["grad_output", "weights"])
def test_what_is_not_finite_is_nan_at_its_own_pixels(where: str, bad: float) -> None:
    """As the sums of single points in fixed point."""
    inputs = ENCODERS["several-images"]
    changed = getattr(inputs, where).clone()
    changed[1, 5, 1] = bad
    broken = inputs._replace(**{where: changed})
    expected = backward_fixed(broken)[0]
    actual = reproduced(broken)
    assert not expected.isfinite().all()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert actual[~actual.isnan()].isfinite().all()


def test_a_table_on_the_device() -> None:
    inputs = ENCODERS["several-images"]
    unknown: dict[str, Any] = {"table": LevelTable(None, None), "tables": (inputs.shapes(), None)}
    assert same_bits(backward_sorted_fixed(inputs, **unknown), backward_sorted_fixed(inputs))


@pytest.mark.parametrize("case", ["several-images", "d16-two-points"])
def test_under_the_sanitizers(case: str) -> None:
    inputs = ENCODERS[case]
    assert_value(inputs, backward_sorted_fixed(inputs, sanitize=True))


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
    good = backward_sorted_fixed(inputs)
    options: dict[str, Any] = {"source": source.replace(fence, none), "sanitize": True}
    for seed in range(8):
        try:
            if not same_bits(backward_sorted_fixed(inputs, seed=seed, **options), good):
                return
        except EmulatorError:
            return
    pytest.fail("the fence is not needed")
