# SPDX-License-Identifier: Apache-2.0
"""Run a plan: its launches, bound to one device, on the arrays of the calling thread.

A thread has one DLTensor for each array name of a plan. A launch takes the addresses of their data pointers: whoever
fills these in, through DLPack or from a CuPy array, has filled in the arguments of every launch of the plan.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from cupy_msda.cuda import dlpack, tuned
from cupy_msda.cuda.compile import load
from cupy_msda.cuda.importing import require_cupy
from cupy_msda.cuda.plans import (
    ARRAYS,
    BACKWARDS,
    FORWARD,
    Device,
    Fill,
    Launch,
    Plan,
    fused_limit,
    plan_backward,
    plan_forward,
)
from cupy_msda.problem import NO_TABLE, Grids, LevelTable, Problem

ALIGNMENT = 16  # bytes: the widest load
SLOT = {name: number for number, name in enumerate(ARRAYS)}
_NULL = len(ARRAYS)  # the slot of null pointers
_MAX_TABLES = 4096


class Arguments:
    """The arguments that one thread's next launch takes.

    `words` are its DLTensors, one after another in the order of `ARRAYS`, then one of zeros. `addresses` are theirs;
    `inputs` has the bytes of those of value, locations and weights, `inputs_and_table` also those of the level table,
    `mask` those of the mask.
    """

    def __init__(self) -> None:
        """Make room; all pointers are null."""
        self.words = (ctypes.c_uint64 * (dlpack.WORDS * (_NULL + 1)))()
        memory = memoryview(self.words).cast("B")
        names = "value", "sizes", "mask", "output"
        first, table, mask, end = (8 * dlpack.WORDS * SLOT[name] for name in names)
        self.inputs, self.inputs_and_table = memory[first:table], memory[first:mask]
        self.mask = memory[mask:end]
        base = ctypes.addressof(self.words)
        self.addresses = [base + 8 * dlpack.WORDS * slot for slot in range(_NULL + 1)]
        self.stream = ctypes.c_uint64()  # where a current stream may be written
        self.stream_address = ctypes.addressof(self.stream)
        self.tables: dict[int, int] = {}
        self._kept: list[Any] = []
        self.devices: set[int] = set()  # whose context the thread has made current once

    def set_pointer(self, name: str, pointer: int) -> None:
        """Let an array name stand for the memory at this address."""
        self.words[dlpack.WORDS * SLOT[name]] = pointer

    def pointer(self, name: str | None) -> int:
        """The address that an array name stands for; 0 for None."""
        return self.words[dlpack.WORDS * (_NULL if name is None else SLOT[name])]

    def add_table(self, launch: Launch) -> int:
        """Make the launch's array of pointers to arguments, as cuLaunchKernel takes it; its address."""
        if len(self.tables) >= _MAX_TABLES:
            self.tables.clear()
            self._kept.clear()
        slots = [_NULL if name is None else SLOT[name] for name in launch.arguments]
        pointers = [*(self.addresses[slot] for slot in slots), launch.params.ctypes.data]
        table = (ctypes.c_void_p * len(pointers))(*pointers)
        # The launch is kept, so that its id stays its own.
        self._kept.append((launch, table))
        self.tables[id(launch)] = address = ctypes.addressof(table)
        return address

    def make_context_current(self, device: int) -> None:
        """Make the current device's context the driver's current one: the runtime does so on its first call."""
        require_cupy().cuda.runtime.setDevice(device)
        self.devices.add(device)


_local = threading.local()


def thread_arguments() -> Arguments:
    """The arguments of the calling thread."""
    try:
        return _local.arguments  # type: ignore[no-any-return]
    except AttributeError:
        _local.arguments = Arguments()
        return _local.arguments  # type: ignore[no-any-return]


Step = Callable[[Arguments, int], None]  # of the thread's arguments and the address of a stream


class Bound(NamedTuple):
    """A plan for one device, its kernels compiled; `cuda` is CuPy's module."""

    plan: Plan
    device: int
    steps: tuple[Step, ...]
    cuda: Any


