# SPDX-License-Identifier: Apache-2.0
"""CPU arrays: the Numba kernels where Numba is installed and works, else the reference."""

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
from cupy_msda.cpu import fork
from cupy_msda.faults import reason, warn_once
from cupy_msda.problem import LevelTable, Problem


@cache
def obstacle() -> str | None:
    """Why the Numba kernels cannot run, or None if they can; with a warning where Numba is installed."""
    if find_spec("numba") is None:
        return 'Numba is not installed: pip install "cupy-msda[cpu]"'
    try:
        import_module("cupy_msda.cpu.kernels")  # which compiles a small one
    except Exception as error:
        _warn(error)
        return f"Numba is installed and does not work ({reason(error)})"
    return None


@cache
def backend() -> ModuleType:
    """`cupy_msda.cpu.kernels` if Numba is installed and works, else `cupy_msda.reference`."""
    return import_module("cupy_msda.cpu.kernels") if obstacle() is None else reference


@cache
def _compiles(kernels: ModuleType, name: str, *template: Any) -> bool:
    """Whether Numba can compile `forward` or `backward` for D and so on; it is compiled then."""
    try:
        getattr(kernels, f"{name}_kernel")(*template)
    except Exception as error:
        _warn(error)
        return False
    return True


def _warn(error: Exception) -> None:
    """Warn that the reference runs."""
    warn_once(
        "numba",
        f"Numba must import and compile the kernels of CPU arrays, got {reason(error)}: the slow "
        "reference runs instead",
    )


def forward(
    problem: Problem,
    table: LevelTable,
    value: Any,
    locations: Any,
    weights: Any,
    *,
    mask: Any = None,
    threads: int | None = None,
) -> Any:
    """The output of the operator on CPU arrays of any library, as a NumPy array.

    It is in float32, or in float64 for float64 values; the caller rounds it. `mask` is that of the
    positions of value, if there is one. `threads` limits the Numba kernels, which otherwise use as many
    as `cupy_msda.cpu.threads.limit` finds.
    """
    value, *points = (_widened(problem, array) for array in (value, locations, weights))
    return _run("forward", problem, mask, threads, value, table.levels, *points)


def backward(
    problem: Problem,
    table: LevelTable,
    grad_output: Any,
    value: Any,
    locations: Any,
    weights: Any,
    *,
    mask: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any, Any]:
    """The gradients of value, locations and weights as NumPy arrays, in the dtype of `forward`."""
    arrays = (grad_output, value, locations, weights)
    grad, value, *points = (_widened(problem, array) for array in arrays)
    gradients: tuple[Any, Any, Any] = _run(
        "backward", problem, mask, threads, grad, value, table.levels, *points
    )
    return gradients


def compile_ahead(problem: Problem, with_backward: bool) -> None:
    """Compile the Numba kernels for a problem."""
    for name in ("forward", "backward") if with_backward else ("forward",):
        _module(name, problem)


def _module(name: str, problem: Problem) -> ModuleType:
    """What runs `forward` or `backward`; the kernel is compiled then."""
    module, itemsize = backend(), np.dtype(_wide(problem)).itemsize
    template = problem.head_dim, itemsize, problem.interpolation == "nearest", problem.has_mask
    # Without channels there is nothing to compile.
    if problem.head_dim and module is not reference:
        return module if _compiles(module, name, *template) else reference
    return reference


def _run(name: str, problem: Problem, mask: Any, threads: int | None, *arguments: Any) -> Any:
    """Call a function of the backend; the reference leaves threads to its library."""
    module, points, interpolation = (
        _module(name, problem),
        problem.level_points,
        problem.interpolation,
    )
    if mask is not None:
        mask = np.ascontiguousarray(_numpy(mask))
    if module is not reference:
        return getattr(module, name)(
            *arguments,
            num_points=points,
            interpolation=interpolation,
            mask=mask,
            threads=threads,
        )
    flat = arguments[-1].ndim == 4  # the weights: (N, Lq, M, K)
    with np.errstate(all="ignore"):  # only NumPy would warn of infinities and overflow
        return getattr(reference, name)(
            *arguments,
            num_points=points if flat else None,
            interpolation=interpolation,
            value_mask=mask,
        )


def _wide(problem: Problem) -> type[np.floating[Any]]:
    """The dtype of all arrays of the backend: float32, or float64 for float64 values."""
    return np.float64 if problem.value_dtype == "float64" else np.float32


def _widened(problem: Problem, array: Any) -> Any:
    """A C-contiguous, aligned NumPy array in the dtype to compute in, copied only where needed."""
    array = np.ascontiguousarray(_numpy(array), _wide(problem))
    return array if array.flags.aligned else array.copy()


def _numpy(array: Any) -> Any:
    """A CPU array of any library as a NumPy array, in float32 if it is bfloat16."""
    if isinstance(array, np.ndarray):
        return array
    if dtype_name(array) == "bfloat16":  # NumPy cannot read it, so its own library widens it
        xp = array_namespace(array)
        array = xp.astype(array, xp.float32)
    return np.from_dlpack(array)


fork.register()
