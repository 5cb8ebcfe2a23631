# SPDX-License-Identifier: Apache-2.0
"""Train one MSDeformAttn layer: a query in the middle of a picture learns to look at a blob and tell its brightness."""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from cupy_msda import MSDeformAttn

STEPS = 100
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
levels = [(16, 16), (8, 8)]
d_model = 32

encode = nn.Linear(1, d_model).to(device)
attention = MSDeformAttn(d_model, n_levels=len(levels), n_heads=4, n_points=4).to(device)
decode = nn.Linear(d_model, 1).to(device)
optimizer = torch.optim.Adam(nn.ModuleList([encode, attention, decode]).parameters(), lr=0.01)

reference_points = torch.full((16, 1, 1, 2), 0.5, device=device)  # (x, y), the same on every level
query = torch.zeros(16, 1, d_model, device=device)


def batch() -> tuple[Tensor, Tensor]:
    """Pictures of noise with one blob, as flattened pyramids (16, S, 1), and the blob's brightness (16, 1, 1)."""
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    blob = torch.exp(-((x - 12) ** 2 + (y - 4) ** 2) / 8)
    brightness = torch.rand(16, 1, 1)
    pictures = torch.rand(16, 16, 16) * 0.2 + brightness * blob
    pyramid = torch.cat([pictures.flatten(1), avg_pool2d(pictures, 2).flatten(1)], dim=1)
    return pyramid[..., None].to(device), brightness.to(device)


losses = []
for _ in range(STEPS):
    pyramid, brightness = batch()
    attended = attention(query, reference_points, encode(pyramid), levels, None)
    loss = (decode(attended) - brightness).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
first, last = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
print(f"mean loss on {device}: {first:.4f} in the first ten steps, {last:.4f} in the last ten")
