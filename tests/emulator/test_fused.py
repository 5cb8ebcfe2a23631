# SPDX-License-Identifier: Apache-2.0
"""The fused kernels: locations and weights from reference points, offsets and logits, and the way back."""

from __future__ import annotations

import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.plans import Choice
from tests.emulator.cases import F32, MANY, SEEDS, same_bits
from tests.emulator.fused import (
    CASES,
    Fused,
    backward,
    check_backward,
    check_forward,
    forward,
    fused,
)
from tests.emulator.launches import device

inf, nan = torch.inf, torch.nan
on_cases = pytest.mark.parametrize("inputs", CASES.values(), ids=CASES.keys())


@on_cases
def test_output(inputs: Fused) -> None:
    """Of plain and persistent kernels, which are bitwise identical."""
    problem, _ = inputs.problem
    candidates = plans.forward_candidates(problem, device(1), None)
    assert {candidate.kernel for candidate in candidates} == {"plain", "persistent"}
    names = [Choice(str(candidate), "test") for candidate in candidates]
    first, *others = (forward(inputs, grids=None, choice=name) for name in names)
    check_forward(inputs, first)
    assert all(same_bits(other, first) for other in others)


@on_cases
def test_gradients(inputs: Fused) -> None:
    """All at once, or that of value binned and the others, bitwise identical, by the persistent kernel."""
    problem, _ = inputs.problem
    candidates = plans.backward_candidates(problem, device(1), None, True, True, False)
    kinds = ("binned", "persistent"), ("", "plain")
    binned, plain = (next(c for c in candidates if (c.value, c.kernel) == kind) for kind in kinds)
    by_binned, by_plain = (
        backward(inputs, grids=None, choice=Choice(str(candidate), "test"))
        for candidate in (binned, plain)
    )
    check_backward(inputs, by_plain)
    check_backward(inputs, (by_binned[0], None, None, None))
    assert all(map(same_bits, by_binned[1:], by_plain[1:]))
