# SPDX-License-Identifier: Apache-2.0
"""CPU arrays: the Numba kernels where Numba is installed and works, else the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from cupy_msda.fused import FusedPoints, gradients, locations_and_weights
from cupy_msda.problem import Level, LevelTable, Problem


@cache
def obstacle() -> str | None:
    """Why the Numba kernels cannot run, or None if they can; with a warning where Numba is installed."""
    if find_spec("numba") is None:
        return 'Numba is not installed: pip install "cupy-msda[cpu]"'
    try:
        fork.import_during_call("cupy_msda.cpu.kernels")  # which compiles a small one
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
    """Whether Numba can compile what a function needs for D and so on; it is compiled then."""
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
    results: tuple[Any, Any, Any] = _run(
        "backward", problem, mask, threads, grad, value, table.levels, *points
    )
    return results


def fused_forward(
    problem: Problem,
    table: LevelTable,
    value: Any,
    reference_points: Any,
    offsets: Any,
    logits: Any,
    *,
    offset_scale: float,
    mask: Any = None,
    threads: int | None = None,
) -> Any:
    """The output of a fused call, as `forward`."""
    given = (value, reference_points, offsets, logits)
    value, *points = (_widened(problem, array) for array in given)
    arguments = value, table.levels, *points
    return _run("fused_forward", problem, mask, threads, *arguments, offset_scale=offset_scale)


def fused_backward(
    problem: Problem,
    table: LevelTable,
    grad_output: Any,
    value: Any,
    reference_points: Any,
    offsets: Any,
    logits: Any,
    *,
    offset_scale: float,
    mask: Any = None,
    threads: int | None = None,
) -> tuple[Any, Any, Any, Any]:
    """The gradients of value, reference points, offsets and logits, as `backward`."""
    given = (grad_output, value, reference_points, offsets, logits)
    grad, value, *points = (_widened(problem, array) for array in given)
    arguments = grad, value, table.levels, *points
    results: tuple[Any, Any, Any, Any] = _run(
        "fused_backward", problem, mask, threads, *arguments, offset_scale=offset_scale
    )
    return results


def compile_ahead(problem: Problem, with_backward: bool) -> None:
    """Compile the Numba kernels for a problem."""
    fused = "fused_" if problem.references else ""
    for name in ("forward", "backward") if with_backward else ("forward",):
        _module(fused + name, problem)


def _module(name: str, problem: Problem) -> ModuleType:
    """What runs a function of the backend; the kernels are compiled then."""
    module, itemsize = backend(), np.dtype(_wide(problem)).itemsize
    template = problem.head_dim, itemsize, problem.interpolation == "nearest", problem.has_mask
    # Without channels there is nothing to compile.
    if problem.head_dim and module is not reference:
        return module if _compiles(module, name, *template) else reference
    return reference


def _run(
    name: str, problem: Problem, mask: Any, threads: int | None, *arguments: Any, **scale: float
) -> Any:
    """Call a function of the backend; the reference leaves threads to its library."""
    module, points = _module(name, problem), problem.level_points
    interpolation = problem.interpolation
    if mask is not None:
        mask = np.ascontiguousarray(_numpy(mask))
    if module is not reference:
        rules = {"num_points": points, "interpolation": interpolation, "mask": mask}
        return getattr(module, name)(*arguments, **rules, **scale, threads=threads)
    flat = arguments[-1].ndim == 4  # weights or logits, (N, Lq, M, K)
    rules = {"num_points": points if flat else None, "interpolation": interpolation}
    call = _COMPOSED[name] if name in _COMPOSED else getattr(reference, name)
    with np.errstate(all="ignore"):  # only NumPy would warn of infinities and overflow
        return call(*arguments, **rules, **scale, value_mask=mask)


def _fused_forward(
    value: Any, levels: Sequence[Level], *points: Any, offset_scale: float, **rules: Any
) -> Any:
    """`fused_forward` by the reference."""
    given = _fused_points(levels, points, rules["num_points"], offset_scale)
    return reference.forward(value, levels, *locations_and_weights(given), **rules)


def _fused_backward(
    grad_output: Any,
    value: Any,
    levels: Sequence[Level],
    *points: Any,
    offset_scale: float,
    **rules: Any,
) -> Any:
    """`fused_backward` by the reference."""
    given = _fused_points(levels, points, rules["num_points"], offset_scale)
    locations, weights = locations_and_weights(given)
    inputs = value, levels, locations, weights
    by_value, *by_points = reference.backward(grad_output, *inputs, **rules)
    return by_value, *gradients(given, weights, *by_points)


_COMPOSED: dict[str, Callable[..., Any]] = {
    "fused_forward": _fused_forward,
    "fused_backward": _fused_backward,
}


def _fused_points(
    levels: Sequence[Level],
    points: tuple[Any, ...],
    num_points: Sequence[int] | None,
    offset_scale: float,
) -> FusedPoints:
    """Reference points, offsets and logits with what belongs to them."""
    references, offsets, logits = points
    sizes = np.array([(width, height) for height, width, _ in levels], offsets.dtype)
    sizes = sizes.reshape(-1, 2)  # also without levels
    return FusedPoints(references, offsets, logits, sizes, num_points, offset_scale)


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
