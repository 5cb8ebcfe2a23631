# SPDX-License-Identifier: Apache-2.0
"""RT-DETR of the package kornia (0.9.0).

::

    from cupy_msda.integrations.kornia import patch

    patch()

Models built before or after it use it; parameters and checkpoints stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cupy_msda.integrations.forms import attend, plain
from cupy_msda.integrations.packages import Target, patch_targets
from cupy_msda.integrations.patching import Patch


def _forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`MultiScaleDeformableAttention.forward`, which knows boxes alone."""

    def forward(
        self: Any, query: Tensor, reference_points: Tensor, value: Tensor, value_spatial_shapes: Any
    ) -> Tensor:
        given = query, reference_points, value, value_spatial_shapes
        if reference_points.shape[-1] != 4:
            return original(self, *given)
        return attend(self, (self.num_heads, self.num_levels, self.num_points), *given, None)

    return forward


_HEAD = "kornia.models.rt_detr.architecture.rtdetr_head"
TARGETS = (
    Target(_HEAD, "MultiScaleDeformableAttention.forward", _forward),
    Target(_HEAD, "_deformable_attention_kernel", plain),
)


def patch(target: Any = None, *, strict: bool = True) -> Patch:
    """Replace the attention of RT-DETR; arguments, result and errors as `packages.patch_targets`."""
    return patch_targets(TARGETS, target, strict=strict)
