# SPDX-License-Identifier: Apache-2.0
"""The registered torch operators, and the exchange of their tensors with the kernels.

They check the contract themselves, on real tensors: a call is as safe from a compiled graph or
from `torch.ops.cupy_msda` as from the public functions, and tracing never reads the level table.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from cupy_msda.contract import check, check_grad_output, check_query_order
from cupy_msda.cpu import backend as host
from cupy_msda.cuda.plans import num_sums
from cupy_msda.problem import Grids, Level, LevelTable, Problem

# The level table as the operators take it: each half as a tensor that is passed on unread, or as
# flat integers (H0, W0, H1, W1, ...); with neither for the starts, levels follow one another.
_TABLE = "Tensor? spatial_shapes, Tensor? level_start_index, SymInt[]? sizes, SymInt[]? starts"
_POINTS = "Tensor sampling_locations, Tensor attention_weights"
# The grids of the queries as flat integers, too; [] for queries as they come, None for "auto".
_ORDER = "SymInt[]? query_order=None"
_SCHEMAS = {
    "ms_deform_attn_forward": f"(Tensor value, {_TABLE}, {_POINTS}, {_ORDER}) -> Tensor",
    # A gradient that is not needed comes back without elements: operators cannot return None.
    "ms_deform_attn_backward": f"(Tensor grad_output, Tensor value, {_TABLE}, {_POINTS}, "
    f"bool needs_value, bool needs_points, {_ORDER}) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cupy_msda::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
FORWARD = torch.ops.cupy_msda.ms_deform_attn_forward.default
BACKWARD = torch.ops.cupy_msda.ms_deform_attn_backward.default

_HALF = (torch.float16, torch.bfloat16)
_ALIGNMENT = 16  # bytes: the kernels load vectors of this size


def as_given(
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sizes: list[int] | None,
    starts: list[int] | None,
) -> tuple[Any, Any]:
    """spatial_shapes and level_start_index as `check` takes them, from what the operators take."""
    pairs = None if sizes is None else list(zip(sizes[::2], sizes[1::2], strict=True))
    return (
        pairs if spatial_shapes is None else spatial_shapes,
        starts if level_start_index is None else level_start_index,
    )


def order_as_given(query_order: Sequence[int] | None) -> Any:
    """query_order as `check_query_order` takes it, from what the operators take."""
    if query_order is None:
        return "auto"
    return list(zip(query_order[::2], query_order[1::2], strict=True)) or None


def with_order(arguments: Sequence[Any], count: int) -> tuple[Any, ...]:
    """All of so many arguments that end in query_order, which torch leaves out where it is None."""
    return (*arguments, None)[:count]


def levels_of(
    spatial_size: int,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sizes: list[int] | None,
    starts: list[int] | None,
) -> list[Level]:
    """The levels for the reference, unread: ints where all are ints, else 0-dim tensors."""
    known = spatial_shapes is None and level_start_index is None
    shapes, begins = (
        half.long() if isinstance(half, Tensor) else half
        for half in as_given(spatial_shapes, level_start_index, sizes, starts)
    )
    if begins is None:
        begins = list(accumulate((h * w for h, w in shapes), initial=0))[:-1]
    table = [Level(h, w, start) for (h, w), start in zip(shapes, begins, strict=True)]
    return table if known else [_shrunk(level, spatial_size) for level in table]


def _shrunk(level: Level, spatial_size: int) -> Level:
    """The level, or an empty one where it does not fit S, so that no index leaves value."""
    h, w, start = level
    fits = (h >= 0) & (h <= spatial_size) & (w >= 0) & (w <= spatial_size)
    fits = fits & (start >= 0) & (start + h * w <= spatial_size)
    return Level(h * fits, w * fits, start * fits)


_accepted: dict[tuple[Any, ...], tuple[Problem, LevelTable, Grids]] = {}
_MOST_ACCEPTED = 4096  # problems, of which a process has few


def _checked(
    grad_output: Tensor | None,
    query_order: list[int] | None,
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sizes: list[int] | None,
    starts: list[int] | None,
    locations: Tensor,
    weights: Tensor,
) -> tuple[Problem, LevelTable, Grids]:
    """`check`, done once for all calls that are alike in everything it looks at."""
    # Spelled out: this is most of what a small call costs.
    key = (
        *(value.shape, value.dtype, value.device),
        *(locations.shape, locations.dtype, locations.device),
        *(weights.shape, weights.dtype, weights.device),
        None if grad_output is None else (grad_output.shape, grad_output.dtype, grad_output.device),
        None if spatial_shapes is None else _contents(spatial_shapes, value),
        None if level_start_index is None else _contents(level_start_index, value),
        None if sizes is None else tuple(sizes),
        None if starts is None else tuple(starts),
        None if query_order is None else tuple(query_order),
    )
    found = _accepted.get(key)
    if found is None:
        given = as_given(spatial_shapes, level_start_index, sizes, starts)
        problem, table = check(value, *given, locations, weights)
        grids = check_query_order(order_as_given(query_order), problem.num_queries)
        if grad_output is not None:
            check_grad_output(problem, grad_output, value)
        if len(_accepted) >= _MOST_ACCEPTED:
            _accepted.clear()
        found = _accepted[key] = problem, LevelTable(table.sizes, table.starts), grids
    problem, table, grids = found
    if table.sizes is None or table.starts is None:
        table = LevelTable(
            table.sizes,
            table.starts,
            spatial_shapes if table.sizes is None else None,
            level_start_index if table.starts is None else None,
        )
    return problem, table, grids


def _contents(given: Tensor, value: Tensor) -> Any:
    """What a check sees of a table: all of it where it is read, its kind where it is not."""
    if not given.is_cuda:
        return given.dtype, given.shape, given.numpy().tobytes()
    kind = given.dtype, given.shape, given.device
    if value.is_cuda and os.environ.get("CUPY_MSDA_CHECK") != "1":
        return kind
    return *kind, given.cpu().numpy().tobytes()


def _forward(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sizes: list[int] | None,
    starts: list[int] | None,
    locations: Tensor,
    weights: Tensor,
    query_order: list[int] | None = None,
) -> Tensor:
    """The forward operator on real tensors, with the arguments of its schema."""
    given = spatial_shapes, level_start_index, sizes, starts
    problem, table, grids = _checked(None, query_order, value, *given, locations, weights)
    if value.is_cuda:
        return _device_forward(problem, table, value, locations, weights, grids)
    arrays = _numpy(value), _numpy(locations), _numpy(weights)
    output = host.forward(problem, table, *arrays, threads=torch.get_num_threads())
    return _tensor(output, value.dtype)


def _backward(grad_output: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The backward operator on real tensors, with the arguments of its schema."""
    locations, weights, needs_value, needs_points, order = with_order(arguments, 9)[4:]
    problem, table, grids = _checked(grad_output, order, value, *arguments[:6])
    if not (needs_value or needs_points):
        by_value, by_locations, by_weights = None, None, None
    elif value.is_cuda:
        tensors, needs = (grad_output, value, locations, weights), (needs_value, needs_points)
        by_value, by_locations, by_weights = _device_backward(
            problem, table, *tensors, *needs, grids
        )
    else:
        arrays = _numpy(grad_output), _numpy(value), _numpy(locations), _numpy(weights)
        gradients = host.backward(problem, table, *arrays, threads=torch.get_num_threads())
        by_value = _tensor(gradients[0], value.dtype) if needs_value else None
        if needs_points:
            by_locations = _tensor(gradients[1], locations.dtype)
            by_weights = _tensor(gradients[2], weights.dtype)
        else:
            by_locations, by_weights = None, None
    return (
        value.new_empty(0) if by_value is None else by_value,
        locations.new_empty(0) if by_locations is None else by_locations,
        weights.new_empty(0) if by_weights is None else by_weights,
    )


