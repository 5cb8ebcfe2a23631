# SPDX-License-Identifier: Apache-2.0
"""Tensors to the CUDA kernels and back: allocation by torch, pointers through DLPack, torch's current stream.

Every microsecond here is one of every eager call: hence the few frames and the local names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from cupy_msda.cuda import dlpack, launch
from cupy_msda.cuda.importing import require_cupy
from cupy_msda.cuda.plans import fused_limit
from cupy_msda.torch.operands import BackwardOperands, Operands, inputs_of

if TYPE_CHECKING:
    from cupy_msda.torch.fused_operands import FusedBackwardOperands, FusedOperands
    from cupy_msda.torch.operators import Call

Gradients = tuple[Tensor, Tensor, Tensor]
FusedGradients = tuple[Tensor, Tensor, Tensor, Tensor]

_read = dlpack.reader(Tensor, to_dlpack)
_read_stream = dlpack.stream_reader(Tensor)

# Slots of a thread's arguments.
_GRAD_OUTPUT, _REFERENCES, _VALUE, _LOCATIONS, _WEIGHTS, _SIZES, _STARTS, _MASK = (
    launch.SLOT[name]
    for name in (
        *("grad_output", "references", "value", "locations", "weights"),
        *("sizes", "starts", "mask"),
    )
)
# The places of the inputs' data pointers and byte offsets among a thread's words.
_VALUE_DATA, _LOCATIONS_DATA, _WEIGHTS_DATA = (
    dlpack.WORDS * slot + dlpack.DATA for slot in (_VALUE, _LOCATIONS, _WEIGHTS)
)
_VALUE_OFFSET, _LOCATIONS_OFFSET, _WEIGHTS_OFFSET = (
    dlpack.WORDS * slot + dlpack.BYTE_OFFSET for slot in (_VALUE, _LOCATIONS, _WEIGHTS)
)
_MASK_DATA, _MASK_OFFSET = (
    dlpack.WORDS * _MASK + word for word in (dlpack.DATA, dlpack.BYTE_OFFSET)
)
_STARTS_WORDS = slice(dlpack.WORDS * _STARTS, dlpack.WORDS * (_STARTS + 1))
_NO_WORDS: list[Any] = [0] * dlpack.WORDS
_UNALIGNED = launch.ALIGNMENT - 1  # the bits of an address that must be zero
(
    _OUTPUT,
    _GRAD_VALUE,
    _GRAD_LOCATIONS,
    _GRAD_WEIGHTS,
    _GRAD_REFERENCES,
    _ACCUMULATOR,
    _BY_LOCATION,
) = (
    launch.SLOT[name]
    for name in (
        *("output", "grad_value", "grad_locations", "grad_weights", "grad_references"),
        *("accumulator", "by_location"),
    )
)


class NoMemoryError(RuntimeError):
    """A tensor has no memory that DLPack could export: what escaped from a transform, or a batch of gradients."""


def current_stream(device: int, arguments: launch.Arguments) -> int:
    """The address of torch's current stream on a device."""
    if _read_stream is None:
        return torch.cuda.current_stream(device).cuda_stream
    _read_stream(device, arguments.stream_address)
    return arguments.stream.value


def forward(call: Call, operands: Operands) -> tuple[Tensor, bytes]:
    """The output for tensors that the call's check accepted, and by what `backward` knows them again."""
    value = operands.value
    arguments = launch.thread_arguments()
    # What is kept must live until the launches are queued. From then on, torch keeps memory of copies for the stream.
    kept = _read_inputs(arguments, call, operands)
    seen = _seen(arguments, call)
    bound = call.bound.get(None) or _bind(call, value, None)
    output: Tensor = value.new_empty(call.output_shape)
    kept = (
        kept,
        _adapt_inputs(arguments, call, operands),
        _read(output, arguments.addresses[_OUTPUT]),
    )
    launch.run(bound, arguments, current_stream(bound.device, arguments))
    del kept
    return output, seen


