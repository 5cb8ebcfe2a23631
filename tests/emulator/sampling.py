# SPDX-License-Identifier: Apache-2.0
"""Inputs whose points are sampled otherwise: of each level another number, at the nearest pixel, under a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch

from tests.emulator.cases import BF16, F16, F32
from tests.emulator.launches import Rules
from tests.problems import Inputs, random_inputs

SIZES = ((7, 9), (3, 5), (2, 2))
POSITIONS = 7 * 9 + 3 * 5 + 2 * 2


class Case(NamedTuple):
    """Inputs, and how their points are sampled."""

    inputs: Inputs
    rules: Rules


def case(
    points: Sequence[int],
    *,
    nearest: bool = False,
    masked: bool = False,
    d: int = 16,
    lq: int = POSITIONS,
    sizes: Sequence[tuple[int, int]] = SIZES,
    dtypes: Sequence[torch.dtype] = (F32, F32),
) -> Case:
    """Random inputs with so many points of each level; what is masked is NaN."""
    inputs = random_inputs(sizes, n=2, m=2, d=d, lq=lq, p=max(points), dtypes=dtypes)
    rules: dict[str, Any] = {"num_points": list(points)}
    if nearest:
        rules["interpolation"] = "nearest"
    if masked:
        rules["value_mask"] = mask = mask_of(inputs)
        inputs.value[~mask] = torch.nan
    return Case(flat(inputs, points), rules)


def flat(inputs: Inputs, points: Sequence[int]) -> Inputs:
    """The first points of each level, level after level."""
    locations, weights = (
        torch.cat([given[:, :, :, level, :count] for level, count in enumerate(points)], dim=3)
        for given in (inputs.locations, inputs.weights)
    )
    return inputs._replace(locations=locations, weights=weights)


def mask_of(inputs: Inputs) -> torch.Tensor:
    """One image with the padding of a narrower one, with single holes in the rest; others with many holes."""
    images, positions = inputs.value.shape[:2]
    holes = torch.rand(images, positions, generator=torch.Generator().manual_seed(5))
    mask = holes > 0.4
    mask[0] = holes[0] > 0.1
    for (_, width), level in zip(inputs.sizes, inputs.levels, strict=True):
        of_level = mask[0, level.start : level.start + level.height * width].view(-1, width)
        of_level[:, 2 * width // 3 :] = False
    return mask


# Queries are the pixels: persistent and binned kernels run too.
CASES = {
    "uneven": case((3, 6, 3)),
    "level-without-points": case((4, 0, 5), dtypes=(F16, F32, F16)),
    "nearest": case((4, 4, 4), nearest=True),
    "masked": case((4, 4, 4), masked=True, d=32),
    "uneven-masked": case((0, 3, 6), masked=True, dtypes=(BF16, BF16, BF16)),
    "nearest-masked": case((2, 2, 2), nearest=True, masked=True, d=32, dtypes=(F16, F32, F32)),
    "all": case((3, 6, 3), nearest=True, masked=True),
}
on_cases = pytest.mark.parametrize(("inputs", "rules"), CASES.values(), ids=CASES.keys())


def some(*names: str) -> pytest.MarkDecorator:
    """Parametrise a test over some of the cases."""
    chosen = [CASES[name] for name in names]
    return pytest.mark.parametrize(("inputs", "rules"), chosen, ids=names)
