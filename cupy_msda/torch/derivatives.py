# SPDX-License-Identifier: Apache-2.0
"""Derivatives beyond the first, forward mode, and the transforms of `torch.func`.

The operators compute what they have kernels for; `reference.tangent` and its derivatives the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from cupy_msda import reference
from cupy_msda.problem import MAX_GRIDS
from cupy_msda.torch import flops
from cupy_msda.torch.operands import (
    NO_OPERANDS,
    BackwardOperands,
    Operands,
    backward_operands,
    constants_of,
    flat,
    inputs_of,
    joined,
    levels_of,
    needs_of,
    register_once,
    sampling_of,
    tensors_of,
    with_inputs,
)
from cupy_msda.torch.operators import BACKWARD, DIFFERENTIABLE_BACKWARD, FORWARD

# Older versions were not tried but for 2.4, whose Dynamo cannot see transforms.
_SEEN_BY_DYNAMO = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def active() -> bool:
    """Whether a call happens in forward mode or inside a transform, where `Attention` must be used."""
    if not _SEEN_BY_DYNAMO and torch.compiler.is_compiling():
        return False
    transforming: bool = torch._C._are_functorch_transforms_active()
    return transforming or forward_ad._current_level >= 0


def _is_traced() -> bool:
    """Whether torch.jit.trace records the call."""
    return torch._C._get_tracing_state() is not None


def _refuse_trace() -> None:
    """Raise the error for a trace where `active()` holds."""
    if _is_traced():
        raise RuntimeError(
            "torch.jit.trace cannot record cupy_msda.ms_deform_attn in forward mode or under a transform of "
            "torch.func: trace the function that is transformed, or use torch.export"
        )


def attention(operands: Operands) -> Tensor:
    """The output, for calls where `active()` holds."""
    if not torch.compiler.is_compiling():
        flops.register()
        _refuse_trace()
        return Attention.apply(*operands)  # type: ignore[no-any-return,no-untyped-call]
    # Under a transform Dynamo (torch 2.13) takes every Function for a constant.
    return reference.forward(  # type: ignore[no-any-return]
        operands.value,
        levels_of(operands),
        operands.sampling_locations,
        operands.attention_weights,
        **sampling_of(operands),
    )


def gradients(operands: BackwardOperands) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, differentiable."""
    if not torch.compiler.is_compiling():
        flops.register()
        if active():
            _refuse_trace()
        elif _is_traced():
            return DIFFERENTIABLE_BACKWARD(*flat(operands))  # type: ignore[no-any-return]
        return Gradients.apply(*flat(operands))  # type: ignore[no-any-return,no-untyped-call]
    if not active():
        return _CompiledGradients.apply(*flat(operands))  # type: ignore[no-any-return,no-untyped-call]
    levels, sampling = levels_of(operands.forward), sampling_of(operands.forward)

    def forward(value: Tensor, *points: Tensor) -> Any:
        return reference.forward(value, levels, *points, **sampling)

    return torch.func.vjp(forward, *inputs_of(operands.forward))[1](operands.grad_output)  # type: ignore[no-any-return]


