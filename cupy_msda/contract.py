# SPDX-License-Identifier: Apache-2.0
"""The input contract: what every backend may rely on, and the only place that raises input errors.

A check reads shapes, dtypes and devices, never the contents of an array on a device, so it costs
no synchronisation.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import accumulate
from math import isfinite
from numbers import Integral, Real
from reprlib import repr as short_repr
from typing import Any, NamedTuple, TypeVar

import numpy as np

from cupy_msda.arrays import Described, device_of, dtype_name, library, place
from cupy_msda.problem import (
    INT32_MAX,
    MAX_GRIDS,
    MAX_HOST_LEVELS,
    MAX_UNEVEN_LEVELS,
    Grids,
    LevelTable,
    Problem,
    References,
)

INTERPOLATIONS = ("bilinear", "nearest")
VALUE_DTYPES = ("float16", "bfloat16", "float32", "float64")
# Of which every library has the same; DLPack knows no narrower ones.
_INTEGERS = {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
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
    num_points: Any = None,
    interpolation: Any = "bilinear",
    value_mask: Any = None,
    traced: bool = False,
) -> tuple[Problem, LevelTable]:
    """Check the inputs; raise TypeError or ValueError naming argument, contract and fact.

    `traced` leaves the contents of level arrays and symbolic sizes unchecked.
    """
    points = _Points(
        {"sampling_locations": sampling_locations, "attention_weights": attention_weights},
        check_num_points(num_points),
    )
    table = spatial_shapes, level_start_index
    return _check_call(value, *table, points, interpolation, value_mask, traced)


def check_fused(  # noqa: PLR0913 - the arguments of the operator
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Any,
    sampling_offsets: Any,
    attention_logits: Any,
    *,
    num_points: Any = None,
    offset_scale: Any = 0.5,
    interpolation: Any = "bilinear",
    value_mask: Any = None,
    traced: bool = False,
) -> tuple[Problem, LevelTable]:
    """Check the inputs of a fused call, as `check` does."""
    points = _Points(
        {"sampling_offsets": sampling_offsets, "attention_logits": attention_logits},
        check_num_points(num_points),
    )
    if (
        isinstance(offset_scale, bool)
        or not isinstance(offset_scale, Real)
        or not isfinite(offset_scale)
    ):
        raise TypeError(f"offset_scale must be a finite number, got {short_repr(offset_scale)}")
    _check_value(value)
    _check_points("reference_points", reference_points, value)
    table = spatial_shapes, level_start_index
    problem, levels = _check_call(value, *table, points, interpolation, value_mask, traced)
    n, lq, num_levels = problem.batch, problem.num_queries, problem.num_levels
    shape = _check_reference_shape(
        reference_points, n, lq, num_levels, "sampling_offsets", sampling_offsets
    )
    references = References(shape[0], shape[2], shape[3], dtype_name(reference_points))
    return problem._replace(references=references), levels


class _Points(NamedTuple):
    """The two arrays of points by name, the first with coordinates, and the points of each level if they are given."""

    arrays: dict[str, Any]
    of_levels: tuple[int, ...] | None


def _check_call(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    points: _Points,
    interpolation: Any,
    value_mask: Any,
    traced: bool,
) -> tuple[Problem, LevelTable]:
    """What all calls have in common."""
    check_interpolation(interpolation)
    _check_value(value)
    for name, array in points.arrays.items():
        _check_points(name, array, value)
    sizes = _check_shapes(value, points, traced)
    _check_mask("value_mask", value_mask, value)
    name, array = next(iter(points.arrays.items()))
    levels = _NumLevels(sizes[5], name, array) if points.of_levels is None else None
    levels = levels or _NumLevels(sizes[5], "num_points", None)
    if (
        isinstance(sizes[6], tuple)
        and len(sizes[6]) > MAX_UNEVEN_LEVELS
        and place(value).startswith("cuda")
    ):
        raise ValueError(
            f"num_points must be the same for all levels or hold at most {MAX_UNEVEN_LEVELS} of them where "
            f"value is on a CUDA device, got {short_repr(sizes[6])}"
        )
    table = _level_table(spatial_shapes, level_start_index, value, levels, traced)
    of_locations, of_weights = map(dtype_name, points.arrays.values())
    dtypes = dtype_name(value), of_locations, of_weights
    return Problem(*sizes, *dtypes, interpolation, value_mask is not None), table


class _NumLevels(NamedTuple):
    """L, the argument that it comes from, and the array whose shape has it, if it is one."""

    number: int
    origin: str
    array: Any


def check_interpolation(interpolation: Any) -> None:
    """Check the name."""
    if not isinstance(interpolation, str) or interpolation not in INTERPOLATIONS:
        raise ValueError(
            f'interpolation must be "bilinear" or "nearest", got {short_repr(interpolation)}'
        )


def check_num_points(num_points: Any) -> tuple[int, ...] | None:
    """The points of each level, given as integers on the host; None for None."""
    if num_points is None:
        return None
    try:
        points = tuple(_number(number, operator.index) for number in _items(num_points))
    except Exception as error:  # also what an iterator or an __index__ of the caller's raises
        raise TypeError(
            "num_points must be None or a sequence of integers, one for each level, "
            f"got {short_repr(num_points)}"
        ) from error
    for level, number in enumerate(points):
        if not 0 <= number <= INT32_MAX:
            raise ValueError(
                f"num_points must be from 0 to 2**31 - 1, got {number} for level {level}"
            )
    return points


def _check_mask(name: str, mask: Any, value: Any) -> None:
    """Check a mask of the positions of `value`, or None."""
    if mask is None:
        return
    _check_beside(name, mask, value)
    if dtype_name(mask) != "bool":
        raise TypeError(
            f"{name} must have dtype bool, True where a position is valid, got {dtype_name(mask)}"
        )
    _check_shape(name, mask, "(N, S)", tuple(value.shape[:2]), ("value", value))


def check_described(
    value_shape: Sequence[int],
    sampling_locations_shape: Sequence[int],
    dtype: Any,
    points_dtype: Any,
    num_points: Any,
    interpolation: Any,
    has_mask: Any,
    reference_points_shape: Sequence[int] | None,
) -> Problem:
    """Check shapes and dtypes as those of arrays; `points_dtype` None: float32, or float64 for float64.

    With a shape of reference points, in that dtype, it is a fused call, and the locations are offsets.
    """
    value = Described(_described("value_shape", value_shape), _dtype_of("dtype", dtype))
    wide = "float64" if value.dtype == "float64" else "float32"
    if points_dtype is None:
        points_dtype = wide
    shape = _described("sampling_locations_shape", sampling_locations_shape)
    locations = Described(shape, _dtype_of("points_dtype", points_dtype))
    weights = Described(shape[:-1], locations.dtype)
    levels = shape[3] if len(shape) > 3 else 0
    if num_points is not None:
        levels = len(check_num_points(num_points) or ())
    given = value, [(0, 0)] * levels, [0] * levels
    rules = {"num_points": num_points, "interpolation": interpolation}
    if reference_points_shape is None:
        problem, _ = check(*given, locations, weights, **rules)
    else:
        references = Described(_described("reference_points_shape", reference_points_shape), wide)
        problem, _ = check_fused(*given, references, locations, weights, **rules)
    if not isinstance(has_mask, bool):
        raise TypeError(f"value_mask must be True or False, got {short_repr(has_mask)}")
    return problem._replace(has_mask=has_mask)


def _described(name: str, given: Any) -> tuple[int, ...]:
    """The shape of an array that is only described."""
    try:
        shape = tuple(_number(number, operator.index) for number in _items(given))
    except Exception as error:  # also what an iterator or an __index__ of the caller's raises
        raise TypeError(
            f"{name} must be a sequence of integers, got {short_repr(given)}"
        ) from error
    if shape and not 0 <= min(shape) <= max(shape) <= INT32_MAX:
        raise ValueError(f"{name} must have sizes from 0 to 2**31 - 1, got {short_repr(shape)}")
    return shape


def _dtype_of(name: str, given: Any) -> str:
    """The name of a dtype of any library, a NumPy scalar type or a name."""
    try:
        dtype = str(getattr(given, "__name__", given)).rpartition(".")[2]
    except Exception:  # what is no dtype may raise anything when it is printed
        dtype = ""
    if not dtype.isidentifier():
        raise TypeError(f"{name} must be a dtype or its name, got {short_repr(given)}")
    return dtype


def unsupported_device(where: str) -> ValueError:
    """The error for values on a device without kernels."""
    return ValueError(f"value must be on the CPU or on an NVIDIA CUDA device, got {where}")


def made_in_inference_mode(name: str) -> ValueError:
    """The error for a tensor that autograd cannot save."""
    return ValueError(
        f"{name} must not be made in torch.inference_mode() where gradients are recorded, got such a "
        "tensor: pass a clone of it"
    )


def check_grad_output(problem: Problem, grad_output: Any, value: Any) -> None:
    """Check the gradient of the output against the inputs that `check` accepted."""
    _check_beside("grad_output", grad_output, value)
    got = dtype_name(grad_output)
    if got != problem.value_dtype:
        raise TypeError(
            f"grad_output must have the dtype of value, {problem.value_dtype}, got {got}"
        )
    _check_shape("grad_output", grad_output, "(N, Lq, M*D)", problem.output_shape)


def check_query_order(
    query_order: Any, num_queries: int, origin: str = "sampling_locations"
) -> Grids:
    """Check `query_order` of a call; "auto" becomes None, None becomes (). `origin`: the argument that has Lq."""
    if query_order is None:
        return ()
    if isinstance(query_order, str) and query_order == "auto":
        return None
    try:
        rows = [_grid(row) for row in _items(query_order)]
    except Exception as error:  # also what an iterator or an __index__ of the caller's raises
        raise TypeError(
            'query_order must be "auto", None or a sequence of (H, W) pairs of integers, '
            f"got {short_repr(query_order)}"
        ) from error
    grids = _pairs("query_order", rows)
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
            f"{origin}, got {total} in {short_repr(query_order)}"
        )
    return grids


def _grid(row: Any) -> tuple[int, ...]:
    """The numbers of a row as ints; values that need a device synchronisation are rejected."""
    sizes = tuple(_items(row))
    for size in sizes:
        if isinstance(size, bool) or hasattr(size, "__dlpack__"):
            raise TypeError
    return tuple(map(operator.index, sizes))


def check_sizes(sizes: Mapping[str, Any], ratio: Any) -> int:
    """Check the sizes of `MSDeformAttn` by name, d_model and n_heads among them; the channels of its value."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral):
            raise TypeError(f"{name} must be an integer, got {short_repr(size)}")
        if int(size) < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
        if int(size) > INT32_MAX:
            raise ValueError(f"{name} must be below 2**31, got {size}")
    d_model, n_heads = sizes["d_model"], sizes["n_heads"]
    if d_model % n_heads:
        raise ValueError(
            f"d_model must be a multiple of n_heads, got d_model {d_model} with n_heads {n_heads}"
        )
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(f"ratio must be a number, got {short_repr(ratio)}")
    channels = int(d_model * ratio) if isfinite(ratio) else 0
    if not 1 <= channels <= INT32_MAX or channels % n_heads:
        raise ValueError(
            "ratio must be such that int(d_model * ratio) is a multiple of n_heads from 1 to 2**31 - 1, "
            f"got {ratio} with d_model {d_model} and n_heads {n_heads}"
        )
    return channels


