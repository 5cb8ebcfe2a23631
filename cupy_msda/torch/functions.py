# SPDX-License-Identifier: Apache-2.0
"""torch: the functions on tensors, and the autograd Function around the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch.overrides import handle_torch_function, has_torch_function

from cupy_msda import contract
from cupy_msda.torch import derivatives, export, operators
from cupy_msda.torch.operands import (
    AUTO,
    BILINEAR,
    PLAIN,
    Arguments,
    BackwardOperands,
    Operands,
    Sampling,
    argument_gradients,
    arguments_of,
    constants_of,
    flat,
    given_of,
    joined,
    order_of,
    pack,
    pack_traced,
    register_once,
    sampling_by,
    sampling_of,
    tensors_of,
)

# value, spatial_shapes, level_start_index, sampling_locations, attention_weights
_Inputs = tuple[Any, Any, Any, Any, Any]


@contract.refuse_scripting
def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Any = None,
    interpolation: Any = BILINEAR,
    value_mask: Any = None,
    query_order: Any = AUTO,
) -> Tensor:
    """`cupy_msda.ms_deform_attn` for torch tensors: the same arguments, shapes, dtypes and errors, differentiable.

    Parameters
    ----------
    value : Tensor, shape (N, S, M, D)
    spatial_shapes : sequence of (H, W) or integer tensor, shape (L, 2), in pixels
    level_start_index : sequence of ints or integer tensor, shape (L,), or None: levels fill all S
    sampling_locations : Tensor, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
    attention_weights : Tensor, shape (N, Lq, M, L, P)
        Under autocast, locations and weights may have another 16-bit dtype than value: they become
        float32. Value keeps its dtype, and gradients have the dtypes of the arguments.
    num_points : sequence of ints, one for each level, or None
        If given, locations are (N, Lq, M, K, 2) and weights (N, Lq, M, K), level after level.
    interpolation : "bilinear" or "nearest"
    value_mask : bool Tensor, shape (N, S), or None: True where value is valid
    query_order : "auto", None or sequence of (H, W) pairs of ints, at most 16, in queries
        A hint about time: the grids on which the Lq queries lie one after another.

    Returns
    -------
    Tensor, shape (N, Lq, M*D), dtype of `value`

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ImportError
        As `cupy_msda.ms_deform_attn`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    sampling = sampling_by(num_points, interpolation, value_mask)
    if has_torch_function(inputs):  # a proxy of torch.fx, say
        keywords = sampling._asdict() | {"query_order": query_order}
        return handle_torch_function(ms_deform_attn, inputs, *inputs, **keywords)
    if torch.compiler.is_compiling():
        return _in_graph(_packed(inputs, query_order, sampling))
    try:
        if derivatives.active():
            return _transformed(pack(*inputs, query_order, sampling))
        try:
            records = (
                torch.is_grad_enabled()
                and (
                    value.requires_grad
                    or sampling_locations.requires_grad
                    or attention_weights.requires_grad
                )
                and _get_tracing_state() is None
            )
        except AttributeError:  # one of them is no tensor, which the check will say
            records = False
        if records:
            # Each argument that torch is spared is time on small problems.
            plain = query_order is AUTO and sampling is PLAIN
            return _record(*inputs, *(() if plain else (None, query_order, *sampling)))
        return operators.recorded_forward(pack(*inputs, query_order, sampling))[0]
    except (TypeError, RuntimeError) as error:
        mended = _mended(inputs, sampling, error)
        if mended is None:
            raise
    inputs, sampling = mended
    return ms_deform_attn(*inputs, query_order=query_order, **sampling._asdict())


