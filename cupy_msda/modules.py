# SPDX-License-Identifier: Apache-2.0
"""The attention module of Deformable-DETR, with its parameters, so that checkpoints load unchanged."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cupy_msda.contract import (
    NO_SCRIPT,
    check,
    check_module,
    check_projected,
    check_sizes,
    read_table,
)
from cupy_msda.torch import ms_deform_attn
from cupy_msda.torch.operands import traceable

# Leaf functions in a graph of torch.fx: they branch on shapes and dtypes, which fx does not know.
for _name in ("check_module", "_sampling_locations", "ms_deform_attn"):
    torch.fx.wrap(_name)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its four projections.

    Every query predicts, for each head, level and point, an offset from its reference point and a
    weight; the weights of a head are normalised over levels and points together.

    Parameters
    ----------
    d_model : int
        Channels C of queries and features, a multiple of `n_heads`.
    n_levels : int
        Feature levels L.
    n_heads : int
        Heads M, of D = C / M channels each; any D works.
    n_points : int
        Sampling points P for each query, head and level.
    ratio : float
        Channels of the value per channel of the features, as in ViT-Adapter: the heads have
        int(`d_model` * `ratio`) / M channels each.
    use_4D_normalizer : bool
        As in DINO, the offsets from boxes are in units of half the box per pixel of the level, and
        not per point. Points are not affected.

    Attributes
    ----------
    im2col_step : int
        No effect: batches are never split. Code written for the extension module reads and sets it.

    Raises
    ------
    TypeError
        A size is no integer, or `ratio` no number.
    ValueError
        A size is below 1, or `d_model` or int(`d_model` * `ratio`) is not a multiple of `n_heads`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        ratio: float = 1.0,
        *,
        use_4D_normalizer: bool = False,  # noqa: N803 - the name in DINO
    ) -> None:
        """Create and initialise the projections."""
        super().__init__()
        sizes = {"d_model": d_model, "n_levels": n_levels, "n_heads": n_heads, "n_points": n_points}
        channels = check_sizes(sizes, ratio)
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.ratio = ratio
        self.use_4D_normalizer = use_4D_normalizer
        self.im2col_step = 64
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, samples * 2)  # M, L, P, (x, y)
        self.attention_weights = nn.Linear(d_model, samples)  # M, L, P
        self.value_proj = nn.Linear(d_model, channels)
        self.output_proj = nn.Linear(channels, d_model)
        self._reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as Deformable-DETR does, by the name that torch's own modules have."""
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """The same, by the name that models of Deformable-DETR's kind call and override."""
        # One direction for each head, points at growing distances.
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # M, 2: on a unit square
        distance = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None] * distance[:, None]  # M, 1, P, 2
        with torch.no_grad():
            bias = offsets.expand(-1, self.n_levels, -1, -1).reshape(-1)
            self.sampling_offsets.bias.copy_(bias)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def __prepare_scriptable__(self) -> None:
        """Refuse torch.jit.script, which calls this."""
        raise RuntimeError(NO_SCRIPT)

    def extra_repr(self) -> str:
        """The sizes, as printed by ``print(module)``."""
        text = (
            f"d_model={self.d_model}, n_levels={self.n_levels}, "
            f"n_heads={self.n_heads}, n_points={self.n_points}"
        )
        if self.ratio != 1:
            text += f", ratio={self.ratio}"
        return text + ", use_4D_normalizer=True" * self.use_4D_normalizer

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Any,
        input_level_start_index: Any,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to the features around its reference points.

        Never synchronises with the device. Sampling locations are computed in float32 or wider, also
        under autocast: a half-precision coordinate can be off by a large part of a pixel.

        Parameters
        ----------
        query : Tensor, shape (N, Lq, C)
        reference_points : Tensor, shape (N or 1, Lq, L or 1, 2 or 4)
            Fractions of the padded input, (0, 0) top-left and (1, 1) bottom-right. Points (x, y):
            offsets are in pixels of the level. Boxes (x, y, w, h) around (x, y): offsets are in
            units of 1 / (2 P) of the box. A single image or level stands for all.
        input_flatten : Tensor, shape (N, S, C)
            The levels one after another, each row-major.
        input_spatial_shapes : sequence of (H, W) or integer tensor, shape (L, 2), in pixels
        input_level_start_index : sequence of ints or integer tensor, shape (L,), or None
        input_padding_mask : bool Tensor, shape (N, S), or None
            True marks padding, whose values are zeroed after the value projection.

        Returns
        -------
        Tensor, shape (N, Lq, C)

        Raises
        ------
        TypeError
            An argument is no dense tensor or has another dtype than the parameters, the mask is not
            boolean, or a dtype violates the contract of `ms_deform_attn`.
        ValueError
            A shape, level size or device does not fit.

        References
        ----------
        Zhu et al., "Deformable DETR", arXiv:2010.04159.
        """
        check_module(
            self.d_model,
            self.n_levels,
            query,
            reference_points,
            input_flatten,
            input_padding_mask,
        )
        value = self._project_value(input_flatten, input_padding_mask)
        offsets, weights = self._project_query(query)
        table = input_spatial_shapes, input_level_start_index
        if torch.compiler.is_compiling():
            table = traceable(input_spatial_shapes), traceable(input_level_start_index)
        locations = _sampling_locations(
            reference_points, offsets, value, weights, *table, self.use_4D_normalizer
        )
        projected: Tensor = self.output_proj(ms_deform_attn(value, *table, locations, weights))
        return projected

    def _project_value(self, input_flatten: Tensor, input_padding_mask: Tensor | None) -> Tensor:
        """The value of the operator, shape (N, S, M, D), zero at padding."""
        value = _projected("input_flatten", self.value_proj, input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0)
        heads: Tensor = value.unflatten(-1, (self.n_heads, -1))
        return heads

    def _project_query(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets, shape (N, Lq, M, L, P, 2), and normalised weights, shape (N, Lq, M, L, P)."""
        samples = (self.n_heads, self.n_levels, self.n_points)
        offsets = _projected("query", self.sampling_offsets, query)
        offsets = offsets.unflatten(-1, (*samples, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.n_heads, -1))
        return offsets, weights.softmax(-1).unflatten(-1, samples[1:])


