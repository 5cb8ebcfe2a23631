# SPDX-License-Identifier: Apache-2.0
"""The registered torch operators, and the way past torch's dispatcher where it has nothing to add.

They check the contract themselves, on real tensors: a call is as safe from a compiled graph or from
`torch.ops.cupy_msda` as from the public functions, and tracing never reads the level table.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled

from cupy_msda import contract
from cupy_msda.cpu import backend
from cupy_msda.problem import INT32_MAX, Grids, LevelTable, Problem
from cupy_msda.torch import exchange, flops
from cupy_msda.torch.exchange import Gradients
from cupy_msda.torch.fused_operands import FUSED_BACKWARD_SCHEMA, FUSED_SCHEMA
from cupy_msda.torch.operands import (
    BACKWARD_SCHEMA,
    FORWARD_SCHEMA,
    BackwardOperands,
    Operands,
    backward_operands,
    check,
    check_traced,
    constants_of,
    flat,
    inputs_of,
    needs_of,
    register_once,
    tensors_of,
)

_SCHEMAS = {
    "ms_deform_attn_forward": FORWARD_SCHEMA,
    "ms_deform_attn_backward": BACKWARD_SCHEMA,
    # The same with autograd, which costs a call more: what torch.jit.trace records, since a trace may be run with
    # gradients. The modules that differentiate implement them, by the operators above.
    "ms_deform_attn": FORWARD_SCHEMA,
    "ms_deform_attn_gradients": BACKWARD_SCHEMA,
    # fused.py implements these.
    "ms_deform_attn_fused": FUSED_SCHEMA,
    "ms_deform_attn_fused_forward": FUSED_SCHEMA,
    "ms_deform_attn_fused_backward": FUSED_BACKWARD_SCHEMA,
}
for _name, _schema in _SCHEMAS.items():
    register_once(
        torch.library.define, f"cupy_msda::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag
    )
FORWARD = torch.ops.cupy_msda.ms_deform_attn_forward.default
BACKWARD = torch.ops.cupy_msda.ms_deform_attn_backward.default
DIFFERENTIABLE_FORWARD = torch.ops.cupy_msda.ms_deform_attn.default
FUSED_FORWARD = torch.ops.cupy_msda.ms_deform_attn_fused_forward.default
FUSED_BACKWARD = torch.ops.cupy_msda.ms_deform_attn_fused_backward.default
DIFFERENTIABLE_FUSED = torch.ops.cupy_msda.ms_deform_attn_fused.default
DIFFERENTIABLE_BACKWARD = torch.ops.cupy_msda.ms_deform_attn_gradients.default

HALF = (torch.float16, torch.bfloat16)

# --- eager calls ---------------------------------------------------------------------------------


# The call of a forward, and by what its backward knows the inputs again.
Recorded = tuple["Call", bytes]


def recorded_forward(operands: Operands) -> tuple[Tensor, Recorded | None]:
    """The output, and what spares `backward` the check on a device. The operator runs where torch must see the call."""
    if _is_plain(operands):
        call = checked(operands)
        if not call.on_device:
            return _cpu_forward(operands, call), None
        try:
            output, seen = exchange.forward(call, operands)
        except exchange.NoMemoryError:
            pass  # torch's dispatcher unwraps it
        else:
            return output, (call, seen)
    refuse_undispatchable(operands)
    if _get_tracing_state() is not None:
        return DIFFERENTIABLE_FORWARD(*operands), None
    flops.register()
    return FORWARD(*operands), None


def backward(operands: BackwardOperands, recorded: Recorded | None = None) -> Gradients:
    """The gradients, by the backward operator where torch must see the call."""
    grad_output = operands.grad_output
    if type(grad_output) is Tensor and not grad_output.is_neg() and not is_watched():
        try:
            if recorded is not None:
                call, seen = recorded
                _check_grad_output(operands, call)
                # None: hooks on saved tensors, or `tensor.data = ...`, have put other memory in the place of an input.
                gradients = exchange.backward(call, operands, seen)
                if gradients is not None:
                    return gradients
            if _is_plain(operands.forward):
                return _backward(operands)
        except exchange.NoMemoryError:
            pass  # torch's dispatcher unwraps it
    flops.register()
    return BACKWARD(*flat(operands))  # type: ignore[no-any-return]


# The exporter by torch.jit.trace, which knows no operator of ours.
NO_OLD_EXPORTER = "torch.onnx.export needs dynamo=True for cupy_msda.ms_deform_attn"
_TENSORS = {Tensor, torch.nn.Parameter}


def _is_plain(operands: Operands) -> bool:
    """Whether torch's dispatcher has nothing to add: tensors in memory, and nothing that wants to see the call."""
    value, shapes, start_index, locations, weights, mask = tensors_of(operands)
    return (
        not is_watched()
        and type(value) in _TENSORS
        and type(locations) in _TENSORS
        and type(weights) in _TENSORS
        and (shapes is None or type(shapes) is Tensor)
        and (start_index is None or type(start_index) is Tensor)
        and (mask is None or type(mask) is Tensor)
        and (value.is_cuda or value.is_cpu)
        and not (value.is_neg() or locations.is_neg() or weights.is_neg())
    )