@lru_cache(maxsize=1024)
def bind_forward(
    problem: Problem, table: LevelTable, grids: Grids, device: int, offset_scale: float = 0.5
) -> Bound:
    """Plan a forward for the CUDA device of this index and compile what it launches; `table` as the host knows it."""
    on = describe(device)
    choice = tuned.choice(FORWARD, problem, on, grids)
    return bind(plan_forward(problem, table, on, grids, choice, offset_scale), device)


@lru_cache(maxsize=1024)
def bind_backward(
    problem: Problem,
    table: LevelTable,
    grids: Grids,
    device: int,
    needs_value: bool,
    needs_points: bool,
    deterministic: bool,
    needs_references: bool = False,
    offset_scale: float = 0.5,
) -> Bound:
    """Plan a backward for the CUDA device of this index and compile what it launches."""
    on = describe(device)
    result = BACKWARDS.get((needs_value, needs_points), "")
    plan = plan_backward(
        problem,
        table,
        on,
        grids,
        needs_value=needs_value,
        needs_points=needs_points,
        deterministic=deterministic,
        choice=tuned.choice(result, problem, on, grids),
        needs_references=needs_references,
        offset_scale=offset_scale,
    )
    return bind(plan, device)


def run(bound: Bound, arguments: Arguments, stream: int) -> None:
    """Queue the plan's launches on the stream at this address, on the thread's arguments."""
    if bound.device not in arguments.devices or bound.cuda.runtime.getDevice() != bound.device:
        with bound.cuda.Device(bound.device):
            arguments.make_context_current(bound.device)
            for step in bound.steps:
                step(arguments, stream)
    else:
        for step in bound.steps:
            step(arguments, stream)


def warmup(
    problem: Problem, grids: Grids, device: int | None, with_backward: bool, deterministic: bool
) -> None:
    """Compile what calls will launch on a device, or on CuPy's current one."""
    index = require_cupy().cuda.runtime.getDevice() if device is None else device
    rest = NO_TABLE, grids, index

    def kernels_of(of_value: bool) -> Problem:
        """The problem, or the plain one that stands for it where there are no fused kernels."""
        composed = problem.references and fused_limit(problem, of_value and deterministic)
        return problem.composed if composed else problem

    bind_forward(kernels_of(False), *rest)
    for needs in ((True, True), (True, False), (False, True)) if with_backward else ():
        bind_backward(kernels_of(needs[0]), *rest, *needs, deterministic)
    if with_backward and kernels_of(False).references:
        bind_backward(problem, *rest, False, True, False, needs_references=True)


@cache
def describe(device: int) -> Device:
    """What plans depend on, of the CUDA device of this index."""
    found = require_cupy().cuda.Device(device)
    attributes = found.attributes
    return Device(
        int(attributes["MultiProcessorCount"]),
        str(found.compute_capability),
        int(attributes["WarpSize"]),
    )


# --- from a plan to steps ------------------------------------------------------------------------


def bind(plan: Plan, device: int) -> Bound:
    """Compile the plan's kernels for a device."""
    cupy = require_cupy()
    with cupy.cuda.Device(device):
        steps = tuple(
            bind_fill(step) if isinstance(step, Fill) else bind_launch(step, device)
            for step in plan.launches
        )
    return Bound(plan, device, steps, cupy.cuda)


def bind_fill(fill: Fill) -> Step:
    """The step that fills an array with zeros."""
    memset = require_cupy().cuda.runtime.memsetAsync
    data, num_bytes = dlpack.WORDS * SLOT[fill.array], fill.num_bytes

    def step(arguments: Arguments, stream: int) -> None:
        memset(arguments.words[data], 0, num_bytes, stream)

    return step


def bind_launch(launch: Launch, device: int) -> Step:
    """The step that launches a kernel, which is compiled for the device: the current one."""
    function = load(launch.kernel, device)
    launch_kernel = getattr(require_cupy().cuda.driver, "launchKernel", None)
    pointer = getattr(getattr(function, "kernel", None), "ptr", None)
    if launch_kernel is None or pointer is None:
        return _bind_raw_kernel(launch, function)
    where, key = (pointer, *launch.grid, *launch.block, 0), id(launch)

    def step(arguments: Arguments, stream: int) -> None:
        table = arguments.tables.get(key) or arguments.add_table(launch)
        launch_kernel(*where, stream, table, 0)

    return step