def check_module(
    d_model: int,
    num_levels: int,
    query: Any,
    reference_points: Any,
    input_flatten: Any,
    input_padding_mask: Any,
    return_locations: Any,
) -> None:
    """Check the arguments of `MSDeformAttn.forward` that the operator does not see."""
    if not isinstance(return_locations, bool):
        raise TypeError(
            f"return_locations must be True or False, got {short_repr(return_locations)}"
        )
    _check_tensor("query", query)
    channels = f"C = {d_model}"
    n, _, _ = _check_shape("query", query, f"(N, Lq, {channels})", (None, None, d_model))
    _check_tensor("input_flatten", input_flatten, query)
    _, s, _ = _check_shape(
        "input_flatten",
        input_flatten,
        f"(N, S, {channels})",
        (n, None, d_model),
        ("query", query),
    )
    _check_reference_points(reference_points, query, num_levels)
    if input_padding_mask is None:
        return
    _check_tensor("input_padding_mask", input_padding_mask, query)
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


def _check_reference_points(reference_points: Any, query: Any, num_levels: int) -> None:
    """Check them beside a query that is right."""
    _check_tensor("reference_points", reference_points, query)
    if not dtype_name(reference_points).startswith(("float", "bfloat")):
        raise TypeError(
            f"reference_points must have a floating dtype, got {dtype_name(reference_points)}"
        )
    n, lq, _ = query.shape
    _check_reference_shape(reference_points, n, lq, num_levels, "query", query)


