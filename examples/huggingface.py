# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's D-FINE before and after one added line: the same logits, and the time of a training step."""

import copy
import statistics
import time

import torch
from transformers import DFineConfig, DFineForObjectDetection

from cupy_msda.integrations.transformers import patch

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
# Random weights and a small backbone; a checkpoint of `from_pretrained` is patched by the same line.
backbone = {
    "model_type": "resnet",
    "embedding_size": 16,
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_indices": [2, 3, 4],
}
config = DFineConfig(
    backbone_config=backbone,
    encoder_in_channels=[32, 64, 128],
    encoder_hidden_dim=128,
    decoder_in_channels=[128, 128, 128],
    d_model=128,
    decoder_n_points=[3, 6, 3],
)
with torch.device(device):
    before = DFineForObjectDetection(config)
after = copy.deepcopy(before)

patch(after)  # the added line; patch() does it for all models of transformers

picture = torch.rand(1, 3, 256, 256, device=device)


def training_step(model: DFineForObjectDetection) -> tuple[torch.Tensor, float]:
    """Logits, and the seconds of a forward and a backward pass."""
    start = time.perf_counter()
    output = model(pixel_values=picture)
    (output.logits.mean() + output.pred_boxes.mean()).backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return output.logits.detach(), time.perf_counter() - start


models = {"before": before, "after": after}
logits = {name: training_step(model)[0] for name, model in models.items()}  # compiles kernels
times: dict[str, list[float]] = {name: [] for name in models}
for _ in range(5):
    for name, model in models.items():
        times[name].append(training_step(model)[1])
for name, seconds in times.items():
    print(f"{name}: {statistics.median(seconds) * 1e3:.0f} ms a training step on {device}")
difference = (logits["after"] - logits["before"]).abs().max().item()
print(f"largest difference of a logit: {difference:.0e}")
