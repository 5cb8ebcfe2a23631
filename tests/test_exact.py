# SPDX-License-Identifier: Apache-2.0
"""The double-double operator that float64 results are judged against, itself against fractions."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from math import floor

import numpy as np
import pytest
import torch

from cupy_msda import reference
from cupy_msda.bench.cases import consecutive
from cupy_msda.problem import Level
from tests import exact
from tests.problems import (
    away_from_edges,
    by_reference,
    check_against_reference,
    exactly,
    random_inputs,
)

NAN, INF = float("nan"), float("inf")
F64 = (torch.float64, torch.float64)
MIXED = (torch.float64, torch.float32)


def fractions(array):
    """The elements as exact fractions, in an array of the same shape."""
    return np.vectorize(Fraction, otypes=[object])(np.asarray(array, np.float64))


def zeros(shape):
    """Exact zeros."""
    return np.full(shape, Fraction(0), object)


def in_fractions(value, levels, locations, weights, grad_output):
    """The output and the three gradients, point by point and corner by corner, without rounding."""
    value, locations, weights, grad = map(fractions, (value, locations, weights, grad_output))
    n, _, m, d = value.shape
    lq, p = locations.shape[1], locations.shape[4]
    grad = grad.reshape(n, lq, m, d)
    output, by_value, by_locations, by_weights = map(
        zeros, (grad.shape, value.shape, locations.shape, weights.shape)
    )
    for i, q, h, k, j in product(range(n), range(lq), range(m), range(len(levels)), range(p)):
        height, width, start = levels[k]
        at = i, q, h, k, j
        x, y = (locations[at] * np.array([width, height], object)) - Fraction(1, 2)
        for row, column in product((floor(y), floor(y) + 1), (floor(x), floor(x) + 1)):
            if not (0 <= row < height and 0 <= column < width):
                continue
            pixel = i, start + row * width + column, h
            of_x, of_y = 1 - abs(x - column), 1 - abs(y - row)
            dot = (value[pixel] * grad[i, q, h]).sum()
            output[i, q, h] += weights[at] * of_x * of_y * value[pixel]
            by_value[pixel] += weights[at] * of_x * of_y * grad[i, q, h]
            by_weights[at] += of_x * of_y * dot
            by_locations[at][0] += width * weights[at] * of_y * dot * (1 if column > x else -1)
            by_locations[at][1] += height * weights[at] * of_x * dot * (1 if row > y else -1)
    results = output.reshape(n, lq, m * d), by_value, by_locations, by_weights
    return [result.astype(np.float64) for result in results]


def in_double_double(value, levels, locations, weights, grad_output):
    """The same by the oracle."""
    points = levels, locations, weights
    return exact.forward(value, *points), *exact.backward(grad_output, value, *points)


@pytest.mark.parametrize("dtypes", [F64, MIXED], ids=str)
def test_every_bit_is_that_of_fractions(dtypes):
    inputs = random_inputs(n=2, m=2, d=3, lq=4, p=2, dtypes=dtypes)
    inputs = inputs._replace(value=torch.randn_like(inputs.value))  # all 53 bits
    value, *rest = (tensor.numpy() for tensor in inputs[1:])
    arguments = value, consecutive(inputs.sizes), *rest
    for got, wanted in zip(in_double_double(*arguments), in_fractions(*arguments), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_sums_that_all_but_cancel():
    rng = np.random.default_rng(0)
    levels = [Level(2, 2, 0)]
    locations = rng.uniform(0.3, 0.7, (1, 40, 1, 1, 2, 2))
    weights = rng.uniform(0.5, 1, (1, 40, 1, 1, 2))
    locations[..., 1, :], weights[..., 1] = locations[..., 0, :], -weights[..., 0] * (1 + 2.0**-50)
    value, grad_output = rng.standard_normal((1, 4, 1, 8)), rng.standard_normal((1, 40, 8))
    arguments = value, levels, locations, weights, grad_output
    wanted = in_fractions(*arguments)
    for got, true in zip(in_double_double(*arguments), wanted, strict=True):
        np.testing.assert_allclose(got, true, rtol=2.0**-52, atol=2.0**-80)
    for cancelled in wanted[:2]:
        assert 0 < np.abs(cancelled).max() < 2.0**-46
    plain = reference.backward(grad_output, value, levels, locations, weights)[0]
    assert np.abs(plain - wanted[1]).max() > 0.01 * np.abs(wanted[1]).max()


SHAPES = {
    "levels": ([(5, 7), (3, 4), (1, 1)], {}),
    "crowded": ([(3, 2)], {"lq": 200, "p": 4, "d": 32}),
    "large": ([(90, 110)], {"n": 1, "lq": 300, "d": 32}),
}


@pytest.mark.parametrize("dtypes", [F64, MIXED], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_float64_reference_is_within_its_budget_but_not_exact(name, dtypes):
    sizes, numbers = SHAPES[name]
    inputs = random_inputs(sizes, dtypes=dtypes, **numbers)
    output, *gradients = by_reference(inputs)
    check_against_reference(inputs, output, gradients)
    true = exactly(inputs)
    assert not all(map(torch.equal, (output, *gradients), true))
    for got, wanted in zip((output, *gradients), true, strict=True):
        eps = torch.finfo(got.dtype).eps
        assert (got - wanted).abs().max() <= 1000 * eps * wanted.abs().max()


@pytest.mark.parametrize("index", range(4))
def test_a_float64_result_with_errors_of_float32_coordinates_fails(index):
    inputs = away_from_edges(random_inputs(d=16))
    rounded = inputs._replace(locations=inputs.locations.float().double())
    results = list(by_reference(inputs))
    results[index] = by_reference(rounded)[index]
    with pytest.raises(AssertionError, match="times its budget"):
        check_against_reference(inputs, results[0], results[1:])


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
def test_points_that_are_nowhere_count_for_nothing(bad):
    inputs = random_inputs(lq=30, dtypes=F64)
    inputs.locations[torch.rand(inputs.locations.shape) < 0.2] = bad
    output, *gradients = by_reference(inputs)
    check_against_reference(inputs, output, gradients)
    inputs.locations.fill_(bad)
    assert not any(result.any() for result in exactly(inputs))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["value", "weights", "grad_output"])
def test_what_is_not_finite_is_where_the_reference_has_it(name, bad):
    inputs = random_inputs(dtypes=F64)
    getattr(inputs, name).flatten()[::37] = bad
    for got, wanted in zip(exactly(inputs), by_reference(inputs), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("size", ["n", "lq", "m", "d", "p", "s", "l"])
def test_empty_sizes(size):
    sizes = {"s": [(0, 3), (2, 0)], "l": []}.get(size, [(2, 3), (1, 1)])
    extents = {} if size in "sl" else {size: 0}
    inputs = random_inputs(sizes, s=7 if size == "l" else None, dtypes=F64, **extents)
    for result, like in zip(exactly(inputs), by_reference(inputs), strict=True):
        assert result.shape == like.shape
        assert not result.any()