class Attention(Function):
    """The forward operator under every transform; dearer per call than the Function for eager use."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        """Run the forward operator with the arguments of its schema."""
        output: Tensor = FORWARD(*arguments)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs."""
        operands = Operands(*inputs)
        ctx.constants = constants_of(operands)
        ctx.save_for_backward(*tensors_of(operands))
        ctx.save_for_forward(*tensors_of(operands))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Run the backward operator."""
        needed = Operands(*ctx.needs_input_grad)
        needs_points = needed.sampling_locations or needed.attention_weights
        given = joined(ctx.saved_tensors, ctx.constants)
        results = gradients(BackwardOperands(grad_outputs[0], given, needed.value, needs_points))
        wanted = [
            result if need else None
            for result, need in zip(results, inputs_of(needed), strict=True)
        ]
        return tuple(with_inputs(NO_OPERANDS, *wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Move the inputs along the tangents."""
        with forward_ad._set_fwd_grad_enabled(True):
            operands = joined(_primal(*ctx.saved_tensors), ctx.constants)
            value, locations, weights = inputs_of(operands)
            directions = inputs_of(Operands(*tangents))
            levels, sampling = levels_of(operands), sampling_of(operands)
            return reference.tangent(value, levels, locations, weights, directions, **sampling)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Tensor, int]:
        """Samples become images or, where they share one value, queries."""
        operands, dims = Operands(*arguments), Operands(*in_dims)
        _refuse_batched_table(dims)
        size = info.batch_size
        value_dim, *point_dims = inputs_of(dims)
        points = [
            _batched(tensor, dim, size)
            for tensor, dim in zip(inputs_of(operands)[1:], point_dims, strict=True)
        ]
        if value_dim is None and dims.value_mask is None:
            points = [tensor.movedim(0, 1).flatten(1, 2) for tensor in points]
            operands = with_inputs(operands, operands.value, *points)
            order = _repeated(operands.query_order, size)
            output = Attention.apply(*operands._replace(query_order=order))  # type: ignore[no-untyped-call]
            return output.unflatten(1, (size, output.shape[1] // size)), 1
        tensors = (_batched(operands.value, value_dim, size), *points)
        images = [tensor.flatten(0, 1) for tensor in tensors]
        operands = _with_masks_of_samples(operands, dims, size)
        output = Attention.apply(*with_inputs(operands, *images))  # type: ignore[no-untyped-call]
        return output.unflatten(0, (size, output.shape[0] // size)), 0


class _CompiledGradients(Function):
    """The backward operator as Dynamo takes it: `forward` with a context, and no forward mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backward operator with the arguments of its schema."""
        operands = backward_operands(arguments)
        ctx.constants, ctx.computed = constants_of(operands.forward), needs_of(operands)
        ctx.save_for_backward(*tensors_of(operands.forward), operands.grad_output)
        results: tuple[Tensor, Tensor, Tensor] = BACKWARD(*arguments)
        return results

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> tuple[Tensor | None, ...]:
        """Differentiate the inner product of grad_output and the tangent along `directions`."""
        if type(ctx.saved_tensors[0]).__name__ == "DTensor":
            raise NotImplementedError("value must not be a DTensor for gradients of gradients")
        *tensors, grad_output = ctx.saved_tensors
        operands = joined(tensors, ctx.constants)
        levels, sampling = levels_of(operands), sampling_of(operands)
        along: Any = _where(ctx.computed, directions, inputs_of(operands), torch.zeros_like)

        def moved(value: Tensor, locations: Tensor, weights: Tensor) -> Any:
            return reference.tangent(value, levels, locations, weights, along, **sampling)

        by_grad, pull, *_ = torch.func.vjp(moved, *inputs_of(operands))
        by_inputs = with_inputs(NO_OPERANDS, *pull(grad_output))
        return flat(BackwardOperands(by_grad, by_inputs, None, None))


class Gradients(Function):
    """The backward operator and its derivatives under every transform."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backward operator with the arguments of its schema."""
        results: tuple[Tensor, Tensor, Tensor] = BACKWARD(*arguments)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep the inputs."""
        operands = backward_operands(inputs)
        ctx.constants, ctx.computed = constants_of(operands.forward), needs_of(operands)
        tensors = (*tensors_of(operands.forward), operands.grad_output)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    backward = _CompiledGradients.backward

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """Samples become images."""
        operands, dims = backward_operands(arguments), backward_operands(in_dims)
        _refuse_batched_table(dims.forward)
        size = info.batch_size
        grad_output, *images = (
            _batched(tensor, dim, size).flatten(0, 1)
            for tensor, dim in zip(
                (operands.grad_output, *inputs_of(operands.forward)),
                (dims.grad_output, *inputs_of(dims.forward)),
                strict=True,
            )
        )
        given = _with_masks_of_samples(operands.forward, dims.forward, size)
        given = with_inputs(given, *images)
        results = gradients(operands._replace(grad_output=grad_output, forward=given))
        samples = tuple(
            result.reshape(size, result.shape[0] // size, *result.shape[1:]) if need else result
            for result, need in zip(results, needs_of(operands), strict=True)
        )
        return samples, tuple(0 if need else None for need in needs_of(operands))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        """Differentiate <output, tangent of grad_output> + <tangent of output, grad_output> by the inputs."""
        directions = backward_operands(tangents)
        along = inputs_of(directions.forward)

        def both(value: Tensor, locations: Tensor, weights: Tensor) -> Any:
            given = value, levels, locations, weights
            tangent = reference.tangent(*given, along, **sampling)
            return reference.forward(*given, **sampling), tangent

        with forward_ad._set_fwd_grad_enabled(True):
            *tensors, grad_output = _primal(*ctx.saved_tensors)
            operands = joined(tensors, ctx.constants)
            levels, sampling = levels_of(operands), sampling_of(operands)
            _, pull, *_ = torch.func.vjp(both, *inputs_of(operands))
            results = pull((directions.grad_output, grad_output))
            return _where(ctx.computed, results, inputs_of(operands), _no_elements)


def _repeated(query_order: Any, size: int) -> Any:
    """Each sample's grids again or, where they are too many, queries in the order given."""
    if not query_order:
        return query_order
    repeated = list(query_order) * size
    return repeated if len(repeated) <= 2 * MAX_GRIDS else ()


def _primal(*kept: Any) -> tuple[Any, ...]:
    """The saved tensors without their tangents.

    torch turns forward mode off inside a `jvp` rule, since the inputs still carry their tangents there, and with it off
    an outer transform would take the result for a constant. So the rules turn it on again and remove the tangents.
    """
    return tuple(
        None if part is None else forward_ad.unpack_dual(part).primal  # type: ignore[no-untyped-call]
        for part in kept
    )


def _where(
    computed: Sequence[bool], results: Sequence[Any], inputs: Sequence[Tensor], absent: Any
) -> tuple[Tensor, ...]:
    """The results that were computed, and a stand-in made from the input for the others."""
    return tuple(
        result if done else absent(tensor)
        for done, result, tensor in zip(computed, results, inputs, strict=True)
    )


def _no_elements(tensor: Tensor) -> Tensor:
    """What the backward operator returns for a gradient that is not needed."""
    return tensor.new_empty(0)


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with its batch dimension first."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _with_masks_of_samples(operands: Operands, dims: Operands, size: int) -> Operands:
    """The operands with the mask of every sample's images."""
    mask = operands.value_mask
    if mask is None:
        return operands
    return operands._replace(value_mask=_batched(mask, dims.value_mask, size).flatten(0, 1))


def _refuse_batched_table(dims: Operands) -> None:
    """One call has one level table."""
    tables = {
        "spatial_shapes": dims.spatial_shapes,
        "level_start_index": dims.level_start_index,
    }
    for name, dim in tables.items():
        if dim is not None:
            raise ValueError(
                f"{name} must be the same for all samples of torch.func.vmap (in_dims None), "
                f"got one for each along dimension {dim}"
            )


def _differentiable_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What a trace of torch.jit runs for `gradients`."""
    return gradients(backward_operands(arguments))


register_once(
    torch.library.impl,
    "cupy_msda::ms_deform_attn_gradients",
    "CompositeImplicitAutograd",
    _differentiable_backward,
)
