# SPDX-License-Identifier: Apache-2.0
"""The array functions: validate, then dispatch on the type and place of the arrays."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from reprlib import repr as short_repr
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, device

import cupy_msda
from cupy_msda.arrays import library, on_host
from cupy_msda.contract import (
    check,
    check_described,
    check_fused,
    check_grad_output,
    check_query_order,
    refuse_scripting,
)
from cupy_msda.cpu import backend
from cupy_msda.cuda import launch
from cupy_msda.cuda.plans import fused_limit
from cupy_msda.fused import FusedPoints, gradients, locations_and_weights
from cupy_msda.problem import Grids, LevelTable, Problem


class MSDeformAttnGradients(NamedTuple):
    """Gradients of the three differentiable inputs, each with the shape and dtype of its input."""

    value: Any
    sampling_locations: Any
    attention_weights: Any


@refuse_scripting
def ms_deform_attn(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    num_points: Any = None,
    interpolation: Any = "bilinear",
    value_mask: Any = None,
    query_order: Any = "auto",
) -> Any:
    """Multi-scale deformable attention: weighted bilinear samples of a feature pyramid.

    CUDA arrays run the CUDA kernels on the current stream without synchronising; host arrays run
    the Numba kernels where Numba is installed and works, else the reference. Their threads: for torch
    tensors `torch.get_num_threads()`; for other arrays the least of NUMBA_NUM_THREADS,
    `numba.set_num_threads`, OMP_NUM_THREADS, the limits by threadpoolctl (of OpenBLAS, MKL and OpenMP)
    and the CPUs that the process may use. torch tensors are differentiable.
    Besides torch, CuPy and NumPy, any library will do that has DLPack and the array API standard's
    namespace (JAX, outside `jit`).

    Parameters
    ----------
    value : array, shape (N, S, M, D), float16, bfloat16, float32 or float64
        The levels of the pyramid one after another, each row-major; M heads of D channels.
    spatial_shapes : sequence of (H, W) pairs or integer array, shape (L, 2)
        Pixels per level. An array has 8 to 64 bits and is on the host, of any library, or on the
        device of `value`, of its library. There the host never reads it: a level that does not fit
        S gives NaN in every output that it touches, and positions that no level fills are not read.
        With the environment variable CUPY_MSDA_CHECK=1 both are a ValueError, at the price of a
        synchronisation. Beside host values, an array on a device is copied to the host.
    level_start_index : sequence of ints or integer array, shape (L,), or None
        Where each level starts among the S positions, in the same forms; None: one after another,
        and together they fill all S. Given starts may let levels overlap or leave gaps.
    sampling_locations : array, shape (N, Lq, M, L, P, 2), float32 or the dtype of `value`
        (x, y) as fractions of the level: (0, 0) top-left, (1, 1) bottom-right corner. Points
        outside read zero.
    attention_weights : array, shape (N, Lq, M, L, P), float32 or the dtype of `value`
        Used as given: not normalised here.
        Under torch's autocast, 16-bit locations and weights of another dtype than `value` become
        float32; elsewhere they are a TypeError.
    num_points : sequence of ints, one for each level, or None
        The points of each level, where these differ: locations are then (N, Lq, M, K, 2) and weights
        (N, Lq, M, K), level after level, K the sum of the numbers. A level may have none.
    interpolation : "bilinear" or "nearest"
        "nearest" reads the pixel in column trunc(x * W + 0.5) and row trunc(y * H + 0.5), each
        limited to the level, so that a point outside reads its border: RT-DETRv2's discrete sampling.
        The gradient of `sampling_locations` is zero. A NaN location contributes nothing.
    value_mask : bool array, shape (N, S), or None
        True where `value` is valid: elsewhere it counts as zero, whatever it holds, and its gradient is
        zero. No masked copy is made.
    query_order : "auto", None or sequence of (H, W) pairs of ints, at most 16
        A hint for speed that changes no bit of the output: CUDA kernels can take queries that lie on
        grids in tiles of these, so that caches serve most reads. The pairs are the grids, counted in
        queries, on which all Lq queries lie one after another, each row-major: ``[(200, 200)]`` for
        a bird's-eye view. "auto": where Lq = S, as in an encoder, the levels are the grids. Followed
        if the queries are enough to fill the device; for pairs that are given, half of it. None:
        queries are taken in the order given. Grids pay where each query samples near its own place,
        and all about as much; they cost time where points lie anywhere (docs/performance.md). On the
        host it is checked and has no effect.

    Returns
    -------
    array of the same library, shape (N, Lq, M*D), dtype of `value`
        Accumulated in float32 (float64 for float64).

    Raises
    ------
    TypeError
        A dtype or an array type violates the contract.
    ValueError
        A shape, level size, grid or device violates the contract.
    KernelCompileError
        The CUDA compiler refused a kernel, or the GPU has a compute capability below 7.0.
    ImportError
        The arrays are on a CUDA device and CuPy does not import; ModuleNotFoundError: it is not installed.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    sampling = {
        "num_points": num_points,
        "interpolation": interpolation,
        "value_mask": value_mask,
    }
    if library(value) == "torch":
        return cupy_msda.torch.ms_deform_attn(*inputs, **sampling, query_order=query_order)
    problem, table = check(*inputs, **sampling)
    grids = check_query_order(query_order, problem.num_queries)
    given = {"value": value, "locations": sampling_locations, "weights": attention_weights}
    if on_host(value):
        return _like(value, backend.forward(problem, table, *given.values(), mask=value_mask))
    return _like(value, launch.forward_arrays(problem, table, grids, given, mask=value_mask))


