# SPDX-License-Identifier: Apache-2.0
"""torch: the fused operator, whose inputs are reference points, offsets and logits.

Where torch transforms or shards a call, or the fused kernels do not take it, it is composed: torch computes locations
and weights, and the plain operator the rest, so that the fused operator can do there whatever both can.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state
from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function

from cupy_msda import contract
from cupy_msda.cpu import backend
from cupy_msda.torch import derivatives, exchange, flops, functions, operators
from cupy_msda.torch.fused_operands import (
    FusedBackwardOperands,
    FusedOperands,
    Needs,
    check,
    check_traced,
    composed,
    composed_gradients,
    differentiable_of,
    flat,
    flat_backward,
    fused_backward_operands,
    fused_operands,
    joined,
    needs_of,
    points_of,
    saved_of,
)
from cupy_msda.torch.operands import (
    AUTO,
    BILINEAR,
    PLAIN,
    Operands,
    Sampling,
    given_of,
    inputs_of,
    order_of,
    pack,
    pack_traced,
    register_once,
    sampling_by,
    sampling_of,
    with_inputs,
)

_NAMES = (
    *("value", "spatial_shapes", "level_start_index"),
    *("reference_points", "sampling_offsets", "attention_logits"),
)


@contract.refuse_scripting
def ms_deform_attn_fused(  # noqa: PLR0913 - a module's tensors, and how to sample
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    num_points: Any = None,
    offset_scale: float = 0.5,
    interpolation: Any = BILINEAR,
    value_mask: Any = None,
    query_order: Any = AUTO,
) -> Tensor:
    """`cupy_msda.ms_deform_attn_fused` for torch tensors: the same arguments, shapes and errors, differentiable.

    Parameters
    ----------
    value, spatial_shapes, level_start_index, num_points, interpolation, value_mask, query_order
        As `ms_deform_attn` takes them.
    reference_points : Tensor, shape (N or 1, Lq, L or 1, 2 or 4), (x, y) or (x, y, w, h) as fractions of the level
    sampling_offsets : Tensor, shape (N, Lq, M, L, P, 2) or, with `num_points`, (N, Lq, M, K, 2)
    attention_logits : Tensor, shape (N, Lq, M, L, P) or (N, Lq, M, K)
        Under autocast, all three may have another 16-bit dtype than value.
    offset_scale : float

    Returns
    -------
    Tensor, shape (N, Lq, M*D), dtype of `value`

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ImportError
        As `cupy_msda.ms_deform_attn_fused`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    inputs = (
        *(value, spatial_shapes, level_start_index),
        *(reference_points, sampling_offsets, attention_logits),
    )
    sampling = sampling_by(num_points, interpolation, value_mask)
    if has_torch_function(inputs):  # a proxy of torch.fx, say
        keywords = sampling._asdict() | {"offset_scale": offset_scale, "query_order": query_order}
        return handle_torch_function(ms_deform_attn_fused, inputs, *inputs, **keywords)
    operands = _packed(inputs, offset_scale, sampling, query_order)
    if _must_compose(operands):
        return _composed_call(operands)
    if not torch.compiler.is_compiling() and _get_tracing_state() is not None:
        return operators.DIFFERENTIABLE_FUSED(*flat(operands))  # type: ignore[no-any-return]
    if not torch.compiler.is_compiling() and not _is_recorded(operands):
        return _run(operands)
    try:
        output: Tensor = _Fused.apply(*flat(operands))  # type: ignore[no-untyped-call]
        return output
    except RuntimeError as error:
        given = dict(zip(_NAMES, inputs, strict=True)) | sampling._asdict()
        copies = functions.savable(given, error)
        if copies is None:
            raise
    return ms_deform_attn_fused(**copies, offset_scale=offset_scale, query_order=query_order)


