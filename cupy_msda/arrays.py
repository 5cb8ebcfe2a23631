# SPDX-License-Identifier: Apache-2.0
"""Library, dtype and device of an array of any library. Its contents are never read."""

from __future__ import annotations

from typing import Any

_LIBRARIES = ("numpy", "torch", "cupy")
# DLPack's device codes: host memory, plain and pinned; CUDA memory, plain and managed.
_DLPACK_DEVICES = {1: "cpu", 3: "cpu", 2: "cuda", 13: "cuda"}


def library(array: object) -> str:
    """The top-level module of an array's type, or of its first base class from a known library."""
    module = type(array).__module__
    if module == "torch":  # a tensor, soonest: every call asks
        return "torch"
    own = module.partition(".")[0]
    if own in _LIBRARIES:  # before the bases, which older versions of Dynamo cannot walk
        return own
    names = (base.__module__.partition(".")[0] for base in type(array).__mro__)
    return next((name for name in names if name in _LIBRARIES), own)


def dtype_name(array: Any) -> str:
    """The dtype without its library's prefix: "float32" for both torch and NumPy."""
    return str(array.dtype).rpartition(".")[2]


def place(array: Any) -> str:
    """The device that holds the data, named as torch does: "cpu", "cuda:0", "meta", ..."""
    device = device_of(array)
    if not isinstance(device, tuple):
        return str(device)
    kind = _DLPACK_DEVICES.get(int(device[0]), f"DLPack device {int(device[0])}")
    return kind if kind == "cpu" else f"{kind}:{device[1]}"


def on_host(array: Any) -> bool:
    """Whether the host can read the array without copying it from a device."""
    return place(array) == "cpu"


def device_of(array: Any) -> Any:
    """torch's device or DLPack's (type, index): quicker to compare than the strings of `place`."""
    return array.device if library(array) == "torch" else tuple(array.__dlpack_device__())


class Described:
    """Stands for a host array of which only shape and dtype are known."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        """`dtype` is its name."""
        self.shape = shape
        self.dtype = dtype

    def __dlpack__(self) -> None:
        """Never called: a check reads no contents."""

    __array_namespace__ = __dlpack__

    def __dlpack_device__(self) -> tuple[int, int]:
        """The CPU."""
        return 1, 0
