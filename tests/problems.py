# SPDX-License-Identifier: Apache-2.0
"""Random inputs as torch tensors, and their comparison with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cupy_msda.bench.cases import Inputs
from cupy_msda.bench.correctness import by_reference
from cupy_msda.budget import assert_within_budget
from tests import exact

# dtypes of value and of locations and weights.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]


def random_inputs(
    sizes: Sequence[tuple[int, int]] = ((5, 7), (3, 4)),
    *,
    n: int = 2,
    m: int = 2,
    d: int = 8,
    lq: int = 5,
    p: int = 3,
    s: int | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float32),
    reach: float = 0.15,
    device: Any = "cpu",
    seed: int = 0,
) -> Inputs:
    """Normal values, positive weights, and locations up to `reach` (in levels) beyond the edges.

    `dtypes` are those of value, locations and weights; the last may be left out.
    No location is so near the edge of a cell that rounding could put it into the next cell, whose
    gradient differs.
    """
    generator = torch.Generator().manual_seed(seed)
    s = sum(h * w for h, w in sizes) if s is None else s
    points = (n, lq, m, len(sizes), p)
    value = torch.randn(n, s, m, d, generator=generator)
    scale = torch.tensor([(w, h) for h, w in sizes]).reshape(-1, 1, 2).clamp(min=1).double()
    pixels = (torch.rand(*points, 2, generator=generator) * (1 + 2 * reach) - reach) * scale - 0.5
    locations = (pixels.floor() + pixels.remainder(1).clamp(1e-3, 1 - 1e-3) + 0.5) / scale
    weights = torch.rand(points, generator=generator)
    grad_output = torch.randn(n, lq, m * d, generator=generator)
    of_value, of_locations, of_weights = (*dtypes, dtypes[-1])[:3]
    return Inputs(
        list(sizes),
        value.to(device, of_value),
        locations.to(device, of_locations),
        weights.to(device, of_weights),
        grad_output.to(device, of_value),
    )


def ragged(inputs: Inputs, points: Sequence[int]) -> Inputs:
    """The same with `points[l]` points on level l: the rest lie outside, with zero weights."""
    locations, weights = inputs.locations.clone(), inputs.weights.clone()
    for level, count in enumerate(points):
        locations[:, :, :, level, count:] = -2
        weights[:, :, :, level, count:] = 0
    return inputs._replace(locations=locations, weights=weights)


def flat_points(inputs: Inputs, num_points: Sequence[int]) -> Inputs:
    """The same with the first `num_points[l]` points of each level alone, level after level."""
    locations, weights = (
        torch.cat(
            [array[:, :, :, level, :number] for level, number in enumerate(num_points)], dim=3
        )
        for array in (inputs.locations, inputs.weights)
    )
    return inputs._replace(locations=locations, weights=weights)


def away_from_edges(inputs: Inputs, num_points: Sequence[int] | None = None) -> Inputs:
    """The same in float64 with every point well inside a cell, where the operator is smooth."""
    inputs = inputs.to(torch.float64)
    scale = inputs.shapes().flip(-1)[:, None]  # L, 1, (W, H)
    if num_points is not None:
        scale = scale[:, 0].repeat_interleave(torch.tensor(num_points), dim=0)  # K, (W, H)
    pixels = inputs.locations * scale - 0.5
    pixels = pixels.floor() + 0.2 + 0.6 * pixels.remainder(1)
    return inputs._replace(locations=(pixels + 0.5) / scale)


def exactly(inputs: Inputs) -> tuple[Tensor, ...]:
    """The same in float64: by the reference, or for a float64 value by `tests.exact`."""
    wide = by_reference(inputs.to(torch.float64))
    if inputs.value.dtype != torch.float64:
        return wide
    arrays = (tensor.detach().double().cpu().numpy() for tensor in inputs[1:])
    value, locations, weights, grad_output = arrays
    points = inputs.levels, locations, weights
    results = exact.forward(value, *points), *exact.backward(grad_output, value, *points)
    # What is not finite is no matter of rounding, and exact.py does not tell infinity from NaN.
    return tuple(
        torch.where(plain.isfinite(), torch.from_numpy(result), plain)
        for plain, result in zip((tensor.cpu() for tensor in wide), results, strict=True)
    )


def check_against_reference(inputs: Inputs, output: Tensor, gradients: Sequence[Tensor]) -> None:
    """The output and the three gradients within the error budget, element by element finite alike."""
    results = by_reference(inputs), exactly(inputs)
    for actual, same, true in zip((output, *gradients), *results, strict=True):
        assert actual.device == inputs.value.device
        assert_within_budget(*(tensor.detach().cpu() for tensor in (actual, same, true)))