def _projected(name: str, projection: nn.Module, given: Tensor) -> Any:
    """The projection of an argument, whose name torch's errors do not give."""
    try:
        return projection(given)
    except RuntimeError:
        weight = getattr(projection, "weight", None)
        if isinstance(
            weight, Tensor
        ):  # a wrapper's may be anywhere, that of a quantised layer is a method
            check_projected(name, given, weight)
        raise


def _sampling_locations(
    reference_points: Tensor,
    offsets: Tensor,
    value: Tensor,
    weights: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    boxes_by_pixel: bool,
) -> Tensor:
    """The sampling locations, shape (N, Lq, M, L, P, 2), for offsets of that shape."""
    wide = torch.promote_types(value.dtype, torch.float32)
    reference = reference_points.to(wide)[:, :, None, :, None]  # N or 1, Lq, 1, L or 1, 1, 2 or 4
    offsets = offsets.to(wide)
    boxes = reference.shape[-1] == 4
    if boxes and not boxes_by_pixel:
        steps = offsets / offsets.shape[4]
    else:
        try:
            steps = offsets / _widths_and_heights(spatial_shapes, offsets)
        except Exception:
            # Raises the error that names what is wrong with the levels.
            check(value, spatial_shapes, level_start_index, offsets, weights)
            raise
    return reference[..., :2] + steps * reference[..., 2:] * 0.5 if boxes else reference + steps


def _widths_and_heights(spatial_shapes: Any, offsets: Tensor) -> Tensor:
    """(W, H) of each level, shape (L, 1, 2), for offsets of shape (N, Lq, M, L, P, 2)."""
    shape = (offsets.shape[3], 1, 2)
    if isinstance(spatial_shapes, Tensor) and (
        spatial_shapes.device == offsets.device or torch.compiler.is_compiling()
    ):
        return spatial_shapes.to(offsets).flip(-1).view(shape)  # torch flips no uint16
    pairs = spatial_shapes
    if isinstance(pairs, Tensor):
        pairs = pairs.tolist()
    elif hasattr(pairs, "__dlpack__"):
        pairs = read_table("spatial_shapes", pairs)  # None, a TypeError below: it must stay unread
    # Fill number by number on the device: a copy from the host would synchronise.
    sizes = [offsets.new_full((), size) for h, w in pairs for size in (w, h)]
    return torch.stack(sizes).view(shape)