def backward(call: Call, operands: BackwardOperands, seen: bytes | None = None) -> Gradients | None:
    """The gradients for tensors that the call's check accepted; those that are not needed have no elements.

    With `seen`, from `forward`: None unless the inputs are the same tensors still, in the same memory.
    """
    given = operands.forward
    arguments = launch.thread_arguments()
    kept = _read_inputs(arguments, call, given)
    if seen is not None and _seen(arguments, call) != seen:
        return None
    value, locations, weights = given.value, given.sampling_locations, given.attention_weights
    needs_value, needs_points = operands.needs_value, operands.needs_points
    request = needs_value, needs_points, torch.are_deterministic_algorithms_enabled()
    bound = call.bound.get(request) or _bind(call, value, request)
    kept = kept, _adapt_inputs(arguments, call, given)
    kept = kept, _pass(arguments, _GRAD_OUTPUT, operands.grad_output)
    by_value = _empty(value, needs_value)
    by_locations = _empty(locations, needs_points)
    by_weights = _empty(weights, needs_points)
    addresses = arguments.addresses
    kept = (
        kept,
        _read(by_value, addresses[_GRAD_VALUE]),
        _read(by_locations, addresses[_GRAD_LOCATIONS]),
        _read(by_weights, addresses[_GRAD_WEIGHTS]),
    )
    if bound.plan.workspace:
        workspace = value.new_empty(bound.plan.workspace, dtype=torch.uint8)
        kept = kept, workspace, _read(workspace, addresses[_ACCUMULATOR])
    launch.run(bound, arguments, current_stream(bound.device, arguments))
    del kept
    return by_value, by_locations, by_weights


def fused_forward(call: Call, operands: FusedOperands) -> Tensor | None:
    """The output of a fused call that its check accepted; None if it must be composed: see `plans.fused_limit`."""
    given, scale = operands.given, operands.offset_scale
    value = given.value
    bound = _bind_fused(call, value, None, scale)
    if bound is None:
        return None
    arguments = launch.thread_arguments()
    output: Tensor = value.new_empty(call.output_shape)
    kept = (
        _read_fused(arguments, call, operands),
        _read(output, arguments.addresses[_OUTPUT]),
    )
    launch.run(bound, arguments, current_stream(bound.device, arguments))
    del kept
    return output


def fused_backward(call: Call, operands: FusedBackwardOperands) -> FusedGradients | None:
    """The gradients of value, reference points, offsets and logits, likewise; one not needed has no elements."""
    forward, needs = operands.forward, operands.needs
    value, offsets, logits = inputs_of(forward.given)
    needs_points = needs.points or needs.references
    deterministic = needs.value and torch.are_deterministic_algorithms_enabled()
    request = needs.value, needs_points, deterministic, needs.references
    bound = _bind_fused(call, value, request, forward.offset_scale)
    if bound is None:
        return None
    arguments = launch.thread_arguments()
    kept: Any = _read_fused(arguments, call, forward)
    kept = kept, _pass(arguments, _GRAD_OUTPUT, operands.grad_output)
    results = (
        _empty(value, needs.value),
        _empty(forward.reference_points, needs.references),
        _empty(offsets, needs_points),
        _empty(logits, needs_points),
    )
    written = dict(
        zip((_GRAD_VALUE, _GRAD_REFERENCES, _GRAD_LOCATIONS, _GRAD_WEIGHTS), results, strict=True)
    )
    if bound.plan.workspace:
        written[_ACCUMULATOR] = value.new_empty(bound.plan.workspace, dtype=torch.uint8)
    if needs.references:
        written[_BY_LOCATION] = offsets.new_empty(offsets.shape, dtype=torch.float32)
    addresses = arguments.addresses
    kept = kept, [_read(tensor, addresses[slot]) for slot, tensor in written.items()]
    launch.run(bound, arguments, current_stream(bound.device, arguments))
    del kept
    if needs_points and not needs.points:
        return *results[:2], offsets.new_empty(0), logits.new_empty(0)
    return results


def _bind_fused(
    call: Call, value: Tensor, request: tuple[bool, bool, bool, bool] | None, scale: float
) -> launch.Bound | None:
    """Prepare what a fused call launches, once; None if it must be composed."""
    key = request, scale
    if key not in call.bound:
        deterministic = request is not None and request[2]
        composed = fused_limit(call.problem, deterministic)
        call.bound[key] = None if composed else _fused_bound(call, value, request, scale)
    return call.bound[key]  # type: ignore[no-any-return]


def _fused_bound(
    call: Call, value: Tensor, request: tuple[bool, bool, bool, bool] | None, scale: float
) -> launch.Bound:
    """What a fused call launches."""
    require_cupy(torch.version.cuda)
    case = call.problem, call.table, call.grids, max(value.get_device(), 0)
    if request is None:
        return launch.bind_forward(*case, scale)
    return launch.bind_backward(*case, *request, scale)


def _read_fused(arguments: launch.Arguments, call: Call, operands: FusedOperands) -> Any:
    """Point to the inputs of a fused call, or to copies; what must be kept for that."""
    return (
        _read_inputs(arguments, call, operands.given),
        _adapt_inputs(arguments, call, operands.given),
        _pass(arguments, _REFERENCES, operands.reference_points, "reference_points"),
    )