@contract.refuse_scripting
def ms_deform_attn_fused_backward(  # noqa: PLR0913 - likewise
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    num_points: Any = None,
    offset_scale: float = 0.5,
    interpolation: Any = BILINEAR,
    value_mask: Any = None,
    query_order: Any = AUTO,
) -> tuple[Tensor, ...]:
    """`cupy_msda.ms_deform_attn_fused_backward` for torch tensors; differentiable itself.

    Parameters
    ----------
    grad_output : Tensor, shape (N, Lq, M*D), dtype of `value`
    value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits
        As `ms_deform_attn_fused` takes them.
    num_points, offset_scale, interpolation, value_mask, query_order
        Likewise.

    Returns
    -------
    tuple of four Tensors
        Gradients of value, reference points, offsets and logits, with their shapes and dtypes.

    Errors and source: as `ms_deform_attn_fused`.
    """
    inputs = (
        *(value, spatial_shapes, level_start_index),
        *(reference_points, sampling_offsets, attention_logits),
    )
    sampling = sampling_by(num_points, interpolation, value_mask)
    forward = _packed(inputs, offset_scale, sampling, query_order)
    if not torch.compiler.is_compiling():
        check(forward, grad_output)
    operands = FusedBackwardOperands(grad_output, forward, Needs(True, True, True))
    recorded = torch.is_grad_enabled() and grad_output.requires_grad
    if recorded or _is_recorded(forward) or _must_compose(forward):
        found = composed_gradients(operands, derivatives.gradients)
    else:
        found = _run_backward(operands)
    given = (value, reference_points, sampling_offsets, attention_logits)
    return tuple(result.to(tensor.dtype) for result, tensor in zip(found, given, strict=True))


def locations_and_weights(
    *inputs: Any, num_points: Any = None, offset_scale: Any = 0.5
) -> tuple[Tensor, Tensor]:
    """Sampling locations and attention weights of what `ms_deform_attn_fused` takes by position, differentiable."""
    operands = _packed(inputs, offset_scale, sampling_by(num_points, BILINEAR, None), AUTO)
    _check_here(operands)
    _, locations, weights = inputs_of(composed(operands))
    return locations, weights


def scaled_by_pixel(*inputs: Any) -> Tensor:
    """Offsets from boxes for `ms_deform_attn_fused`, of offsets that are in units of half the box per pixel."""
    operands = _packed(inputs, 0.5, PLAIN, AUTO)
    _check_here(operands)
    points = points_of(operands)
    offsets: Tensor = points.offsets * points.offsets.shape[4] / points.sizes[:, None]
    return offsets


def _check_here(operands: FusedOperands) -> None:
    """Check the contract, but in a graph, where the operator does, and of DTensors, where the plain one does."""
    if not torch.compiler.is_compiling() and not _has_dtensors(operands):
        checked(operands)


def _has_dtensors(operands: FusedOperands) -> bool:
    """Whether the call is sharded."""
    return "DTensor" in [type(tensor).__name__ for tensor in differentiable_of(operands)]


def _packed(
    inputs: tuple[Any, ...], offset_scale: Any, sampling: Sampling, query_order: Any
) -> FusedOperands:
    """The operands, also in a graph and under autocast."""
    value, shapes, start_index, references, offsets, logits = inputs
    references, offsets, logits = functions.promoted(value, references, offsets, logits)
    arguments = value, shapes, start_index, offsets, logits, query_order, sampling
    check_given = partial(_check_given, references, offset_scale)
    pack_here = pack_traced if torch.compiler.is_compiling() else pack
    return FusedOperands(references, pack_here(*arguments, check_given), offset_scale)


def _check_given(
    references: Any,
    offset_scale: Any,
    value: Any,
    shapes: Any,
    start_index: Any,
    *points: Any,
    **rules: Any,
) -> Any:
    """`contract.check_fused` with the arguments of `contract.check`."""
    given = value, shapes, start_index, references, *points
    return contract.check_fused(*given, offset_scale=offset_scale, **rules)


