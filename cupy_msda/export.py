# SPDX-License-Identifier: Apache-2.0
"""ONNX files of models that call the operator, by standard operators or with a node for a plugin of TensorRT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from cupy_msda.torch import operators, tensorrt
from cupy_msda.torch.export import decompositions_by, forward

_PLUGINS = {None: forward, "tensorrt": tensorrt.forward}


def onnx(
    model: Any,
    args: tuple[Any, ...] = (),
    f: Any = None,
    *,
    plugin: str | None = None,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    custom_translation_table: Mapping[Any, Callable[..., Any]] | None = None,
    **options: Any,
) -> Any:
    """`torch.onnx.export` with a choice of what becomes of the operators of this package.

    By default they become gathers and other standard operators, and never GridSample, as `torch.onnx.export` of
    a module makes them. With ``plugin="tensorrt"`` each call becomes one node ``MultiscaleDeformableAttnPlugin_TRT``
    (domain TRT, plugin_version "2"), which TensorRT computes by NVIDIA's plugin of that name and onnxruntime cannot
    run. Its inputs are value, the level sizes and starts in int32, sampling locations and attention weights: in
    float16 where all three are, else in float32. Standard operators around it stand for fused calls, masks and
    numbers of points that differ by level (`num_points`)::

        cupy_msda.export.onnx(model.eval(), (images,), "model.onnx", plugin="tensorrt")

    Parameters
    ----------
    model : torch.nn.Module or torch.export.ExportedProgram
        A module goes through `torch.export.export` with `args`, `kwargs` and `dynamic_shapes`.
    args, f, kwargs, dynamic_shapes, **options
        As `torch.onnx.export` takes them.
    plugin : None or "tensorrt"
    custom_translation_table : mapping, optional
        As `torch.onnx.export` takes it. It may also translate ``torch.ops.cupy_msda.ms_deform_attn_forward.default``
        and ``ms_deform_attn_fused_forward.default``, in a module as in a program; `torch.onnx.export` itself ignores
        these for a module. Fused calls become plain ones where the table has only the first.

    Returns
    -------
    torch.onnx.ONNXProgram

    Raises
    ------
    ValueError
        `plugin` is neither; `dynamo` is False; or, with a plugin, a call has `interpolation` "nearest".
    TypeError
        With a plugin, a call has float64.
    RuntimeError
        With a plugin: this torch has no `torch.onnx.ops.symbolic`.
    torch.onnx.OnnxExporterError
        torch's own.

    References
    ----------
    https://github.com/NVIDIA/TensorRT, plugin/multiscaleDeformableAttnPlugin.
    """
    _check_plugin(plugin)
    if not options.setdefault("dynamo", True):
        raise ValueError("dynamo must be True: the old exporter cannot export the operator")
    table = dict(custom_translation_table or {})
    program = model
    if not isinstance(model, ExportedProgram):
        program = _exported(model, args, kwargs, dynamic_shapes)
    plain = _as_it_is if operators.FORWARD in table else _PLUGINS[plugin]
    rules = decompositions_by(plain)
    for operator in table.keys() & rules.keys():
        del rules[operator]
    return torch.onnx.export(
        program.run_decompositions(rules),
        f=f,
        dynamic_shapes=dynamic_shapes,  # for the names alone: the program has the shapes
        custom_translation_table=table,
        **options,
    )


def _check_plugin(plugin: Any) -> None:
    """Refuse what is no plugin, and a torch that cannot make its node."""
    if plugin not in _PLUGINS:
        raise ValueError(f'plugin must be None or "tensorrt", got {plugin!r}')
    if plugin is not None and not hasattr(torch.onnx, "ops"):
        raise RuntimeError(
            f'plugin must be None for a torch without torch.onnx.ops, got "{plugin}" and torch {torch.__version__}: '
            "torch 2.13 has it"
        )


def _exported(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Any, dynamic_shapes: Any
) -> ExportedProgram:
    """The program of a module, with the operators of this package whole."""
    if model.training:
        warnings.warn(
            "the model is exported in training mode: call model.eval() before, unless that is meant",
            stacklevel=3,
        )
    sizes = _pytree.tree_map(_size, dynamic_shapes)
    return torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)


def _size(dimension: Any) -> Any:
    """A dimension as torch.export takes it; torch.onnx also takes names."""
    return Dim.DYNAMIC if isinstance(dimension, str) else dimension


def _as_it_is(operands: Any) -> Any:
    """The plain forward operator itself, for a table that translates it."""
    return operators.FORWARD(*operands)
