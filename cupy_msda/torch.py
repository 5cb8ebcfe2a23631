# SPDX-License-Identifier: Apache-2.0
"""torch: registered operators, the autograd Function around them, and the exchange with CuPy by DLPack.

The operators check the contract themselves, on real tensors: a call is as safe from a compiled
graph or from `torch.ops.cupy_msda` as from the public functions, and tracing never reads the level
table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, compress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from cupy_msda import host, reference
from cupy_msda.contract import (
    INT32_MAX,
    Level,
    LevelTable,
    Problem,
    check,
    check_grad_output,
    unsupported_device,
)

# The level table as the operators take it: each half as a tensor that is passed on unread, or as
# flat integers (H0, W0, H1, W1, ...); with neither for the starts, levels follow one another.
_TABLE = "Tensor? spatial_shapes, Tensor? level_start_index, SymInt[]? sizes, SymInt[]? starts"
_POINTS = "Tensor sampling_locations, Tensor attention_weights"
_SCHEMAS = {
    "ms_deform_attn_forward": f"(Tensor value, {_TABLE}, {_POINTS}) -> Tensor",
    # A gradient that is not needed comes back without elements: operators cannot return None.
    "ms_deform_attn_backward": f"(Tensor grad_output, Tensor value, {_TABLE}, {_POINTS}, "
    "bool needs_value, bool needs_points) -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"cupy_msda::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)
_FORWARD = torch.ops.cupy_msda.ms_deform_attn_forward.default
_BACKWARD = torch.ops.cupy_msda.ms_deform_attn_backward.default

_HALF = (torch.float16, torch.bfloat16)
_ALIGNMENT = 16  # bytes: the kernels load vectors of this size


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """`cupy_msda.ms_deform_attn` for torch tensors: the same arguments, shapes, dtypes and errors, differentiable.

    Parameters
    ----------
    value : Tensor, shape (N, S, M, D)
    spatial_shapes : sequence of (H, W) or integer tensor, shape (L, 2), in pixels
    level_start_index : sequence of ints or integer tensor, shape (L,), or None
    sampling_locations : Tensor, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
    attention_weights : Tensor, shape (N, Lq, M, L, P)

    Returns
    -------
    Tensor, shape (N, Lq, M*D), dtype of `value`

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ModuleNotFoundError
        As `cupy_msda.ms_deform_attn`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    output: Tensor = MSDeformAttnFunction.apply(  # type: ignore[no-untyped-call]
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights, None
    )
    return output


def ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cupy_msda.ms_deform_attn_backward` for torch tensors; differentiable itself.

    Parameters
    ----------
    grad_output : Tensor, shape (N, Lq, M*D), dtype of `value`
    value, spatial_shapes, level_start_index, sampling_locations, attention_weights
        As `ms_deform_attn` takes them.

    Returns
    -------
    tuple of three Tensors
        Gradients of value, sampling_locations and attention_weights, with their shapes and dtypes.

    Raises
    ------
    TypeError, ValueError, KernelCompileError, ModuleNotFoundError
        As `cupy_msda.ms_deform_attn`.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    _require_tensors(*inputs)
    if not _dense(grad_output) or grad_output.is_meta:
        check_grad_output(check(*inputs)[0], grad_output, value)
    gradients: tuple[Tensor, Tensor, Tensor] = _Gradients.apply(  # type: ignore[no-untyped-call]
        grad_output, value, *_table(*inputs), sampling_locations, attention_weights, True, True
    )
    return gradients


def ms_deform_attn_core_pytorch(
    value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same operator in terms of `torch.nn.functional.grid_sample`: slow, on any device, differentiable once.

    Parameters
    ----------
    value : Tensor, shape (N, S, M, D)
        The levels one after another, nothing between or after them.
    spatial_shapes : sequence of (H, W) or integer tensor, shape (L, 2), L >= 1, H and W >= 1
        A tensor on a device is read, which synchronises.
    sampling_locations : Tensor, shape (N, Lq, M, L, P, 2), (x, y) as fractions of the level
    attention_weights : Tensor, shape (N, Lq, M, L, P)

    Returns
    -------
    Tensor, shape (N, Lq, M*D), dtype of `value`

    Raises
    ------
    RuntimeError, ValueError
        torch's own, where shapes do not fit.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """
    n, _, m, d = value.shape
    lq = sampling_locations.shape[1]
    sizes = spatial_shapes.tolist() if hasattr(spatial_shapes, "tolist") else spatial_shapes
    # grid_sample knows one dtype; half values with float32 locations are computed in float32.
    wide = torch.promote_types(value.dtype, sampling_locations.dtype)
    maps = torch.split(value.to(wide), [h * w for h, w in sizes], dim=1)
    grids = (2 * sampling_locations.to(wide) - 1).transpose(1, 2).flatten(0, 1)  # N*M, Lq, L, P, 2
    samples = [
        torch.nn.functional.grid_sample(
            level.permute(0, 2, 3, 1).reshape(n * m, d, h, w),
            grids[:, :, index],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for index, (level, (h, w)) in enumerate(zip(maps, sizes, strict=True))
    ]  # each (N*M, D, Lq, P)
    weights = attention_weights.transpose(1, 2).reshape(n * m, 1, lq, -1)  # N*M, 1, Lq, L*P
    output = (torch.cat(samples, dim=-1) * weights).sum(-1)  # N*M, D, Lq
    return output.view(n, m * d, lq).transpose(1, 2).to(value.dtype)


class MSDeformAttnFunction(torch.autograd.Function):
    """The autograd Function of Deformable-DETR's `ops`, for code that calls its `apply`.

    ``MSDeformAttnFunction.apply(value, spatial_shapes, level_start_index, sampling_locations,
    attention_weights, im2col_step)`` takes and returns what `ms_deform_attn` does. `im2col_step`
    may be anything or left out: batches are never split, so it has no effect.

    Gradients flow to value, sampling_locations and attention_weights. One that is not needed is
    not computed (on a CPU: not kept, since one pass makes all three). They are differentiable to
    any order themselves, at the speed of the reference.

    References
    ----------
    Zhu et al., "Deformable DETR", arXiv:2010.04159.
    """

    # Not setup_context: with it, every apply inspects a signature and costs several times as much.
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        spatial_shapes: Any,
        level_start_index: Any,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: Any = None,
    ) -> Tensor:
        """Run the forward operator; `im2col_step` has no effect."""
        del im2col_step
        inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        _require_tensors(*inputs)
        shapes, start_index, sizes, starts = _table(*inputs)
        ctx.integers = sizes, starts
        ctx.save_for_backward(value, shapes, start_index, sampling_locations, attention_weights)
        output: Tensor = _FORWARD(
            value, shapes, start_index, sizes, starts, sampling_locations, attention_weights
        )
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `apply`; None where there is none or none is needed."""
        value, shapes, start_index, locations, weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        table = (shapes, start_index, *ctx.integers)
        flags = needed[0], needed[3] or needed[4]
        # Grad mode is on only under create_graph, which a compiled backward refuses by itself.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run: Callable[..., Any] = _Gradients.apply if twice else _BACKWARD
        gradients = run(grad_outputs[0], value, *table, locations, weights, *flags)
        by_value, by_locations, by_weights = gradients
        return (
            by_value if needed[0] else None,
            None,
            None,
            by_locations if needed[3] else None,
            by_weights if needed[4] else None,
            None,
        )


class _Gradients(torch.autograd.Function):
    """The backward operator, with its arguments, differentiable through the reference."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Run the backward operator."""
        *tensors, sizes, starts, locations, weights, needs_value, needs_points = arguments
        ctx.integers = sizes, starts
        ctx.computed = needs_value, needs_points, needs_points
        ctx.save_for_backward(*tensors, locations, weights)
        gradients: tuple[Tensor, Tensor, Tensor] = _BACKWARD(*arguments)
        return gradients

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        """Differentiate the gradient of the reference."""
        grad_output, value, shapes, start_index, locations, weights = ctx.saved_tensors
        given = _given(shapes, start_index, *ctx.integers)
        _, table = check(value, *given, locations, weights)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, since one input may be computed from another and these are partial derivatives.
            sources = [
                tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
                for tensor in (grad_output, value, locations, weights)
            ]
            levels = _levels(table, value.shape[1])
            output = reference.forward(sources[1], levels, *sources[2:])
            if not output.requires_grad:  # an empty problem
                return (None,) * 10
            first = torch.autograd.grad(output, sources[1:], sources[0], create_graph=True)
        needed = [ctx.needs_input_grad[i] for i in (0, 1, 6, 7)]
        second = iter(
            torch.autograd.grad(
                list(compress(first, ctx.computed)),
                list(compress(sources, needed)),
                list(compress(grad_outputs, ctx.computed)),
                create_graph=create_graph,
                allow_unused=True,
            )
        )
        by_grad, by_value, *by_points = (next(second) if need else None for need in needed)
        return (by_grad, by_value, None, None, None, None, *by_points, None, None)


def _dense(*arrays: Any) -> bool:
    """Whether all are torch tensors of a layout that the operators take."""
    return all(
        isinstance(array, Tensor) and array.layout is torch.strided and not array.is_nested
        for array in arrays
    )


def _require_tensors(
    value: Any,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Any,
    attention_weights: Any,
) -> None:
    """Refuse what does not reach the operators, or reaches what stands for them while tracing."""
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    if not _dense(value, sampling_locations, attention_weights):
        check(*inputs)
        raise TypeError(f"value must be a dense torch tensor, got {type(value).__name__}")
    if any(isinstance(given, Tensor) and given.is_meta for given in inputs):
        check(*inputs)
    kind = value.device.type
    if kind not in ("cpu", "cuda", "meta") or (kind == "cuda" and torch.version.hip is not None):
        build = " of a ROCm build of torch" if kind == "cuda" else ""
        raise unsupported_device(f"{value.device}{build}")


def _table(
    value: Tensor,
    spatial_shapes: Any,
    level_start_index: Any,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor | None, Tensor | None, list[int] | None, list[int] | None]:
    """The level table as the operators take it."""
    shapes, start_index, sizes, starts = None, None, None, None
    try:
        if isinstance(spatial_shapes, Tensor):
            shapes = spatial_shapes
        else:
            sizes = [operator.index(n) for h, w in spatial_shapes for n in (h, w)]
        if isinstance(level_start_index, Tensor):
            start_index = level_start_index
        elif level_start_index is not None:
            starts = [operator.index(start) for start in level_start_index]
        if any(abs(number) > INT32_MAX for number in (*(sizes or ()), *(starts or ()))):
            raise OverflowError  # beyond what the operators' integers may hold
    except (OverflowError, TypeError, ValueError):
        # Says which argument is wrong, and in what.
        check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
        raise
    return shapes, start_index, sizes, starts


def _given(
    spatial_shapes: Tensor | None,
    level_start_index: Tensor | None,
    sizes: list[int] | None,
    starts: list[int] | None,
) -> tuple[Any, Any]:
    """spatial_shapes and level_start_index as `check` takes them, from what the operators take."""
    pairs = None if sizes is None else list(zip(sizes[::2], sizes[1::2], strict=True))
    return (
        pairs if spatial_shapes is None else spatial_shapes,
        starts if level_start_index is None else level_start_index,
    )


def _levels(table: LevelTable, spatial_size: int) -> list[Level]:
    """The levels for the reference: of ints, or of 0-dim tensors where only a device knows them."""
    if table.levels is not None:
        return list(table.levels)
    sizes: Any = table.sizes if table.device_sizes is None else table.device_sizes.long()
    starts: Any = table.starts if table.device_starts is None else table.device_starts.long()
    if starts is None:
        starts = accumulate((h * w for h, w in sizes), initial=0)
    levels = []
    for (h, w), start in zip(sizes, starts, strict=False):
        # A level that does not fit S shrinks to nothing, so that no index leaves value.
        fits = (h >= 0) & (h <= spatial_size) & (w >= 0) & (w <= spatial_size)
        fits = fits & (start >= 0) & (start + h * w <= spatial_size)
        levels.append(Level(h * fits, w * fits, start * fits))
    return levels


def _forward(value: Tensor, *arguments: Any) -> Tensor:
    """The forward operator on real tensors, with the arguments of its schema."""
    *table_arguments, locations, weights = arguments
    problem, table = check(value, *_given(*table_arguments), locations, weights)
    inputs = (value, locations, weights)
    if not value.is_cuda:
        arrays = map(_numpy, inputs)
        output = host.forward(problem, table, *arrays, threads=torch.get_num_threads())
        return torch.from_numpy(output).to(value.dtype)
    return _device_forward(problem, table, *inputs)


def _backward(grad_output: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The backward operator on real tensors, with the arguments of its schema."""
    *table_arguments, locations, weights, needs_value, needs_points = arguments
    problem, table = check(value, *_given(*table_arguments), locations, weights)
    check_grad_output(problem, grad_output, value)
    inputs = (value, locations, weights)
    needs = (needs_value, needs_points, needs_points)
    gradients: tuple[Tensor | None, ...]
    if not any(needs):
        gradients = (None, None, None)
    elif value.is_cuda:
        gradients = _device_backward(problem, table, grad_output, *inputs, *needs[:2])
    else:
        sources = map(_numpy, (grad_output, *inputs))
        arrays = host.backward(problem, table, *sources, threads=torch.get_num_threads())
        gradients = tuple(
            torch.from_numpy(array).to(tensor.dtype) if need else None
            for array, tensor, need in zip(arrays, inputs, needs, strict=True)
        )
    return tuple(
        tensor.new_empty(0) if gradient is None else gradient
        for gradient, tensor in zip(gradients, inputs, strict=True)
    )


def _fake_forward(value: Tensor, *arguments: Any) -> Tensor:
    """Shape, dtype and device of the output; the operator checks its inputs when it runs."""
    n, _, m, d = value.shape
    locations = arguments[4]
    return value.new_empty((n, locations.shape[1], m * d))


def _fake_backward(grad_output: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Shapes, dtypes and devices of the gradients."""
    *_, locations, weights, needs_value, needs_points = arguments
    needs = (needs_value, needs_points, needs_points)
    return tuple(
        tensor.new_empty(tensor.shape if need else 0)
        for tensor, need in zip((value, locations, weights), needs, strict=True)
    )


for _name, _run, _fake in (
    ("ms_deform_attn_forward", _forward, _fake_forward),
    ("ms_deform_attn_backward", _backward, _fake_backward),
):
    # One function for both: a table on a GPU with host values dispatches as CUDA.
    torch.library.impl(f"cupy_msda::{_name}", ("cpu", "cuda"), _run)
    torch.library.register_fake(f"cupy_msda::{_name}", _fake)


def _numpy(tensor: Tensor) -> Any:
    """A host tensor as a C-contiguous NumPy array: shared memory, or a copy widened to float32."""
    tensor = tensor.detach()
    if tensor.dtype in _HALF:  # NumPy has no bfloat16, and computes float16 slowly
        tensor = tensor.float()
    return tensor.contiguous().numpy()


def _device_forward(
    problem: Problem, table: LevelTable, value: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """The output, computed by the CUDA kernels on torch's current stream."""
    if problem.is_empty:
        return value.new_zeros(problem.output_shape)
    launch = _launch()
    inputs = [_readable(tensor) for tensor in (value, locations, weights)]
    output = value.new_empty(problem.output_shape)
    with launch.on_stream(*_place(value)):
        launch.forward(problem, _exported(table), *map(_Exporter, (*inputs, output)))
    return output


def _device_backward(
    problem: Problem,
    table: LevelTable,
    grad_output: Tensor,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    needs_value: bool,
    needs_points: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients that are needed, computed by the CUDA kernels on torch's current stream."""
    by_value, by_locations, by_weights, sums = None, None, None, None
    reproducible = torch.are_deterministic_algorithms_enabled() and not problem.is_empty
    if needs_value and reproducible:
        by_value = value.new_empty(value.shape)
        sums = _Exporter(value.new_zeros(_launch().num_sums(problem), dtype=torch.int64))
    elif needs_value:
        wide = torch.promote_types(value.dtype, torch.float32)
        by_value = value.new_zeros(value.shape, dtype=wide)
    if needs_points:
        make = Tensor.new_zeros if problem.is_empty else Tensor.new_empty
        by_locations, by_weights = (make(tensor, tensor.shape) for tensor in (locations, weights))
    if not problem.is_empty:
        launch = _launch()
        inputs = [_readable(tensor) for tensor in (grad_output, value, locations, weights)]
        gradients = (
            None if tensor is None else _Exporter(tensor)
            for tensor in (by_value, by_locations, by_weights)
        )
        exported = tuple(map(_Exporter, inputs)), tuple(gradients)
        with launch.on_stream(*_place(value)):
            launch.backward(problem, _exported(table), *exported, sums)
    return None if by_value is None else by_value.to(value.dtype), by_locations, by_weights


@cache
def _launch() -> ModuleType:
    """`cupy_msda.launch`, or an error that names the CuPy package for this build of torch."""
    if find_spec("cupy") is None:
        major = str(torch.version.cuda).partition(".")[0]
        raise ModuleNotFoundError(
            "the CUDA kernels need CuPy, which is not installed: "
            f'pip install "cupy-msda[cuda{major}x]" fits this torch, built for CUDA {major}',
            name="cupy",
        )
    from cupy_msda import launch

    return launch


def _place(value: Tensor) -> tuple[int, int]:
    """The device of value and the pointer of torch's current stream there."""
    stream = torch.cuda.current_stream(value.device)
    return value.get_device(), stream.cuda_stream


def _readable(tensor: Tensor) -> Tensor:
    """The tensor as the kernels read it: C-contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _exported(table: LevelTable) -> LevelTable:
    """The table with its device tensors, if any, as DLPack exporters of contiguous int64."""
    if table.device_sizes is None and table.device_starts is None:
        return table
    sizes, starts = (
        None if tensor is None else _Exporter(tensor.long().contiguous()) for tensor in table[2:]
    )
    return table._replace(device_sizes=sizes, device_starts=starts)


class _Exporter:
    """A tensor for one `from_dlpack`, several times cheaper than through `Tensor.__dlpack__`.

    Nothing waits for a stream: whoever imports it already works on the tensor's own. Half dtypes
    travel as int16, since CuPy has no bfloat16.
    """

    __slots__ = ("_capsule", "_device")

    def __init__(self, tensor: Tensor) -> None:
        self._capsule = to_dlpack(tensor.view(torch.int16) if tensor.dtype in _HALF else tensor)
        self._device = (2, tensor.get_device()) if tensor.is_cuda else (1, 0)  # kDLCUDA, kDLCPU

    def __dlpack__(self, **_: Any) -> Any:
        """The capsule, whatever stream or version is asked for."""
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's device type and index."""
        return self._device