def is_watched() -> bool:
    """Whether a mode, a tracer or a profiler wants to see calls. Dynamo does not come here."""
    return bool(
        _len_torch_dispatch_stack()
        or _is_torch_function_mode_enabled()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )


def refuse_undispatchable(operands: Operands) -> None:
    """Raise the error for what would not reach the operator, or not its checks."""
    if not torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        raise RuntimeError(NO_OLD_EXPORTER)
    if "DTensor" in [type(part).__name__ for part in operands]:
        import cupy_msda.torch.dtensor  # noqa: F401 - its import, which is costly, registers the rule
    value, locations, weights = inputs_of(operands)
    optional = (operands.spatial_shapes, operands.level_start_index, operands.value_mask)
    given = (value, locations, weights, *[part for part in optional if part is not None])
    if not all([is_dense(tensor) for tensor in given]):  # noqa: C419 - as Dynamo takes it
        check(operands)
        raise TypeError(f"value must be a dense torch tensor, got {type(value).__name__}")
    if not (value.is_cpu or value.is_cuda or value.is_meta):
        raise contract.unsupported_device(str(value.device))
    _refuse_rocm(value)
    mixed = any(
        p.dtype is not torch.float32 and p.dtype is not value.dtype for p in (locations, weights)
    )
    if mixed and not torch.compiler.is_compiling():
        check(operands)  # before a mode or a tracer records the call
    if any(tensor.is_meta for tensor in given):
        check(operands)  # where only shapes are computed, nothing else does
    numbers = (*(operands.sizes or ()), *(operands.starts or ()), *(operands.query_order or ()))
    # In a graph, to compare an integer would limit its range.
    if not torch.compiler.is_compiling() and any(
        type(number) is int and abs(number) > INT32_MAX for number in numbers
    ):
        check(operands)  # the dispatcher takes no larger ones


def _refuse_rocm(value: Tensor) -> None:
    """torch calls AMD's devices cuda, too."""
    if value.is_cuda and torch.version.hip is not None:
        raise contract.unsupported_device(f"{value.device} of a ROCm build of torch")


def is_dense(array: Any) -> bool:
    """Whether it is a torch tensor of a layout that the operators take."""
    return (
        isinstance(array, Tensor)
        and array.layout is torch.strided
        and not array.is_nested
        and not array.is_quantized
    )


# --- the memoised check --------------------------------------------------------------------------


