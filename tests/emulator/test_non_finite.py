# SPDX-License-Identifier: Apache-2.0
"""Infinities and NaN come out of the kernels where they come out of the equations."""

from __future__ import annotations

import pytest
import torch

from tests.emulator.cases import F16, F32, F64, MANY, check_backward, check_forward, check_value, on
from tests.emulator.launches import (
    backward,
    backward_binned,
    backward_fixed_point,
    backward_tiled,
    forward,
)
from tests.non_finite import INTERIOR, POSITIONS, non_finite_inputs
from tests.problems import Inputs, random_inputs

MIXED = non_finite_inputs()
CASES = {
    "specialised": (MIXED, 0),
    "split-k": (MIXED, MANY),
    "interior": (non_finite_inputs(positions=INTERIOR), 0),
    "generic": (non_finite_inputs(6), 0),
    "float16": (non_finite_inputs(16, (F16, F32)), 0),
    "float64": (non_finite_inputs(6, (F64, F64)), 0),
}


@pytest.mark.parametrize(("inputs", "multiprocessors"), CASES.values(), ids=CASES.keys())
def test_non_finite_inputs(inputs: Inputs, multiprocessors: int) -> None:
    check_forward(inputs, forward(inputs, multiprocessors))
    check_backward(inputs, backward(inputs, multiprocessors))


def test_non_finite_inputs_in_persistent_kernels() -> None:
    grids = ((1, len(POSITIONS)),)
    check_forward(MIXED, forward(MIXED, 1, grids=grids))
    gradients = backward(MIXED, 1, needs=(False, True), grids=grids)
    check_backward(MIXED, gradients, (False, True, True))


@pytest.mark.parametrize("run", [backward_tiled, backward_binned])
def test_non_finite_inputs_in_gradients_of_value(run) -> None:
    check_value(MIXED, run(MIXED))


@on({"specialised": MIXED, "generic": CASES["generic"][0]})
def test_fixed_point_has_nan_where_the_equations_are_not_finite(inputs: Inputs) -> None:
    plain = backward(inputs)[0]
    assert torch.equal(backward_fixed_point(inputs)[0].isnan(), ~plain.isfinite())


@pytest.mark.parametrize("d", [32, 30], ids=["specialised", "generic"])
def test_an_infinite_weight_gives_infinity(d: int) -> None:
    inputs = random_inputs(((2, 2),), n=1, m=1, d=d, lq=1, p=1)
    inputs.value[:], inputs.locations[:], inputs.weights[:] = 1, 0.4, torch.inf
    assert (forward(inputs) == torch.inf).all()
