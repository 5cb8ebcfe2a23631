# SPDX-License-Identifier: Apache-2.0
"""Run the plans through CuPy: arrays in and out, on whose device and stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from cupy_msda.cuda.compile import load
from cupy_msda.cuda.plans import (
    NO_TABLE,
    Plan,
    is_owned,
    plan_backward,
    plan_finish,
    plan_forward,
    plan_scale,
    plan_value,
)
from cupy_msda.problem import Grids, LevelTable, Problem

ALIGNMENT = 16  # bytes: the widest load


def require_cupy(torch_cuda: str | None = None) -> Any:
    """CuPy, or an error that says what to install, for a torch of this CUDA version if given."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        what = '"cupy-msda[cuda12x]" or, for a driver and torch of CUDA 13, "cupy-msda[cuda13x]"'
        if torch_cuda is not None:
            major = torch_cuda.partition(".")[0]
            what = f'"cupy-msda[cuda{major}x]" fits this torch, built for CUDA {major}'
        raise ModuleNotFoundError(
            f"the CUDA kernels run through CuPy, which is not installed: pip install {what}",
            name="cupy",
        ) from error
    return cupy


@contextmanager
def on_stream(device: int, stream: int) -> Iterator[None]:
    """Make `device` and the stream at this address CuPy's current ones."""
    cupy = require_cupy()
    streams = cupy.cuda.Stream
    with (
        cupy.cuda.Device(device),
        streams.from_external(_External(stream)) if stream else streams.null,
    ):
        yield


class _External:
    """A stream of another library, as the protocol that CuPy reads."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        """Protocol version and address."""
        return 0, self._pointer


def forward_arrays(
    problem: Problem,
    table: LevelTable,
    value: Any,
    locations: Any,
    weights: Any,
    grids: Grids = None,
) -> Any:
    """The operator on CUDA arrays of any library but torch, on CuPy's current stream, as a CuPy array."""
    cupy = require_cupy()
    with _device_of(value):
        value, locations, weights = map(_aligned, (value, locations, weights))
        if problem.is_empty:
            return cupy.zeros(problem.output_shape, value.dtype)
        output = cupy.empty(problem.output_shape, value.dtype)
        forward(problem, _aligned_table(table), value, locations, weights, output, grids)
    return output


def backward_arrays(
    problem: Problem,
    table: LevelTable,
    grad_output: Any,
    value: Any,
    locations: Any,
    weights: Any,
    grids: Grids = None,
) -> tuple[Any, Any, Any]:
    """The three gradients on CUDA arrays of any library but torch, as CuPy arrays."""
    cupy = require_cupy()
    with _device_of(value):
        grad, *arrays = [_aligned(array) for array in (grad_output, value, locations, weights)]
        accumulator = cupy.float64 if problem.value_dtype == "float64" else cupy.float32
        of_points = map(cupy.zeros_like if problem.is_empty else cupy.empty_like, arrays[1:])
        gradients = (cupy.zeros(value.shape, accumulator), *of_points)
        if not problem.is_empty:
            backward(problem, _aligned_table(table), (grad, *arrays), gradients, grids=grids)
        return gradients[0].astype(arrays[0].dtype, copy=False), gradients[1], gradients[2]


def forward(
    problem: Problem,
    table: LevelTable,
    value: Any,
    locations: Any,
    weights: Any,
    output: Any,
    grids: Grids = None,
) -> None:
    """Launch the forward on CuPy's current device and stream; arrays C-contiguous and 16-byte aligned."""
    device, multiprocessors = _current_device()
    plan = plan_forward(problem, _host_part(table), multiprocessors, grids)
    arrays = (value, locations, weights, output, *table[2:])
    _launch(plan, device, map(_as_cupy, arrays))


