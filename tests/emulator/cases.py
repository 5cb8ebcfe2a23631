# SPDX-License-Identifier: Apache-2.0
"""Inputs, checks and parametrisations that several test files of the kernels share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.problem import LevelTable
from tests.emulator.emulator import EmulatorError
from tests.emulator.launches import PLAIN, Rules
from tests.problems import Inputs, ragged, random_inputs

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MANY = 10**6  # multiprocessors: split-K as far as it goes
SEEDS = (1, 2, 3)  # other orders of blocks and lanes
FOUR = ((9, 13), (6, 7), (3, 4), (2, 2))
THREE = ((8, 8), (4, 4), (2, 2))
FIVE = ((12, 14), *FOUR)


def problem(  # one line a case
    n: int,
    sizes: Sequence[tuple[int, int]],
    m: int,
    d: int,
    lq: int,
    p: int,
    dtypes: Sequence[torch.dtype] = (F32, F32),
    reach: float = 0.2,
) -> Inputs:
    """Random inputs of the given sizes."""
    return random_inputs(sizes, n=n, m=m, d=d, lq=lq, p=p, dtypes=dtypes, reach=reach)


# Shapes of real models that fill a GPU: levels and queries scaled down; N, M, D, L and P as they are.
MODELS = {
    "detr-encoder": problem(2, FOUR, 8, 32, 37, 4),
    "detr-encoder-f16": problem(1, FOUR, 8, 32, 70, 4, (F16, F32, F32)),
    "detr-encoder-bf16": problem(1, FOUR, 8, 32, 70, 4, (BF16, F32, F32)),
    "dino5-encoder": problem(1, FIVE, 8, 32, 35, 4),
    "mask2former-1024": problem(2, THREE[::-1], 8, 32, 33, 4),
    "mask2former-512": problem(4, THREE[::-1], 8, 32, 11, 4),
    "bevformer-sca": problem(6, FOUR, 8, 32, 9, 8),
    "bevformer-tsa": problem(2, ((11, 10),), 8, 32, 40, 4),
    "rfdetr": problem(2, ((9, 9),), 16, 16, 50, 2),
    "rfdetr-f16": problem(2, ((9, 9),), 16, 16, 50, 2, (F16, F16, F16)),
    "dfine-n-decoder": problem(1, THREE[:2], 8, 16, 21, 6),
    "msda-triton": problem(4, FOUR, 8, 32, 10, 4),
}


# The rest of what the specialised kernels are made for.
SPECIALISED = {
    "d8": problem(1, THREE, 3, 8, 75, 3),
    "d8-f16": problem(1, THREE, 3, 8, 75, 3, (F16, F32, F16)),
    "d64-bf16": problem(1, THREE, 2, 64, 19, 5, (BF16, BF16, BF16)),
    "d128": problem(1, THREE, 2, 128, 11, 4),
    "d256-f16": problem(1, ((5, 6),), 1, 256, 9, 4, (F16, F16, F32)),
    "one-point": problem(3, ((5, 6),), 1, 32, 5, 1),
    "one-pixel": problem(1, ((1, 1), (1, 7), (0, 4), (5, 1)), 2, 32, 12, 4, reach=1.0),
    "inside-only": problem(1, ((20, 20), (16, 18)), 2, 32, 24, 4, reach=-0.2),
    "inside-only-f16": problem(1, ((20, 20), (16, 18)), 2, 32, 24, 4, (F16, F32, F32), reach=-0.2),
}


# Shapes with few queries.
SPLIT_K = {
    "detr-decoder": problem(2, FOUR, 8, 32, 13, 4),
    "dino-decoder": problem(1, FOUR, 8, 32, 21, 4),
    "dino-decoder-f16": problem(1, FOUR, 8, 32, 13, 4, (F16, F32, F32)),
    "rtdetr-decoder": problem(2, THREE, 8, 32, 13, 4),
    "rtdetr-decoder-bf16": problem(1, THREE, 8, 32, 13, 4, (BF16, F32, BF16)),
    "dfine-decoder": ragged(problem(1, THREE, 8, 32, 13, 6), (3, 6, 3)),
    "d8-f16": problem(1, FOUR, 2, 8, 6, 8, (F16, F32, F32)),
}


GENERIC = {
    "d30": problem(2, THREE, 3, 30, 11, 3),
    "d71-f16": problem(1, THREE, 2, 71, 5, 4, (F16, F16, F32)),
    "d256": problem(1, THREE, 1, 256, 5, 4),
    "d1-bf16": problem(1, THREE, 2, 1, 9, 13, (BF16, F32, F32)),
    "float64": problem(2, FOUR, 4, 32, 9, 4, (F64, F64, F64)),
    "float64-mixed": problem(1, THREE, 2, 5, 9, 4, (F64, F32, F32)),
    "seventeen-levels": problem(1, ((3, 2),) * 17, 2, 8, 4, 3),
    "most-levels": problem(1, ((3, 2),) * 320, 2, 8, 1, 3),
}


def on(cases: dict[str, Inputs]) -> pytest.MarkDecorator:
    """Parametrise a test over named inputs."""
    return pytest.mark.parametrize("inputs", cases.values(), ids=cases.keys())


def copied(inputs: Inputs) -> Inputs:
    """A copy that a test may write into."""
    return Inputs(inputs.sizes, *(tensor.clone() for tensor in inputs[1:]))


def check_forward(inputs: Inputs, output: torch.Tensor, rules: Rules = PLAIN) -> None:
    """The output must stay within the error budget."""
    same, exact = (
        reference.forward(case.value, case.levels, case.locations, case.weights, **rules)
        for case in (inputs, inputs.to(torch.float64))
    )
    assert_within_budget(output, same, exact)


def check_backward(
    inputs: Inputs,
    gradients: Sequence[torch.Tensor | None],
    needs: Sequence[bool] = (True,) * 3,
    rules: Rules = PLAIN,
) -> None:
    """Each gradient that is needed must stay within the error budget, and the others be absent."""
    same, exact = (
        reference.backward(
            case.grad_output, case.value, case.levels, case.locations, case.weights, **rules
        )
        for case in (inputs, inputs.to(torch.float64))
    )
    for needed, *three in zip(needs, gradients, same, exact, strict=True):
        if needed:
            assert_within_budget(*three)
        else:
            assert three[0] is None


def check_value(inputs: Inputs, grad_value: torch.Tensor, rules: Rules = PLAIN) -> None:
    """The gradient of value must stay within the error budget."""
    check_backward(inputs, (grad_value, None, None), (True, False, False), rules)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaN equals NaN and 0 is not -0."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether they are bitwise identical."""
    return torch.equal(bits(actual), bits(expected))