class Call:
    """What is known of all calls that are alike in everything that a check sees.

    `bound` holds what the CUDA kernels have prepared, by the request.
    """

    __slots__ = (
        *("bound", "grids", "on_device", "output_shape"),
        *("problem", "table", "table_on_host"),
    )

    def __init__(self, accepted: tuple[Problem, LevelTable, Grids], value: Tensor) -> None:
        """Keep what a check has found; of the level table, only what the host knows."""
        self.problem, table, self.grids = accepted
        self.table = table.on_host
        self.output_shape = self.problem.output_shape
        self.table_on_host = table.levels is not None
        self.on_device = is_on_device(value)
        self.bound: dict[Any, Any] = {}


_calls: dict[tuple[Any, ...], Call] = {}
MAX_CALLS = 4096  # of which a process has few


def forget() -> None:
    """Forget all accepted calls, and what was prepared for them."""
    _calls.clear()


def is_on_device(tensor: Tensor) -> bool:
    """Whether its memory is a device's."""
    return tensor.is_cuda


def checked(operands: Operands) -> Call:
    """Check the contract, once for all calls that are alike in everything that it sees. Spelled out for speed."""
    value, shapes, start_index, locations, weights, mask = tensors_of(operands)
    try:
        key = (
            *(value.shape, value.dtype, value.device, value.layout),
            *(locations.shape, locations.dtype, locations.device, locations.layout),
            *(weights.shape, weights.dtype, weights.device, weights.layout),
            None if shapes is None else (shapes.shape, shapes.dtype, shapes.device),
            None
            if start_index is None
            else (start_index.shape, start_index.dtype, start_index.device),
            contents(value, shapes, start_index),
            None if mask is None else (mask.shape, mask.dtype, mask.device, mask.layout),
            *constants_of(operands),
        )
    except (RuntimeError, TypeError):
        check(operands)  # names what has no shape, or no contents for NumPy
        raise
    return _calls.get(key) or remember(key, check(operands), value)


def known(key: tuple[Any, ...]) -> Call | None:
    """The call that is remembered by this key."""
    return _calls.get(key)


def remember(
    key: tuple[Any, ...], accepted: tuple[Problem, LevelTable, Grids], value: Tensor
) -> Call:
    """Remember a call that a check has accepted."""
    call = Call(accepted, value)
    _refuse_rocm(value)
    if len(_calls) >= MAX_CALLS:
        _calls.clear()
    _calls[key] = call
    return call


def contents(value: Tensor, shapes: Tensor | None, start_index: Tensor | None) -> Any:
    """The contents of the level table where a check reads them: everywhere but on the device of value."""
    if shapes is None and start_index is None:
        return None
    if (
        is_on_device(value)
        and (shapes is None or is_on_device(shapes))
        and (start_index is None or is_on_device(start_index))
        and os.environ.get("CUPY_MSDA_CHECK") != "1"
    ):
        return None
    return tuple(
        None if half is None else half.cpu().numpy().tobytes() for half in (shapes, start_index)
    )


# --- the operators on real tensors ---------------------------------------------------------------


def _forward(operands: Operands) -> Tensor:
    """The forward operator."""
    call = checked(operands)
    if not call.on_device:
        return _cpu_forward(operands, call)
    return exchange.forward(call, operands)[0]


def _cpu_forward(operands: Operands, call: Call) -> Tensor:
    """The output, by the CPU's kernels."""
    arrays = map(to_numpy, inputs_of(operands))
    output = backend.forward(call.problem, call.table, *arrays, **on_host(operands))
    return to_tensor(output, operands.value.dtype)


def _backward(operands: BackwardOperands) -> Gradients:
    """The backward operator."""
    given = operands.forward
    call = checked(given)
    _check_grad_output(operands, call)
    if call.on_device:
        gradients = exchange.backward(call, operands)
        assert gradients is not None
        return gradients
    results: tuple[Any, ...] = (None, None, None)
    if operands.needs_value or operands.needs_points:
        arrays = map(to_numpy, (operands.grad_output, *inputs_of(given)))
        results = backend.backward(call.problem, call.table, *arrays, **on_host(given))
    by_value, by_locations, by_weights = (
        to_tensor(result, tensor.dtype) if need else tensor.new_empty(0)
        for result, tensor, need in zip(results, inputs_of(given), needs_of(operands), strict=True)
    )
    return by_value, by_locations, by_weights