def _check_reference_shape(
    reference_points: Any, n: int, lq: int, num_levels: int, name: str, beside: Any
) -> tuple[int, ...]:
    """The shape of reference points, if it fits the array `beside` them, an argument called `name`."""
    shape = tuple(reference_points.shape)
    if not (
        len(shape) == 4
        and shape[0] in (1, n)
        and shape[1] == lq
        and shape[2] in (1, num_levels)
        and shape[3] in (2, 4)
    ):
        raise ValueError(
            "reference_points must have shape (N or 1, Lq, L or 1, 2 or 4) = "
            f"({n} or 1, {lq}, {num_levels} or 1, 2 or 4) since {name} has shape {tuple(beside.shape)}, "
            f"got {shape}"
        )
    return shape


def check_projected(name: str, given: Any, weight: Any) -> None:
    """Check an argument of `MSDeformAttn.forward` against the weight of its projection."""
    if device_of(given) != device_of(weight):
        raise ValueError(
            f"{name} must be on the device of the module's parameters, {place(weight)}, got {place(given)}"
        )
    if given.dtype != weight.dtype:
        raise TypeError(
            f"{name} must have the dtype of the module's parameters, {dtype_name(weight)}, "
            f"got {dtype_name(given)}"
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
    value: Any, points: _Points, traced: bool
) -> tuple[int, int, int, int, int, int, int | tuple[int, ...]]:
    """The sizes (N, S, M, D, Lq, L, P), if the three shapes fit each other."""
    n, s, m, d = _check_shape("value", value, "(N, S, M, D)", (None,) * 4)
    (first, locations), (second, weights) = points.arrays.items()
    of_levels, letters, reason = points.of_levels, "L, P", ""
    per_row: tuple[int | None, ...] = (None, None)
    if of_levels is not None:
        letters, per_row = "K", (sum(of_levels),)
        reason = f"K, the sum of num_points, is {per_row[0]} and "
    expected = (n, None, m, *per_row, 2)
    since = ("value", value)
    _, lq, _, *axes, _ = _check_shape(
        first, locations, f"(N, Lq, M, {letters}, 2)", expected, since, reason
    )
    # Skipped when tracing, as in `check_module`: a comparison would specialise a dynamic size.
    for name, array in (("value", value), (first, locations)):
        if not traced and max(array.shape) > INT32_MAX:
            raise ValueError(f"{name} must have sizes below 2**31, got shape {tuple(array.shape)}")
    expected = (n, lq, m, *axes)
    _check_shape(second, weights, f"(N, Lq, M, {letters})", expected, (first, locations))
    if of_levels is None:
        return n, s, m, d, lq, axes[0], axes[1]
    same = len(set(of_levels)) == 1
    return n, s, m, d, lq, len(of_levels), of_levels[0] if same else of_levels


