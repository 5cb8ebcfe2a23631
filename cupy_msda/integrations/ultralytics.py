# SPDX-License-Identifier: Apache-2.0
"""RT-DETR of the package ultralytics (8.4.190).

::

    from cupy_msda.integrations.ultralytics import patch

    patch()

Models built before or after it use it; parameters and checkpoints stay as they are. Undo it before an
export to another format than ONNX, which would hold calls of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cupy_msda.integrations.forms import attend, plain
from cupy_msda.integrations.packages import Target, patch_targets
from cupy_msda.integrations.patching import Patch


def _forward(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`MSDeformAttn.forward`; `value_mask` is True for padding."""

    def forward(
        self: Any,
        query: Tensor,
        refer_bbox: Tensor,
        value: Tensor,
        value_shapes: Any,
        value_mask: Tensor | None = None,
    ) -> Tensor:
        samples = self.n_heads, self.n_levels, self.n_points
        return attend(self, samples, query, refer_bbox, value, value_shapes, value_mask)

    return forward


_MODULES = "ultralytics.nn.modules"
TARGETS = (
    Target(f"{_MODULES}.transformer", "MSDeformAttn.forward", _forward),
    Target(f"{_MODULES}.utils", "multi_scale_deformable_attn_pytorch", plain),
)


def patch(target: Any = None, *, strict: bool = True) -> Patch:
    """Replace the attention of RT-DETR; arguments, result and errors as `packages.patch_targets`."""
    return patch_targets(TARGETS, target, strict=strict)
