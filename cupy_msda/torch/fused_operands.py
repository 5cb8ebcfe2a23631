# SPDX-License-Identifier: Apache-2.0
"""The fused operators' arguments, and the plain operator's that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cupy_msda import contract
from cupy_msda.fused import FusedPoints, gradients, locations_and_weights
from cupy_msda.problem import Grids, LevelTable, Problem
from cupy_msda.torch.operands import (
    DECLARED,
    BackwardOperands,
    Operands,
    check_rest,
    check_rest_traced,
    constants_of,
    given_of,
    inputs_of,
    sampling_of,
    tensors_of,
    with_inputs,
)
from cupy_msda.torch.operands import joined as plain_operands

_NUM_TABLE = Operands._fields.index("sampling_locations")  # value and the level table
_NUM_REQUIRED = _NUM_TABLE + 3


class FusedOperands(NamedTuple):
    """The arguments of the fused forward operator.

    `given` has offsets and logits in the places of locations and weights.
    """

    reference_points: Any
    given: Operands
    offset_scale: Any = 0.5


class Needs(NamedTuple):
    """Which gradients are needed."""

    value: Any
    points: Any  # offsets and logits
    references: Any


class FusedBackwardOperands(NamedTuple):
    """The arguments of the fused backward operator."""

    grad_output: Any
    forward: FusedOperands
    needs: Needs


def flat(operands: FusedOperands) -> tuple[Any, ...]:
    """In the order of the forward's schema."""
    given = tuple(operands.given)
    table, rest = given[:_NUM_TABLE], given[_NUM_TABLE:]
    return (*table, operands.reference_points, *rest, operands.offset_scale)


def fused_operands(flat: Sequence[Any]) -> FusedOperands:
    """From arguments in that order; the last may be left out."""
    table, references, rest = flat[:_NUM_TABLE], flat[_NUM_TABLE], flat[_NUM_TABLE + 1 :]
    room = len(Operands._fields) - _NUM_TABLE
    given = Operands(*table, *rest[:room])
    return FusedOperands(references, given, *rest[room:])


def flat_backward(operands: FusedBackwardOperands) -> tuple[Any, ...]:
    """In the order of the backward's schema, where what older graphs may lack stands last."""
    forward = flat(operands.forward)
    required, optional = forward[:_NUM_REQUIRED], forward[_NUM_REQUIRED:]
    return (operands.grad_output, *required, *operands.needs, *optional)


def fused_backward_operands(flat: Sequence[Any]) -> FusedBackwardOperands:
    """From arguments in that order."""
    grad_output, *rest = flat
    required, rest = rest[:_NUM_REQUIRED], rest[_NUM_REQUIRED:]
    needs, optional = rest[: len(Needs._fields)], rest[len(Needs._fields) :]
    return FusedBackwardOperands(grad_output, fused_operands([*required, *optional]), Needs(*needs))


_FIELDS = FusedOperands(
    "Tensor reference_points",
    DECLARED._replace(
        sampling_locations="Tensor sampling_offsets", attention_weights="Tensor attention_logits"
    ),
    "float offset_scale=0.5",
)
FUSED_SCHEMA = f"({', '.join(flat(_FIELDS))}) -> Tensor"
_BACKWARD_FIELDS = FusedBackwardOperands(
    "Tensor grad_output", _FIELDS, Needs(*(f"bool needs_{name}" for name in Needs._fields))
)
_GRADIENTS = ", ".join(["Tensor"] * 4)
FUSED_BACKWARD_SCHEMA = f"({', '.join(flat_backward(_BACKWARD_FIELDS))}) -> ({_GRADIENTS})"


def differentiable_of(operands: FusedOperands) -> tuple[Any, Any, Any, Any]:
    """What has a gradient: value, reference points, offsets and logits."""
    value, offsets, logits = inputs_of(operands.given)
    return value, operands.reference_points, offsets, logits


def needs_of(operands: FusedBackwardOperands) -> tuple[Any, Any, Any, Any]:
    """Which gradients of `differentiable_of` are needed."""
    needs = operands.needs
    return needs.value, needs.references, needs.points, needs.points


