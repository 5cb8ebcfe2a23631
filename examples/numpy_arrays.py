# SPDX-License-Identifier: Apache-2.0
"""Plain arrays, no torch: NumPy here, and CuPy with the same calls on a GPU."""

import numpy as np

from cupy_msda import ms_deform_attn, ms_deform_attn_backward

rng = np.random.default_rng(0)
levels = [(32, 48), (16, 24)]  # (H, W) of each level
n, m, d, lq, p = 1, 8, 32, 100, 4  # batch, heads, channels per head, queries, points per level
s = sum(h * w for h, w in levels)

value = rng.standard_normal((n, s, m, d), dtype=np.float32)
locations = rng.random(
    (n, lq, m, len(levels), p, 2), dtype=np.float32
)  # (x, y), fractions of a level
weights = np.full((n, lq, m, len(levels), p), 1 / (len(levels) * p), dtype=np.float32)

output = ms_deform_attn(value, levels, None, locations, weights)
gradients = ms_deform_attn_backward(np.ones_like(output), value, levels, None, locations, weights)

print("output", output.shape, output.dtype)
for name, gradient in zip(gradients._fields, gradients, strict=True):
    print("gradient of", name, gradient.shape, gradient.dtype)
