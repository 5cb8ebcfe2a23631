# SPDX-License-Identifier: Apache-2.0
"""torch.distributed: what the operators do with DTensors, and tensor parallelism for `MSDeformAttn`.

Importing this module registers the operators' rule for DTensors. The first DTensor that reaches
the functions of `cupy_msda` imports it; code that calls ``torch.ops.cupy_msda`` itself has to.

On each dimension of the device mesh, the operators split their work by one axis or not at all:

    ========  =========  =====================  ==========  ==========
    by        value      locations and weights  output      grad_value
    ========  =========  =====================  ==========  ==========
    batch     Shard(0)   Shard(0)               Shard(0)    Shard(0)
    head      Shard(2)   Shard(2)               Shard(2)    Shard(2)
    query     Replicate  Shard(1)               Shard(1)    Partial
    nothing   Replicate  Replicate              Replicate   Replicate
    ========  =========  =====================  ==========  ==========

The gradients of locations and weights lie as these do, and grad_output as the output. The first of
value, locations, weights and grad_output that is sharded by one of these axes decides; whatever
lies otherwise is redistributed. Level tables are whole on every process: integers, a plain tensor
or a DTensor. So are the grids of `query_order`; split by query, each part is taken as it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from cupy_msda.contract import check, check_grad_output, check_query_order
from cupy_msda.modules import MSDeformAttn
from cupy_msda.torch.operators import as_given, order_as_given, with_order

try:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        parallelize_module,
    )
    from torch.distributed.tensor.placement_types import Placement
except ImportError as error:
    raise ImportError(
        "DTensors and cupy_msda.distributed need torch 2.5 or later, built with torch.distributed; "
        f"this is torch {torch.__version__}"
    ) from error

__all__ = ["HeadwiseParallel"]

# Of the earlier ones that were tried, 2.9 cannot flip a DTensor, such as a level table, and 2.6 and
# 2.5 return wrong gradients of reference points with four coordinates.
_HEADWISE = "2.13"

# Axes of locations and weights, which are also those of the output.
_BATCH, _QUERY, _HEAD = 0, 1, 2


class HeadwiseParallel(ParallelStyle):
    """Tensor parallelism for `MSDeformAttn`: each process has some of the heads and their parameters.

    The plan for ``torch.distributed.tensor.parallel.parallelize_module``, either alone, as in
    ``parallelize_module(attention, mesh, HeadwiseParallel())``, or for the entries of a larger
    module's plan that name an `MSDeformAttn`.

    The parameters become DTensors: those of `value_proj`, `sampling_offsets` and
    `attention_weights` sharded by rows, so that heads stay whole, `output_proj.weight` by columns,
    and `output_proj.bias` replicated. `forward` takes the same inputs on every process, plain
    tensors or DTensors, and returns the whole output on every process, a plain tensor; gradients of
    the inputs are whole, too. One forward communicates once, a sum of outputs.

    Raises
    ------
    RuntimeError
        From `parallelize_module`: torch is older than 2.13.
    TypeError
        From `parallelize_module`: the module is not an `MSDeformAttn`.
    ValueError
        From `parallelize_module`: `n_heads` is not a multiple of the number of processes.

    Examples
    --------
    >>> mesh = init_device_mesh("cuda", (4,))
    >>> plan = {"encoder.layers.*.self_attn": HeadwiseParallel()}
    >>> parallelize_module(model, mesh, plan)
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Distribute the parameters, and the inputs of every forward from now on."""
        if TorchVersion(torch.__version__) < _HEADWISE:
            raise RuntimeError(
                f"HeadwiseParallel needs torch {_HEADWISE} or later, whose DTensors have all that "
                f"MSDeformAttn asks of them; this is torch {torch.__version__}"
            )
        if not isinstance(module, MSDeformAttn):
            raise TypeError(
                f"module must be an MSDeformAttn for HeadwiseParallel, got {type(module).__name__}"
            )
        size = device_mesh.size()
        if module.n_heads % size:
            raise ValueError(
                f"n_heads must be a multiple of the {size} processes of device_mesh, "
                f"got {module.n_heads}"
            )
        # DTensors all the way, so that the sum over heads in the gradient of reference_points, say,
        # is one over processes.
        by_head = ("value_proj", "sampling_offsets", "attention_weights")
        plan: dict[str, ParallelStyle] = {
            name: ColwiseParallel(use_local_output=False) for name in by_head
        }
        plan["output_proj"] = RowwiseParallel()
        parallelize_module(module, device_mesh, plan, src_data_rank=self.src_data_rank)
        module.register_forward_pre_hook(partial(_replicate_inputs, device_mesh), with_kwargs=True)
        return module


def _replicate_inputs(
    mesh: DeviceMesh, _: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward with every tensor as a replicated DTensor."""
    everywhere = [Replicate()] * mesh.ndim

    def replicated(given: Any) -> Any:
        if isinstance(given, DTensor):
            return given.redistribute(placements=everywhere)
        # A level table on the host stays there, where it can be read without waiting.
        if isinstance(given, Tensor) and given.device.type == mesh.device_type:
            return DTensor.from_local(given, mesh, everywhere, run_check=False)
        return given

    return tuple(map(replicated, inputs)), {k: replicated(v) for k, v in keywords.items()}


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

    def order(self, query_order: list[int] | None) -> list[int] | None:
        """That of a part: grids do not describe some of the queries."""
        return [] if query_order and _QUERY in self.axes else query_order

    def joined(self, part: Tensor, shape: Sequence[int], placements: list[Placement]) -> DTensor:
        """The DTensor of this shape whose part on this process is given."""
        # The stride of what is contiguous, as the operators' results are.
        stride = tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1]
        # Without a shape, torch would take parts to be even.
        return DTensor.from_local(
            part, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )


