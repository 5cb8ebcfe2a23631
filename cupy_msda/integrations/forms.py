# SPDX-License-Identifier: Apache-2.0
"""The forms in which other packages write the operator and its module, and ours in each of them.

A form takes their function and returns ours, which calls theirs where ours would not compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused

_Function = Callable[..., Any]
_INTERPOLATIONS = {"default": "bilinear", "bilinear_gather": "bilinear", "discrete": "nearest"}


def plain(_: _Function) -> _Function:
    """mmcv's form: value (N, S, M, D), or a level each as `ragged` takes; weights (N, Lq, M, L, P) or (N, Lq, M, L*P).

    Locations (N, Lq, M, L, P, 2) or, in ultralytics, (N, Lq, M, L*P, 2).
    """

    def attention(
        value: Any,
        value_spatial_shapes: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
    ) -> Tensor:
        locations, levels = sampling_locations, len(value_spatial_shapes)
        if not isinstance(value, Tensor):
            value = _joined(value, value_spatial_shapes, *locations.shape[:3:2])
        if locations.ndim == 5:
            locations = locations.reshape(*locations.shape[:3], levels, -1, 2)
        return _sampled(value, value_spatial_shapes, (locations, attention_weights))

    return attention


def transposed(original: _Function) -> _Function:
    """LW-DETR's form: value (N, M, D, S), locations (N, Lq, M, L, P, 2), weights (N, Lq, M, L*P) or (N, Lq, M, L, P).

    Locations of rank 5 are those of a module in export mode, whose graph stays theirs.
    """

    def attention(
        value: Tensor,
        value_spatial_shapes: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        value_spatial_shapes_hw: Any = None,
    ) -> Any:
        shapes, pairs = value_spatial_shapes, value_spatial_shapes_hw
        if sampling_locations.ndim == 5:
            rest = () if pairs is None else (pairs,)
            return original(value, shapes, sampling_locations, attention_weights, *rest)
        shapes = shapes if pairs is None else pairs
        points = sampling_locations, attention_weights
        return _sampled(value.permute(0, 3, 1, 2), shapes, points)

    return attention


def ragged(original: _Function) -> _Function:
    """RT-DETRv2's form: points of each level in `num_points_list`, and a method.

    Value is a tensor (N, S, M, D) or a level each of (N, M, D, H*W) or (N*M, D, H, W); locations (N, Lq, M, K, 2)
    and weights (N, Lq, M, K). "discrete" limits both coordinates to H - 1, so that levels that are not square are
    theirs to compute; so is what other versions may add.
    """

    def attention(
        value: Any,
        value_spatial_shapes: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        num_points_list: Sequence[int],
        method: str = "default",
        value_shape: str = "default",
        **others: Any,
    ) -> Any:
        points = sampling_locations, attention_weights
        interpolation = _INTERPOLATIONS.get(method)
        sizes, discrete = value_spatial_shapes, interpolation == "nearest"
        if (
            others
            or interpolation is None
            or (discrete and any(int(h) != int(w) for h, w in sizes))
            or len(sampling_locations) == 0  # an empty batch does not tell D
        ):
            shape = {} if value_shape == "default" else {"value_shape": value_shape}
            given = value, sizes, *points, num_points_list
            return original(*given, method=method, **shape, **others)
        if not isinstance(value, Tensor):
            value = _joined(value, sizes, *sampling_locations.shape[:3:2])
        if discrete:  # whole pixels have no gradient
            points = sampling_locations.detach(), attention_weights
        sampling = {"num_points": num_points_list, "interpolation": interpolation}
        return _sampled(value, sizes, points, sampling)

    return attention


def _joined(levels: Sequence[Tensor], sizes: Any, n: int, m: int) -> Tensor:
    """Value (N, S, M, D) of one tensor for each level, (N, M, D, H*W) or (N*M, D, H, W)."""
    rows = [
        level.reshape(n, m, -1, h * w).permute(0, 3, 1, 2)
        for level, (h, w) in zip(levels, sizes, strict=True)
    ]
    return torch.cat(rows, dim=1)


def _sampled(
    value: Tensor,
    shapes: Any,
    points: tuple[Tensor, Tensor],
    sampling: dict[str, Any] | None = None,
) -> Tensor:
    """The operator on locations and weights, in the dtype that torch gives the product of weights and samples."""
    locations, weights = points
    weights = weights.reshape(locations.shape[:-1])
    output = ms_deform_attn(value, shapes, None, locations, weights, **(sampling or {}))
    dtype = torch.promote_types(value.dtype, locations.dtype)
    return output.to(torch.promote_types(dtype, weights.dtype))


def attend(
    module: Any,
    samples: tuple[int, int, int],
    query: Tensor,
    references: Tensor,
    features: Tensor,
    shapes: Any,
    padding: Tensor | None,
) -> Tensor:
    """What a module with Deformable-DETR's four projections returns.

    Parameters
    ----------
    samples : heads M, levels L and points P
    query : Tensor, shape (N, Lq, C)
    references : Tensor, shape (N or 1, Lq, L or 1, 2 or 4); boxes are in units of 1 / (2 P)
    features : Tensor, shape (N, S, C)
    shapes : (H, W) of each level
    padding : bool Tensor, shape (N, S), True where the value counts as zero, or None
    """
    value = module.value_proj(features).unflatten(-1, (samples[0], -1))
    offsets = module.sampling_offsets(query).unflatten(-1, (*samples, 2))
    logits = module.attention_weights(query).unflatten(-1, samples)
    references = references.to(torch.promote_types(value.dtype, torch.float32))
    mask = None if padding is None else ~padding
    given = value, shapes, None, references, offsets, logits
    output: Tensor = module.output_proj(ms_deform_attn_fused(*given, value_mask=mask))
    return output


def attend_boxes(module: Any, query: Tensor, references: Tensor, value: Any, sizes: Any) -> Tensor:
    """What D-FINE's module returns, (N, Lq, M*D), for boxes (N, Lq, 1, 4) and value as `ragged` takes it."""
    m, numbers = module.num_heads, list(module.num_points_list)
    points = m, sum(numbers)
    if not isinstance(value, Tensor):
        value = _joined(value, sizes, len(query), m)
    offsets = module.sampling_offsets(query).unflatten(-1, (*points, 2))
    logits = module.attention_weights(query).unflatten(-1, points)
    # Theirs multiplies by a buffer that holds 1 / P, rounded, and comes with a checkpoint; the operator divides by P.
    scales = module.num_points_scale.to(query.dtype).split(numbers)
    factors = [scale * number for scale, number in zip(scales, numbers, strict=True)]
    offsets = offsets * torch.cat(factors)[:, None]
    boxes = references.to(torch.promote_types(value.dtype, torch.float32))
    output = ms_deform_attn_fused(
        *(value, sizes, None, boxes, offsets, logits),
        num_points=numbers,
        offset_scale=getattr(module, "offset_scale", 0.5),
    )
    dtype = torch.promote_types(value.dtype, references.dtype)
    return output.to(torch.promote_types(dtype, query.dtype))


