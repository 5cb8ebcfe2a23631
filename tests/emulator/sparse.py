# SPDX-License-Identifier: Apache-2.0
"""Arrays of terabytes of which few pages exist, and launches of which few blocks run."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from cupy_msda.cuda.compile import BLOCK, WARP, assemble
from cupy_msda.cuda.plans import Fill, Launch, Plan
from tests.emulator.emulator import Emulated
from tests.emulator.launches import memory

Array = np.ndarray[Any, Any]
Blocks = Sequence[tuple[int, int, int]]
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.13 has the name


def sparse(shape: Sequence[int], dtype: Any) -> Array:
    """Zeros, of which only the pages that are written take memory."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size == 0:
        return np.zeros(shape, dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype).reshape(shape)


def scattered(tensor: torch.Tensor, images: Sequence[int], batch: int) -> Array:
    """The images of a small array, at these numbers of one of `batch` images."""
    small = memory(tensor)
    assert small is not None
    huge = sparse((batch, *small.shape[1:]), small.dtype)
    huge[list(images)] = small
    return huge


def run(plan: Plan, arrays: dict[str, Any], blocks: Callable[[Launch], Blocks]) -> None:
    """Run some blocks of each launch, on arrays that are zero where they would be filled."""
    for step in plan.launches:
        if isinstance(step, Fill):
            assert arrays[step.array].nbytes == step.num_bytes
            continue
        kernel = Emulated(assemble(step.kernel.file), step.kernel.name)
        given = [None if name is None else arrays[name] for name in step.arguments]
        kernel(step.grid, step.block, [*given, step.params], blocks=blocks(step))


def in_one_pass(plan: Plan, kernel: str, rows: int) -> Plan:
    """The plan with a warp for each row in this kernel, which else takes them in turns."""
    x = -(-rows // (BLOCK // WARP))
    return plan._replace(
        launches=tuple(
            step._replace(grid=(x, *step.grid[1:])) if is_of(step, kernel) else step
            for step in plan.launches
        )
    )


def is_of(step: Launch | Fill, kernel: str) -> bool:
    """Whether a step launches the kernel."""
    return isinstance(step, Launch) and step.kernel.name.startswith(f"{kernel}<")


def of_image_heads(step: Launch, numbers: Sequence[int], xs: Sequence[int] | None = None) -> Blocks:
    """The blocks of these (image, head), at these x, by default all."""
    x, y, _ = step.grid
    return [(i, n % y, n // y) for n in numbers for i in (range(x) if xs is None else xs)]