def _differentiable(*arguments: Any) -> Tensor:
    """What a trace of torch.jit runs for `ms_deform_attn_fused`."""
    operands = fused_operands(arguments)
    value, *table, offsets, logits = given_of(operands.given)
    return ms_deform_attn_fused(
        *(value, *table, operands.reference_points, offsets, logits),
        **sampling_of(operands.given),
        offset_scale=operands.offset_scale,
        query_order=order_of(operands.given),
    )


def _must_compose(operands: FusedOperands) -> bool:
    """Whether torch has to see what the operator is made of."""
    if derivatives.active():
        return True
    if torch.compiler.is_compiling():
        return bool(torch.onnx.is_in_onnx_export())
    return _has_dtensors(operands)


def _composed_call(operands: FusedOperands) -> Tensor:
    """The output by the plain operator, of locations and weights by torch."""
    _check_here(operands)  # by the names of the arguments, before torch's own errors
    plain = composed(operands)
    order = order_of(plain)
    return functions.ms_deform_attn(*given_of(plain), **sampling_of(plain), query_order=order)


def _is_recorded(operands: FusedOperands) -> bool:
    """Whether autograd records the call; a wrong argument is left to the check."""
    return torch.is_grad_enabled() and any(
        getattr(part, "requires_grad", False) for part in differentiable_of(operands)
    )


class _Fused(Function):
    """The fused operator for autograd; its arguments are those of the operator."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        """Run the forward operator."""
        operands = fused_operands(arguments)
        tensors, ctx.constants = saved_of(operands)
        ctx.save_for_backward(*tensors)
        if torch.compiler.is_compiling():
            return operators.FUSED_FORWARD(*arguments)  # type: ignore[no-any-return]
        return _run(operands)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Run the backward operator or, to be differentiable, what it is composed of."""
        needed = fused_operands(ctx.needs_input_grad)
        by_value, by_references, by_offsets, by_logits = differentiable_of(needed)
        needs = Needs(by_value, by_offsets or by_logits, by_references)
        given = joined(ctx.saved_tensors, ctx.constants)
        operands = FusedBackwardOperands(grad_outputs[0], given, needs)
        if torch.compiler.is_compiling():
            results = operators.FUSED_BACKWARD(*flat_backward(operands))
        elif torch.is_grad_enabled():
            results = composed_gradients(operands, derivatives.gradients)
        else:
            results = _run_backward(operands)
        wanted = [
            result if need else None
            for result, need in zip(results, differentiable_of(needed), strict=True)
        ]
        return _argument_gradients(*wanted)


# Made here: torch 2.4's Dynamo does not trace how.
_NO_GRADIENTS = Operands(*(None for _ in Operands._fields))


def _argument_gradients(*results: Any) -> tuple[Any, ...]:
    """The gradients in the places of the operator's arguments."""
    value, references, offsets, logits = results
    given = with_inputs(_NO_GRADIENTS, value, offsets, logits)
    return flat(FusedOperands(references, given, None))


# --- the operators -------------------------------------------------------------------------------


def _run(operands: FusedOperands) -> Tensor:
    """The output, by the operator where torch must see the call."""
    if not operators.is_watched() and all(map(_is_plain, differentiable_of(operands))):
        with suppress(exchange.NoMemoryError):  # torch's dispatcher unwraps it
            return _forward(operands)
    check(operands)
    flops.register()
    return operators.FUSED_FORWARD(*flat(operands))  # type: ignore[no-any-return]


def _run_backward(operands: FusedBackwardOperands) -> tuple[Tensor, ...]:
    """The gradients, likewise."""
    if not operators.is_watched() and _is_plain(operands.grad_output):
        with suppress(exchange.NoMemoryError):
            return _backward(operands)
    flops.register()
    return operators.FUSED_BACKWARD(*flat_backward(operands))  # type: ignore[no-any-return]


def _is_plain(tensor: Any) -> bool:
    """Whether torch's dispatcher has nothing to add: a tensor in memory."""
    known = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return known and not tensor.is_meta and not tensor.is_neg()