def detr_forward(original: _Function) -> _Function:
    """`MSDeformAttn.forward` of Deformable-DETR, LW-DETR and RF-DETR.

    In RF-DETR's export mode it is theirs, so that the graph is the one that the package makes.
    """

    def forward(
        self: Any,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Any,
        input_level_start_index: Any = None,
        input_padding_mask: Tensor | None = None,
        input_spatial_shapes_hw: Any = None,
    ) -> Any:
        shapes, pairs = input_spatial_shapes, input_spatial_shapes_hw
        if getattr(self, "_export", False):
            rest = () if pairs is None else (pairs,)
            given = query, reference_points, input_flatten, shapes
            return original(self, *given, input_level_start_index, input_padding_mask, *rest)
        shapes = shapes if pairs is None else pairs
        samples = self.n_heads, self.n_levels, self.n_points
        given = query, reference_points, input_flatten, shapes
        return attend(self, samples, *given, input_padding_mask)

    return forward


def attend_sequences(
    module: Any,
    query: Tensor,
    value: Tensor | None,
    query_pos: Tensor | None,
    key_padding_mask: Tensor | None,
    reference_points: Tensor,
    spatial_shapes: Any,
) -> Tensor:
    """What mmcv's and Grounding DINO's modules compute: sequences (Lq, N, C) and (S, N, C) unless `batch_first`."""
    value = query if value is None else value
    query = query if query_pos is None else query + query_pos
    if not module.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    samples = module.num_heads, module.num_levels, module.num_points
    given = query, reference_points, value, spatial_shapes
    output = attend(module, samples, *given, key_padding_mask)
    return output if module.batch_first else output.transpose(0, 1)
