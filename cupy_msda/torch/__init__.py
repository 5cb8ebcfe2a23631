# SPDX-License-Identifier: Apache-2.0
"""The operator on torch tensors."""

from cupy_msda.torch.functions import (
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_backward,
    ms_deform_attn_core_pytorch,
)
from cupy_msda.torch.fused import ms_deform_attn_fused, ms_deform_attn_fused_backward

__all__ = [
    "MSDeformAttnFunction",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_core_pytorch",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_backward",
]