def _split(**tensors: Any) -> _Split:
    """How to split a call with these arguments, the first of which is value."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(
                f"{name} must be a DTensor where any argument is one, got {type(tensor).__name__}: "
                "distribute_tensor or DTensor.from_local makes one"
            )
        mesh = tensors["value"].device_mesh
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"{name} must be on the device mesh of value, {mesh}, got {tensor.device_mesh}"
            )
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


def _whole(table: Any) -> Any:
    """One argument of the level table, whole on this process."""
    if isinstance(table, DTensor):
        return _local(table, [Replicate()] * table.device_mesh.ndim)
    return table


def _forward(_: type, run: Any, __: Any, arguments: Sequence[Any], ___: Any) -> DTensor:
    """The forward operator on DTensors."""
    value, *table, locations, weights, order = with_order(arguments, 8)
    split = _split(value=value, sampling_locations=locations, attention_weights=weights)
    table = [_whole(argument) for argument in table]
    _check(value, table, locations, weights, order)
    points = split.placements()
    parts = [_local(value, split.placements(by_query=Replicate()))]
    parts += [_local(tensor, points) for tensor in (locations, weights)]
    output = parts[0]
    if _takes_part(split.mesh):
        output = run(parts[0], *table, *parts[1:], split.order(order))
    n, _, m, d = value.shape
    return split.joined(output, (n, locations.shape[1], m * d), points)


def _backward(
    _: type, run: Any, __: Any, arguments: Sequence[Any], ___: Any
) -> tuple[DTensor, ...]:
    """The backward operator on DTensors."""
    grad_output, value, *table, locations, weights, needs_value, needs_points, order = with_order(
        arguments, 11
    )
    split = _split(
        value=value,
        sampling_locations=locations,
        attention_weights=weights,
        grad_output=grad_output,
    )
    table = [_whole(argument) for argument in table]
    _check(value, table, locations, weights, order, grad_output)
    points = split.placements()
    parts = [_local(grad_output, points), _local(value, split.placements(by_query=Replicate()))]
    parts += [_local(tensor, points) for tensor in (locations, weights)]
    gradients = parts[1:]
    if _takes_part(split.mesh):
        needs = needs_value, needs_points
        gradients = run(*parts[:2], *table, *parts[2:], *needs, split.order(order))
    everywhere: list[Placement] = [Replicate()] * split.mesh.ndim
    joined = (
        # One that is not needed is as empty everywhere.
        split.joined(gradient, tensor.shape, placements)
        if need
        else split.joined(gradient.new_empty(0), (0,), everywhere)
        for gradient, tensor, placements, need in (
            (gradients[0], value, split.placements(by_query=Partial()), needs_value),
            (gradients[1], locations, points, needs_points),
            (gradients[2], weights, points, needs_points),
        )
    )
    return tuple(joined)


def _check(
    value: DTensor,
    table: Sequence[Any],
    locations: DTensor,
    weights: DTensor,
    query_order: list[int] | None,
    grad_output: DTensor | None = None,
) -> None:
    """Check the contract on whole shapes, so that all processes raise or none does."""
    if torch.compiler.is_compiling():
        return
    problem, _ = check(value, *as_given(*table), locations, weights)
    check_query_order(order_as_given(query_order), problem.num_queries)
    if grad_output is not None:
        check_grad_output(problem, grad_output, value)


def _takes_part(mesh: DeviceMesh) -> bool:
    """Whether this process is in the mesh: one that is not holds no part that has the right shape."""
    return mesh.get_coordinate() is not None


for _name, _rule in (("forward", _forward), ("backward", _backward)):
    torch.library.register_torch_dispatch(f"cupy_msda::ms_deform_attn_{_name}", DTensor, _rule)
