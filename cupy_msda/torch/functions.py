# SPDX-License-Identifier: Apache-2.0
"""torch: the functions on tensors, and the autograd Function around the operators."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from cupy_msda.contract import check, check_grad_output, check_query_order, unsupported_device
from cupy_msda.problem import INT32_MAX
from cupy_msda.torch import derivatives as transforms
from cupy_msda.torch.operators import BACKWARD, FORWARD

_AUTO = "auto"


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    query_order: Any = _AUTO,
) -> Tensor:
    """`cupy_msda.ms_deform_attn` for torch tensors: the same arguments, shapes, dtypes and errors, differentiable.

    Parameters
    ----------
    value : Tensor, shape (N, S, M, D)
    spatial_shapes : sequence of (H, W) or integer tensor, shape (L, 2), in pixels
    level_start_index : sequence of ints or integer tensor, shape (L,), or None
    sampling_locations : Tensor, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
    attention_weights : Tensor, shape (N, Lq, M, L, P)
    query_order : "auto", None or sequence of (H, W) pairs of ints, at most 16, in queries
        A hint about time: the grids on which the Lq queries lie one after another.

    Returns
    -------
    Tensor, shape (N, Lq, M*D), dtype of `value`

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ModuleNotFoundError
        As `cupy_msda.ms_deform_attn`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    if has_torch_function(inputs):  # a proxy of torch.fx, say
        return handle_torch_function(ms_deform_attn, inputs, *inputs, query_order=query_order)
    if torch.compiler.is_compiling() and transforms.active():  # Dynamo passes `apply` by
        return transforms.attention(*_operands(*inputs, None, query_order))
    if query_order is _AUTO:  # each argument that `apply` is spared is time on small problems
        return MSDeformAttnFunction.apply(*inputs)
    return MSDeformAttnFunction.apply(*inputs, None, query_order)


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    query_order: Any = _AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cupy_msda.ms_deform_attn_backward` for torch tensors; differentiable itself.

    Parameters
    ----------
    grad_output : Tensor, shape (N, Lq, M*D), dtype of `value`
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights, query_order
        As `ms_deform_attn` takes them.

    Returns
    -------
    tuple of three Tensors
        Gradients of value, sampling_locations and attention_weights, with their shapes and dtypes.

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ModuleNotFoundError
        As `cupy_msda.ms_deform_attn`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    *operands, order = _operands(*inputs, None, query_order)
    if not _dense(grad_output) or grad_output.is_meta:
        check_grad_output(check(*inputs)[0], grad_output, value)
    return transforms.gradients(grad_output, *operands, True, True, order)


def ms_deform_attn_core_pytorch(
    value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same operator in terms of `torch.nn.functional.grid_sample`: slow, on any device, differentiable once.

    Parameters
    ----------
    value : Tensor, shape (N, S, M, D)
        The levels one after another, nothing between or after them.
    spatial_shapes : sequence of (H, W) or integer tensor, shape (L, 2), L >= 1, H and W >= 1
        A tensor on a device is read, which synchronises.
    sampling_locations : Tensor, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
    attention_weights : Tensor, shape (N, Lq, M, L, P)

    Returns
    -------
    Tensor, shape (N, Lq, M*D), dtype of `value`

    Raises
    ------
    RuntimeError, ValueError
        torch's own, where shapes do not fit.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    n, _, m, d = value.shape
    lq = sampling_locations.shape[1]
    sizes = spatial_shapes.tolist() if hasattr(spatial_shapes, "tolist") else spatial_shapes
    # grid_sample knows one dtype; half values with float32 locations are computed in float32.
    wide = torch.promote_types(value.dtype, sampling_locations.dtype)
    maps = torch.split(value.to(wide), [h * w for h, w in sizes], dim=1)
    grids = (2 * sampling_locations.to(wide) - 1).transpose(1, 2).flatten(0, 1)  # N*M, Lq, L, P, 2
    samples = [
        torch.nn.functional.grid_sample(
            level.permute(0, 2, 3, 1).reshape(n * m, d, h, w),
            grids[:, :, index],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for index, (level, (h, w)) in enumerate(zip(maps, sizes, strict=True))
    ]  # each (N*M, D, Lq, P)
    weights = attention_weights.transpose(1, 2).reshape(n * m, 1, lq, -1)  # N*M, 1, Lq, L*P
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)  # N*M, D, Lq
    return output.view(n, m * d, lq).transpose(1, 2).to(value.dtype)


class MSDeformAttnFunction(torch.autograd.Function):
    """The autograd Function of Deformable-DETR's `ops`, for code that calls its `apply`.

    ``MSDeformAttnFunction.apply(value, spatial_shapes, level_start_index, sampling_locations,
    attention_weights, im2col_step)`` takes and returns what `ms_deform_attn` does. `im2col_step`
    may be anything or left out: batches are never split, so it has no effect. `query_order` is "auto".

    Gradients flow to value, sampling_locations and attention_weights. One that is not needed is
    not computed (on a CPU: not kept, since one pass makes all three). They are differentiable to
    any order themselves, in both modes and under the transforms of `torch.func`, at the speed of
    the reference.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Tensor:
        """Run the operator; arguments, shapes and errors as `ms_deform_attn`, with `im2col_step`."""
        if transforms.active():
            return transforms.attention(*_operands(*arguments))
        if not torch.is_grad_enabled():
            return _forward(*_operands(*arguments))
        return super().apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]

    # What follows `im2col_step` comes from `ms_deform_attn` alone.
    # Not setup_context: with it, every apply inspects a signature and costs several times as much.
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        spatial_shapes: Any,
        level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: Any = None,
        query_order: Any = _AUTO,
    ) -> Tensor:
        """Run the forward operator; `im2col_step` has no effect."""
        if torch.compiler.is_compiling() and transforms.active():
            raise RuntimeError(
                "MSDeformAttnFunction.apply must not be compiled under a transform of torch.func, where "
                "Dynamo takes it for a constant: call cupy_msda.ms_deform_attn"
            )
        inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        operands = _operands(*inputs, im2col_step, query_order)
        ctx.integers = operands[3], operands[4], operands[7]
        ctx.save_for_backward(*operands[:3], sampling_locations, attention_weights)
        return _forward(*operands)

    @staticmethod
    def symbolic(*_: Any) -> None:
        """Refuse the old exporter to ONNX, which calls this and cannot look into a Function."""
        raise RuntimeError("torch.onnx.export needs dynamo=True for cupy_msda.ms_deform_attn")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `apply`; None where there is none or none is needed."""
        value, shapes, start_index, locations, weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        sizes, starts, order = ctx.integers
        table = shapes, start_index, sizes, starts
        flags = needed[0], needed[3] or needed[4]
        # Grad mode is on only under create_graph, which a compiled backward refuses by itself.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = transforms.gradients if twice else BACKWARD
        gradients = run(grad_outputs[0], value, *table, locations, weights, *flags, order)
        by_value, by_locations, by_weights = gradients
        return (
            by_value if needed[0] else None,
            None,
            None,
            by_locations if needed[3] else None,
            by_weights if needed[4] else None,
            None,
            None,
        )


# Types of arguments that are no subclass of Tensor, for a quick look.
_PLAIN = {Tensor, torch.nn.Parameter, list, tuple, type(None)}


def _operands(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    im2col_step: Any = None,
    query_order: Any = _AUTO,
) -> tuple[Any, ...]:
    """The arguments of the forward operator; an error for what would not reach it, or not its checks."""
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    # The quick look is not for Dynamo, whose older versions know no such method of a set.
    quick = not torch.compiler.is_compiling() and _PLAIN.issuperset(map(type, inputs))
    if not quick and "DTensor" in [type(given).__name__ for given in inputs]:
        import cupy_msda.distributed  # noqa: F401 - its import registers the rule for DTensors
    if not (_dense(value) and _dense(sampling_locations) and _dense(attention_weights)):
        check(*inputs)
        raise TypeError(f"value must be a dense torch tensor, got {type(value).__name__}")
    if not (value.is_cpu or value.is_cuda or value.is_meta):
        raise unsupported_device(str(value.device))
    if value.is_cuda and torch.version.hip is not None:
        raise unsupported_device(f"{value.device} of a ROCm build of torch")
    shapes, start_index, sizes, starts = _table(*inputs)
    order = _order(query_order, sampling_locations)
    if (
        value.is_meta
        or sampling_locations.is_meta
        or attention_weights.is_meta
        or (shapes is not None and shapes.is_meta)
        or (start_index is not None and start_index.is_meta)
    ):
        # Where only shapes are computed, nothing else does.
        problem, _ = check(*inputs)
        check_query_order(query_order, problem.num_queries)
    return value, shapes, start_index, sizes, starts, sampling_locations, attention_weights, order


def _dense(array: Any) -> bool:
    """Whether it is a torch tensor of a layout that the operators take."""
    return isinstance(array, Tensor) and array.layout is torch.strided and not array.is_nested


def _table(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor | None, Tensor | None, list[int] | None, list[int] | None]:
    """The level table as the operators take it."""
    shapes, start_index, sizes, starts = None, None, None, None
    try:
        if isinstance(spatial_shapes, Tensor):
            shapes = spatial_shapes
        else:
            sizes = [_integer(number) for h, w in spatial_shapes for number in (h, w)]
        if isinstance(level_start_index, Tensor):
            start_index = level_start_index
        elif level_start_index is not None:
            starts = [_integer(start) for start in level_start_index]
    except (OverflowError, TypeError, ValueError):
        # Says which argument is wrong, and in what.
        check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        raise
    return shapes, start_index, sizes, starts


def _order(query_order: Any, sampling_locations: Tensor) -> list[int] | None:
    """The order of the queries as the operators take it."""
    if isinstance(query_order, str) and query_order == "auto":
        return None
    if query_order is None:
        return []
    try:
        numbers = [number for h, w in query_order for number in (h, w)]
        order = [_integer(number) for number in numbers]
    except (OverflowError, TypeError, ValueError):
        check_query_order(query_order, sampling_locations.shape[1])  # says what is wrong
        raise
    # Like ints to the operator, which would not know them.
    if not order or any(isinstance(number, (bool, Tensor)) for number in numbers):
        check_query_order(query_order, sampling_locations.shape[1])
    return order


def _integer(number: Any) -> Any:
    """As an int of a size that the operators may be given, or the symbol that a tracer has for one."""
    if isinstance(number, torch.SymInt):  # its `__index__` would make it a constant
        return number
    index = operator.index(number)
    if -INT32_MAX <= index <= INT32_MAX:
        return index
    raise OverflowError


def _forward(*operands: Any) -> Tensor:
    """The forward operator or, for ONNX, which has standard operators only, its decomposition."""
    # The first question is the cheaper one.
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        from cupy_msda.torch import export

        return export.forward(*operands)
    return FORWARD(*operands)  # type: ignore[no-any-return]
