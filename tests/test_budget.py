# SPDX-License-Identifier: Apache-2.0
"""The error budget: what it lets pass and what it finds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cupy_msda import budget

RNG = np.random.default_rng(0)
EXACT = RNG.standard_normal(10_000)
REFERENCE = EXACT.astype(np.float32)  # off by half a unit of rounding at most
EPSILON = np.finfo(np.float32).eps


def changed(index, number):
    """The reference with one element replaced."""
    result = REFERENCE.copy()
    result[index] = number
    return result


def test_the_reference_itself_is_right():
    assert 0 < budget.used(REFERENCE, REFERENCE, EXACT) <= 0.5
    budget.assert_within_budget(REFERENCE, REFERENCE, EXACT)


def test_one_wrong_element_is_found():
    wrong = changed(7, REFERENCE[7] + 10 * EPSILON * np.abs(EXACT).max())
    difference = wrong - EXACT
    root_mean_square = np.sqrt((difference**2).mean() / (EXACT**2).mean())
    assert root_mean_square < 2 * EPSILON  # too little for this norm to find it
    assert budget.used(wrong, REFERENCE, EXACT) > 1
    with pytest.raises(AssertionError, match="times its budget"):
        budget.assert_within_budget(wrong, REFERENCE, EXACT)


def test_a_loss_of_accuracy_in_all_elements_is_found():
    worse = (EXACT + 5 * EPSILON * RNG.choice([-1, 1], EXACT.size)).astype(np.float32)
    assert (
        np.abs(worse - EXACT).max() < 4 * EPSILON * np.abs(EXACT).max()
    )  # largest magnitude: right
    assert budget.used(worse, REFERENCE, EXACT) > 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_elements_of_16_bits_cannot_hold_anything(dtype):
    """The whole array's band lets 4% of its largest element pass in bfloat16, and half a percent in float16."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    exact = torch.from_numpy(EXACT.reshape(-1, 20).copy())
    exact[7] *= 1e-3
    same = exact.to(getattr(torch, dtype))
    budget.assert_within_budget(same, same, exact)
    for row in (torch.zeros(20), -same[7], 1.1 * same[7]):
        wrong = same.clone()
        wrong[7] = row
        assert budget.used(wrong, same, exact) <= 1
        assert budget.used_by_rows(wrong, same, exact) > 1
        with pytest.raises(AssertionError, match="times its budget"):
            budget.assert_within_budget(wrong, same, exact)


def test_sums_that_cancel_in_a_row_have_the_accuracy_of_their_terms():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    exact = torch.from_numpy(EXACT.reshape(-1, 20).copy())
    exact[7] *= 1e-6
    same = exact.to(torch.bfloat16)
    other = same.clone()
    other[7] += 4 * EPSILON  # of float32, in which terms of the size of other rows are summed
    budget.assert_within_budget(other, same, exact)


def test_zeros_must_be_met_exactly():
    zeros = np.zeros(3)
    assert budget.used(zeros.astype(np.float32), zeros.astype(np.float32), zeros) == 0
    assert budget.used(np.full(3, 1e-30, np.float32), zeros.astype(np.float32), zeros) == math.inf


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_must_be_where_the_reference_has_it(number):
    same, exact = changed(3, number), EXACT.copy()
    exact[3] = number
    assert budget.used(same, same, exact) <= 1
    for wrong in (REFERENCE, changed(4, number), -same if np.isinf(number) else REFERENCE):
        assert budget.used(wrong, same, exact) == math.inf
    assert budget.used(same, REFERENCE, EXACT) == math.inf


def test_overflow_of_half_precision_is_that_of_the_reference():
    exact = np.array([1e6, 1.0])
    with np.errstate(over="ignore"):
        same = exact.astype(np.float16)
    assert np.isinf(same[0])
    assert budget.used(same, same, exact) == 0


def test_squares_of_huge_and_tiny_numbers_are_not_needed():
    for scale in (1e200, 1e-200):
        exact = EXACT * scale
        assert budget.used(exact, exact, exact) == 0
        assert budget.used(exact * (1 + 1e-9), exact, exact) > 1


def test_shapes_must_be_the_same():
    assert budget.used(REFERENCE[:1], REFERENCE, EXACT) == math.inf
    with pytest.raises(AssertionError):
        budget.assert_within_budget(REFERENCE.astype(np.float64), REFERENCE, EXACT)


def test_arrays_of_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    exact = torch.from_numpy(EXACT)
    same = exact.to(torch.bfloat16)
    assert budget.used(same, same, exact) <= 0.5
    assert budget.used(same * 1.05, same, exact) > 1


def test_relative_error():
    assert budget.relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    assert budget.relative_error(np.array([np.nan, 4.0]), np.array([3.0, 4.0])) == math.inf
    assert budget.relative_error(np.zeros(2), np.zeros(2)) == 0
