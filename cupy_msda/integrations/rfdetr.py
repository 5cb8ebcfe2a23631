# SPDX-License-Identifier: Apache-2.0
"""RF-DETR: the packages rfdetr (1.11.2) and inference-models (0.39.6).

::

    from cupy_msda.integrations.rfdetr import patch

    patch()

Models built before or after it use it; parameters and checkpoints stay as they are. A model in export
mode (`model.export()`) keeps its own code, so that its graph is the one that the package makes.
"""

from __future__ import annotations

from typing import Any

from cupy_msda.integrations.forms import detr_forward, transposed
from cupy_msda.integrations.packages import Target, patch_targets
from cupy_msda.integrations.patching import Patch

_OPS = "rfdetr.models.ops"
_INFERENCE = "inference_models.models.rfdetr"
TARGETS = (
    Target(f"{_OPS}.modules.ms_deform_attn", "MSDeformAttn.forward", detr_forward),
    Target(f"{_OPS}.functions.ms_deform_attn_func", "ms_deform_attn_core_pytorch", transposed),
    Target(f"{_INFERENCE}.ms_deform_attn", "MSDeformAttn.forward", detr_forward),
    Target(f"{_INFERENCE}.ms_deform_attn_func", "ms_deform_attn_core_pytorch", transposed),
)


def patch(target: Any = None, *, strict: bool = True) -> Patch:
    """Replace RF-DETR's attention; arguments, result and errors as `packages.patch_targets`."""
    return patch_targets(TARGETS, target, strict=strict)
