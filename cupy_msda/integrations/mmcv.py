# SPDX-License-Identifier: Apache-2.0
"""mmcv (2.2.0), mmcv-lite (2.2.0) and onedl-mmcv (2.3.6), with or without their compiled operators.

::

    from cupy_msda.integrations.mmcv import patch

    patch()  # before anything imports mmcv.ops, where mmcv._ext is missing

Replaced are `multi_scale_deformable_attn_pytorch`, `MultiScaleDeformableAttnFunction.apply`, the registered
module `MultiScaleDeformableAttention`, and `ms_deform_attn_forward` and `ms_deform_attn_backward` of the
extension `mmcv._ext`, which other projects call directly. Models built before or after it use them.

`mmcv.ops` does not import without the extension, which mmcv-lite lacks and which may not fit the
installed torch. A stand-in takes its place then: its other operators raise NotImplementedError when
they are called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor

from cupy_msda.integrations.forms import attend_sequences, plain
from cupy_msda.integrations.packages import Target, patch_targets
from cupy_msda.integrations.patching import Patch
from cupy_msda.torch import ms_deform_attn, ms_deform_attn_backward

_EXTENSION = "mmcv._ext"


class _Extension(ModuleType):
    """`mmcv._ext` where it is not compiled: it seems to have every function, since mmcv.ops looks for all of them."""

    def __init__(self, cause: ImportError) -> None:
        super().__init__(_EXTENSION)
        self.__spec__ = ModuleSpec(_EXTENSION, None)
        self._cause = cause

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def operator(*_: Any, **__: Any) -> Any:
            if name.startswith("get_"):  # versions of compilers, of which reports ask
                return "n/a"
            raise NotImplementedError(
                f"{_EXTENSION}.{name} must be compiled, which it is not ({self._cause}): install an mmcv with "
                "operators that fit the installed torch"
            )

        return operator


def _apply(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`MultiScaleDeformableAttnFunction.apply`; locations and weights keep their dtype, which theirs rounds."""

    def apply(
        value: Tensor,
        value_spatial_shapes: Any,
        value_level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: Any = None,
    ) -> Tensor:
        table = value_spatial_shapes, value_level_start_index
        return ms_deform_attn(value, *table, sampling_locations, attention_weights)

    return apply


def _extension_forward(_: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`mmcv._ext.ms_deform_attn_forward`."""

    def forward(
        value: Tensor,
        spatial_shapes: Any,
        level_start_index: Any,
        sampling_loc: Tensor,
        attn_weight: Tensor,
        im2col_step: Any = None,
    ) -> Tensor:
        return ms_deform_attn(value, spatial_shapes, level_start_index, sampling_loc, attn_weight)

    return forward


def _extension_backward(_: Callable[..., None]) -> Callable[..., None]:
    """`mmcv._ext.ms_deform_attn_backward`, which writes into the gradients that it is given."""

    def backward(
        value: Tensor,
        spatial_shapes: Any,
        level_start_index: Any,
        sampling_loc: Tensor,
        attn_weight: Tensor,
        grad_output: Tensor,
        grad_value: Tensor,
        grad_sampling_loc: Tensor,
        grad_attn_weight: Tensor,
        im2col_step: Any = None,
    ) -> None:
        given = value, spatial_shapes, level_start_index, sampling_loc, attn_weight
        gradients = ms_deform_attn_backward(grad_output, *given)
        for place, gradient in zip(
            (grad_value, grad_sampling_loc, grad_attn_weight), gradients, strict=True
        ):
            place.copy_(gradient)

    return backward


def _module_forward(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`MultiScaleDeformableAttention.forward`."""

    def forward(
        self: Any,
        query: Tensor,
        key: Any = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        level_start_index: Any = None,
        **others: Any,
    ) -> Tensor:
        identity = others.get("residual") if identity is None else identity  # its older name
        identity = query if identity is None else identity
        given = query, value, query_pos, key_padding_mask, reference_points, spatial_shapes
        attended: Tensor = self.dropout(attend_sequences(self, *given))
        return attended + identity

    return forward


_MODULE = "mmcv.ops.multi_scale_deform_attn"
TARGETS = (
    Target(_MODULE, "multi_scale_deformable_attn_pytorch", plain),
    Target(_MODULE, "MultiScaleDeformableAttnFunction.apply", _apply),
    Target(_MODULE, "MultiScaleDeformableAttention.forward", _module_forward),
    Target(_EXTENSION, "ms_deform_attn_forward", _extension_forward),
    Target(_EXTENSION, "ms_deform_attn_backward", _extension_backward),
)


def patch(target: Any = None, *, strict: bool = True) -> Patch:
    """Replace mmcv's attention; arguments, result and errors as `packages.patch_targets`.

    Without `target`, or with the package as target, the extension is replaced by a stand-in where it
    does not import; `undo` leaves that.
    """
    if target is None or isinstance(target, ModuleType):
        _provide_extension()
    return patch_targets(TARGETS, target, strict=strict)


def _provide_extension() -> None:
    """Put the stand-in in the place of an extension that does not import."""
    try:
        import_module("mmcv")
    except Exception:  # of which `patch_targets` tells
        return
    try:
        import_module(_EXTENSION)
    except ImportError as error:
        sys.modules[_EXTENSION] = _Extension(error)