def _check_array(name: str, array: Any) -> str:
    """Require an array that kernels can read and whose library can take their results."""
    lib = library(array)
    if lib == "torch" and hasattr(array, "layout"):
        _check_dense(name, array)
        return lib
    for needed in _ARRAY_ATTRIBUTES if lib in ("cupy", "numpy") else _OTHER_ARRAY_ATTRIBUTES:
        if not hasattr(array, needed):
            raise TypeError(
                f"{name} must be a torch, CuPy or NumPy array or one with "
                f"{', '.join(_OTHER_ARRAY_ATTRIBUTES)}, got {type(array).__name__}"
            )
    _check_dense(name, array)
    return lib


def _check_dense(name: str, array: Any) -> None:
    """Require an array of numbers in memory and nothing else."""
    if library(array) == "torch":
        # A nested tensor has no shape to ask for.
        if array.is_nested or str(array.layout) != "torch.strided":
            got = "a nested tensor" if array.is_nested else array.layout
            raise TypeError(f"{name} must be a dense tensor, got {got}")
    elif hasattr(array, "mask"):
        raise TypeError(f"{name} must be an array without a mask, got {type(array).__name__}")


def _check_tensor(name: str, given: Any, query: Any = None) -> None:
    """Require a dense torch tensor, on the device of `query`."""
    try:
        if library(given) != "torch":
            raise AttributeError
        _check_dense(name, given)
    except AttributeError as error:  # Dynamo of torch 2.4 knows no hasattr of a tensor
        raise TypeError(f"{name} must be a torch tensor, got {type(given).__name__}") from error
    if query is not None and given.device != query.device:
        raise ValueError(
            f"{name} must be on the device of query, {query.device}, got {given.device}"
        )


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
    reason: str = "",
) -> tuple[int, ...]:
    """The shape, if it has the expected sizes (None: any), which come from the shape of `source`, and by `reason`."""
    shape = tuple(array.shape)
    if len(shape) != len(expected) or any(
        want is not None and got != want for got, want in zip(shape, expected, strict=True)
    ):
        sizes = ", ".join("any" if want is None else str(want) for want in expected)
        comma = "," if len(expected) == 1 else ""
        wanted = "" if set(expected) == {None} else f" = ({sizes}{comma})"
        since = f" since {reason}{source[0]} has shape {tuple(source[1].shape)}" if source else ""
        raise ValueError(f"{name} must have shape {letters}{wanted}{since}, got {shape}")
    return shape