def _check_grad_output(operands: BackwardOperands, call: Call) -> None:
    """Check grad_output, quickly where it is right."""
    grad_output, value = operands.grad_output, operands.forward.value
    if (
        grad_output.shape != call.output_shape
        or grad_output.dtype is not value.dtype
        or grad_output.device != value.device
        or grad_output.layout is not torch.strided
    ):
        contract.check_grad_output(call.problem, grad_output, value)


def on_host(operands: Operands) -> dict[str, Any]:
    """What the CPU's kernels take by keyword."""
    mask = operands.value_mask
    return {
        "mask": None if mask is None else to_numpy(mask),
        "threads": torch.get_num_threads(),
    }


def to_numpy(tensor: Tensor) -> Any:
    """A host tensor as a C-contiguous NumPy array: shared memory, or a copy widened to float32."""
    if tensor.dtype in HALF:  # NumPy has no bfloat16, and computes float16 slowly
        tensor = tensor.float()
    try:
        return tensor.detach().contiguous().numpy()
    except RuntimeError as error:
        raise exchange.NoMemoryError(
            f"grad_output and inputs must be in memory, got {error}"
        ) from error


def to_tensor(array: Any, dtype: torch.dtype) -> Tensor:
    """A result of the CPU kernels as a tensor of this dtype."""
    tensor = torch.from_numpy(array)
    # `to` alone takes ten times as long to find out.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


# --- registration --------------------------------------------------------------------------------


def _refuse_old_exporter(*_: object) -> None:
    """What the old exporter to ONNX calls for an operator in the graph of a traced module.

    Not of `Any`: torch 2.4 asks whether the annotation is a subclass, and on Python 3.10 `Any` is no class.
    """
    raise RuntimeError(NO_OLD_EXPORTER)


def hashable(operands: Operands) -> Operands:
    """The operands with tuples for the lists that the dispatcher makes."""
    return Operands(*(tuple(part) if isinstance(part, list) else part for part in operands))


def _dispatched_forward(*arguments: Any) -> Tensor:
    """The forward operator as the dispatcher calls it."""
    return _forward(hashable(Operands(*arguments)))


def _dispatched_backward(*arguments: Any) -> Gradients:
    """The backward operator as the dispatcher calls it."""
    operands = backward_operands(arguments)
    return _backward(operands._replace(forward=hashable(operands.forward)))


def _fake_forward(*arguments: Any) -> Tensor:
    """Shape, dtype and device of the output."""
    operands = Operands(*arguments)
    check_traced(operands)
    n, _, m, d = operands.value.shape
    return operands.value.new_empty((n, operands.sampling_locations.shape[1], m * d))  # type: ignore[no-any-return]


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Shapes, dtypes and devices of the gradients."""
    operands = backward_operands(arguments)
    check_traced(operands.forward, operands.grad_output)
    return tuple(
        tensor.new_empty(tensor.shape if need else 0)
        for tensor, need in zip(inputs_of(operands.forward), needs_of(operands), strict=True)
    )


for _name in _SCHEMAS:
    torch.onnx.register_custom_op_symbolic(  # type: ignore[attr-defined]
        f"cupy_msda::{_name}", _refuse_old_exporter, 9
    )
flops.register()
for _name, _run, _fake in (
    ("forward", _dispatched_forward, _fake_forward),
    ("backward", _dispatched_backward, _fake_backward),
):
    # One function for both: a table on a GPU with host values dispatches as CUDA.
    _operator = f"cupy_msda::ms_deform_attn_{_name}"
    register_once(torch.library.impl, _operator, ("cpu", "cuda"), _run)
    register_once(torch.library.register_fake, _operator, _fake)