@refuse_scripting
def ms_deform_attn_backward(
    grad_output: Any,
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
    *,
    num_points: Any = None,
    interpolation: Any = "bilinear",
    value_mask: Any = None,
    query_order: Any = "auto",
) -> MSDeformAttnGradients:
    """Gradients of `ms_deform_attn` by value, sampling_locations and attention_weights.

    Parameters
    ----------
    grad_output : array, shape (N, Lq, M*D), dtype of `value`
        Gradient of a scalar with respect to the output.
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        As `ms_deform_attn` takes them.
    num_points, interpolation, value_mask, query_order
        Likewise. The order may change the last bits of the gradient of `value`.

    Returns
    -------
    MSDeformAttnGradients
        Three arrays of the same library, each with the shape and dtype of the input it belongs to.
        The gradient of `value` is accumulated in float32 (float64 for float64). A point outside its
        level has zero gradients.

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ImportError
        As `ms_deform_attn`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    sampling = {
        "num_points": num_points,
        "interpolation": interpolation,
        "value_mask": value_mask,
    }
    if library(value) == "torch":
        gradients = cupy_msda.torch.ms_deform_attn_backward(
            grad_output, *inputs, **sampling, query_order=query_order
        )
        return MSDeformAttnGradients(*gradients)
    problem, table = check(*inputs, **sampling)
    grids = check_query_order(query_order, problem.num_queries)
    check_grad_output(problem, grad_output, value)
    given = {"value": value, "locations": sampling_locations, "weights": attention_weights}
    arrays = tuple(given.values())
    if on_host(value):
        found = backend.backward(problem, table, grad_output, *arrays, mask=value_mask)
    else:
        found = launch.backward_arrays(problem, table, grids, grad_output, given, mask=value_mask)
    return MSDeformAttnGradients(*map(_like, arrays, found))


class MSDeformAttnFusedGradients(NamedTuple):
    """Gradients of the four differentiable inputs of a fused call, each with the shape and dtype of its input."""

    value: Any
    reference_points: Any
    sampling_offsets: Any
    attention_logits: Any


@refuse_scripting
def ms_deform_attn_fused(  # noqa: PLR0913 - a module's tensors, and how to sample
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Any,
    sampling_offsets: Any,
    attention_logits: Any,
    *,
    num_points: Any = None,
    offset_scale: float = 0.5,
    interpolation: Any = "bilinear",
    value_mask: Any = None,
    query_order: Any = "auto",
) -> Any:
    """`ms_deform_attn` from what an attention module holds: reference points, offsets and logits.

    The sampling locations are, for reference points (x, y), ``(x, y) + offset / (W, H)``, and for boxes
    (x, y, w, h), ``(x, y) + offset / P * (w, h) * offset_scale`` with the P points of the level. The attention
    weights are the softmax of the logits over all points of a query and head. Both are computed in float32
    (float64 for float64), whatever the dtypes.

    Parameters
    ----------
    value, spatial_shapes, level_start_index, num_points, interpolation, value_mask, query_order
        As `ms_deform_attn` takes them.
    reference_points : array, shape (N or 1, Lq, L or 1, 2 or 4), float32 or the dtype of `value`
        Fractions of the level, (0, 0) top-left and (1, 1) bottom-right. One image or level stands for all.
    sampling_offsets : array, shape (N, Lq, M, L, P, 2), float32 or the dtype of `value`
        With points (x, y) in pixels of the level. With `num_points`: (N, Lq, M, K, 2).
    attention_logits : array, shape (N, Lq, M, L, P), float32 or the dtype of `value`
        Of any finite size; -inf gives a weight of zero. With `num_points`: (N, Lq, M, K).
    offset_scale : float
        For boxes alone; 0.5: an offset of P moves a point by half the box.

    Returns
    -------
    array of the same library, shape (N, Lq, M*D), dtype of `value`

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ImportError
        As `ms_deform_attn`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159; Peng et al., "D-FINE", arXiv:2410.13842.
    """
    inputs = (
        *(value, spatial_shapes, level_start_index),
        *(reference_points, sampling_offsets, attention_logits),
    )
    rules = {"num_points": num_points, "interpolation": interpolation, "value_mask": value_mask}
    if library(value) == "torch":
        return cupy_msda.torch.ms_deform_attn_fused(
            *inputs, **rules, offset_scale=offset_scale, query_order=query_order
        )
    problem, table, grids = _check_fused(inputs, rules, offset_scale, query_order)
    keywords = {"offset_scale": offset_scale, "mask": value_mask}
    given = _by_name(inputs)
    if on_host(value):
        return _like(value, backend.fused_forward(problem, table, *given.values(), **keywords))
    if not fused_limit(problem, deterministic=False):
        return _like(value, launch.forward_arrays(problem, table, grids, given, **keywords))
    points = _points(problem, table, inputs, rules, offset_scale)
    plain = (value, spatial_shapes, level_start_index, *locations_and_weights(points))
    return ms_deform_attn(*plain, **rules, query_order=query_order)


@refuse_scripting
def ms_deform_attn_fused_backward(  # noqa: PLR0913 - likewise
    grad_output: Any,
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    reference_points: Any,
    sampling_offsets: Any,
    attention_logits: Any,
    *,
    num_points: Any = None,
    offset_scale: float = 0.5,
    interpolation: Any = "bilinear",
    value_mask: Any = None,
    query_order: Any = "auto",
) -> MSDeformAttnFusedGradients:
    """Gradients of `ms_deform_attn_fused` by value, reference points, offsets and logits.

    Parameters
    ----------
    grad_output : array, shape (N, Lq, M*D), dtype of `value`
        Gradient of a scalar with respect to the output.
    value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits
        As `ms_deform_attn_fused` takes them.
    num_points, offset_scale, interpolation, value_mask, query_order
        Likewise.

    Returns
    -------
    MSDeformAttnFusedGradients
        Four arrays of the same library, each with the shape and dtype of the input it belongs to.

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ImportError
        As `ms_deform_attn`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    inputs = (
        *(value, spatial_shapes, level_start_index),
        *(reference_points, sampling_offsets, attention_logits),
    )
    rules = {"num_points": num_points, "interpolation": interpolation, "value_mask": value_mask}
    if library(value) == "torch":
        keywords = {"offset_scale": offset_scale, "query_order": query_order, **rules}
        found = cupy_msda.torch.ms_deform_attn_fused_backward(grad_output, *inputs, **keywords)
        return MSDeformAttnFusedGradients(*found)
    problem, table, grids = _check_fused(inputs, rules, offset_scale, query_order)
    check_grad_output(problem, grad_output, value)
    keywords = {"offset_scale": offset_scale, "mask": value_mask}
    given = _by_name(inputs)
    arrays = tuple(given.values())
    if on_host(value):
        found = backend.fused_backward(problem, table, grad_output, *arrays, **keywords)
        return MSDeformAttnFusedGradients(*map(_like, arrays, found))
    if not fused_limit(problem, deterministic=False):
        found = launch.backward_arrays(problem, table, grids, grad_output, given, **keywords)
        return MSDeformAttnFusedGradients(*map(_like, arrays, found))
    points = _points(problem, table, inputs, rules, offset_scale)
    locations, weights = locations_and_weights(points)
    plain = (value, spatial_shapes, level_start_index, locations, weights)
    by_value, *by_points = ms_deform_attn_backward(
        grad_output, *plain, **rules, query_order=query_order
    )
    found = (by_value, *gradients(points, weights, *by_points))
    return MSDeformAttnFusedGradients(*map(_like, arrays, found))


