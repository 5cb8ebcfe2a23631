# SPDX-License-Identifier: Apache-2.0
"""The forward operator as a node of ONNX that TensorRT runs by NVIDIA's plugin for it.

The node's type is the plugin's name; TensorRT's importer reads version and namespace from its attributes. The plugin
has no parameters. Its source: https://github.com/NVIDIA/TensorRT, plugin/multiscaleDeformableAttnPlugin.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cupy_msda.torch.operands import Operands, check_traced, inputs_of

NODE = "TRT::MultiscaleDeformableAttnPlugin_TRT"  # the domain TRT marks it as no standard node
_ATTRIBUTES: dict[str, Any] = {"plugin_version": "2", "plugin_namespace": ""}
_OUTSIDE = -2.0  # a location outside of every level, by more than a pixel


def forward(operands: Operands) -> Tensor:
    """The node, with standard operators around it for masks, points of levels and dtypes, which it does not have.

    The plugin takes float32 or float16, one for all, and makes (N, Lq, M, D).
    """
    check_traced(operands)
    _check(operands)
    value, locations, weights = inputs_of(operands)
    if operands.value_mask is not None:
        value = value.masked_fill(~operands.value_mask[:, :, None, None], 0)
    if operands.num_points is not None:
        locations = _padded(locations, operands.num_points, _OUTSIDE)
        weights = _padded(weights, operands.num_points, 0.0)
    tensors = value, locations, weights
    halves = all(tensor.dtype is torch.float16 for tensor in tensors)
    value, locations, weights = (
        tensor.to(torch.float16 if halves else torch.float32) for tensor in tensors
    )
    n, _, m, d = value.shape
    output = torch.onnx.ops.symbolic(
        NODE,
        (value, *_level_table(operands), locations, weights),
        _ATTRIBUTES,
        dtype=value.dtype,
        shape=(n, locations.shape[1], m, d),
        version=1,
    )
    # torch takes it to be on the CPU, wherever the model is.
    return output.to(operands.value).flatten(2)


def _check(operands: Operands) -> None:
    """Refuse what the plugin cannot compute."""
    if operands.interpolation != "bilinear":
        raise ValueError(
            'interpolation must be "bilinear" for the plugin of TensorRT, which has no other, '
            f'got "{operands.interpolation}"'
        )
    names = "value", "sampling_locations", "attention_weights"
    for name, tensor in zip(names, inputs_of(operands), strict=True):
        if tensor.dtype is torch.float64:
            raise TypeError(
                f"{name} must be float16, bfloat16 or float32 for the plugin of TensorRT, got float64"
            )


def _padded(points: Tensor, num_points: Sequence[int], fill: float) -> Tensor:
    """(N, Lq, M, K, ...) as (N, Lq, M, L, P, ...), each level filled up to the largest P."""
    most = max(num_points, default=0)
    behind = (0, 0) * (points.dim() - 4)  # what follows K is not padded
    levels = [
        functional.pad(level, (*behind, 0, most - level.shape[3]), value=fill)
        for level in torch.split(points, list(num_points), dim=3)
    ]
    return torch.stack(levels, dim=3)


def _level_table(operands: Operands) -> tuple[Tensor, Tensor]:
    """(H, W) of the levels, shape (L, 2), and where each starts, shape (L,), in int32."""
    shapes, starts = operands.spatial_shapes, operands.level_start_index
    if starts is None and operands.starts is not None:
        starts = _integers(operands, operands.starts)
    if shapes is None:
        sizes = operands.sizes
        areas = [h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True)]
        shapes = _integers(operands, sizes).view(-1, 2)
        if starts is None:
            starts = _integers(operands, list(accumulate(areas, initial=0))[:-1])
    elif starts is None:
        areas_there = shapes.long().prod(-1)
        starts = areas_there.cumsum(0) - areas_there
    return shapes.to(torch.int32), starts.to(torch.int32)


def _integers(operands: Operands, numbers: Sequence[Any]) -> Tensor:
    """Ints or symbols of a tracer as a tensor; `torch.tensor` would put an in-place operator into the graph."""
    value = operands.value
    return torch.stack([value.new_full((), number, dtype=torch.int32) for number in numbers])
