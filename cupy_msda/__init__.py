# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention as run-time-compiled CUDA and CPU kernels: no build step.

Importing this package imports neither torch, CuPy nor Numba; each is loaded when a name or an array
needs it. Where torch is imported already, its operators are registered, so that saved programs load;
where it is imported later, ``import cupy_msda.torch`` does that.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cupy_msda.api import (
        MSDeformAttnFusedGradients,
        MSDeformAttnGradients,
        ms_deform_attn,
        ms_deform_attn_backward,
        ms_deform_attn_fused,
        ms_deform_attn_fused_backward,
        warmup,
    )
    from cupy_msda.cuda.compile import KernelCompileError
    from cupy_msda.modules import MSDeformAttn
    from cupy_msda.recording import record
    from cupy_msda.torch import MSDeformAttnFunction, ms_deform_attn_core_pytorch
    from cupy_msda.torch.export import decompositions

__version__ = "0.1.0"

_HOMES = {
    "KernelCompileError": "cupy_msda.cuda.compile",
    "MSDeformAttn": "cupy_msda.modules",
    "MSDeformAttnFunction": "cupy_msda.torch",
    "MSDeformAttnFusedGradients": "cupy_msda.api",
    "MSDeformAttnGradients": "cupy_msda.api",
    "decompositions": "cupy_msda.torch.export",
    "ms_deform_attn": "cupy_msda.api",
    "ms_deform_attn_backward": "cupy_msda.api",
    "ms_deform_attn_core_pytorch": "cupy_msda.torch",
    "ms_deform_attn_fused": "cupy_msda.api",
    "ms_deform_attn_fused_backward": "cupy_msda.api",
    "record": "cupy_msda.recording",
    "warmup": "cupy_msda.api",
}

__all__ = [
    "KernelCompileError",
    "MSDeformAttn",
    "MSDeformAttnFunction",
    "MSDeformAttnFusedGradients",
    "MSDeformAttnGradients",
    "decompositions",
    "ms_deform_attn",
    "ms_deform_attn_backward",
    "ms_deform_attn_core_pytorch",
    "ms_deform_attn_fused",
    "ms_deform_attn_fused_backward",
    "record",
    "warmup",
]

_SUBMODULES = ("export", "plot", "torch")  # whose imports need more than NumPy


def __getattr__(name: str) -> Any:
    if name not in _HOMES and name not in _SUBMODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        if name in _SUBMODULES:
            return import_module(f"cupy_msda.{name}")
        value = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f'cupy_msda.{name} needs torch: pip install "cupy-msda[torch]"', name="torch"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _register_operators() -> None:
    """Register torch's operators, without which no saved program that calls them can be loaded."""
    try:
        import_module("cupy_msda.torch")
    except Exception as error:  # a torch that is too old is no obstacle to other arrays
        warnings.warn(
            f"cupy_msda cannot register its operators with torch: {error!r}", stacklevel=3
        )


if sys.modules.get("torch") is not None:
    _register_operators()
