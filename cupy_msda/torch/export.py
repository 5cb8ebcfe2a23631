# SPDX-License-Identifier: Apache-2.0
"""The operators in terms of standard ones, for exported programs that run where this package is absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cupy_msda import reference
from cupy_msda.torch.fused_operands import (
    composed,
    composed_gradients,
    fused_backward_operands,
    fused_operands,
)
from cupy_msda.torch.operands import (
    BackwardOperands,
    Operands,
    backward_operands,
    check_traced,
    inputs_of,
    levels_of,
    needs_of,
    sampling_of,
)
from cupy_msda.torch.operators import BACKWARD, FORWARD, FUSED_BACKWARD, FUSED_FORWARD


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators of this package, each with the function that computes it by standard operators.

    For `torch.export.ExportedProgram.run_decompositions`. An exported program calls the kernels and
    needs this package: whoever loads it, or an AOTInductor package of it, imports `cupy_msda` after
    torch, or `cupy_msda.torch`. It has no gradients, of which torch warns. Decomposed, it runs where
    cupy_msda is not installed, slower, and can be trained. `torch.onnx.export(model, ...)` needs no
    table; an ExportedProgram has to be decomposed for it, which `cupy_msda.export.onnx` does by itself::

        program = torch.export.export(model, args, dynamic_shapes=dynamic_shapes)
        portable = program.run_decompositions(cupy_msda.decompositions())
        torch.export.save(portable, "model.pt2")
        torch.onnx.export(portable).save("model.onnx")

    N, Lq and the level sizes may be dynamic. What the operators refuse is refused while decomposing,
    as far as it is known by then: the numbers in a tensor of level sizes or starts are not, and a
    level there that does not fit S reads zero.

    Returns
    -------
    dict
        By operator overload, forward and backward, functions of the operator's arguments. Nothing
        else is decomposed; ``{**torch.export.default_decompositions(), **decompositions()}`` is for
        programs of core ATen operators.

    Raises
    ------
    ModuleNotFoundError
        torch is not installed: from ``cupy_msda.decompositions``, before any call.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    return decompositions_by(forward)


def decompositions_by(forward: Callable[[Operands], Tensor]) -> dict[Any, Callable[..., Any]]:
    """The same with another function for the plain forward, also of what a fused one is composed of."""
    return {
        FORWARD: lambda *arguments: forward(Operands(*arguments)),
        BACKWARD: lambda *arguments: backward(backward_operands(arguments)),
        FUSED_FORWARD: lambda *arguments: forward(composed(fused_operands(arguments))),
        FUSED_BACKWARD: lambda *arguments: composed_gradients(
            fused_backward_operands(arguments), backward
        ),
    }


def forward(operands: Operands) -> Tensor:
    """The forward operator by standard ones."""
    check_traced(operands)
    value, locations, weights = inputs_of(operands)
    points = locations, weights
    return reference.forward(value, levels_of(operands), *points, **sampling_of(operands))  # type: ignore[no-any-return]


def backward(operands: BackwardOperands) -> tuple[Tensor, ...]:
    """The backward operator by standard ones."""
    given = operands.forward
    check_traced(given)
    value, locations, weights = inputs_of(given)
    gradients = reference.backward(
        operands.grad_output, value, levels_of(given), locations, weights, **sampling_of(given)
    )
    return tuple(
        gradient if need else tensor.new_empty(0)
        for gradient, tensor, need in zip(
            gradients, inputs_of(given), needs_of(operands), strict=True
        )
    )