def _check_fused(
    inputs: tuple[Any, ...], rules: dict[str, Any], offset_scale: Any, query_order: Any
) -> tuple[Problem, LevelTable, Grids]:
    """Check a fused call."""
    problem, table = check_fused(*inputs, **rules, offset_scale=offset_scale)
    grids = check_query_order(query_order, problem.num_queries, "sampling_offsets")
    return problem, table, grids


def _by_name(inputs: tuple[Any, ...]) -> dict[str, Any]:
    """What has a gradient, by its name in plans, in the order in which gradients are returned."""
    value, _, _, references, offsets, logits = inputs
    return {"value": value, "references": references, "locations": offsets, "weights": logits}


def _points(
    problem: Problem,
    levels: LevelTable,
    inputs: tuple[Any, ...],
    rules: dict[str, Any],
    offset_scale: float,
) -> FusedPoints:
    """The points of a fused call in the dtype to compute in."""
    xp = array_namespace(inputs[0])
    wide = xp.float64 if problem.value_dtype == "float64" else xp.float32
    references, offsets, logits = (xp.astype(array, wide) for array in inputs[3:])
    if levels.sizes is None:
        heights_first = xp.astype(levels.device_sizes, wide)
    else:
        numbers = [number for size in levels.sizes for number in size]
        heights_first = xp.asarray(numbers, dtype=wide, device=device(offsets))
    sizes = xp.flip(xp.reshape(heights_first, (problem.num_levels, 2)), axis=1)
    return FusedPoints(references, offsets, logits, sizes, rules["num_points"], offset_scale)


