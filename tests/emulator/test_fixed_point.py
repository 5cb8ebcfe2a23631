# SPDX-License-Identifier: Apache-2.0
"""Gradients of value accumulated in fixed point: error, range, non-finite addends, and bits that depend on no order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.emulator.cases import (
    CORNERS,
    F32,
    F64,
    GENERIC,
    MANY,
    MODELS,
    SPECIALISED,
    SPLIT_K,
    THREE,
    check_backward,
    copied,
    crowd,
    on,
    problem,
    same_bits,
)
from tests.emulator.launches import (
    backward,
    backward_fixed_point,
)
from tests.problems import Inputs

FIXED = {
    "specialised": (MODELS["msda-triton"], 0),
    "half": (MODELS["rfdetr-f16"], 0),
    "split-k": (SPLIT_K["rtdetr-decoder"], MANY),
    "one-pixel": (SPECIALISED["one-pixel"], 0),
    "generic": (GENERIC["d30"], 0),
    "generic-bf16": (GENERIC["d1-bf16"], 0),
    "float64": (GENERIC["float64"], 0),
    "float64-mixed": (GENERIC["float64-mixed"], 0),
}


@pytest.mark.parametrize(("inputs", "multiprocessors"), FIXED.values(), ids=FIXED.keys())
def test_gradients(inputs: Inputs, multiprocessors: int) -> None:
    gradients = backward_fixed_point(inputs, multiprocessors)
    check_backward(inputs, gradients)
    plain = backward(inputs, multiprocessors)
    assert all(map(torch.equal, gradients[1:], plain[1:]))


@pytest.mark.parametrize("case", ["specialised", "half", "split-k", "generic", "float64"])
def test_any_order_of_blocks_and_lanes(case: str) -> None:
    """Bitwise identical, in orders that do change the direct sums."""
    fixed, plain = (
        [run(*FIXED[case], seed=seed)[0] for seed in range(4)]
        for run in (backward_fixed_point, backward)
    )
    assert all(same_bits(other, fixed[0]) for other in fixed[1:])
    assert not all(torch.equal(other, plain[0]) for other in plain[1:])


def cell_of_crowd(inputs: Inputs) -> torch.Tensor:
    """The sums at the cell's four corners, exact but for a rounding to float64."""
    grad = inputs.grad_output[0].numpy().astype(np.longdouble)  # Lq, M*D
    weights = inputs.weights[0].numpy().astype(np.longdouble).sum((-1, -2))  # Lq, M
    sums = (weights[..., None] * grad.reshape(*weights.shape, -1)).sum(0)  # M, D
    coefficients = np.array([0.375, 0.375, 0.125, 0.125])
    return torch.from_numpy(np.multiply.outer(coefficients, sums).astype(np.float64))


CROWDS = {
    "specialised": (1600, 2, 8, 4),
    "generic": (1600, 2, 5, 4),
    "float64": (1600, 2, 5, 4, F64),
}


CROWDED = pytest.mark.parametrize("size", CROWDS.values(), ids=CROWDS.keys())


@CROWDED
def test_many_addends_of_one_sign(size: tuple[Any, ...]) -> None:
    """Thousands of addends to one cell: nearer to the exact sums than additions in floating point come."""
    inputs = crowd(*size)
    exact = cell_of_crowd(inputs)
    errors = [
        float((run(inputs)[0][0, CORNERS].double() - exact).abs().max() / exact.max())
        for run in (backward_fixed_point, backward)
    ]
    print("largest error, of the largest sum: {:.2g}, in floating point {:.2g}".format(*errors))
    assert errors[0] <= torch.finfo(inputs.value.dtype).eps
    assert errors[0] < errors[1]


def all_largest(lq: int, d: int, p: int, dtype: torch.dtype) -> Inputs:
    """Every addend as large as any may be for its unit, and all to the same position."""
    inputs = problem(1, ((2, 2),), 1, d, lq, p, (dtype,) * 3)
    inputs.locations[:] = 0.25  # the middle of the top-left pixel
    below_two = 2 - torch.finfo(dtype).eps
    inputs.weights.fill_(below_two)
    inputs.grad_output.fill_(below_two)
    return inputs


