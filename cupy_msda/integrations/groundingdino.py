# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO: the packages groundingdino-py (0.4.0) and rf-groundingdino (0.3.0), and the repository itself.

::

    from cupy_msda.integrations.groundingdino import patch

    patch()

Models built before or after it use it; parameters and checkpoints stay as they are. The repository's
extension `groundingdino._C` is not called then, so that it need not be built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cupy_msda.integrations.forms import attend_sequences, plain
from cupy_msda.integrations.packages import Target, patch_targets
from cupy_msda.integrations.patching import Patch


def _forward(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`MultiScaleDeformableAttention.forward`."""

    def forward(
        self: Any,
        query: Tensor,
        key: Any = None,
        value: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        level_start_index: Any = None,
        **others: Any,
    ) -> Tensor:
        given = query, value, query_pos, key_padding_mask, reference_points, spatial_shapes
        return attend_sequences(self, *given)

    return forward


_MODULE = "groundingdino.models.GroundingDINO.ms_deform_attn"
TARGETS = (
    Target(_MODULE, "MultiScaleDeformableAttention.forward", _forward),
    Target(_MODULE, "multi_scale_deformable_attn_pytorch", plain),
)


def patch(target: Any = None, *, strict: bool = True) -> Patch:
    """Replace Grounding DINO's attention; arguments, result and errors as `packages.patch_targets`."""
    return patch_targets(TARGETS, target, strict=strict)
