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
from cupy_msda.torch.operators import BACKWARD, FORWARD, levels_of

# Older versions were not tried but for 2.4, whose Dynamo cannot see transforms.
_SEEN_BY_DYNAMO = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def active() -> bool:
    """Whether a call happens in forward mode or inside a transform, where `Attention` must be used."""
    if not _SEEN_BY_DYNAMO and torch.compiler.is_compiling():
        return False
    transforming: bool = torch._C._are_functorch_transforms_active()
    return transforming or forward_ad._current_level >= 0


def attention(value: Tensor, *arguments: Any) -> Tensor:
    """The forward operator with the arguments of its schema, for calls where `active()` holds."""
    if not torch.compiler.is_compiling():
        return Attention.apply(value, *arguments)  # type: ignore[no-any-return,no-untyped-call]
    # Under a transform Dynamo (torch 2.13) takes every Function for a constant.
    *table, locations, weights, _ = arguments
    levels = levels_of(value.shape[1], *table)
    return reference.forward(value, levels, locations, weights)  # type: ignore[no-any-return]


def gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backward operator with the arguments of its schema, differentiable."""
    if not torch.compiler.is_compiling():
        return Gradients.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]
    if not active():
        return _CompiledGradients.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]
    grad_output, value, *table, locations, weights, _, _, _ = arguments
    levels = levels_of(value.shape[1], *table)

    def forward(value: Tensor, *points: Tensor) -> Any:
        return reference.forward(value, levels, *points)

    return torch.func.vjp(forward, value, locations, weights)[1](grad_output)  # type: ignore[no-any-return]


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
        value, shapes, start_index, *ctx.integers, locations, weights, ctx.query_order = inputs
        tensors = (value, shapes, start_index, locations, weights)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Run the backward operator."""
        value, shapes, start_index, locations, weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        table = (shapes, start_index, *ctx.integers)
        flags = needed[0], needed[5] or needed[6]
        by_value, *by_points = gradients(
            grad_outputs[0], value, *table, locations, weights, *flags, ctx.query_order
        )
        wanted = [by if need else None for by, need in zip(by_points, needed[5:7], strict=True)]
        return (by_value if needed[0] else None, *(None,) * 4, *wanted, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Move the inputs along the tangents."""
        with forward_ad._set_fwd_grad_enabled(True):
            value, levels, locations, weights = _primal(*_kept(ctx))
            directions = (tangents[0], *tangents[5:7])
            return reference.tangent(value, levels, locations, weights, directions)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *arguments: Any) -> tuple[Tensor, int]:
        """Samples become images or, where they share one value, queries."""
        value, *table, locations, weights, order = arguments
        _refuse_batched_table(*in_dims[1:3])
        size = info.batch_size
        points = [
            _batched(tensor, dim, size)
            for tensor, dim in zip((locations, weights), in_dims[5:7], strict=True)
        ]
        if in_dims[0] is None:
            points = [tensor.movedim(0, 1).flatten(1, 2) for tensor in points]
            # Each sample's grids again or, where they are too many, queries as they come.
            order = order and (order * size if len(order) * size <= 2 * MAX_GRIDS else [])
            output = Attention.apply(value, *table, *points, order)  # type: ignore[no-untyped-call]
            return output.unflatten(1, (size, output.shape[1] // size)), 1
        images = [tensor.flatten(0, 1) for tensor in (_batched(value, in_dims[0], size), *points)]
        output = Attention.apply(images[0], *table, *images[1:], order)  # type: ignore[no-untyped-call]
        return output.unflatten(0, (size, output.shape[0] // size)), 0


class _CompiledGradients(Function):
    """The backward operator as Dynamo takes it: `forward` with a context, and no forward mode."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backward operator with the arguments of its schema."""
        grad_output, value, shapes, start_index, *others = arguments
        *ctx.integers, locations, weights, _, _, _ = others
        ctx.computed = arguments[8], arguments[9], arguments[9]
        ctx.save_for_backward(value, shapes, start_index, locations, weights, grad_output)
        results: tuple[Tensor, Tensor, Tensor] = BACKWARD(*arguments)
        return results

    @staticmethod
    def backward(ctx: Any, *directions: Any) -> tuple[Tensor | None, ...]:
        """Differentiate the inner product of grad_output and the tangent along `directions`."""
        if type(ctx.saved_tensors[0]).__name__ == "DTensor":
            raise NotImplementedError("value must not be a DTensor for gradients of gradients")
        value, levels, locations, weights, grad_output = _kept(ctx)
        inputs = value, locations, weights
        along: Any = _where(ctx.computed, directions, inputs, torch.zeros_like)

        def moved(value: Tensor, locations: Tensor, weights: Tensor) -> Any:
            return reference.tangent(value, levels, locations, weights, along)

        by_grad, pull, *_ = torch.func.vjp(moved, *inputs)
        by_value, by_locations, by_weights = pull(grad_output)
        by_points = by_locations, by_weights
        return (by_grad, by_value, *(None,) * 4, *by_points, *(None,) * 3)


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
        ctx.integers = inputs[4:6]
        ctx.computed = inputs[8], inputs[9], inputs[9]
        tensors = (*inputs[1:4], *inputs[6:8], inputs[0])
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    backward = _CompiledGradients.backward

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[Any], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """Samples become images."""
        grad_output, value, *table, locations, weights, needs_value, needs_points, order = arguments
        _refuse_batched_table(*in_dims[2:4])
        tensors = (grad_output, value, locations, weights)
        dims = (*in_dims[:2], *in_dims[6:8])
        size = info.batch_size
        grad_output, value, *points = (
            _batched(tensor, dim, size).flatten(0, 1)
            for tensor, dim in zip(tensors, dims, strict=True)
        )
        needs = needs_value, needs_points, needs_points
        results = gradients(grad_output, value, *table, *points, needs_value, needs_points, order)
        samples = tuple(
            result.reshape(size, result.shape[0] // size, *result.shape[1:]) if need else result
            for result, need in zip(results, needs, strict=True)
        )
        return samples, tuple(0 if need else None for need in needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        """Differentiate, by the inputs, what grad_output and its tangent weigh."""
        along = (tangents[1], *tangents[6:8])

        def weighed(value: Tensor, locations: Tensor, weights: Tensor) -> Any:
            output = reference.forward(value, levels, locations, weights)
            return output, reference.tangent(value, levels, locations, weights, along)

        with forward_ad._set_fwd_grad_enabled(True):
            value, levels, *points, grad_output = _primal(*_kept(ctx))
            inputs = (value, *points)
            _, pull, *_ = torch.func.vjp(weighed, *inputs)
            return _where(ctx.computed, pull((tangents[0], grad_output)), inputs, _no_elements)


def _kept(ctx: Any) -> tuple[Any, ...]:
    """The tensors that were kept, the table among them as levels."""
    value, shapes, start_index, *others = ctx.saved_tensors
    return value, levels_of(value.shape[1], shapes, start_index, *ctx.integers), *others


def _primal(*kept: Any) -> tuple[Any, ...]:
    """What was kept without its tangents.

    torch turns forward mode off inside a `jvp` rule, since the inputs still carry their tangents there, and with it off
    an outer transform would take the result for a constant. So the rules turn it on again and take the tangents off.
    """
    return tuple(
        forward_ad.unpack_dual(part).primal  # type: ignore[no-untyped-call]
        if isinstance(part, Tensor)
        else part
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


def _refuse_batched_table(shapes_dim: int | None, start_dim: int | None) -> None:
    """One call has one level table."""
    for name, dim in (("spatial_shapes", shapes_dim), ("level_start_index", start_dim)):
        if dim is not None:
            raise ValueError(
                f"{name} must be the same for all samples of torch.func.vmap (in_dims None), "
                f"got one for each along dimension {dim}"
            )
