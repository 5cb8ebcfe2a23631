# SPDX-License-Identifier: Apache-2.0
"""CPU arrays: the Numba kernels where Numba is installed, else the reference."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from cupy_msda import reference
from cupy_msda.arrays import dtype_name
from cupy_msda.problem import LevelTable, Problem


@cache
def backend() -> ModuleType:
    """`cupy_msda.cpu.kernels` if Numba is installed, else `cupy_msda.reference`.

    A broken Numba installation raises its own error.
    """
    return reference if find_spec("numba") is None else import_module("cupy_msda.cpu.kernels")


def forward(
    problem: Problem,
    table: LevelTable,
    value: Any,
    locations: Any,
    weights: Any,
    *,
    threads: int | None = None,
) -> Any:
    """The output of the operator on CPU arrays of any library, as a NumPy array.

    It is in float32, or in float64 for float64 values; the caller rounds it. `threads` limits the
    Numba kernels, which otherwise use NUMBA_NUM_THREADS.
    """
    value, *points = (_widened(problem, array) for array in (value, locations, weights))
    return _run("forward", threads, value, table.levels, *points)


def backward(
    problem: Problem,
    table: LevelTable,
    grad_output: Any,
    value: Any,
    locations: Any,
    weights: Any,
    *,
    threads: int | None = None,
) -> tuple[Any, Any, Any]:
    """The gradients of value, locations and weights as NumPy arrays, in the dtype of `forward`."""
    arrays = (grad_output, value, locations, weights)
    grad, value, *points = (_widened(problem, array) for array in arrays)
    gradients: tuple[Any, Any, Any] = _run("backward", threads, grad, value, table.levels, *points)
    return gradients


def compile_ahead(problem: Problem, with_backward: bool) -> None:
    """Compile the Numba kernels for a problem by running the smallest one of its kind."""
    wide = _wide(problem)
    small = problem._replace(
        batch=1, spatial_size=1, num_heads=1, num_queries=1, num_levels=1, num_points=1
    )
    value = np.zeros((1, 1, 1, problem.head_dim), wide)
    locations, weights = np.zeros((1, 1, 1, 1, 1, 2), wide), np.zeros((1, 1, 1, 1, 1), wide)
    table = LevelTable(((1, 1),), (0,))
    output = forward(small, table, value, locations, weights)
    if with_backward:
        backward(small, table, output, value, locations, weights)


def _run(name: str, threads: int | None, *arguments: Any) -> Any:
    """Call a function of the backend; the reference leaves threads to its library."""
    module = backend()
    if module is not reference:
        return getattr(module, name)(*arguments, threads=threads)
    with np.errstate(all="ignore"):  # only NumPy would warn of infinities and overflow
        return getattr(reference, name)(*arguments)


def _wide(problem: Problem) -> type[np.floating[Any]]:
    """The dtype of all arrays of the backend: float32, or float64 for float64 values."""
    return np.float64 if problem.value_dtype == "float64" else np.float32


def _widened(problem: Problem, array: Any) -> Any:
    """A C-contiguous, aligned NumPy array in the dtype to compute in, copied only where needed."""
    if not isinstance(array, np.ndarray):
        if dtype_name(array) == "bfloat16":  # NumPy cannot read it, so its own library widens it
            xp = array_namespace(array)
            array = xp.astype(array, xp.float32)
        array = np.from_dlpack(array)
    array = np.ascontiguousarray(array, _wide(problem))
    return array if array.flags.aligned else array.copy()