def _forward(operands: FusedOperands) -> Tensor:
    """The forward operator."""
    call = checked(operands)
    if not call.on_device:
        arrays = map(operators.to_numpy, differentiable_of(operands))
        output = backend.fused_forward(call.problem, call.table, *arrays, **_on_host(operands))
        return operators.to_tensor(output, operands.given.value.dtype)
    output = exchange.fused_forward(call, operands)
    return operators.recorded_forward(composed(operands))[0] if output is None else output


def _backward(operands: FusedBackwardOperands) -> tuple[Tensor, ...]:
    """The backward operator."""
    call = checked(operands.forward)
    contract.check_grad_output(call.problem, operands.grad_output, operands.forward.given.value)
    if call.on_device:
        gradients = exchange.fused_backward(call, operands)
        return gradients or composed_gradients(operands, operators.backward)
    inputs = differentiable_of(operands.forward)
    found: tuple[Any, ...] = (None,) * 4
    if any(operands.needs):
        arrays = map(operators.to_numpy, (operands.grad_output, *inputs))
        rules = _on_host(operands.forward)
        found = backend.fused_backward(call.problem, call.table, *arrays, **rules)
    return tuple(
        operators.to_tensor(result, tensor.dtype) if need else tensor.new_empty(0)
        for result, tensor, need in zip(found, inputs, needs_of(operands), strict=True)
    )


def _on_host(operands: FusedOperands) -> dict[str, Any]:
    """What the CPU's kernels take by keyword."""
    return operators.on_host(operands.given) | {"offset_scale": operands.offset_scale}


def checked(operands: FusedOperands) -> operators.Call:
    """Check the contract, once for all calls that are alike in everything that it sees."""
    value, shapes, start_index, *_ = operands.given
    tensors, constants = saved_of(operands)
    try:
        described = [
            None if part is None else (part.shape, part.dtype, part.device, part.layout)
            for part in tensors
        ]
        key = *described, operators.contents(value, shapes, start_index), *constants
        hash(key)
    except (AttributeError, RuntimeError, TypeError):
        check(operands)  # names what has no shape, or no contents for NumPy
        raise
    return operators.known(key) or operators.remember(key, check(operands), value)


def _fake_forward(*arguments: Any) -> Tensor:
    """Shape, dtype and device of the output."""
    operands = fused_operands(arguments)
    check_traced(operands)
    value, offsets = operands.given.value, operands.given.sampling_locations
    n, _, m, d = value.shape
    return value.new_empty((n, offsets.shape[1], m * d))  # type: ignore[no-any-return]


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Shapes, dtypes and devices of the gradients."""
    operands = fused_backward_operands(arguments)
    check_traced(operands.forward, operands.grad_output)
    return tuple(
        tensor.new_empty(tensor.shape if need else 0)
        for tensor, need in zip(
            differentiable_of(operands.forward), needs_of(operands), strict=True
        )
    )


def _dispatched_forward(*arguments: Any) -> Tensor:
    """The forward operator as the dispatcher calls it."""
    return _forward(_hashable(fused_operands(arguments)))


def _dispatched_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The backward operator as the dispatcher calls it."""
    operands = fused_backward_operands(arguments)
    return _backward(operands._replace(forward=_hashable(operands.forward)))


def _hashable(operands: FusedOperands) -> FusedOperands:
    """The operands with tuples for the lists that the dispatcher makes."""
    return operands._replace(given=operators.hashable(operands.given))


register_once(
    torch.library.impl,
    "cupy_msda::ms_deform_attn_fused",
    "CompositeImplicitAutograd",
    _differentiable,
)
for _name, _implementation, _fake in (
    ("forward", _dispatched_forward, _fake_forward),
    ("backward", _dispatched_backward, _fake_backward),
):
    _operator = f"cupy_msda::ms_deform_attn_fused_{_name}"
    register_once(torch.library.impl, _operator, ("cpu", "cuda"), _implementation)
    register_once(torch.library.register_fake, _operator, _fake)