def _level_table(
    spatial_shapes: Any,
    level_start_index: Any,
    value: Any,
    num_levels: _NumLevels,
    traced: bool,
) -> LevelTable:
    """Read the level table where that needs no synchronisation; keep the arrays elsewhere."""
    sizes = _half("spatial_shapes", spatial_shapes, value, num_levels, traced)
    starts: tuple[int, ...] | None = None
    if level_start_index is not None:
        starts = _half("level_start_index", level_start_index, value, num_levels, traced)
    elif sizes is not None:
        starts = tuple(accumulate((h * w for h, w in sizes), initial=0))[:-1]
    numbers = (value.shape[1], *(n for size in sizes or () for n in size), *(starts or ()))
    checked = not traced or all(isinstance(number, int) for number in numbers)
    if checked:
        _check_levels(sizes, starts, value.shape[1])
    known = len(sizes or starts or ())
    if known > MAX_HOST_LEVELS and place(value).startswith("cuda"):
        raise ValueError(
            f"spatial_shapes and level_start_index must hold at most {MAX_HOST_LEVELS} levels where value "
            f"is on a CUDA device and they are not, got {known}"
        )
    if checked and sizes and level_start_index is None:
        _check_filled(sizes, value.shape[1])
    return LevelTable(
        sizes,
        starts,
        spatial_shapes if sizes is None else None,
        level_start_index if starts is None else None,
    )


def _half(
    name: str, given: Any, value: Any, num_levels: _NumLevels, traced: bool
) -> tuple[Any, ...] | None:
    """An int or a pair of ints for each level; None if the array that holds them stays unread."""
    number, origin, array = num_levels
    if _is_array(given):
        _check_integer_array(name, given)
        expected = (number, 2) if _of_pairs(name) else (number,)
        source = None if array is None else (origin, array)
        _check_shape(name, given, _letters(name), expected, source)
        if traced or _unread(name, given, value):
            return None
        rows = _contents(name, given)
    else:
        rows = tuple(given) if traced else read_sequence(name, given)
    if len(rows) != number:
        raise ValueError(
            f"{name} must have one entry for each of the L = {number} levels of {origin}, "
            f"got {len(rows)}"
        )
    return rows


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


def _check_filled(sizes: Sequence[tuple[int, int]], spatial_size: int) -> None:
    """Require levels one after another to fill the S positions of value."""
    total = sum(height * width for height, width in sizes)
    if total != spatial_size:
        raise ValueError(
            f"spatial_shapes must have levels that fill the S = {spatial_size} positions of value where "
            f"level_start_index is None, got {total} positions in {short_repr(sizes)}"
        )


# --- reading a level table: the only place that does so, for arrays and sequences of any library -----