def _bind_raw_kernel(launch: Launch, function: Any) -> Step:
    """The same by a call of the RawKernel, at several times the cost, for a CuPy without the driver's function."""
    streams = require_cupy().cuda.Stream
    params = launch.params.view(f"V{launch.params.nbytes}")

    def step(arguments: Arguments, stream: int) -> None:
        pointers = [np.intp(arguments.pointer(name)) for name in launch.arguments]
        with streams.from_external(_External(stream)) if stream else streams.null:
            function(launch.grid, launch.block, (*pointers, params))

    return step


class _External:
    """A stream of another library, as the protocol that CuPy reads."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        """Protocol version and address."""
        return 0, self._pointer


# --- CUDA arrays of other libraries than torch ---------------------------------------------------


def forward_arrays(
    problem: Problem,
    table: LevelTable,
    grids: Grids,
    given: dict[str, Any],
    *,
    mask: Any = None,
    offset_scale: float = 0.5,
) -> Any:
    """The output for CUDA arrays of any library but torch, on CuPy's current stream, as a CuPy array.

    `given` has them by their names in plans: value, locations, weights; of a fused call value, references, and offsets
    and logits as locations and weights.
    """
    cupy = require_cupy()
    device = given["value"].__dlpack_device__()[1]
    with cupy.cuda.Device(device):
        arrays = {name: _aligned(array) for name, array in given.items()}
        arrays["output"] = cupy.empty(problem.output_shape, arrays["value"].dtype)
        bound = bind_forward(problem, table.on_host, grids, device, offset_scale)
        _run_arrays(bound, arrays, table, mask)
    return arrays["output"]


def backward_arrays(
    problem: Problem,
    table: LevelTable,
    grids: Grids,
    grad_output: Any,
    given: dict[str, Any],
    *,
    mask: Any = None,
    offset_scale: float = 0.5,
) -> tuple[Any, ...]:
    """The gradients of what is given, in that order, likewise."""
    cupy = require_cupy()
    device = given["value"].__dlpack_device__()[1]
    with cupy.cuda.Device(device):
        every = {"grad_output": grad_output} | given
        arrays = {name: _aligned(array) for name, array in every.items()}
        gradients = {f"grad_{name}": cupy.empty_like(arrays[name]) for name in given}
        fused = problem.references is not None
        if fused:
            arrays["by_location"] = cupy.empty(arrays["locations"].shape, "float32")
        bound = bind_backward(
            *(problem, table.on_host, grids, device, True, True, False, fused, offset_scale)
        )
        _run_arrays(bound, arrays | gradients, table, mask)
    return tuple(gradients.values())


def _run_arrays(bound: Bound, arrays: dict[str, Any], table: LevelTable, mask: Any) -> None:
    """Run a plan on CuPy arrays by name, the device's part of the level table, a mask or None, and workspace."""
    cupy = require_cupy()
    arrays = arrays | {"mask": None if mask is None else _aligned(mask)}
    for name, array in (("sizes", table.device_sizes), ("starts", table.device_starts)):
        arrays[name] = None if array is None else _aligned(array, "int64")
    if bound.plan.workspace:
        arrays["accumulator"] = cupy.empty(bound.plan.workspace, "uint8")
    arguments = thread_arguments()
    for name, array in arrays.items():
        arguments.set_pointer(name, 0 if array is None else array.data.ptr)
    run(bound, arguments, cupy.cuda.get_current_stream().ptr)


def _aligned(array: Any, dtype: Any = None) -> Any:
    """A C-contiguous CuPy array on a 16-byte boundary; the array's own memory where it is one."""
    cupy = require_cupy()
    if not isinstance(array, cupy.ndarray):
        array = cupy.from_dlpack(array)
    array = cupy.ascontiguousarray(array, dtype)
    return array if array.data.ptr % ALIGNMENT == 0 else array.copy()
