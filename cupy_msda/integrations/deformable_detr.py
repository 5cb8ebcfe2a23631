# SPDX-License-Identifier: Apache-2.0
"""The extension module of Deformable-DETR, `MultiScaleDeformableAttention`, without its build.

Deformable-DETR and its many forks run ``import MultiScaleDeformableAttention as MSDA`` and call the
two functions below. Call `install` before that import; their code then runs without an edit::

    from cupy_msda.integrations import deformable_detr

    deformable_detr.install()
    import models.ops.functions  # the fork's own autograd Function

Descendants have the same two functions under another name: ``install("groundingdino._C")``,
``install("detrex._C")``, ``install("vis4d_cuda_ops")``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from cupy_msda import torch as _torch

MODULE_NAME = "MultiScaleDeformableAttention"


def install(name: str = MODULE_NAME) -> ModuleType:
    """Let an import of the extension module `name` find this module from now on.

    A compiled extension of that name that is installed but not imported yet stays unused, with whatever
    other functions it has. Calling this again changes nothing.

    Parameters
    ----------
    name : str
        The name that the code imports. The package of a dotted name is imported: ``install("pkg._C")``
        imports `pkg` and gives it the attribute `_C`.

    Returns
    -------
    module
        This module, which that import now gives.

    Raises
    ------
    ImportError
        Another module of that name has been imported: code that holds it would go on using it. Or
        the package of a dotted name cannot be imported.

    References
    ----------
    https://github.com/fundamentalvision/Deformable-DETR, `models/ops`.
    """
    own = sys.modules[__name__]
    found = sys.modules.setdefault(name, own)
    if found is not own:
        where = getattr(found, "__file__", None) or repr(found)
        raise ImportError(
            f"{name} must not be imported before install() is called, and was, from {where}",
            name=name,
        )
    package, _, attribute = name.rpartition(".")
    if package:
        try:  # only now, since the package may import its extension
            setattr(import_module(package), attribute, own)
        except BaseException:
            del sys.modules[name]
            raise
    return own


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: Any = None,
) -> Tensor:
    """`cupy_msda.ms_deform_attn` with the extension's argument names.

    Parameters
    ----------
    value : Tensor, shape (N, S, M, D)
    spatial_shapes : integer Tensor, shape (L, 2), (H, W) in pixels
    level_start_index : integer Tensor, shape (L,)
    sampling_loc : Tensor, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
    attn_weight : Tensor, shape (N, Lq, M, L, P)
    im2col_step : int
        No effect: batches are never split. Some forks leave it out.

    Returns
    -------
    Tensor, shape (N, Lq, M*D)

    Errors and source: as `cupy_msda.ms_deform_attn`.
    """
    del im2col_step
    return _torch.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_loc, attn_weight
    )


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    im2col_step: Any = None,
) -> list[Tensor]:
    """`cupy_msda.ms_deform_attn_backward` with the extension's argument names and order.

    Parameters
    ----------
    value, spatial_shapes, level_start_index, sampling_loc, attn_weight, im2col_step
        As `ms_deform_attn_forward` takes them.
    grad_output : Tensor, shape (N, Lq, M*D), dtype of `value`

    Returns
    -------
    list of three Tensors
        Gradients of value, sampling_loc and attn_weight, with their shapes and dtypes.

    Errors and source: as `cupy_msda.ms_deform_attn`.
    """
    del im2col_step
    return list(
        _torch.ms_deform_attn_backward(
            grad_output, value, spatial_shapes, level_start_index, sampling_loc, attn_weight
        )
    )