def saved_of(operands: FusedOperands) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors and the constants that autograd keeps."""
    tensors = operands.reference_points, *tensors_of(operands.given)
    return tensors, (operands.offset_scale, *constants_of(operands.given))


def joined(tensors: Sequence[Any], constants: Sequence[Any]) -> FusedOperands:
    """The operands of these `saved_of`."""
    given = plain_operands(tensors[1:], constants[1:])
    return FusedOperands(tensors[0], given, constants[0])


# --- the contract --------------------------------------------------------------------------------


_ORIGIN = "sampling_offsets"


def _given(operands: FusedOperands) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that `contract.check_fused` takes."""
    value, shapes, start_index, offsets, logits = given_of(operands.given)
    keywords = sampling_of(operands.given) | {"offset_scale": operands.offset_scale}
    return (value, shapes, start_index, operands.reference_points, offsets, logits), keywords


def check(operands: FusedOperands, grad_output: Any = None) -> tuple[Problem, LevelTable, Grids]:
    """Check the contract."""
    arguments, keywords = _given(operands)
    found = contract.check_fused(*arguments, **keywords)
    return check_rest(operands.given, grad_output, found, _ORIGIN)


def check_traced(operands: FusedOperands, grad_output: Any = None) -> None:
    """Check the contract as far as it needs no number of a tensor and no symbolic size."""
    arguments, keywords = _given(operands)

    def check() -> tuple[Problem, LevelTable]:
        return contract.check_fused(*arguments, **keywords, traced=True)

    check_rest_traced(operands.given, grad_output, check, _ORIGIN)


# --- the composition -----------------------------------------------------------------------------


def points_of(operands: FusedOperands) -> FusedPoints:
    """The points in the dtype to compute in: float32, or float64 where value is."""
    value, references, offsets, logits = differentiable_of(operands)
    wide = torch.float64 if value.dtype is torch.float64 else torch.float32
    offsets = offsets.to(wide)
    return FusedPoints(
        references.to(wide),
        offsets,
        logits.to(wide),
        _widths_and_heights(operands.given, offsets),
        operands.given.num_points,
        operands.offset_scale,
    )


def composed(operands: FusedOperands) -> Operands:
    """The plain operator's arguments, with locations and weights by torch."""
    return with_inputs(
        operands.given, operands.given.value, *locations_and_weights(points_of(operands))
    )


def composed_gradients(
    operands: FusedBackwardOperands, plain_backward: Callable[..., Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """The gradients of `differentiable_of`, with the plain operator's backward; one that is not needed is empty."""
    forward, needs = operands.forward, operands.needs
    points = points_of(forward)
    locations, weights = locations_and_weights(points)
    plain = with_inputs(forward.given, forward.given.value, locations, weights)
    needs_points = needs.points or needs.references
    by_value, *by_points = plain_backward(
        BackwardOperands(operands.grad_output, plain, needs.value, needs_points)
    )
    found: tuple[Any, ...] = (None,) * 3
    if needs_points:
        found = gradients(points, weights, *by_points)
    return tuple(
        result.to(tensor.dtype) if need else tensor.new_empty(0)
        for result, tensor, need in zip(
            (by_value, *found), differentiable_of(forward), needs_of(operands), strict=True
        )
    )


def _widths_and_heights(given: Operands, offsets: Tensor) -> Tensor:
    """(W, H) of each level, shape (L, 2), beside the offsets and in their dtype."""
    shapes: Tensor | None = given.spatial_shapes
    sizes = given.sizes
    if shapes is not None:
        if shapes.device == offsets.device or torch.compiler.is_compiling():
            return shapes.to(offsets).flip(-1)  # after the conversion: torch flips no uint16
        sizes = shapes.flatten().tolist()
    if not sizes:
        return offsets.new_empty((0, 2))
    # Number by number on the device: a copy from the host would synchronise.
    heights, widths = sizes[::2], sizes[1::2]
    numbers = [
        offsets.new_full((), size) for pair in zip(widths, heights, strict=True) for size in pair
    ]
    return torch.stack(numbers).view(-1, 2)
