# SPDX-License-Identifier: Apache-2.0
"""The attention module of Deformable-DETR, with its parameters, so that checkpoints load unchanged."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cupy_msda.contract import NO_SCRIPT, check_module, check_projected, check_sizes
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_fused
from cupy_msda.torch.fused import locations_and_weights, scaled_by_pixel

# Leaf functions in a graph of torch.fx: they branch on shapes and dtypes, which fx does not know.
for _name in (
    *("check_module", "ms_deform_attn", "ms_deform_attn_fused", "locations_and_weights"),
    *("_widened", "_scaled_by_pixel"),
):
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
        *,
        return_locations: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Attend from each query to the features around its reference points.

        Never synchronises with the device. Sampling locations and attention weights are computed in
        float32 or wider, also under autocast: a half-precision coordinate can be off by a large part of
        a pixel.

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
            True marks padding, where the projected value counts as zero.
        return_locations : bool
            Also return where each query looks, and with what weight.

        Returns
        -------
        Tensor, shape (N, Lq, C)
            With `return_locations`, a tuple of it and of two tensors: the sampling locations, shape
            (N, Lq, M, L, P, 2), and the attention weights, shape (N, Lq, M, L, P).

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
            return_locations,
        )
        value = _projected("input_flatten", self.value_proj, input_flatten)
        value = value.unflatten(-1, (self.n_heads, -1))
        mask = None if input_padding_mask is None else ~input_padding_mask
        samples = (self.n_heads, self.n_levels, self.n_points)
        offsets = _projected("query", self.sampling_offsets, query).unflatten(-1, (*samples, 2))
        logits = self.attention_weights(query).unflatten(-1, samples)
        table = input_spatial_shapes, input_level_start_index
        given = (value, *table, _widened(reference_points, value), offsets, logits)
        if self.use_4D_normalizer:
            given = (*given[:4], _scaled_by_pixel(*given), logits)
        if return_locations is True:  # torch.fx knows its identity alone
            locations, weights = locations_and_weights(*given)
            attended = ms_deform_attn(value, *table, locations, weights, value_mask=mask)
            return self.output_proj(attended), locations, weights
        output: Tensor = self.output_proj(ms_deform_attn_fused(*given, value_mask=mask))
        return output


def _widened(reference_points: Tensor, value: Tensor) -> Tensor:
    """Reference points in the dtype to compute in."""
    return reference_points.to(torch.promote_types(value.dtype, torch.float32))


def _scaled_by_pixel(*given: Any) -> Any:
    """Offsets for the operator, of those from boxes in units of half the box per pixel; others as they are."""
    *_, references, offsets, _ = given
    return scaled_by_pixel(*given) if references.shape[-1] == 4 else offsets


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
