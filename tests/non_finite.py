# SPDX-License-Identifier: Apache-2.0
"""One problem with infinities and NaN in every input, each at points inside, at borders, at corners and on pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cupy_msda.bench.cases import Inputs
from tests.problems import random_inputs

inf, nan = torch.inf, torch.nan
SIDE = 8  # of the first level: coordinates in sixteenths of a pixel are exact in every dtype

INTERIOR = {
    "inside": (2.25, 3.5),
    "inside-too": (5.75, 1.125),
    "on-a-column": (3, 4.25),
    "on-a-row": (4.75, 2),
    "on-a-pixel": (5, 5),
}
BORDERS = {
    "left": (-0.5, 3.25),
    "right": (7.25, 4.5),
    "above": (2.5, -0.25),
    "below": (2.75, 7.5),
    "top-left": (-0.5, -0.75),
    "top-right": (7.5, -0.25),
    "bottom-left": (-0.25, 7.125),
    "bottom-right": (7.5, 7.75),
    "first-pixel": (0, 0),
    "last-pixel": (7, 7),
    "last-column": (7, 2.5),
    "excluded": (-1, 3.5),
    "outside": (12, 3.5),
}
POSITIONS = INTERIOR | BORDERS


def _weights(bad: float) -> Callable[[Inputs, int], None]:
    def damage(inputs: Inputs, image: int) -> None:
        inputs.weights[image, :, :, 0, 0] = bad

    return damage


def _value(*numbers: float) -> Callable[[Inputs, int], None]:
    """Of every third pixel, in one channel."""

    def damage(inputs: Inputs, image: int) -> None:
        pixels = inputs.value[image, ::3, :, 1]
        pixels[:] = torch.tensor(numbers).repeat(len(pixels))[: len(pixels), None]

    return damage


def _grad_output(*numbers: float) -> Callable[[Inputs, int], None]:
    """Of every query, in one channel."""

    def damage(inputs: Inputs, image: int) -> None:
        channel = inputs.grad_output[image, :, 2]
        channel[:] = torch.tensor(numbers).repeat(len(channel))[: len(channel)]

    return damage


def _locations(bad: float) -> Callable[[Inputs, int], None]:
    def damage(inputs: Inputs, image: int) -> None:
        inputs.locations[image, ::2, :, 0, 0, 0] = bad
        inputs.locations[image, 1::2, :, 0, 0, 1] = bad

    return damage


# What is not finite, image by image; each image may have several.
IMAGES: Sequence[Sequence[Callable[[Inputs, int], None]]] = (
    *([_weights(bad)] for bad in (inf, -inf, nan)),
    *([_value(*bad)] for bad in ((inf,), (-inf,), (nan,), (inf, -inf))),
    *([_grad_output(*bad)] for bad in ((inf,), (-inf,), (nan,), (inf, -inf))),
    *([_locations(bad)] for bad in (inf, -inf, nan)),
    (_weights(inf), _value(inf)),
    (_weights(inf), _value(0.0), _grad_output(0.0)),
    (_weights(0.0), _value(inf), _grad_output(inf)),
    (_weights(-inf), _locations(nan)),
)


def non_finite_inputs(
    d: int = 32,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float32),
    positions: dict[str, tuple[float, float]] = POSITIONS,
    sizes: Sequence[tuple[int, int]] = ((SIDE, SIDE), (5, 4)),
    lq: int | None = None,
) -> Inputs:
    """An image for each of `IMAGES`; the first point of every query lies at one of the positions, in turn.

    The other points are those of `random_inputs`, inside the level.
    """
    lq = len(positions) if lq is None else lq
    shape = {"n": len(IMAGES), "m": 1, "d": d, "lq": lq, "p": 2}
    inputs = random_inputs(sizes, **shape, dtypes=dtypes, reach=-0.2)
    at = torch.tensor(list(positions.values())).repeat(lq, 1)[:lq]
    inputs.locations[:, :, :, 0, 0] = ((at + 0.5) / SIDE).to(inputs.locations.dtype)[None, :, None]
    for image, damages in enumerate(IMAGES):
        for damage in damages:
            damage(inputs, image)
    return inputs
