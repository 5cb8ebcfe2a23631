# SPDX-License-Identifier: Apache-2.0
"""The measured cases: shapes of published models, distributions of their points, dtypes; random inputs for each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cupy_msda.problem import Level

_DETR = ((100, 167), (50, 84), (25, 42), (13, 21))  # 800 x 1333 at strides 8 to 64
_RTDETR = ((80, 80), (40, 40), (20, 20))
_SWEEP = ((64, 64), (32, 32), (16, 16), (8, 8))
# Every point lies at least this far, in pixels, from the edges of its cell: there gradients jump, and rounding picks
# the side.
_MARGIN = 0.01


class Shape(NamedTuple):
    """The sizes of one call; `queries` None: every pixel of every level is a query, as in an encoder."""

    batch: int
    levels: tuple[tuple[int, int], ...]
    queries: int | None
    points: int | tuple[int, ...] = 4  # for each level, or of each level
    heads: int = 8
    channels: int = 32

    @property
    def samples(self) -> int:
        """Elements of the samples tensor, for an implementation that materialises it."""
        queries = sum(h * w for h, w in self.levels) if self.queries is None else self.queries
        points = self.points if isinstance(self.points, int) else max(self.points)
        rows = self.batch * queries * self.heads
        return rows * len(self.levels) * points * self.channels


SHAPES = {
    "detr-encoder": Shape(1, _DETR, None),
    "detr-decoder": Shape(1, _DETR, 300),
    "dino-decoder": Shape(1, _DETR, 900),
    "dino5-encoder": Shape(1, ((200, 334), *_DETR), None),
    "mask2former-1024": Shape(1, ((32, 32), (64, 64), (128, 128)), None),
    "mask2former-512": Shape(2, ((16, 16), (32, 32), (64, 64)), None),
    "rtdetr-decoder": Shape(1, _RTDETR, 300),
    "dfine-decoder": Shape(1, _RTDETR, 300, (3, 6, 3)),
    "dfine-n-decoder": Shape(1, _RTDETR[1:], 300, 6, channels=16),
    "bevformer-sca": Shape(6, ((116, 200), (58, 100), (29, 50), (15, 25)), 10000, 8),
    "bevformer-tsa": Shape(2, ((200, 200),), None),
    "rfdetr": Shape(1, ((44, 44),), 300, 2, 16, 16),
    "sweep-100": Shape(4, _SWEEP, 100),
    "sweep-10000": Shape(4, _SWEEP, 10000),
}
# The standard deviation of offsets from the query's own pixel, in pixels; None: anywhere.
DISTRIBUTIONS = {"uniform": None, "sigma 2": 2.0, "sigma 4": 4.0}


class Case(NamedTuple):
    """One shape with one distribution of points; locations are float32 at every dtype of value and weights."""

    shape: str
    distribution: str
    dtype: str

    def __str__(self) -> str:
        """The three in words."""
        return ", ".join(self)


_QUICK = {
    "cpu": (
        Case("rtdetr-decoder", "uniform", "float32"),
        Case("mask2former-512", "sigma 2", "float32"),
    ),
    "cuda": (
        Case("detr-encoder", "sigma 2", "float32"),
        Case("detr-encoder", "uniform", "float32"),
        Case("detr-encoder", "sigma 2", "float16"),
        Case("dino-decoder", "uniform", "float32"),
    ),
}
# On a CPU large encoders take seconds: only the small one has points of every distribution, the others local ones.
_LOCAL, _SMALL_ENCODER = "sigma 2", "mask2former-512"
_HALF = {
    "cpu": (Case("rtdetr-decoder", "uniform", "bfloat16"),),
    "cuda": tuple(
        Case(shape, distribution, dtype)
        for shape, distribution in (
            ("detr-encoder", "sigma 2"),
            ("detr-encoder", "uniform"),
            ("mask2former-1024", "sigma 2"),
            ("dino-decoder", "uniform"),
        )
        for dtype in ("float16", "bfloat16")
    ),
}


def select(device: str, quick: bool) -> tuple[Case, ...]:
    """The cases of a run on "cpu" or "cuda"; those of one shape follow one another."""
    if quick:
        return _QUICK[device]
    float32 = (
        Case(name, distribution, "float32")
        for name in SHAPES
        for distribution in _distributions(name, device)
    )
    return (*float32, *_HALF[device])


def _distributions(name: str, device: str) -> tuple[str, ...]:
    """The distributions that a shape is measured with."""
    if SHAPES[name].queries is not None:
        return ("uniform",)
    return tuple(DISTRIBUTIONS) if device == "cuda" or name == _SMALL_ENCODER else (_LOCAL,)


class Inputs(NamedTuple):
    """Tensors of one problem; the levels follow one another."""

    sizes: Sequence[tuple[int, int]]
    value: Tensor
    locations: Tensor
    weights: Tensor
    grad_output: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three differentiable inputs."""
        return self.value, self.locations, self.weights

    @property
    def levels(self) -> list[Level]:
        """(H, W, start) of every level."""
        return consecutive(self.sizes)

    def to(self, *arguments: Any) -> Inputs:
        """All tensors by `Tensor.to`."""
        return Inputs(self.sizes, *(tensor.to(*arguments) for tensor in self[1:]))

    def shapes(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """The level sizes as a tensor on the device of value, shape (L, 2)."""
        return torch.tensor(self.sizes, dtype=dtype, device=self.value.device).reshape(-1, 2)

    def starts(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """The level starts as a tensor on the device of value, shape (L,)."""
        starts = [level.start for level in self.levels]
        return torch.tensor(starts, dtype=dtype, device=self.value.device)


def consecutive(sizes: Sequence[tuple[int, int]]) -> list[Level]:
    """Levels one after another."""
    starts = accumulate((h * w for h, w in sizes), initial=0)
    return [Level(h, w, start) for (h, w), start in zip(sizes, starts, strict=False)]


def build(case: Case, device: str) -> Inputs:
    """Random inputs, the same in every run on one kind of device."""
    shape, dtype = SHAPES[case.shape], getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    n, m, d = shape.batch, shape.heads, shape.channels
    s = sum(h * w for h, w in shape.levels)
    lq = s if shape.queries is None else shape.queries
    counts = (shape.points,) * len(shape.levels) if isinstance(shape.points, int) else shape.points
    points = (n, lq, m, len(counts), max(counts))
    locations = _locations(shape, points, DISTRIBUTIONS[case.distribution], generator)
    logits = torch.rand(points, generator=generator, device=device)
    for level, count in enumerate(counts):  # a level with fewer points: the rest lie outside
        locations[:, :, :, level, count:] = -2
        logits[:, :, :, level, count:] = -torch.inf
    value = torch.randn(n, s, m, d, generator=generator, device=device)
    grad_output = torch.randn(n, lq, m * d, generator=generator, device=device)
    weights = logits.flatten(3).softmax(-1).view(points)
    return Inputs(
        shape.levels, value.to(dtype), locations.float(), weights.to(dtype), grad_output.to(dtype)
    )


def _locations(
    shape: Shape, points: tuple[int, ...], sigma: float | None, generator: torch.Generator
) -> Tensor:
    """Sampling locations in float64, off the edges between cells."""
    device, double = generator.device, torch.float64
    sizes = torch.tensor(shape.levels, device=device).flip(-1)[:, None].double()  # (W, H)
    if sigma is None:
        locations = torch.rand(*points, 2, generator=generator, device=device, dtype=double)
    else:
        centres = _pixel_centres(shape.levels).to(sizes)[:, None, None, None]
        offsets = torch.randn(*points, 2, generator=generator, device=device, dtype=double)
        locations = centres + sigma * offsets / sizes
    pixels = locations * sizes - 0.5
    within = pixels.floor() + _MARGIN + (1 - 2 * _MARGIN) * pixels.remainder(1)
    located: Tensor = (within + 0.5) / sizes
    return located


def _pixel_centres(levels: tuple[tuple[int, int], ...]) -> Tensor:
    """(x, y) of the centre of each pixel of each level, as fractions of the level."""
    grids = (
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in levels
    )
    return torch.cat(list(grids))
