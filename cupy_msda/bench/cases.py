# SPDX-License-Identifier: Apache-2.0
"""The measured cases: shapes of published models, distributions of their points, dtypes; random inputs for each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cupy_msda.bench import geometry
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
    def counts(self) -> tuple[int, ...]:
        """Points of each level."""
        if isinstance(self.points, int):
            return (self.points,) * len(self.levels)
        return self.points

    @property
    def samples(self) -> int:
        """Elements of the samples tensor, for an implementation that materialises it."""
        queries = sum(h * w for h, w in self.levels) if self.queries is None else self.queries
        rows = self.batch * queries * self.heads
        return rows * len(self.levels) * max(self.counts) * self.channels


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
# Where points lie:
# - uniform: anywhere in the level, which no model does: the cost of no locality at all.
# - sigma S: in encoders, at normal offsets of S pixels from the query's own pixel. BEVFormer's temporal self-attention
#   (tsa) has small offsets: 1.
# - directed: encoders as MSDeformAttn is initialised, point k is k pixels from the query's own in the head's direction.
# - cameras: BEVFormer's spatial cross-attention (sca), at normal offsets of one pixel from the pillar of a cell, as
#   each camera sees it. BEVFormer gathers the queries that a camera sees; here all stay, and most points lie outside.
# - boxes: decoders whose references are boxes, as initialised: point k of P is k/P of half the box from its centre.
_SIGMAS = {"sigma 1": 1.0, "sigma 2": 2.0, "sigma 4": 4.0, "cameras": 1.0}
_LOCAL = ("sigma 2", "uniform", "directed")
# By shape, the most telling first. Trained encoders are taken to be like sigma 2, and begin as directed; sigma 4 shows
# on two shapes where locality ends.
DISTRIBUTIONS = {
    "detr-encoder": (*_LOCAL, "sigma 4"),
    "dino5-encoder": _LOCAL,
    "mask2former-1024": (*_LOCAL, "sigma 4"),
    "mask2former-512": _LOCAL,
    "bevformer-sca": ("uniform", "cameras"),
    "bevformer-tsa": ("sigma 2", "sigma 1"),
    "sweep-100": ("uniform",),
    "sweep-10000": ("uniform",),
}
_OF_DECODERS = ("uniform", "boxes")


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
# On a CPU large encoders take seconds: only the small one has points of every distribution.
_SMALL_ENCODER = "mask2former-512"
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
    chosen = DISTRIBUTIONS.get(name, _OF_DECODERS)
    large = device == "cpu" and SHAPES[name].queries is None and name != _SMALL_ENCODER
    return chosen[:1] if large else chosen


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
    points = (n, lq, m, len(shape.levels), max(shape.counts))
    locations = _locations(shape, points, case.distribution, generator)
    logits = torch.rand(points, generator=generator, device=device)
    for level, count in enumerate(shape.counts):  # a level with fewer points: the rest lie outside
        locations[:, :, :, level, count:] = -2
        logits[:, :, :, level, count:] = -torch.inf
    value = torch.randn(n, s, m, d, generator=generator, device=device)
    grad_output = torch.randn(n, lq, m * d, generator=generator, device=device)
    weights = logits.flatten(3).softmax(-1).view(points)
    return Inputs(
        shape.levels, value.to(dtype), locations.float(), weights.to(dtype), grad_output.to(dtype)
    )


def _locations(
    shape: Shape, points: tuple[int, ...], distribution: str, generator: torch.Generator
) -> Tensor:
    """Sampling locations in float64, shape (N, Lq, M, L, P, 2), off the edges between cells."""
    device = generator.device
    sizes = torch.tensor(shape.levels, device=device).flip(-1)[:, None].double()  # (W, H)
    if distribution == "uniform":
        locations = torch.rand(*points, 2, generator=generator, device=device, dtype=torch.float64)
    else:
        reference = _references(shape, distribution).to(sizes)
        if distribution in _SIGMAS:
            offsets = torch.randn(
                *points, 2, generator=generator, device=device, dtype=torch.float64
            )
            offsets = _SIGMAS[distribution] * offsets / sizes
        else:
            offsets = _directed(shape, distribution, reference, sizes)
        locations = (reference[..., :2] + offsets).expand(*points, 2)
    pixels = locations * sizes - 0.5
    within = pixels.floor() + _MARGIN + (1 - 2 * _MARGIN) * pixels.remainder(1)
    located: Tensor = (within + 0.5) / sizes
    return located


def _references(shape: Shape, distribution: str) -> Tensor:
    """The reference points, or boxes, of each query, shape (N or 1, Lq, 1, 1, 1 or P, 2 or 4)."""
    if distribution == "cameras":  # point p of a level belongs to height p mod 4
        pillars = geometry.bev_in_cameras(isqrt(shape.queries or 0))
        found = np.tile(pillars, (1, 1, shape.counts[0] // pillars.shape[2], 1))[:, :, None, None]
    elif distribution == "boxes":
        found = geometry.boxes(shape.batch, shape.queries or 0)[:, :, None, None, None]
    else:
        found = geometry.pixel_centres(shape.levels)[None, :, None, None, None]
    return torch.from_numpy(found)


def _directed(shape: Shape, distribution: str, reference: Tensor, sizes: Tensor) -> Tensor:
    """The offsets that MSDeformAttn's initial bias gives, as fractions: broadcasts to (N, Lq, M, L, P, 2)."""
    towards = torch.from_numpy(geometry.directions(shape.heads)).to(sizes)
    numbers = torch.arange(1, max(shape.counts) + 1).to(sizes)[:, None]
    steps = towards[:, None, None] * numbers
    if distribution == "directed":
        return steps / sizes
    counts = torch.tensor(shape.counts).to(sizes)[:, None, None]
    return steps / counts * reference[..., 2:] / 2
