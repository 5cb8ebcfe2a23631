# SPDX-License-Identifier: Apache-2.0
"""Code written for Deformable-DETR's compiled extension, running without building it, and the time that this saves."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.autograd import Function

from cupy_msda import ms_deform_attn_core_pytorch
from cupy_msda.integrations import deformable_detr

deformable_detr.install()  # once, before the fork imports the extension

import MultiScaleDeformableAttention as MSDA  # noqa: E402, N817 (as every fork writes it)


class Attention(Function):
    """What a fork has in its ops folder: the extension's two entry points as an autograd Function."""

    @staticmethod
    def forward(ctx, *arguments):
        """Take value, shapes, start index, locations, weights and im2col_step."""
        *tensors, ctx.im2col_step = arguments
        ctx.save_for_backward(*tensors)
        return MSDA.ms_deform_attn_forward(*arguments)

    @staticmethod
    def backward(ctx, grad_output):
        """Return gradients of value, locations and weights."""
        arguments = (*ctx.saved_tensors, grad_output.contiguous(), ctx.im2col_step)
        by_value, by_locations, by_weights = MSDA.ms_deform_attn_backward(*arguments)
        return by_value, None, None, by_locations, by_weights, None


device = "cuda" if torch.cuda.is_available() else "cpu"
sizes = [(64, 64), (32, 32), (16, 16), (8, 8)]
shapes = torch.tensor(sizes, device=device)
starts = torch.tensor([0, 4096, 5120, 5376], device=device)
value = torch.rand(2, 5440, 8, 32, device=device, requires_grad=True)
locations = torch.rand(2, 300, 8, 4, 4, 2, device=device, requires_grad=True)
weights = torch.rand(2, 300, 8, 4, 4, device=device, requires_grad=True)


def without_extension() -> torch.Tensor:
    """What a fork falls back to if its extension is not built: grid_sample."""
    return ms_deform_attn_core_pytorch(value, sizes, locations, weights)


def with_ours() -> torch.Tensor:
    """The fork's own way, through the module that stands for the extension."""
    return Attention.apply(value, shapes, starts, locations, weights, 64)


def training_step(attention: Callable[[], torch.Tensor]) -> float:
    """Milliseconds of a forward and a backward pass."""
    start = time.perf_counter()
    attention().sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


for attention in (without_extension, with_ours):
    training_step(attention)  # compiles kernels
before, after = (
    statistics.median(times)
    for times in zip(
        *[(training_step(without_extension), training_step(with_ours)) for _ in range(10)],
        strict=True,
    )
)
output = with_ours()
print("output", tuple(output.shape), "gradient of value", tuple(value.grad.shape))
print(f"a training step on {device}: {before:.1f} ms before, {after:.1f} ms after")