def _fake_forward(value: Tensor, *arguments: Any) -> Tensor:
    """Shape, dtype and device of the output; the operator checks its inputs when it runs."""
    n, _, m, d = value.shape
    locations = arguments[4]
    return value.new_empty((n, locations.shape[1], m * d))


def _fake_backward(grad_output: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Shapes, dtypes and devices of the gradients."""
    locations, weights, needs_value, needs_points = arguments[4:8]
    needs = (needs_value, needs_points, needs_points)
    return tuple(
        tensor.new_empty(tensor.shape if need else 0)
        for tensor, need in zip((value, locations, weights), needs, strict=True)
    )


for _name, _run, _fake in (
    ("ms_deform_attn_forward", _forward, _fake_forward),
    ("ms_deform_attn_backward", _backward, _fake_backward),
):
    # One function for both: a table on a GPU with host values dispatches as CUDA.
    torch.library.impl(f"cupy_msda::{_name}", ("cpu", "cuda"), _run)
    torch.library.register_fake(f"cupy_msda::{_name}", _fake)


def _numpy(tensor: Tensor) -> Any:
    """A host tensor as a C-contiguous NumPy array: shared memory, or a copy widened to float32."""
    if tensor.dtype in _HALF:  # NumPy has no bfloat16, and computes float16 slowly
        tensor = tensor.float()
    return tensor.detach().contiguous().numpy()


def _tensor(array: Any, dtype: torch.dtype) -> Tensor:
    """A result of the host kernels as a tensor of this dtype."""
    tensor = torch.from_numpy(array)
    # `to` alone takes ten times as long to find out.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _device_forward(
    problem: Problem,
    table: LevelTable,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    grids: Grids,
) -> Tensor:
    """The output, computed by the CUDA kernels on torch's current stream."""
    if problem.is_empty:
        return value.new_zeros(problem.output_shape)
    launch = _launch()
    inputs = [_readable(tensor) for tensor in (value, locations, weights)]
    output = value.new_empty(problem.output_shape)
    with launch.on_stream(*_place(value)):
        launch.forward(problem, _exported(table), *map(_Exporter, (*inputs, output)), grids)
    return output


def _device_backward(
    problem: Problem,
    table: LevelTable,
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    needs_value: bool,
    needs_points: bool,
    grids: Grids,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that are needed, computed by the CUDA kernels on torch's current stream."""
    by_value, by_locations, by_weights, sums = None, None, None, None
    reproducible = torch.are_deterministic_algorithms_enabled() and not problem.is_empty
    if needs_value and reproducible:
        by_value = value.new_empty(value.shape)
        sums = _Exporter(value.new_zeros(num_sums(problem), dtype=torch.int64))
    elif needs_value:
        wide = torch.promote_types(value.dtype, torch.float32)
        by_value = value.new_zeros(value.shape, dtype=wide)
    if needs_points:
        make = Tensor.new_zeros if problem.is_empty else Tensor.new_empty
        by_locations, by_weights = (make(tensor, tensor.shape) for tensor in (locations, weights))
    if not problem.is_empty:
        launch = _launch()
        inputs = [_readable(tensor) for tensor in (grad_output, value, locations, weights)]
        gradients = (
            None if tensor is None else _Exporter(tensor)
            for tensor in (by_value, by_locations, by_weights)
        )
        exported = tuple(map(_Exporter, inputs)), tuple(gradients)
        with launch.on_stream(*_place(value)):
            launch.backward(problem, _exported(table), *exported, sums, grids)
    return None if by_value is None else by_value.to(value.dtype), by_locations, by_weights


@cache
def _launch() -> ModuleType:
    """`cupy_msda.cuda.launch`, once CuPy is known to be there."""
    from cupy_msda.cuda import launch

    launch.require_cupy(torch.version.cuda)
    return launch


def _place(value: Tensor) -> tuple[int, int]:
    """The device of value and the pointer of torch's current stream there."""
    stream = torch.cuda.current_stream(value.device)
    return value.get_device(), stream.cuda_stream


def _readable(tensor: Tensor) -> Tensor:
    """The tensor as the kernels read it: C-contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _exported(table: LevelTable) -> LevelTable:
    """The table with its device tensors, if any, as DLPack exporters of contiguous int64."""
    if table.device_sizes is None and table.device_starts is None:
        return table
    sizes, starts = (
        None if tensor is None else _Exporter(tensor.long().contiguous()) for tensor in table[2:]
    )
    return table._replace(device_sizes=sizes, device_starts=starts)


class _Exporter:
    """A tensor for one `from_dlpack`, several times cheaper than through `Tensor.__dlpack__`.

    Nothing waits for a stream: whoever imports it already works on the tensor's own. Half dtypes
    travel as int16, since CuPy has no bfloat16.
    """

    __slots__ = ("_capsule", "_device")

    def __init__(self, tensor: Tensor) -> None:
        self._capsule = to_dlpack(tensor.view(torch.int16) if tensor.dtype in _HALF else tensor)
        self._device = (2, tensor.get_device()) if tensor.is_cuda else (1, 0)  # kDLCUDA, kDLCPU

    def __dlpack__(self, **_: Any) -> Any:
        """The capsule, whatever stream or version is asked for."""
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's device type and index."""
        return self._device
