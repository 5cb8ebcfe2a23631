# SPDX-License-Identifier: Apache-2.0
"""The operators in terms of standard ones, for exported programs that run where this package is absent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cupy_msda import reference
from cupy_msda.contract import check, check_query_order
from cupy_msda.problem import Level
from cupy_msda.torch.operators import (
    BACKWARD,
    FORWARD,
    as_given,
    levels_of,
    order_as_given,
    with_order,
)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators of this package, each with the function that computes it by standard operators.

    For `torch.export.ExportedProgram.run_decompositions`. An exported program calls the kernels and
    needs this package: whoever loads it, or an AOTInductor package of it, imports `cupy_msda.torch`
    first. It has no gradients, of which torch warns. Decomposed, it runs where cupy_msda is not
    installed, slower, and can be trained. `torch.onnx.export(model, ...)` needs no table; an
    ExportedProgram has to be decomposed for it::

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
    return {FORWARD: forward, BACKWARD: backward}


def forward(value: Tensor, *arguments: Any) -> Tensor:
    """The forward operator by standard ones, with the arguments of its schema."""
    locations, weights = arguments[4:6]
    output: Tensor = reference.forward(value, _known(value, *arguments), locations, weights)
    return output


def backward(grad_output: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The backward operator by standard ones, with the arguments of its schema."""
    *table, locations, weights, needs_value, needs_points, order = with_order(arguments, 9)
    inputs = (value, locations, weights)
    levels = _known(value, *table, locations, weights, order)
    gradients = reference.backward(grad_output, value, levels, locations, weights)
    needs = (needs_value, needs_points, needs_points)
    return tuple(
        gradient if need else tensor.new_empty(0)
        for gradient, tensor, need in zip(gradients, inputs, needs, strict=True)
    )


def _known(value: Tensor, *arguments: Any) -> list[Level]:
    """The levels, after the checks that need no numbers of a tensor."""
    *table, locations, weights, order = with_order(arguments, 7)
    check(value, *as_given(*table), locations, weights, traced=True)
    numbers = (locations.shape[1], *(order or ()))
    if all(isinstance(number, int) for number in numbers):
        check_query_order(order_as_given(order), locations.shape[1])
    return levels_of(value.shape[1], *table)
