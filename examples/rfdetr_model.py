# SPDX-License-Identifier: Apache-2.0
"""RF-DETR before and after one added line: the same logits, and the times of inference and of a training step.

Needs `pip install rfdetr`. Random weights: nothing is downloaded.
"""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from rfdetr import RFDETRNano
from torch import Tensor, nn

from cupy_msda.integrations.rfdetr import patch

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
before = RFDETRNano(pretrain_weights=None, device=device).model.model.eval()
after = copy.deepcopy(before)

patch(after)  # the added line; patch() does it for all models of rfdetr

picture = torch.rand(1, 3, 384, 384, device=device)


def inference(model: nn.Module) -> Tensor:
    """Logits."""
    with torch.no_grad():
        return model(picture)["pred_logits"]


def training_step(model: nn.Module) -> Tensor:
    """Logits, after a forward and a backward pass."""
    output = model(picture)
    (output["pred_logits"].mean() + output["pred_boxes"].mean()).backward()
    return output["pred_logits"].detach()


def seconds(run: Callable[[nn.Module], Tensor], model: nn.Module) -> float:
    """How long a run takes."""
    start = time.perf_counter()
    run(model)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


models = {"before": before, "after": after}
for run in (inference, training_step):
    logits = {name: run(model) for name, model in models.items()}  # compiles kernels
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(5):
        for name, model in models.items():
            times[name].append(seconds(run, model))
    for name, measured in times.items():
        print(f"{run.__name__} {name}: {statistics.median(measured) * 1e3:.0f} ms on {device}")
    difference = (logits["after"] - logits["before"]).abs().max().item()
    print(f"largest difference of a logit: {difference:.0e}")