def read_table(name: str, given: Any, integer: Callable[[Any], Any] = operator.index) -> Any:
    """The ints, or pairs of ints, of half a level table; None for an array on a device, which stays unread.

    `name` is "spatial_shapes" or "level_start_index"; `integer` reads a number that is no array.
    """
    if not _is_array(given):
        return read_sequence(name, given, integer)
    _check_integer_array(name, given)
    shape, pairs = tuple(given.shape), _of_pairs(name)
    if len(shape) != 1 + pairs or (pairs and shape[1] != 2):
        raise ValueError(f"{name} must have shape {_letters(name)}, got {shape}")
    return _contents(name, given) if place(given) == "cpu" else None


def read_sequence(
    name: str, given: Any, integer: Callable[[Any], Any] = operator.index
) -> tuple[Any, ...]:
    """The same of what is no array: of numbers or rows that are ints or arrays on the host."""
    pairs = _of_pairs(name)
    try:
        rows = [
            [_number(number, integer) for number in _items(row)] if pairs else _number(row, integer)
            for row in _items(given)
        ]
    except _OnDeviceError as error:
        raise TypeError(
            f"{name} must be one array of shape {_letters(name)} where its numbers are on a device, since "
            f"each would be a synchronisation, got a {type(given).__name__} of numbers on {error}"
        ) from error
    except Exception as error:  # also what an iterator or an __index__ of the caller's raises
        what = "(H, W) pairs" if pairs else "integers"
        raise TypeError(
            f"{name} must be a sequence of {what} or an integer array of shape {_letters(name)}, "
            f"got {short_repr(given)}"
        ) from error
    return _pairs(name, rows) if pairs else tuple(rows)


def _pairs(name: str, rows: Iterable[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Rows that are pairs."""
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"{name} must hold (H, W) pairs, got {short_repr(tuple(row))}")
    return tuple((height, width) for height, width in rows)


def _items(given: Any) -> Iterator[Any]:
    """The items of what has an order and is on the host; a TypeError for the rest."""
    if isinstance(given, (str, bytes, bytearray, Set, Mapping)):
        raise TypeError
    _check_on_host(given)
    return iter(given)


def _number(given: Any, integer: Callable[[Any], Any]) -> Any:
    """An int, given as one or as a 0-dimensional array of integers on the host; a TypeError for the rest."""
    if isinstance(given, bool):
        raise TypeError
    if not _is_array(given):
        return integer(given)
    _check_on_host(given)
    _check_dense("a number", given)
    if dtype_name(given) not in _INTEGERS or tuple(given.shape) != ():
        raise TypeError
    return operator.index(given)


class _OnDeviceError(TypeError):
    """A part of a sequence is an array on the device that the message names."""


def _check_on_host(given: Any) -> None:
    """Require what the host can read number by number."""
    if _is_array(given) and place(given) != "cpu":
        raise _OnDeviceError(place(given))


def _is_array(given: Any) -> bool:
    """Whether it is an array of a library that has DLPack."""
    return all(hasattr(given, need) for need in _ARRAY_ATTRIBUTES[1:])


def _check_integer_array(name: str, given: Any) -> None:
    """Require integers in a form that every library reads alike."""
    _check_dense(name, given)
    got = dtype_name(given)
    if got not in _INTEGERS:
        narrow = ", of fewer than 8 bits" if got.startswith(("int", "uint")) else ""
        raise TypeError(
            f"{name} must have an integer dtype in native byte order, got {got}{narrow}"
        )


def _contents(name: str, given: Any) -> tuple[Any, ...]:
    """The numbers of an array, copied at once."""
    try:
        rows = given.tolist() if hasattr(given, "tolist") else np.from_dlpack(given).tolist()
    except Exception as error:  # of the array's library: of a tracer, or without memory, say
        raise TypeError(
            f"{name} must be an array that the host can read, got {type(given).__name__}"
        ) from error
    return _pairs(name, rows) if _of_pairs(name) else tuple(rows)


def _of_pairs(name: str) -> bool:
    """Whether this half of a level table holds pairs."""
    return name == "spatial_shapes"


def _letters(name: str) -> str:
    """The shape of this half of a level table as an array."""
    return "(L, 2)" if _of_pairs(name) else "(L,)"
