# SPDX-License-Identifier: Apache-2.0
"""The least time that a case can take on a device, from what must be moved and computed and the device's rates.

A floor is the longest of its terms, since at best all overlap. It leaves out coordinates and addresses, and nothing
says that it can be reached. On a GPU caches are cold, as they are when timed; on a CPU what was used is in the nearest
cache that holds it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cupy_msda.bench.cases import Problem
from cupy_msda.bench.constants import Constants


class Work(NamedTuple):
    """What both ways have to do."""

    corners: int  # D-vectors that are read: of each point, the corners of its cell inside the level
    rows: int  # different D-vectors among them


class Floor(NamedTuple):
    """Milliseconds by term, and two that bind only kernels that share nothing between points."""

    terms: dict[str, float]
    unshared: dict[str, float]

    @property
    def milliseconds(self) -> float:
        """The longest term."""
        return max(self.terms.values())


def count(problem: Problem) -> Work:
    """Count corners and rows, level by level."""
    n, s, m, _ = problem.value.shape
    device = problem.value.device
    touched = torch.zeros(n * s * m, dtype=torch.bool, device=device)
    first = torch.arange(n, device=device).view(n, 1, 1, 1) * s
    head = torch.arange(m, device=device).view(1, 1, m, 1)
    corners = 0
    for index, (height, width, start) in enumerate(problem.levels):
        left = torch.floor(problem.locations[:, :, :, index, :, 0] * width - 0.5).long()
        top = torch.floor(problem.locations[:, :, :, index, :, 1] * height - 0.5).long()
        for x, y in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            counts = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            corners += int(counts.sum())
            touched[((first + start + y * width + x) * m + head)[counts]] = True
    return Work(corners, int(touched.sum()))


def floor(way: str, problem: Problem, work: Work, constants: Constants) -> Floor:
    """The floor of "forward" or "backward".

    Terms: `memory`, every array moved once and of value only the rows that are needed; `arithmetic`, a multiply-add
    for each channel of each corner, two in the backward; on a GPU also `gather`, every corner read from the L1 cache,
    and `launch`, an empty kernel. Unshared: all corners from the L2 cache instead, and in the backward each corner's
    share of the gradient of value added to memory on its own, in float32.
    """
    channels = problem.value.shape[3]
    row = channels * problem.value.element_size()
    points = _size(problem.locations) + _size(problem.weights)
    bytes_moved = work.rows * row + points + _size(problem.grad_output)
    if way == "backward":
        bytes_moved += _size(problem.value) + points
    passes = 2 if way == "backward" else 1
    seconds = {
        "memory": bytes_moved / copy_rate(constants, bytes_moved),
        "arithmetic": passes * work.corners * channels / constants.multiply_adds,
    }
    unshared = {}
    if constants.gather and constants.gather_l2 and constants.scatter and constants.launch:
        seconds |= {"gather": work.corners * row / constants.gather, "launch": constants.launch}
        unshared["gather from L2"] = work.corners * row / constants.gather_l2
        if way == "backward":
            unshared["scatter"] = work.corners * channels * 4 / constants.scatter
    return Floor(_milliseconds(seconds), _milliseconds(unshared))


def copy_rate(constants: Constants, reach: int) -> float:
    """That of the largest copy that was measured and reaches no further, or of the smallest."""
    rates = [rate for size, rate in constants.copy if size <= reach]
    return rates[-1] if rates else constants.copy[0][1]


def _size(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    """The same in milliseconds."""
    return {name: 1e3 * each for name, each in seconds.items()}