def deterministic(run: Callable[..., torch.Tensor], inputs: Inputs, **options: Any) -> torch.Tensor:
    """The result of `run`, which must be bitwise identical in every order of blocks and lanes."""
    result = run(inputs, **options)
    for seed in SEEDS:
        assert same_bits(run(inputs, seed=seed, **options), result)
    return result


UNKNOWN = LevelTable(None, None)
TABLES = {"specialised": MODELS["msda-triton"], "generic": GENERIC["d30"]}
BY_STARTS = pytest.mark.parametrize("derived", [False, True], ids=["starts", "derived-starts"])
HUGE = 2**62
BAD_TABLES = {
    "too-tall": ((0, 0), HUGE),
    "negative-width": ((1, 1), -3),
    "past-the-end": ((1, 0), 10**6),
    "wraps-to-small": ((0, 0), 2**32 + 1),
}


def crowd(lq: int, m: int, d: int, p: int, dtype: torch.dtype = F32) -> Inputs:
    """Every point of every query in one cell, three eighths from the top, and all addends positive."""
    inputs = problem(1, ((4, 4),), m, d, lq, p, (dtype,) * 3)
    inputs.locations[:] = torch.tensor([0.5, 0.4375])
    inputs.grad_output.abs_()
    return inputs


CORNERS = [5, 6, 9, 10]  # positions of the crowd's cell


def without(source: str, fence: str, number: int) -> str:
    """The source without one of its fences."""
    parts = source.split(fence)
    assert len(parts) > number + 1
    return fence.join(parts[: number + 1]) + fence.join(parts[number + 1 :])


def assert_fence_is_needed(run: Callable[[int], torch.Tensor], good: torch.Tensor) -> None:
    """`run(seed)` lacks a fence: in some order of blocks and lanes it must go wrong."""
    for seed in range(8):
        try:
            if not same_bits(run(seed), good):
                return
        except EmulatorError:
            return
    pytest.fail("the fence is not needed")
