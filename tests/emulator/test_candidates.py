# SPDX-License-Identifier: Apache-2.0
"""Every candidate of a plan gives the bits that the model's gives."""

from __future__ import annotations

import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.plans import Choice
from tests.emulator import launches
from tests.problems import check_against_reference, random_inputs

SIZES = ((7, 9), (3, 5))
# Points inside and outside, queries that are the pixels; or fewer queries, so that the model splits rows.
ENCODER = random_inputs(SIZES, m=2, d=16, lq=78, p=4)
FEW = random_inputs(SIZES, m=2, d=16, lq=9, p=4)
HALF = random_inputs(SIZES, m=2, d=16, lq=78, p=4, dtypes=(torch.float16, torch.float32))


def chosen(candidate):
    return Choice(str(candidate), "test")


def forward_candidates(inputs, multiprocessors, grids=None):
    problem, _ = launches.checked(inputs)
    return plans.forward_candidates(problem, launches.device(multiprocessors), grids)


@pytest.mark.parametrize("inputs", [ENCODER, HALF], ids=["encoder", "half"])
def test_candidates_of_the_output(inputs):
    candidates = forward_candidates(inputs, 1)
    kernels = {candidate.kernel for candidate in candidates}
    assert kernels == {"plain", "persistent", "query tiles"}
    output, *others = (
        launches.forward(inputs, 1, grids=None, choice=chosen(candidate))
        for candidate in candidates
    )
    assert all(torch.equal(output, other) for other in others)


def test_another_split_k_of_the_output_is_no_candidate():
    """It adds in another order: a device that the rows do not fill has the model's alone, in two block sizes."""
    small, large = forward_candidates(FEW, 10)
    assert small.number == large.number > 1
    assert (small.threads, large.threads) == (64, 256)
    of_small, of_large = (launches.forward(FEW, 10, choice=chosen(c)) for c in (small, large))
    assert torch.equal(of_small, of_large)
    assert not torch.equal(of_small, launches.forward(FEW, 0))


# By whether the model bins: on a small device, and on one that the rows do not fill.
DEVICES = {"binned": 1, "plain": 10}


@pytest.mark.parametrize("multiprocessors", DEVICES.values(), ids=DEVICES.keys())
@pytest.mark.parametrize("inputs", [ENCODER, HALF], ids=["encoder", "half"])
def test_candidates_of_the_gradients(inputs, multiprocessors):
    """Those of points are bitwise identical; those of value, which atomics add up, keep within one error budget."""
    problem, _ = launches.checked(inputs)
    device, request = launches.device(multiprocessors), (True, True, False)
    candidates = plans.backward_candidates(problem, device, None, *request)
    assert {candidate.value for candidate in candidates} == {"", "binned", "tiled"}
    output, first = launches.forward(inputs), None
    for candidate in candidates:
        choice = chosen(candidate)
        gradients = launches.backward(
            inputs,
            multiprocessors,
            grids=None,
            max_points_tiled=plans.MAX_POINTS_TILED,
            choice=choice,
        )
        check_against_reference(inputs, output, gradients)
        first = first or gradients
        assert all(map(torch.equal, gradients[1:], first[1:]))


@pytest.mark.parametrize("tiled", [0, 2**31], ids=["fixed-point", "tiled"])
@pytest.mark.parametrize("multiprocessors", DEVICES.values(), ids=DEVICES.keys())
def test_deterministic_candidates(multiprocessors, tiled, monkeypatch):
    """All gradients are bitwise identical, those of value too."""
    monkeypatch.setattr(plans, "MAX_POINTS_TILED", tiled)
    problem, _ = launches.checked(ENCODER)
    device = launches.device(multiprocessors)
    candidates = plans.backward_candidates(problem, device, None, True, True, True)
    assert len(candidates) > 1
    first, *others = (
        launches.backward(
            ENCODER,
            multiprocessors,
            grids=None,
            deterministic=True,
            max_points_tiled=tiled,
            choice=chosen(candidate),
        )
        for candidate in candidates
    )
    for gradients in others:
        assert all(map(torch.equal, gradients, first))