def _empty(tensor: Tensor, needed: bool) -> Tensor:
    """A contiguous tensor for the gradient of another."""
    if needed and tensor.is_contiguous():
        return torch.empty_like(tensor)  # costs half of what `new_empty` does
    return tensor.new_empty(tensor.shape if needed else 0)


def _bind(call: Call, value: Tensor, request: tuple[bool, bool, bool] | None) -> launch.Bound:
    """Prepare what the call launches, for a forward or for the gradients that are requested, once."""
    require_cupy(torch.version.cuda)
    key = call.problem, call.table, call.grids, max(value.get_device(), 0)
    bound = launch.bind_backward(*key, *request) if request else launch.bind_forward(*key)
    call.bound[request] = bound
    return bound


def _read_inputs(arguments: launch.Arguments, call: Call, operands: Operands) -> Any:
    """Point to the inputs and to what only the device knows of the level table; what must be kept for that."""
    addresses = arguments.addresses
    try:
        kept: tuple[Any, ...] = (
            _read(operands.value, addresses[_VALUE]),
            _read(operands.sampling_locations, addresses[_LOCATIONS]),
            _read(operands.attention_weights, addresses[_WEIGHTS]),
        )
        if call.problem.has_mask:
            kept += (_read(operands.value_mask, addresses[_MASK]),)
    except RuntimeError as error:
        of_points = "sampling_locations, attention_weights"
        if call.problem.references:
            of_points = "sampling_offsets, attention_logits"
        raise NoMemoryError(
            f"value, {of_points} and value_mask must be tensors in memory that DLPack can export, got {error}"
        ) from error
    if call.table_on_host:
        return kept
    shapes, start_index = operands.spatial_shapes, operands.level_start_index
    if start_index is None:
        arguments.words[_STARTS_WORDS] = _NO_WORDS
    return (
        kept,
        None if shapes is None else _read(shapes, addresses[_SIZES]),
        None if start_index is None else _read(start_index, addresses[_STARTS]),
    )


def _seen(arguments: launch.Arguments, call: Call) -> bytes:
    """The DLTensors that `_read_inputs` has filled in."""
    seen = (arguments.inputs if call.table_on_host else arguments.inputs_and_table).tobytes()
    return seen + arguments.mask.tobytes() if call.problem.has_mask else seen


def _adapt_inputs(arguments: launch.Arguments, call: Call, operands: Operands) -> Any:
    """Point to copies of what the kernels cannot read as it is; what must be kept for that."""
    value, locations = operands.value, operands.sampling_locations
    weights, words = operands.attention_weights, arguments.words
    kept: list[Any] = []
    value_data, locations_data = words[_VALUE_DATA], words[_LOCATIONS_DATA]
    weights_data = words[_WEIGHTS_DATA]
    if (
        not (value_data and locations_data and weights_data)
        or (value_data | locations_data | weights_data) & _UNALIGNED
        or words[_VALUE_OFFSET]
        or words[_LOCATIONS_OFFSET]
        or words[_WEIGHTS_OFFSET]
        or not (value.is_contiguous() and locations.is_contiguous() and weights.is_contiguous())
    ):
        kept += (
            _pass(arguments, _VALUE, value),
            _pass(arguments, _LOCATIONS, locations),
            _pass(arguments, _WEIGHTS, weights),
        )
    if call.problem.has_mask:
        # Of bytes: unlike the others, it may begin anywhere.
        mask = operands.value_mask
        if not words[_MASK_DATA] or words[_MASK_OFFSET] or not mask.is_contiguous():
            kept += (_pass(arguments, _MASK, mask),)
    if not call.table_on_host:
        for slot, table in (
            (_SIZES, operands.spatial_shapes),
            (_STARTS, operands.level_start_index),
        ):
            if table is not None and (table.dtype is not torch.int64 or not table.is_contiguous()):
                long = table.long().contiguous()
                kept += long, _read(long, arguments.addresses[slot])
    return kept


def _pass(arguments: launch.Arguments, slot: int, tensor: Tensor, name: str = "grad_output") -> Any:
    """Point to a tensor, or to a copy if it is not C-contiguous and aligned; what must be kept for that.

    A null pointer is of a zero tensor, which torch has not put into memory.
    """
    address, words, data = arguments.addresses[slot], arguments.words, dlpack.WORDS * slot
    try:
        kept = _read(tensor, address)
    except RuntimeError as error:
        raise NoMemoryError(
            f"{name} must be in memory that DLPack can export, got {error}"
        ) from error
    if (
        not words[data]
        or words[data] & _UNALIGNED
        or words[data + dlpack.BYTE_OFFSET]
        or not tensor.is_contiguous()
    ):
        copy = torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
        kept = copy, _read(copy, address)
    return kept
