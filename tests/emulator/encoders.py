# SPDX-License-Identifier: Apache-2.0
"""Inputs like an encoder's: queries are the pixels, and sample near their own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.emulator.cases import BF16, F16, F32
from tests.problems import Inputs, random_inputs

# Tiles cut at the lower and right edges, and levels below one tile.
RAGGED = ((18, 37), (9, 13), (5, 33), (2, 2))


Sizes = Sequence[tuple[int, int]]


def queries(sizes: Sizes) -> int:
    """How many queries lie on the grids."""
    return sum(h * w for h, w in sizes)


def encoder(
    sizes: Sizes = RAGGED,
    n: int = 1,
    m: int = 1,
    d: int = 32,
    p: int = 4,
    dtypes: Sequence[torch.dtype] = (F32, F32),
    reach: float = 0.1,
    lq: int | None = None,
) -> Inputs:
    """Random inputs whose queries are the pixels, near which most points lie; a part is anywhere."""
    lq = queries(sizes) if lq is None else lq
    inputs = random_inputs(sizes, n=n, m=m, d=d, lq=lq, p=p, dtypes=dtypes, reach=reach)
    if lq != queries(sizes):
        return inputs
    centres = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in sizes
    ]
    scale = inputs.shapes().flip(-1)[:, None]
    local = torch.cat(centres).double()[None, :, None, None, None] * scale
    local = local + 6 * (inputs.locations.double() - 0.5)
    local = (local.floor() + local.remainder(1).clamp(0.01, 0.99)) / scale
    locations = torch.where(
        torch.arange(lq)[:, None, None, None, None] % 7 == 0, inputs.locations, local
    )
    return inputs._replace(locations=locations.to(inputs.locations.dtype))


ENCODERS = {
    "f32": encoder(m=2),
    "several-images": encoder(((17, 19), (3, 3)), n=3, m=2),
    "f16": encoder(m=2, dtypes=(F16, F32, F32)),
    "bf16": encoder(m=2, dtypes=(BF16, F32, BF16)),
    "five-levels-three-points": encoder(((16, 21), *RAGGED), p=3),
    "eight-points": encoder(((20, 18), (9, 9)), p=8),
    "d8": encoder(m=3, d=8),
    "d16-two-points": encoder(((24, 24),), m=4, d=16, p=2),
    "d64-bf16": encoder(((17, 23),), d=64, dtypes=(BF16, F32, F32)),
    "one-pixel-wide": encoder(((40, 1), (1, 300), (2, 2)), m=2, p=2),
    "all-inside": encoder(((20, 20), (16, 18)), m=2, reach=-0.2),
}


on_encoders = pytest.mark.parametrize("inputs", ENCODERS.values(), ids=ENCODERS.keys())


def placed(cells: Sequence[tuple[float, float]], sizes: Sizes, lq: int = 300) -> Inputs:
    """Inputs all of whose points lie at these pixel coordinates (x, y) of the first level, taking turns."""
    inputs = random_inputs(sizes, n=1, m=1, d=32, lq=lq, p=4)
    at = torch.tensor(cells, dtype=torch.float64)[torch.arange(lq * 4) % len(cells)]
    locations = (at.view(1, lq, 1, 1, 4, 2) + 0.5) / torch.tensor(sizes[0][::-1])
    return inputs._replace(locations=locations.expand_as(inputs.locations).float().contiguous())


WALKS = {
    "one-cell": [(3.3, 4.6)],
    "a-row-of-cells": [(x + 0.3, 2.7) for x in range(-1, 8)],
    "two-rows": [(x + 0.3, y + 0.2) for y in (2, 3) for x in range(-1, 8)],
    "end-of-a-row-and-the-next": [(7.25, 2.5), (-0.75, 3.5), (0.25, 3.5), (7.25, 3.5)],
    "every-cell": [(x + 0.4, y + 0.6) for y in range(-1, 8) for x in range(-1, 8)],
    "outside": [(-5.0, 3.0), (9.5, 3.0), (3.0, 40.0)],
    "corners": [(-0.5, -0.5), (7.5, -0.5), (-0.5, 7.5), (7.5, 7.5)],
}