@pytest.mark.parametrize(
    ("lq", "d", "dtype"), [(2**12 - 4, 8, F32), (2**8 - 1, 1, F32), (2**8 - 1, 1, F64)], ids=str
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_of_the_most_addends_does_not_wrap(
    lq: int, d: int, dtype: torch.dtype, sign: int
) -> None:
    """In the first case with the most addends of their unit, so that a unit of half the size would overflow."""
    inputs = all_largest(lq, d, 2**8, dtype)
    inputs.grad_output.mul_(sign)
    total = backward_fixed_point(inputs)[0][0, :, 0]
    exact = sign * lq * 2**8 * inputs.weights[0, 0, 0, 0, 0].double() ** 2
    assert ((total[0].double() / exact - 1).abs() <= torch.finfo(dtype).eps).all()
    assert not total[1:].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_no_number_of_addends_hides_a_non_finite_one(sign: int) -> None:
    inputs = all_largest(2**12 - 1, 8, 2**8, F32)
    inputs.grad_output.mul_(sign)
    inputs.grad_output[0, 1000] = torch.inf
    for seed in range(3):
        assert backward_fixed_point(inputs, seed=seed)[0][0, 0].isnan().all()


def powers(inputs: Inputs) -> Inputs:
    """The same with gradients and weights between a half and two, so that they can be scaled far."""
    inputs = copied(inputs)
    inputs.grad_output.copy_(inputs.grad_output.sign() * (0.5 + inputs.grad_output.abs() % 1.5))
    inputs.weights.add_(0.5)
    return inputs


SMALL = {
    "specialised": powers(problem(2, THREE, 3, 8, 13, 3)),
    "generic": powers(problem(2, THREE, 3, 5, 13, 3)),
    "float64": powers(problem(2, THREE, 3, 5, 13, 3, (F64,) * 3)),
}


# Exponents for gradients and for weights, in eighths of the largest.
EXTREMES = [(8, 8), (8, -7), (-7, 8), (-7, -7), (4, 4), (-4, -4), (-3, -4), (7, -7), (0, 8), (8, 0)]


@on(SMALL)
@pytest.mark.parametrize("eighths", EXTREMES, ids=str)
def test_any_magnitude_of_gradients_and_weights(inputs: Inputs, eighths: tuple[int, int]) -> None:
    """Powers of two before the sums are powers of two after them, up to infinity and down to zero."""
    expected = backward_fixed_point(inputs)[0].double()
    largest = 127 if inputs.value.dtype is F32 else 1023
    by_grad, by_weights = (largest * n // 8 - (n == 8) for n in eighths)
    inputs = copied(inputs)
    inputs.grad_output.ldexp_(torch.tensor(by_grad))
    inputs.weights.ldexp_(torch.tensor(by_weights))
    actual = backward_fixed_point(inputs)[0]
    with np.errstate(over="ignore"):
        scaled = np.ldexp(expected.numpy(), by_grad + by_weights)
    assert torch.equal(actual, torch.from_numpy(scaled).to(actual.dtype))


@on(SMALL)
def test_without_the_gradients_of_points(inputs: Inputs) -> None:
    by_value, *none = backward_fixed_point(inputs, needs_points=False)
    assert none == [None, None]
    assert torch.equal(by_value, backward_fixed_point(inputs)[0])


@on(SMALL)
def test_sums_of_zeros_are_zeros(inputs: Inputs) -> None:
    for name in ("grad_output", "weights"):
        zeros = copied(inputs)
        getattr(zeros, name).zero_()
        assert not backward_fixed_point(zeros)[0].any()


@on(SMALL)
def test_a_loud_head_costs_the_others_nothing(inputs: Inputs) -> None:
    n, _, m, d = inputs.value.shape
    loud = copied(inputs)
    loud.grad_output.view(n, -1, m, d)[1, :, 1] *= 2.0**100
    actual, expected = (backward_fixed_point(case)[0] for case in (loud, inputs))
    expected[1, :, 1] *= 2.0**100
    assert torch.equal(actual, expected)


@on(SMALL)
def test_points_outside_do_not_decide_the_unit(inputs: Inputs) -> None:
    """Whatever their weights, which may be anything where a point does not exist."""
    zeros, huge = copied(inputs), copied(inputs)
    for case, weight in ((zeros, 0.0), (huge, 1e38)):
        case.locations[:, ::2, :, 1] = -2
        case.weights[:, ::2, :, 1] = weight
    huge.weights[:, ::4, :, 1] = torch.nan
    assert torch.equal(backward_fixed_point(huge)[0], backward_fixed_point(zeros)[0])


@on(SMALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["grad_output", "weights"])
def test_non_finite_inputs_show(inputs: Inputs, bad: float, where: str) -> None:
    """NaN where an addend is non-finite, which is where the direct sums are; the rest as without it."""
    zero, inputs = copied(inputs), copied(inputs)
    for case, number in ((zero, 0.0), (inputs, bad)):
        getattr(case, where)[1, 3, 4 if where == "grad_output" else 1] = number
    plain, *of_points = backward(inputs)
    actual = backward_fixed_point(inputs)
    finite = plain.isfinite()
    assert finite.any()
    assert not finite.all()
    assert torch.equal(actual[0].isnan(), ~finite)
    assert torch.equal(actual[0][finite], backward_fixed_point(zero)[0][finite])
    for got, expected in zip(actual[1:], of_points, strict=True):
        assert same_bits(got, expected)
    for seed in (1, 2):
        assert same_bits(backward_fixed_point(inputs, seed=seed)[0], actual[0])


@on(SMALL)
def test_under_the_sanitizers(inputs: Inputs) -> None:
    """The accumulator has exactly its size; non-finite numbers are converted nowhere."""
    inputs = copied(inputs)
    inputs.locations.view(-1)[::17] = torch.nan
    check_backward(inputs, backward_fixed_point(inputs, sanitize=True))
    inputs.grad_output[0, 1, 2] = torch.nan
    inputs.weights[0, 2] = torch.inf
    assert backward_fixed_point(inputs, sanitize=True)[0].isnan().any()