@contract.refuse_scripting
def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Any = None,
    interpolation: Any = BILINEAR,
    value_mask: Any = None,
    query_order: Any = AUTO,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cupy_msda.ms_deform_attn_backward` for torch tensors; differentiable itself.

    Parameters
    ----------
    grad_output : Tensor, shape (N, Lq, M*D), dtype of `value`
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        As `ms_deform_attn` takes them.
    num_points, interpolation, value_mask, query_order
        Likewise.

    Returns
    -------
    tuple of three Tensors
        Gradients of value, sampling_locations and attention_weights, with their shapes and dtypes.

    Errors and source: as `ms_deform_attn`.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    sampling = sampling_by(num_points, interpolation, value_mask)
    operands = _packed(inputs, query_order, sampling)
    operators.refuse_undispatchable(operands)
    if not operators.is_dense(grad_output) or grad_output.is_meta:
        problem, _ = contract.check(*given_of(operands), **sampling_of(operands))
        contract.check_grad_output(problem, grad_output, value)
    try:
        gradients = derivatives.gradients(BackwardOperands(grad_output, operands, True, True))
    except RuntimeError as error:
        given = savable({"grad_output": grad_output, **_named(inputs, sampling)}, error)
        if given is None:
            raise
        inputs, sampling = _unnamed(given)
        operands = _packed(inputs, query_order, sampling)
        gradients = derivatives.gradients(BackwardOperands(grad_output, operands, True, True))
    by_value, by_locations, by_weights = gradients
    return (
        by_value,
        by_locations.to(sampling_locations.dtype),
        by_weights.to(attention_weights.dtype),
    )


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


class _Function(torch.autograd.Function):
    """The operator for autograd. `apply` is torch's: Dynamo can break a graph before it and go on after it."""

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
        query_order: Any = AUTO,
        *sampling: Any,
    ) -> Tensor:
        """Run the forward operator; `im2col_step` has no effect."""
        compiling = torch.compiler.is_compiling()
        if compiling and derivatives.active():
            raise RuntimeError(
                "MSDeformAttnFunction.apply must not be compiled under a transform of torch.func, where "
                "Dynamo takes it for a constant: call cupy_msda.ms_deform_attn"
            )
        inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        # Dynamo comes here from `apply`. autograd gives gradients the dtypes of the arguments.
        rules = Sampling(*sampling) if sampling else PLAIN
        operands = (
            _packed(inputs, query_order, rules) if compiling else pack(*inputs, query_order, rules)
        )
        ctx.constants = constants_of(operands)
        ctx.save_for_backward(*tensors_of(operands))
        if compiling:
            ctx.recorded = None  # the backward may run eagerly all the same
            return _traced(operands)
        output, ctx.recorded = operators.recorded_forward(operands)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `apply`; None where there is none or none is needed."""
        needed = Arguments(*ctx.needs_input_grad)
        needs_points = needed.sampling_locations or needed.attention_weights
        given = joined(ctx.saved_tensors, ctx.constants)
        operands = BackwardOperands(grad_outputs[0], given, needed.value, needs_points)
        # Grad mode is on only under create_graph, which a compiled backward refuses by itself.
        if torch.compiler.is_compiling():
            gradients = operators.BACKWARD(*flat(operands))
        elif torch.is_grad_enabled():
            gradients = derivatives.gradients(operands)
        else:
            gradients = operators.backward(operands, ctx.recorded)
        by_value, by_locations, by_weights = gradients
        return argument_gradients(  # torch ignores None for arguments that were left out
            by_value if needed.value else None,
            by_locations if needed.sampling_locations else None,
            by_weights if needed.attention_weights else None,
        )


class MSDeformAttnFunction(_Function):
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

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Let torch's own `apply` run a subclass with a forward or backward of its own, which ours would pass by."""
        super().__init_subclass__(**keywords)
        if {"forward", "backward"} & vars(cls).keys():
            cls.apply = super().apply  # type: ignore[method-assign]

    @classmethod
    def apply(cls, *arguments: Any) -> Tensor:
        """Run the operator; arguments, shapes and errors as `ms_deform_attn`, with `im2col_step`."""
        given = Arguments(*arguments)
        *inputs, _, query_order = given[: -len(Sampling._fields)]
        sampling = {name: getattr(given, name) for name in Sampling._fields}
        return ms_deform_attn(*inputs, query_order=query_order, **sampling)


# Runs `forward` and records it, outside of transforms: at half the cost of torch's `apply`.
_record = super(torch.autograd.Function, MSDeformAttnFunction).apply


def _mended(
    inputs: _Inputs, sampling: Sampling, error: Exception
) -> tuple[_Inputs, Sampling] | None:
    """The arguments of a call that failed as they can be taken; None if there is nothing to mend."""
    if isinstance(error, TypeError):
        promoted = _promoted(inputs)  # only now, since asking for autocast takes time
        return None if promoted is inputs else (promoted, sampling)
    copies = savable(_named(inputs, sampling), error)
    return None if copies is None else _unnamed(copies)


def _named(inputs: _Inputs, sampling: Sampling) -> dict[str, Any]:
    """The arguments by name."""
    return dict(zip(Arguments._fields, inputs, strict=False)) | sampling._asdict()


def _unnamed(arguments: dict[str, Any]) -> tuple[_Inputs, Sampling]:
    """The same, from names."""
    value, shapes, start_index, locations, weights = (
        arguments[name] for name in Arguments._fields[:5]
    )
    sampling = Sampling(*(arguments[name] for name in Sampling._fields))
    return (value, shapes, start_index, locations, weights), sampling


def savable(arguments: dict[str, Any], error: Exception) -> dict[str, Any] | None:
    """The arguments with copies of integers and masks that were made in inference mode, which autograd does not save.

    None if that is not the error.
    """
    if "Inference tensors" not in str(error):
        return None
    made = {
        name: part
        for name, part in arguments.items()
        if isinstance(part, Tensor) and part.is_inference()
    }
    for name, part in made.items():
        if part.is_floating_point():
            raise contract.made_in_inference_mode(name) from error
    copies = {name: part.clone() for name, part in made.items()}
    return arguments | copies if made else None


def _packed(inputs: _Inputs, query_order: Any, sampling: Sampling) -> Operands:
    """The operands, also in a graph and under autocast."""
    pack_here = pack_traced if torch.compiler.is_compiling() else pack
    return pack_here(*_promoted(inputs), query_order, sampling)


def _promoted(inputs: _Inputs) -> _Inputs:
    """The inputs with what autocast changes."""
    value, shapes, start_index, locations, weights = inputs
    points = promoted(value, locations, weights)
    changed = points[0] is not locations or points[1] is not weights
    return (value, shapes, start_index, *points) if changed else inputs


def promoted(value: Any, *points: Any) -> tuple[Any, ...]:
    """Arrays of points as autocast has them: in 16 bits and of another dtype than value they become float32."""
    narrow = [_is_narrow(one, value) for one in points]
    if not any(narrow) or not _autocasts(value):
        return points
    return tuple(
        one.float() if is_narrow else one for one, is_narrow in zip(points, narrow, strict=True)
    )


def _is_narrow(points: Any, value: Any) -> bool:
    """Whether these are locations or weights in 16 bits beside a value of another dtype."""
    return (
        isinstance(points, Tensor)
        and isinstance(value, Tensor)
        and points.dtype in operators.HALF
        and points.dtype != value.dtype
    )


def _autocasts(value: Tensor) -> bool:
    """Whether autocast is on for the device of value; it leaves float64 alone."""
    return (
        value.dtype != torch.float64
        and value.device.type in ("cpu", "cuda")
        and torch.is_autocast_enabled(value.device.type)
    )


def _in_graph(operands: Operands) -> Tensor:
    """The call of a compiled or exported function, packed before `apply`, inside which Dynamo can break no graph."""
    if derivatives.active():
        return _transformed(operands)
    return _Function.apply(*arguments_of(operands))  # type: ignore[no-any-return,no-untyped-call]


def _transformed(operands: Operands) -> Tensor:
    """The forward operator under a transform of `torch.func` or in forward mode."""
    operators.refuse_undispatchable(operands)
    return derivatives.attention(operands)


def _traced(operands: Operands) -> Tensor:
    """The forward operator in a graph or, for ONNX, which has standard operators only, its decomposition."""
    operators.refuse_undispatchable(operands)
    if torch.onnx.is_in_onnx_export():
        return export.forward(operands)
    return operators.FORWARD(*operands)  # type: ignore[no-any-return]


def _differentiable_forward(*arguments: Any) -> Tensor:
    """What a trace of torch.jit runs for `ms_deform_attn`."""
    operands = Operands(*arguments)
    return ms_deform_attn(
        *given_of(operands), query_order=order_of(operands), **sampling_of(operands)
    )


register_once(
    torch.library.impl,
    "cupy_msda::ms_deform_attn",
    "CompositeImplicitAutograd",
    _differentiable_forward,
)
