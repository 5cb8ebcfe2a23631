# SPDX-License-Identifier: Apache-2.0
"""The input contract: what every backend may rely on, and the only place that raises input errors.

A check reads shapes, dtypes and devices, never the contents of an array on a device, so it costs
no synchronisation.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from reprlib import repr as short_repr
from typing import Any, TypeVar

import numpy as np

from cupy_msda.arrays import Described, device_of, dtype_name, library, place
from cupy_msda.problem import INT32_MAX, MAX_GRIDS, MAX_HOST_LEVELS, Grids, LevelTable, Problem

VALUE_DTYPES = ("float16", "bfloat16", "float32", "float64")
_ARRAY_ATTRIBUTES = ("shape", "dtype", "__dlpack__", "__dlpack_device__")
# Results become arrays of the caller's library by its namespace's from_dlpack.
_OTHER_ARRAY_ATTRIBUTES = (*_ARRAY_ATTRIBUTES, "__array_namespace__")

# torch.jit.script compiles Python that it knows, which this package's is not.
NO_SCRIPT = "cupy_msda cannot be compiled by torch.jit.script: use torch.jit.trace, torch.export or torch.compile"
_Function = TypeVar("_Function", bound=Callable[..., Any])


def refuse_scripting(function: _Function) -> _Function:
    """Mark a function as one that torch.jit.script refuses with `NO_SCRIPT`."""
    vars(function)["__script_unsupported"] = NO_SCRIPT
    return function


def check(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    traced: bool = False,
) -> tuple[Problem, LevelTable]:
    """Check the inputs; raise TypeError or ValueError naming argument, contract and fact.

    `traced` leaves the contents of level arrays and symbolic sizes unchecked.
    """
    _check_value(value)
    _check_points("sampling_locations", sampling_locations, value)
    _check_points("attention_weights", attention_weights, value)
    sizes = _check_shapes(value, sampling_locations, attention_weights, traced)
    table = _level_table(spatial_shapes, level_start_index, value, sampling_locations, traced)
    points = dtype_name(sampling_locations), dtype_name(attention_weights)
    return Problem(*sizes, dtype_name(value), *points), table


def check_described(
    value_shape: Sequence[int],
    sampling_locations_shape: Sequence[int],
    dtype: Any,
    points_dtype: Any,
) -> Problem:
    """Check shapes and dtypes as those of arrays; `points_dtype` None: float32, or float64 for float64."""
    value = Described(value_shape, dtype)
    if points_dtype is None:
        points_dtype = "float64" if value.dtype == "float64" else "float32"
    locations = Described(sampling_locations_shape, points_dtype)
    weights = Described(locations.shape[:-1], locations.dtype)
    levels = locations.shape[3] if len(locations.shape) > 3 else 0
    return check(value, [(0, 0)] * levels, None, locations, weights)[0]


def unsupported_device(where: str) -> ValueError:
    """The error for values on a device without kernels."""
    return ValueError(f"value must be on the CPU or on an NVIDIA CUDA device, got {where}")


def check_grad_output(problem: Problem, grad_output: Any, value: Any) -> None:
    """Check the gradient of the output against the inputs that `check` accepted."""
    _check_beside("grad_output", grad_output, value)
    got = dtype_name(grad_output)
    if got != problem.value_dtype:
        raise TypeError(
            f"grad_output must have the dtype of value, {problem.value_dtype}, got {got}"
        )
    _check_shape("grad_output", grad_output, "(N, Lq, M*D)", problem.output_shape)


def check_query_order(query_order: Any, num_queries: int) -> Grids:
    """Check `query_order` of a call with `num_queries` queries; "auto" becomes None, None becomes ()."""
    if query_order is None:
        return ()
    if isinstance(query_order, str) and query_order == "auto":
        return None
    try:
        grids = tuple(map(_grid, query_order))
    except TypeError as error:
        raise TypeError(
            'query_order must be "auto", None or a sequence of (H, W) pairs of integers, '
            f"got {short_repr(query_order)}"
        ) from error
    if not 1 <= len(grids) <= MAX_GRIDS:
        raise ValueError(f"query_order must hold 1 to {MAX_GRIDS} grids, got {len(grids)}")
    for number, (height, width) in enumerate(grids):
        if min(height, width) < 0 or max(height, width) > INT32_MAX:
            raise ValueError(
                "query_order must have H and W from 0 to 2**31 - 1, "
                f"got (H, W) = {height, width} for grid {number}"
            )
    total = sum(height * width for height, width in grids)
    if total != num_queries:
        raise ValueError(
            f"query_order must have grids that hold the Lq = {num_queries} queries of "
            f"sampling_locations, got {total} in {short_repr(query_order)}"
        )
    return grids


def check_module(
    d_model: int,
    num_levels: int,
    query: Any,
    reference_points: Any,
    input_flatten: Any,
    input_padding_mask: Any,
) -> None:
    """Check the arguments of `MSDeformAttn.forward` that `check` does not see."""
    channels = f"C = {d_model}"
    n, lq, _ = _check_shape("query", query, f"(N, Lq, {channels})", (None, None, d_model))
    _, s, _ = _check_shape(
        "input_flatten",
        input_flatten,
        f"(N, S, {channels})",
        (n, None, d_model),
        ("query", query),
    )
    shape = tuple(reference_points.shape)
    if not (
        len(shape) == 4
        and shape[:2] == (n, lq)
        and shape[2] in (1, num_levels)
        and shape[3] in (2, 4)
    ):
        raise ValueError(
            "reference_points must have shape (N, Lq, L or 1, 2 or 4) = "
            f"({n}, {lq}, {num_levels} or 1, 2 or 4) since query has shape {tuple(query.shape)}, "
            f"got {shape}"
        )
    if input_padding_mask is None:
        return
    if dtype_name(input_padding_mask) != "bool":
        raise TypeError(
            "input_padding_mask must have dtype bool, True for padding, "
            f"got {dtype_name(input_padding_mask)}"
        )
    _check_shape(
        "input_padding_mask",
        input_padding_mask,
        "(N, S)",
        (n, s),
        ("input_flatten", input_flatten),
    )


def _check_value(value: Any) -> None:
    """Library, dtype and device of `value`."""
    lib, dtype, where = _check_array("value", value), dtype_name(value), place(value)
    if dtype not in VALUE_DTYPES:
        raise TypeError(f"value must have dtype {', '.join(VALUE_DTYPES)}, got {dtype}")
    if not where.startswith(("cpu", "cuda", "meta")):
        raise unsupported_device(where)
    if dtype == "bfloat16" and where.startswith("cuda") and lib != "torch":
        raise TypeError(
            "value must have dtype float16, float32 or float64 on a CUDA device, since CuPy has no "
            f"bfloat16, or be a torch tensor; got {dtype}, an array of {lib}"
        )


def _check_points(name: str, array: Any, value: Any) -> None:
    """Library, dtype and device of `sampling_locations` or `attention_weights`."""
    _check_beside(name, array, value)
    got, dtype = dtype_name(array), dtype_name(value)
    if got not in ("float32", dtype):
        or_that = "" if dtype == "float32" else f" or that of value, {dtype}"
        raise TypeError(f"{name} must have dtype float32{or_that}, got {got}")


def _check_shapes(
    value: Any, sampling_locations: Any, attention_weights: Any, traced: bool
) -> tuple[int, int, int, int, int, int, int]:
    """The sizes (N, S, M, D, Lq, L, P), if the three shapes fit each other."""
    n, s, m, d = _check_shape("value", value, "(N, S, M, D)", (None,) * 4)
    _, lq, _, levels, p, _ = _check_shape(
        "sampling_locations",
        sampling_locations,
        "(N, Lq, M, L, P, 2)",
        (n, None, m, None, None, 2),
        ("value", value),
    )
    # Skipped when tracing, as in `check_module`: a comparison would specialise a dynamic size.
    for name, array in (("value", value), ("sampling_locations", sampling_locations)):
        if not traced and max(array.shape) > INT32_MAX:
            raise ValueError(f"{name} must have sizes below 2**31, got shape {tuple(array.shape)}")
    _check_shape(
        "attention_weights",
        attention_weights,
        "(N, Lq, M, L, P)",
        (n, lq, m, levels, p),
        ("sampling_locations", sampling_locations),
    )
    return n, s, m, d, lq, levels, p


def _check_array(name: str, array: Any) -> str:
    """Require an array that kernels can read and whose library can take their results."""
    lib = library(array)
    if lib == "torch" and hasattr(array, "layout"):
        # A nested tensor has no shape to ask for.
        if array.is_nested or str(array.layout) != "torch.strided":
            got = "a nested tensor" if array.is_nested else array.layout
            raise TypeError(f"{name} must be a dense tensor, got {got}")
        return lib
    for needed in _ARRAY_ATTRIBUTES if lib in ("cupy", "numpy") else _OTHER_ARRAY_ATTRIBUTES:
        if not hasattr(array, needed):
            raise TypeError(
                f"{name} must be a torch, CuPy or NumPy array or one with "
                f"{', '.join(_OTHER_ARRAY_ATTRIBUTES)}, got {type(array).__name__}"
            )
    if lib == "numpy" and hasattr(array, "mask"):
        raise TypeError(f"{name} must be an array without a mask, got {type(array).__name__}")
    return lib


def _check_beside(name: str, array: Any, value: Any) -> None:
    """Require an array of the library of `value`, on the same device."""
    got, expected = _check_array(name, array), library(value)
    if got != expected:
        raise TypeError(
            f"{name} must be an array of the library of value, {expected}, got one of {got}"
        )
    if device_of(array) != device_of(value):
        raise ValueError(
            f"{name} must be on the device of value, {place(value)}, got {place(array)}"
        )


def _check_shape(
    name: str,
    array: Any,
    letters: str,
    expected: Sequence[int | None],
    source: tuple[str, Any] | None = None,
) -> tuple[int, ...]:
    """The shape, if it has the expected sizes (None: any), which come from the shape of `source`."""
    shape = tuple(array.shape)
    if len(shape) != len(expected) or any(
        want is not None and got != want for got, want in zip(shape, expected, strict=True)
    ):
        sizes = ", ".join("any" if want is None else str(want) for want in expected)
        comma = "," if len(expected) == 1 else ""
        wanted = "" if set(expected) == {None} else f" = ({sizes}{comma})"
        since = f" since {source[0]} has shape {tuple(source[1].shape)}" if source else ""
        raise ValueError(f"{name} must have shape {letters}{wanted}{since}, got {shape}")
    return shape


def _level_table(
    spatial_shapes: Any,
    level_start_index: Any,
    value: Any,
    sampling_locations: Any,
    traced: bool,
) -> LevelTable:
    """Read the level table where that needs no synchronisation; keep the arrays elsewhere."""
    sizes = _integers("spatial_shapes", spatial_shapes, "(L, 2)", value, sampling_locations, traced)
    starts: tuple[int, ...] | None = None
    if level_start_index is not None:
        starts = _integers(
            "level_start_index", level_start_index, "(L,)", value, sampling_locations, traced
        )
    elif sizes is not None:
        starts = tuple(accumulate((h * w for h, w in sizes), initial=0))[:-1]
    numbers = (value.shape[1], *(n for size in sizes or () for n in size), *(starts or ()))
    if not traced or all(isinstance(number, int) for number in numbers):
        _check_levels(sizes, starts, value.shape[1])
    known = len(sizes or starts or ())
    if known > MAX_HOST_LEVELS and place(value).startswith("cuda"):
        raise ValueError(
            f"spatial_shapes and level_start_index must hold at most {MAX_HOST_LEVELS} levels where value "
            f"is on a CUDA device and they are not, got {known}"
        )
    return LevelTable(
        sizes,
        starts,
        spatial_shapes if sizes is None else None,
        level_start_index if starts is None else None,
    )


def _integers(
    name: str, given: Any, letters: str, value: Any, sampling_locations: Any, traced: bool
) -> tuple[Any, ...] | None:
    """An int or a pair of ints for each level; None if the array that holds them stays unread."""
    num_levels = sampling_locations.shape[3]
    pairs = letters == "(L, 2)"
    if all(hasattr(given, need) for need in ("dtype", "__dlpack__", "__dlpack_device__")):
        if not dtype_name(given).startswith(("int", "uint")):
            raise TypeError(
                f"{name} must have an integer dtype in native byte order, got {dtype_name(given)}"
            )
        expected = (num_levels, 2) if pairs else (num_levels,)
        _check_shape(name, given, letters, expected, ("sampling_locations", sampling_locations))
        if traced or _unread(name, given, value):
            return None
        given = given.tolist() if hasattr(given, "tolist") else np.from_dlpack(given).tolist()
    try:
        rows = tuple(
            given if traced else (_pair(row) if pairs else operator.index(row) for row in given)
        )
    except TypeError as error:
        raise TypeError(
            f"{name} must be a sequence of {'(H, W) pairs' if pairs else 'integers'} or an integer "
            f"array of shape {letters}, got {short_repr(given)}"
        ) from error
    if len(rows) != num_levels:
        raise ValueError(
            f"{name} must have one entry for each of the L = {num_levels} levels of "
            f"sampling_locations, got {len(rows)}"
        )
    return rows


def _pair(row: Any) -> tuple[int, int]:
    """(H, W) as ints."""
    sizes = tuple(map(operator.index, row))
    try:
        height, width = sizes
    except ValueError as error:
        raise ValueError(f"spatial_shapes must hold (H, W) pairs, got {short_repr(row)}") from error
    return height, width


def _grid(row: Any) -> tuple[int, int]:
    """(H, W) as ints; values that need a device synchronisation are rejected."""
    sizes = tuple(row)
    for size in sizes:
        if isinstance(size, bool) or hasattr(size, "__dlpack__"):
            raise TypeError
    try:
        height, width = map(operator.index, sizes)
    except ValueError as error:
        raise ValueError(f"query_order must hold (H, W) pairs, got {short_repr(row)}") from error
    return height, width


def _unread(name: str, given: Any, value: Any) -> bool:
    """Whether to leave an array on a device unread, because reading it would synchronise."""
    where = place(given)
    if where == "cpu" or (place(value) == "cpu" and where != "meta"):
        return False
    _check_beside(name, given, value)
    return where == "meta" or os.environ.get("CUPY_MSDA_CHECK") != "1"


def _check_levels(
    sizes: Sequence[tuple[int, int]] | None, starts: Sequence[int] | None, spatial_size: int
) -> None:
    """Require every level that the host knows to lie inside the S positions of value."""
    for level in range(len(sizes or starts or ())):
        start = 0 if starts is None else starts[level]
        if not 0 <= start <= spatial_size:
            raise ValueError(
                f"level_start_index must be from 0 to S = {spatial_size}, got {start} "
                f"for level {level}"
            )
        height, width = (0, 0) if sizes is None else sizes[level]
        if min(height, width) < 0 or max(height, width) > INT32_MAX:
            raise ValueError(
                "spatial_shapes must have H and W from 0 to 2**31 - 1, "
                f"got (H, W) = {height, width} for level {level}"
            )
        if start + height * width > spatial_size:
            at = "" if starts is None else f" starting at {start}"
            raise ValueError(
                "spatial_shapes and level_start_index must keep every level inside the "
                f"S = {spatial_size} positions of value, got (H, W) = {height, width}{at} "
                f"for level {level}"
            )