def warmup(  # noqa: PLR0913 - all by keyword but two
    value_shape: Sequence[int],
    sampling_locations_shape: Sequence[int],
    *,
    dtype: Any = "float32",
    points_dtype: Any = None,
    backward: bool = True,
    device: str = "cuda",
    num_points: Any = None,
    interpolation: Any = "bilinear",
    value_mask: bool = False,
    query_order: Any = "auto",
    reference_points_shape: Sequence[int] | None = None,
) -> None:
    """Compile what calls of these shapes and dtypes will run, so that none of them compiles anything.

    A server's first request then takes no longer than its second, and a CUDA graph can be captured
    at once. On a GPU a kernel is compiled for M, D, L, P, the dtypes and, where there are few queries,
    for how many: warm up for each number that is to come. What is compiled stays in the process and, by
    CuPy's and Numba's caches, on disk.

    Parameters
    ----------
    value_shape : sequence of ints, (N, S, M, D)
    sampling_locations_shape : sequence of ints, (N, Lq, M, L, P, 2); with `num_points`, (N, Lq, M, K, 2)
    dtype : str or dtype of any library
        Of `value`: float16, bfloat16, float32 or float64.
    points_dtype : str or dtype, optional
        Of `sampling_locations` and `attention_weights`: float32, the default, or that of `value`;
        float64 by default for float64.
    backward : bool
        Also the backward, for whichever gradients may be needed; the deterministic one if
        `torch.use_deterministic_algorithms(True)` holds now.
    device : str
        "cuda", the current device, "cuda:1", ..., or "cpu".
    num_points, interpolation, query_order
        As the calls will pass them to `ms_deform_attn`.
    value_mask : bool
        Whether the calls will have one.
    reference_points_shape : sequence of ints, (N or 1, Lq, L or 1, 2 or 4), or None
        If given, for calls of `ms_deform_attn_fused`, as `MSDeformAttn` makes them, with reference points in
        float32 (float64 for float64). `sampling_locations_shape` is then that of `sampling_offsets`, and
        `points_dtype` the dtype of these and of `attention_logits`.

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ImportError
        As `ms_deform_attn`; a ValueError for a device that is none of these.
    """
    dtypes = dtype, points_dtype
    rules = (num_points, interpolation, value_mask, reference_points_shape)
    problem = check_described(value_shape, sampling_locations_shape, *dtypes, *rules)
    grids = check_query_order(query_order, problem.num_queries)
    kind, _, index = device.partition(":") if isinstance(device, str) else ("", "", "")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f'device must be "cpu", "cuda" or "cuda:INDEX", got {short_repr(device)}')
    if kind == "cpu":
        backend.compile_ahead(problem, backward)
    else:
        torch = sys.modules.get("torch")
        deterministic = torch is not None and torch.are_deterministic_algorithms_enabled()
        launch.warmup(problem, grids, int(index) if index else None, backward, deterministic)


def _like(array: Any, result: Any) -> Any:
    """The result as an array of the caller's library and dtype."""
    xp = array_namespace(array)
    if library(result) != library(array):
        result = xp.from_dlpack(result)
    with np.errstate(over="ignore"):  # float16 overflows to infinity everywhere, NumPy alone warns
        return xp.astype(result, array.dtype, copy=False)