def backward(
    problem: Problem,
    table: LevelTable,
    inputs: tuple[Any, Any, Any, Any],
    gradients: tuple[Any, Any, Any],
    sums: Any = None,
    grids: Grids = None,
) -> None:
    """Launch the backward on CuPy's current device and stream; arrays C-contiguous and 16-byte aligned.

    `inputs` are grad_output, value, locations and weights. Of the gradients, that of value may be
    None, and so may the other two; it is a zeroed float32 (float64 for float64) accumulator, added
    to in no fixed order. With `sums`, a zeroed int64 array of `num_sums` elements (which may be 0),
    it is of the dtype of value instead, written whole, and reproducible bit for bit.
    """
    device, multiprocessors = _current_device()
    case = problem, _host_part(table), multiprocessors
    grad_output, *others = map(_as_cupy, inputs)
    grad_value, *of_points = map(_as_cupy, gradients)
    levels = [_as_cupy(array) for array in table[2:]]
    needs_value, needs_points = (gradient is not None for gradient in gradients[:2])
    separate = plan_value(*case, sums is not None, grids) if needs_value else None
    fixed = sums is not None and not is_owned(problem)
    added_to = _as_cupy(sums) if fixed else grad_value
    if fixed:
        _launch(plan_scale(*case), device, (grad_output, *others[1:], added_to, *levels))
    if separate is not None:
        _launch(separate, device, (grad_output, *others[1:], added_to, *levels))
    if separate is None or needs_points:
        together = separate is None and needs_value
        plan = plan_backward(*case, together, needs_points, fixed and together, grids)
        to = added_to if together else _as_cupy(None)
        _launch(plan, device, (grad_output, *others, to, *of_points, *levels))
    if fixed:
        _launch(plan_finish(problem, multiprocessors), device, (added_to, grad_value))


def compile_ahead(
    problem: Problem,
    with_backward: bool,
    reproducible: bool,
    device: int | None = None,
    grids: Grids = None,
) -> None:
    """Compile what `forward` and `backward`, with sums or without, will launch on `device` or CuPy's current one."""
    with require_cupy().cuda.Device(device):
        index, multiprocessors = _current_device()
        case = problem, NO_TABLE, multiprocessors
        plans = [plan_forward(*case, grids)]
        separate = plan_value(*case, reproducible, grids)
        fixed = reproducible and not is_owned(problem)
        if with_backward:
            plans.append(plan_backward(*case, False, True, grids=grids))
        if with_backward and separate is not None:
            plans.append(separate)
        elif with_backward:
            plans += [plan_backward(*case, True, points, fixed) for points in (True, False)]
        if with_backward and fixed:
            plans += [plan_scale(*case), plan_finish(problem, multiprocessors)]
        for plan in plans:
            load(plan.kernel, index)


def _launch(plan: Plan, device: int, arrays: Iterable[Any]) -> None:
    """Launch on CuPy arrays, which the parameters follow."""
    load(plan.kernel, device)(plan.grid, plan.block, (*arrays, plan.params))


def _host_part(table: LevelTable) -> LevelTable:
    """The table without its device arrays, as a key of the plan."""
    return LevelTable(table.sizes, table.starts)


@cache
def _multiprocessors(device: int) -> int:
    """How many multiprocessors a device has."""
    return int(require_cupy().cuda.Device(device).attributes["MultiProcessorCount"])


def _current_device() -> tuple[int, int]:
    """CuPy's current device and its number of multiprocessors."""
    device = int(require_cupy().cuda.runtime.getDevice())
    return device, _multiprocessors(device)


def _device_of(array: Any) -> Any:
    """A context that makes the device of a DLPack exporter CuPy's current one."""
    return require_cupy().cuda.Device(array.__dlpack_device__()[1])


def _aligned(array: Any, dtype: Any = None) -> Any:
    """A C-contiguous CuPy array on a 16-byte boundary; the array's own memory where it is one."""
    array = require_cupy().ascontiguousarray(_as_cupy(array), dtype)
    return array if array.data.ptr % ALIGNMENT == 0 else array.copy()


def _aligned_table(table: LevelTable) -> LevelTable:
    """The table with its device arrays as the kernels read them: contiguous int64."""
    sizes, starts = (
        None if array is None else _aligned(array, "int64")
        for array in (table.device_sizes, table.device_starts)
    )
    return table._replace(device_sizes=sizes, device_starts=starts)


def _as_cupy(array: Any) -> Any:
    """A CuPy view of any DLPack exporter; a null pointer for None."""
    if array is None:
        return np.intp(0)
    cupy = require_cupy()
    return array if isinstance(array, cupy.ndarray) else cupy.from_dlpack(array)
