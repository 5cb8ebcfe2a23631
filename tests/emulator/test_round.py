# SPDX-License-Identifier: Apache-2.0
"""msda_round, which rounds a float32 accumulator into a 16-bit gradient of value, against torch's cast."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cupy_msda.cuda.compile import BLOCK, assemble
from cupy_msda.problem import Problem
from tests.emulator.cases import same_bits
from tests.emulator.emulator import Emulated

DTYPES = {"half_t": torch.float16, "bfloat16_t": torch.bfloat16}
on_dtypes = pytest.mark.parametrize("name", DTYPES)


def rounded(
    name: str,
    accumulator: torch.Tensor,
    shape: tuple[int, int, int, int],
    blocks: int = 2,
    sanitize: bool = False,
) -> torch.Tensor:
    """The accumulator of a value of `shape` (N, S, M, D), rounded by the kernel."""
    sizes = Problem(*shape, 0, 0, 0, "", "", "")._asdict()
    params = np.zeros((), [(field, "i4") for field in Problem._fields[:7]])
    for field in params.dtype.names or ():
        params[field] = sizes[field]
    bits = np.full(accumulator.numel(), -1, np.int16)
    kernel = Emulated(assemble("round.cu"), f"msda_round<{name}>", sanitize=sanitize)
    kernel((blocks, 1, 1), (BLOCK, 1, 1), [accumulator.numpy(), bits, params])
    return torch.from_numpy(bits).view(DTYPES[name])


def assert_as_torch(actual: torch.Tensor, accumulator: torch.Tensor) -> None:
    """Every element has the bits of torch's cast; NaN may be any NaN."""
    expected = accumulator.to(actual.dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert same_bits(
        actual.nan_to_num(0.0, torch.inf, -torch.inf),
        expected.nan_to_num(0.0, torch.inf, -torch.inf),
    )


# The last has more elements than a grid of two blocks takes in one step.
SHAPES = [(1, 1, 1, 1), (1, 3, 1, 1), (2, 1, 3, 1), (1, 1, 1, 4), (2, 5, 3, 7), (3, 29, 7, 31)]


@on_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("blocks", [1, 2, 30])
def test_any_number_of_elements(name: str, shape: tuple[int, int, int, int], blocks: int) -> None:
    accumulator = torch.randn(int(np.prod(shape)))
    assert_as_torch(rounded(name, accumulator, shape, blocks), accumulator)


@on_dtypes
def test_ties_infinities_nan_and_subnormals(name: str) -> None:
    """Every 16-bit number, the middle to the next one, and the float32 numbers next to that middle."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(DTYPES[name])
    wide = every.float()
    middle = ((wide.double() + wide.roll(-1).double()) / 2).float()
    above = torch.nextafter(middle, torch.tensor(torch.inf))
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 65520.0, 3.4e38, 1e-45, -0.0])
    accumulator = torch.cat([wide, middle, above, below, special])
    assert_as_torch(rounded(name, accumulator, (1, accumulator.numel(), 1, 1), 32), accumulator)


@on_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 1), (2, 5, 3, 7)], ids=str)
def test_no_access_outside_the_arrays(name: str, shape: tuple[int, int, int, int]) -> None:
    accumulator = torch.randn(int(np.prod(shape)))
    assert_as_torch(rounded(name, accumulator, shape, sanitize=True), accumulator)


@on_dtypes
def test_nothing_to_round(name: str) -> None:
    assert rounded(name, torch.zeros(0), (2, 0, 3, 8)).numel() == 0
