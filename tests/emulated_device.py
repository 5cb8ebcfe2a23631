# SPDX-License-Identifier: Apache-2.0
"""A CUDA device for tests on a CPU: the emulator behind the functions of CuPy that launches use.

Host memory stands for device memory, so that CPU tensors and NumPy arrays take the whole way of CUDA ones.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from cupy_msda.arrays import Described, place
from cupy_msda.cuda import launch
from cupy_msda.cuda.compile import Kernel, assemble
from cupy_msda.cuda.plans import Device
from tests.emulator.emulator import Emulated

STREAM = 77
_ALIGNED = launch.SLOT.keys() - {
    "mask",
    "sizes",
    "starts",
}  # of which kernels load several elements at once


class EmulatedDevice:
    """What was done on the device: kernels by name, fills by the number of bytes, in order.

    `has_driver`: CuPy has the driver's launchKernel. `runs`: launches compute something.
    """

    def __init__(self, multiprocessors: int, has_driver: bool, runs: bool) -> None:
        self.description = Device(multiprocessors, "90")
        self.launched: list[str | int] = []
        self.streams: set[int] = set()
        self.compiled: set[tuple[Kernel, int]] = set()
        self._runs = runs
        self._kernels: dict[int, Kernel] = {}
        self._current = 0
        self._stream = STREAM
        runtime = SimpleNamespace(
            getDevice=lambda: self._current, setDevice=lambda _: None, memsetAsync=self._memset
        )
        driver = SimpleNamespace(launchKernel=self._launch_kernel) if has_driver else None
        names = ("ndarray", "empty_like", "from_dlpack", "ascontiguousarray")
        self.cupy = SimpleNamespace(
            **{name: getattr(_Arrays, name) for name in names},
            empty=_Arrays.empty,
            cuda=SimpleNamespace(
                runtime=runtime,
                driver=driver,
                Device=self._device,
                Stream=_Streams(self),
                get_current_stream=lambda: SimpleNamespace(ptr=self._stream),
            ),
        )

    def load(self, kernel: Kernel, device: int) -> Any:
        """The compiled function of a kernel, as CuPy's RawModule gives it."""
        assert device == self._current
        self.compiled.add((kernel, device))
        handle = len(self._kernels) + 1
        self._kernels[handle] = kernel

        def function(grid: Any, block: Any, arguments: Any) -> None:
            values = [np.ascontiguousarray(argument) for argument in arguments]
            table = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
            where = (handle, *grid, *block, 0, self._stream, ctypes.addressof(table), 0)
            self._launch_kernel(*where)

        if self.cupy.cuda.driver is not None:
            function.kernel = SimpleNamespace(ptr=handle)  # type: ignore[attr-defined]
        return function

    def _launch_kernel(self, handle: int, *where: int) -> None:
        """cuLaunchKernel."""
        *sizes, shared, stream, parameters, extra = where
        assert (shared, extra) == (0, 0)
        kernel = self._kernels[handle]
        self.launched.append(kernel.name.partition("<")[0])
        self.streams.add(stream)
        pointers = {name: launch.thread_arguments().pointer(name) for name in _ALIGNED}
        # A CPU would read them all the same; a GPU stops.
        assert not any(pointer % launch.ALIGNMENT for pointer in pointers.values()), pointers
        if self._runs:
            emulated = Emulated(assemble(kernel.file), kernel.name)
            emulated.launch_kernel(tuple(sizes[:3]), tuple(sizes[3:]), parameters)  # type: ignore[arg-type]

    def _memset(self, pointer: int, value: int, num_bytes: int, stream: int) -> None:
        """cudaMemsetAsync."""
        self.launched.append(num_bytes)
        self.streams.add(stream)
        ctypes.memset(pointer, value, num_bytes)

    def _device(self, index: int | None = None) -> Any:
        """cupy.cuda.Device."""

        @contextmanager
        def current() -> Iterator[None]:
            before, self._current = self._current, self._current if index is None else index
            yield
            self._current = before

        return current()

    @contextmanager
    def on_stream(self, stream: int) -> Iterator[None]:
        """Make the stream at this address CuPy's current one."""
        before, self._stream = self._stream, stream
        yield
        self._stream = before


class _Streams:
    """cupy.cuda.Stream."""

    def __init__(self, device: EmulatedDevice) -> None:
        self._device = device

    def from_external(self, stream: Any) -> Any:
        """A stream of another library, as a context."""
        version, pointer = stream.__cuda_stream__()
        assert version == 0
        return self._device.on_stream(pointer)

    @property
    def null(self) -> Any:
        """The default stream, as a context."""
        return self._device.on_stream(0)


class _Array(np.ndarray):
    """A NumPy array with CuPy's `data.ptr`."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        """The memory."""
        return SimpleNamespace(ptr=self.ctypes.data)


class _Arrays:
    """CuPy's functions on arrays; what is not written shows as NaN."""

    ndarray = _Array

    @staticmethod
    def empty(shape: Any, dtype: Any) -> _Array:
        """Poisoned."""
        return np.full(shape, 255 if dtype == "uint8" else np.nan, dtype).view(_Array)

    @staticmethod
    def empty_like(array: Any) -> _Array:
        """Poisoned."""
        return np.full_like(array, np.nan).view(_Array)

    @staticmethod
    def from_dlpack(array: Any) -> _Array:
        """Without a copy."""
        return np.from_dlpack(array).view(_Array)

    @staticmethod
    def ascontiguousarray(array: Any, dtype: Any = None) -> _Array:
        """A copy where needed."""
        return np.ascontiguousarray(array, dtype).view(_Array)


@contextmanager
def emulated_device(
    monkeypatch: Any, multiprocessors: int = 2, has_driver: bool = True, runs: bool = True
) -> Iterator[EmulatedDevice]:
    """Let every CUDA launch go to a small emulated device, and CPU tensors and NumPy arrays be on it."""
    device = EmulatedDevice(multiprocessors, has_driver, runs)
    with monkeypatch.context() as patch:
        for user in ("cuda.launch", "torch.exchange"):
            patch.setattr(f"cupy_msda.{user}.require_cupy", lambda *_: device.cupy)
        patch.setattr(launch, "describe", lambda _: device.description)
        patch.setattr(launch, "load", device.load)
        patch.setattr("cupy_msda.api.on_host", lambda _: False)
        patch.setattr("cupy_msda.contract.place", _place)
        patch.setattr("cupy_msda.torch.operators.is_on_device", lambda _: True)
        patch.setattr("cupy_msda.torch.exchange.current_stream", lambda *_: STREAM)
        forget()
        yield device
        forget()


def _place(array: Any) -> str:
    """The device of everything but what is only described, by `warmup`."""
    return place(array) if isinstance(array, Described) else "cuda:0"


def forget() -> None:
    """Forget what was prepared for other devices."""
    from cupy_msda.torch import operators

    launch.bind_forward.cache_clear()
    launch.bind_backward.cache_clear()
    operators.forget()
