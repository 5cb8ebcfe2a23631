# SPDX-License-Identifier: Apache-2.0
"""Code written for Deformable-DETR's compiled extension, running without building it."""

import torch
from torch.autograd import Function

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
shapes = torch.tensor([(20, 30), (10, 15)], device=device)
starts = torch.tensor([0, 600], device=device)
value = torch.rand(2, 750, 8, 32, device=device, requires_grad=True)
locations = torch.rand(2, 50, 8, 2, 4, 2, device=device, requires_grad=True)
weights = torch.rand(2, 50, 8, 2, 4, device=device, requires_grad=True)

output = Attention.apply(value, shapes, starts, locations, weights, 64)
output.sum().backward()
print("output", tuple(output.shape), "gradient of value", tuple(value.grad.shape))
