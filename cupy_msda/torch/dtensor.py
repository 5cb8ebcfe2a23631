# SPDX-License-Identifier: Apache-2.0
"""The operators' rule for DTensors, which importing this module registers.

On each dimension of the device mesh, the operators split their work by one axis or not at all:

    ========  =========  =====================  ==========  ==========
    by        value      locations and weights  output      grad_value
    ========  =========  =====================  ==========  ==========
    batch     Shard(0)   Shard(0)               Shard(0)    Shard(0)
    head      Shard(2)   Shard(2)               Shard(2)    Shard(2)
    query     Replicate  Shard(1)               Shard(1)    Partial
    nothing   Replicate  Replicate              Replicate   Replicate
    ========  =========  =====================  ==========  ==========

A mask of value lies as value does by batch, else it is replicated.

The gradients of locations and weights lie as these do, and grad_output as the output. The first of
value, locations, weights and grad_output that is sharded by one of these axes decides; whatever
lies otherwise is redistributed. Level tables are whole on every process: integers, a plain tensor
or a DTensor. So are the grids of `query_order`; split by query, each part is taken as it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cupy_msda.torch import operands as form
from cupy_msda.torch.operands import Operands, check

try:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import Placement
except ImportError as error:
    raise ImportError(
        "DTensors need torch 2.5 or later, built with torch.distributed; "
        f"this is torch {torch.__version__}"
    ) from error

# Axes of locations and weights, which are also those of the output.
_BATCH, _QUERY, _HEAD = 0, 1, 2


class _Split(NamedTuple):
    """How one call is split: on each dimension of the mesh by an axis, or not at all."""

    mesh: DeviceMesh
    axes: list[int | None]

    def placements(self, by_query: Placement | None = None) -> list[Placement]:
        """Those of points and output, or, with what stands for the split by query, of value."""
        placements: list[Placement] = []
        for axis in self.axes:
            if axis == _QUERY and by_query is not None:
                placements.append(by_query)
            else:
                placements.append(Replicate() if axis is None else Shard(axis))
        return placements

    def parts(self, operands: Operands) -> Operands:
        """The operands of this process."""
        value, *points = form.inputs_of(operands)
        parts = [_local(value, self.placements(by_query=Replicate()))]
        parts += [_local(tensor, self.placements()) for tensor in points]
        mask = operands.value_mask
        if mask is not None:
            mask = _local(mask, [self._of_mask(axis) for axis in self.axes])
        # Grids do not describe some of the queries.
        keeps_grids = not operands.query_order or _QUERY not in self.axes
        order = operands.query_order if keeps_grids else ()
        operands = form.with_inputs(operands, *parts)
        return operands._replace(query_order=order, value_mask=mask)

    @staticmethod
    def _of_mask(axis: int | None) -> Placement:
        """Where a dimension of the mesh that splits by this axis has the mask: images alone are axes of both."""
        return Shard(_BATCH) if axis == _BATCH else Replicate()

    def joined(self, part: Tensor, shape: Sequence[int], placements: list[Placement]) -> DTensor:
        """The DTensor of this shape whose part on this process is given."""
        # The stride of what is contiguous, as the operators' results are.
        stride = tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1]
        # Without a shape, torch would take parts to be even.
        return DTensor.from_local(
            part, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


def _split(tensors: dict[str, Any]) -> _Split:
    """How to split a call with these arguments, the first of which is value."""
    for name, tensor in tensors.items():
        _check(name, tensor, tensors["value"])
    mesh = tensors["value"].device_mesh
    axes = [
        _axis(tensors, placements)
        for placements in zip(*(tensor.placements for tensor in tensors.values()), strict=True)
    ]
    heads = tensors["value"].shape[2]
    processes = prod(mesh.size(i) for i, axis in enumerate(axes) if axis == _HEAD)
    if heads % processes:
        raise ValueError(
            f"value must have a multiple of {processes} heads M to be sharded by head over "
            f"{processes} processes, got M = {heads}"
        )
    return _Split(mesh, axes)


def _check(name: str, tensor: Any, value: Any) -> None:
    """Require a DTensor on the mesh of value."""
    if not isinstance(tensor, DTensor):
        raise TypeError(
            f"{name} must be a DTensor where any argument is one, got {type(tensor).__name__}: "
            "distribute_tensor or DTensor.from_local makes one"
        )
    if tensor.device_mesh != value.device_mesh:
        raise ValueError(
            f"{name} must be on the device mesh of value, {value.device_mesh}, got {tensor.device_mesh}"
        )


def _axis(names: Iterable[str], placements: Iterable[Placement]) -> int | None:
    """The axis that one dimension of the mesh splits, given where the arguments lie on it."""
    for name, placement in zip(names, placements, strict=True):
        # Axis 1 of value holds the positions, of which any query may need any.
        axes = (_BATCH, _HEAD) if name == "value" else (_BATCH, _QUERY, _HEAD)
        if type(placement) is Shard and placement.dim in axes:
            return placement.dim
    return None


def _local(tensor: DTensor, placements: Sequence[Placement]) -> Tensor:
    """The part of this process when the tensor lies so."""
    # Detached, since this is below autograd: nothing is to be recorded.
    constant: Any = tensor.detach()
    part: Tensor = constant.redistribute(placements=placements).to_local()
    return part


def _with_whole_table(operands: Operands) -> Operands:
    """The operands with the level table whole on this process."""

    def whole(table: Any) -> Any:
        if isinstance(table, DTensor):
            return _local(table, [Replicate()] * table.device_mesh.ndim)
        return table

    return operands._replace(
        spatial_shapes=whole(operands.spatial_shapes),
        level_start_index=whole(operands.level_start_index),
    )


def _forward(_: type, run: Any, __: Any, arguments: Sequence[Any], ___: Any) -> DTensor:
    """The forward operator on DTensors."""
    operands = Operands(*arguments)
    split = _split(_named(operands))
    _check_mask(operands)
    operands = _with_whole_table(operands)
    if not torch.compiler.is_compiling():
        check(operands)  # on whole shapes, so that all processes raise or none does
    parts = split.parts(operands)
    output = run(*parts) if _takes_part(split.mesh) else parts.value
    n, _, m, d = operands.value.shape
    shape = (n, operands.sampling_locations.shape[1], m * d)
    return split.joined(output, shape, split.placements())


def _backward(
    _: type, run: Any, __: Any, arguments: Sequence[Any], ___: Any
) -> tuple[DTensor, ...]:
    """The backward operator on DTensors."""
    operands = form.backward_operands(arguments)
    split = _split(_named(operands.forward) | {"grad_output": operands.grad_output})
    _check_mask(operands.forward)
    given = _with_whole_table(operands.forward)
    if not torch.compiler.is_compiling():
        check(given, operands.grad_output)
    points = split.placements()
    parts = split.parts(given)
    gradients = form.inputs_of(parts)
    if _takes_part(split.mesh):
        grad_output = _local(operands.grad_output, points)
        gradients = run(*form.flat(operands._replace(grad_output=grad_output, forward=parts)))
    everywhere: list[Placement] = [Replicate()] * split.mesh.ndim
    placements = (split.placements(by_query=Partial()), points, points)
    joined = (
        # One that is not needed is as empty everywhere.
        split.joined(gradient, tensor.shape, placed)
        if need
        else split.joined(gradient.new_empty(0), (0,), everywhere)
        for gradient, tensor, placed, need in zip(
            gradients, form.inputs_of(given), placements, form.needs_of(operands), strict=True
        )
    )
    return tuple(joined)


def _named(operands: Operands) -> dict[str, Any]:
    """The arguments that a mesh may split."""
    names = ("value", "sampling_locations", "attention_weights")
    return dict(zip(names, form.inputs_of(operands), strict=True))


def _check_mask(operands: Operands) -> None:
    """Require a mask on the mesh of value, on which it may lie anyhow."""
    if operands.value_mask is not None:
        _check("value_mask", operands.value_mask, operands.value)


def _takes_part(mesh: DeviceMesh) -> bool:
    """Whether this process is in the mesh: one that is not holds no part that has the right shape."""
    return mesh.get_coordinate() is not None


for _name, _rule in (("forward", _forward), ("backward", _backward)):
    form.register_once(
        torch.library.register_torch_dispatch,
        f"cupy_msda::ms_deform_attn_{_name}",
        DTensor,
        _rule,
    )
