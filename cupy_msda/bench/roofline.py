# SPDX-License-Identifier: Apache-2.0
"""The roofline bound: the least time of a case, from its bytes, its arithmetic and the device's rates.

The bound is the longest of its terms, since at best all overlap. It leaves out coordinates and addresses, and it need
not be attainable. On a GPU caches are cold, as when timed; on a CPU an array is in the nearest cache that holds it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cupy_msda.bench.cases import Inputs
from cupy_msda.bench.constants import Constants


class Work(NamedTuple):
    """Counts for one case, the same in the forward and the backward."""

    corners: (
        int  # D-vectors read: for each point, the corners of its cell that lie inside the level
    )
    rows: int  # distinct D-vectors among them


class Bound(NamedTuple):
    """Milliseconds by term; `unshared` terms bound only kernels that share nothing between points."""

    terms: dict[str, float]
    unshared: dict[str, float]

    @property
    def milliseconds(self) -> float:
        """The longest term."""
        return max(self.terms.values())


def count(inputs: Inputs) -> Work:
    """Count corners and rows, level by level."""
    n, s, m, _ = inputs.value.shape
    device = inputs.value.device
    touched = torch.zeros(n * s * m, dtype=torch.bool, device=device)
    first = torch.arange(n, device=device).view(n, 1, 1, 1) * s
    head = torch.arange(m, device=device).view(1, 1, m, 1)
    corners = 0
    for index, (height, width, start) in enumerate(inputs.levels):
        left = torch.floor(inputs.locations[:, :, :, index, :, 0] * width - 0.5).long()
        top = torch.floor(inputs.locations[:, :, :, index, :, 1] * height - 0.5).long()
        for x, y in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
            counts = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            corners += int(counts.sum())
            touched[((first + start + y * width + x) * m + head)[counts]] = True
    return Work(corners, int(touched.sum()))


def bound(way: str, inputs: Inputs, work: Work, constants: Constants) -> Bound:
    """The roofline bound of "forward" or "backward".

    Terms: `memory`, every array moved once, value only in the rows that are needed; `arithmetic`, one multiply-add for
    each channel of each corner, two in the backward; on a GPU also `gather`, every corner read from the L1 cache, and
    `launch`, an empty kernel. Unshared terms: every corner read from the L2 cache, and in the backward every corner's
    addend to the gradient of value added to memory separately, in float32.
    """
    channels = inputs.value.shape[3]
    row = channels * inputs.value.element_size()
    points = _size(inputs.locations) + _size(inputs.weights)
    bytes_moved = work.rows * row + points + _size(inputs.grad_output)
    if way == "backward":
        bytes_moved += _size(inputs.value) + points
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
    return Bound(_milliseconds(seconds), _milliseconds(unshared))


def copy_rate(constants: Constants, reach: int) -> float:
    """The rate of the largest measured copy of at most `reach` bytes, or else of the smallest copy."""
    rates = [rate for size, rate in constants.copy if size <= reach]
    return rates[-1] if rates else constants.copy[0][1]


def _size(tensor: Tensor) -> int:
    """Bytes."""
    return tensor.numel() * tensor.element_size()


def _milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds to milliseconds."""
    return {name: 1e3 * each for name, each in seconds.items()}
