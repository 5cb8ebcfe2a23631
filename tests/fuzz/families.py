# SPDX-License-Identifier: Apache-2.0
"""What kernels are compiled for. A run takes few families, since each costs compilations, and many cases of each."""

from __future__ import annotations

from typing import NamedTuple

import torch

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Family(NamedTuple):
    """Template arguments: heads, channels, points of each level, dtypes and how points are sampled."""

    heads: int
    channels: int
    points: tuple[int, ...]
    # Of value, locations and weights; fused: of value, references, offsets and logits.
    dtypes: tuple[torch.dtype, ...] = (F32, F32, F32)
    nearest: bool = False
    masked: bool = False
    coordinates: int = 0  # of a reference point; 0: the call is not fused
    by_level: bool = True  # fused: one reference point for each level


ALL_F16, ALL_BF16, ALL_F64 = (F16,) * 3, (BF16,) * 3, (F64,) * 3

FAMILIES = {
    "d32": Family(8, 32, (4, 4, 4, 4)),
    "d8": Family(2, 8, (2, 2)),
    "d8-one-point": Family(2, 8, (1,)),
    "d16-masked-f16": Family(2, 16, (3, 0, 2), (F16, F32, F16), masked=True),
    "d16-nearest-bf16": Family(2, 16, (4, 4), ALL_BF16, nearest=True),
    "d8-f16": Family(1, 8, (8,), ALL_F16),
    "d64-uneven-masked": Family(1, 64, (1, 4, 3), masked=True),
    "d128-bf16": Family(1, 128, (2, 2), (BF16, F32, F32)),
    "d32-nearest-masked": Family(2, 32, (3, 5), nearest=True, masked=True),
    "nine-levels": Family(1, 16, (1,) * 9),
    "generic-d5": Family(3, 5, (2, 3)),
    "generic-d36-f16": Family(1, 36, (5,), (F16, F16, F32), masked=True),
    "generic-f64": Family(2, 8, (3, 3), ALL_F64),
    "generic-f64-nearest-masked": Family(2, 3, (1, 2), (F64, F32, F32), nearest=True, masked=True),
    "generic-seventeen-levels": Family(1, 8, (1,) * 17),
    "fused-d16": Family(2, 16, (4, 4), (F32,) * 4, coordinates=2),
    "fused-boxes-f16": Family(2, 16, (2, 3), (F16, F32, F16, F16), coordinates=4),
    "fused-one-reference": Family(
        1, 32, (3, 3), (BF16, F32, F32, F32), coordinates=2, by_level=False
    ),
    "fused-boxes-nearest-masked": Family(
        2, 8, (1, 2), (F32,) * 4, nearest=True, masked=True, coordinates=4
    ),
}
