# SPDX-License-Identifier: Apache-2.0
"""Read tensors through DLPack straight into C structs, for a small part of the cost of a `from_dlpack`.

A tensor type that offers DLPack's C exchange API (`__dlpack_c_exchange_api__`, DLPack 1.3) fills a DLTensor in place;
otherwise the DLTensor is copied out of a capsule. Source of the layouts: dlpack.h, https://dmlc.github.io/dlpack/.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

# struct DLTensor { void* data; DLDevice device; int32_t ndim; DLDataType dtype; int64_t* shape; int64_t* strides;
#                   uint64_t byte_offset; }
WORDS = 6  # of 8 bytes, in a DLTensor
DATA, BYTE_OFFSET = 0, 5  # their places
KDL_CUDA = 2

# struct DLPackExchangeAPI { version; prev_api; allocator; from_py_object; to_py_object; dltensor_from_py_object;
#                            current_work_stream; }
_EXCHANGE_WORDS, _DLTENSOR_FROM_PY_OBJECT, _CURRENT_WORK_STREAM = 7, 5, 6

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]

Reader = Callable[[Any, int], Any]


def reader(tensor_type: type, to_capsule: Callable[[Any], Any]) -> Reader:
    """A function of a tensor and an address that writes the tensor's DLTensor there.

    The DLTensor is valid while the tensor lives, and what the function returns, if that is not 0. Nothing waits for a
    stream.
    """
    entry = _exchange_entry(tensor_type, _DLTENSOR_FROM_PY_OBJECT)
    if entry is not None:
        # A PYFUNCTYPE keeps the GIL and raises the Python error that the function sets.
        return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(entry)

    def read(tensor: Any, address: int) -> Any:
        capsule = to_capsule(tensor)
        managed = _capsule_pointer(
            capsule, b"dltensor"
        )  # a DLManagedTensor begins with its DLTensor
        ctypes.memmove(address, managed, 8 * WORDS)
        return capsule

    return read


def stream_reader(tensor_type: type) -> Callable[[int, int], Any] | None:
    """A function of a CUDA device's index and an address that writes the current stream there; None without the API."""
    entry = _exchange_entry(tensor_type, _CURRENT_WORK_STREAM)
    if entry is None:
        return None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
    return partial(prototype(entry), KDL_CUDA)


def _exchange_entry(tensor_type: type, index: int) -> int | None:
    """The address of a function of the type's exchange API; None if there is none."""
    capsule = getattr(tensor_type, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    table = _capsule_pointer(capsule, b"dlpack_exchange_api")
    major = ctypes.c_uint32.from_address(table).value
    entries = (ctypes.c_void_p * _EXCHANGE_WORDS).from_address(table)
    return entries[index] if major == 1 else None
