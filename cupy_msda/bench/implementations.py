# SPDX-License-Identifier: Apache-2.0
"""This library and the baselines, each as a function of value, locations and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from cupy_msda import ms_deform_attn, ms_deform_attn_core_pytorch
from cupy_msda.bench.cases import SHAPES, Case, Inputs
from cupy_msda.bench.time_limit import TookTooLongError, time_limit

OURS = "cupy_msda"
COMPILED = "grid_sample, compiled"

_MOST_SAMPLES, _MOST_COMPILED = 2**28, 2**26  # on a CPU: 1 GiB and 256 MiB of float32
# Most seconds to compile for one set of shapes, and the shapes that are compiled for on a GPU, where compiling all took
# longer than everything else: encoders and decoders, with one level and with more.
COMPILE_SECONDS = {"cpu": 60, "cuda": 20}
COMPILED_ON_CUDA = (
    "detr-encoder",
    "mask2former-512",
    "bevformer-tsa",
    "dino-decoder",
    "rtdetr-decoder",
)

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Sizes = tuple[tuple[int, int], ...]


def installed(quick: bool) -> tuple[list[str], dict[str, str]]:
    """The names of the available implementations, ours first, and why the others are absent."""
    absent = {
        name: f"{module} is not installed"
        for name, module in _MODULES.items()
        if find_spec(module) is None
    }
    if quick:
        absent[COMPILED] = "a quick run leaves it out: compiling takes longer than all the rest"
    return [name for name in _MAKERS if name not in absent], absent


def applies(name: str, case: Case, device: str) -> bool:
    """Whether an implementation takes part in a case.

    grid_sample computes half values in float32, so only float32 cases are compiled, and on a GPU only
    those of some shapes. On a CPU an implementation that materialises all samples is left out where that
    would take minutes and most of the memory.
    """
    if name == COMPILED and device == "cuda" and case.shape not in COMPILED_ON_CUDA:
        return False
    if device == "cpu" and name not in (OURS, "torch-ms-deform-attn"):
        most = _MOST_COMPILED if name == COMPILED else _MOST_SAMPLES
        if SHAPES[case.shape].samples > most:
            return False
    return name != COMPILED or case.dtype == "float32"


def make(name: str, inputs: Inputs) -> Function:
    """The function of one implementation for one problem."""
    return _MAKERS[name](inputs)


def _ours(inputs: Inputs) -> Function:
    """`ms_deform_attn` as users call it, with level sizes from the host."""
    sizes = inputs.sizes
    return lambda v, x, a: ms_deform_attn(v, sizes, None, x, a)


def _grid_sample(inputs: Inputs) -> Function:
    """The fallback of models without a kernel."""
    sizes = inputs.sizes
    return lambda v, x, a: ms_deform_attn_core_pytorch(v, sizes, x, a)


def _compiled(inputs: Inputs) -> Function:
    """grid_sample under torch.compile, specialised to these shapes; TookTooLongError if that takes too long."""
    shapes = tuple(tensor.shape for tensor in inputs.tensors)
    compiled = _compile(tuple(inputs.sizes), shapes, inputs.value.device)
    if isinstance(compiled, TookTooLongError):
        raise compiled
    return compiled


@lru_cache(maxsize=1)
def _compile(
    sizes: Sizes, shapes: tuple[torch.Size, ...], device: torch.device
) -> Function | TookTooLongError:
    """One function for each set of shapes, or why there is none; that of the previous set is dropped."""
    torch.compiler.reset()

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_core_pytorch(value, sizes, locations, weights)

    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False)
    try:
        with time_limit(COMPILE_SECONDS[device.type], "compiling"):
            _call_both_ways(compiled, shapes, device)
    except TookTooLongError as error:
        torch.compiler.reset()
        return error
    return compiled


def _call_both_ways(
    function: Function, shapes: tuple[torch.Size, ...], device: torch.device
) -> None:
    """Everything that is to be compiled: the forward without and with gradients, and the backward."""
    value, locations, weights = (torch.zeros(shape, device=device) for shape in shapes)
    with torch.no_grad():
        function(value, locations, weights)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    output = function(*leaves)
    torch.autograd.grad(output, leaves, torch.zeros_like(output))


def _torch_ms_deform_attn(inputs: Inputs) -> Function:
    """The kernels of Deformable-DETR; they take one dtype, so half values are widened as a caller would."""
    theirs = import_module("torch_ms_deform_attn").ms_deform_attn
    sizes, starts = inputs.shapes(), inputs.starts()

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        wide = locations.dtype
        output: Tensor = theirs(value.to(wide), sizes, starts, locations, weights.to(wide))
        return output.to(value.dtype)

    return function


def _deformops(inputs: Inputs) -> Function:
    """deformops with the backend that it chooses: Triton on a GPU, eager operations on a CPU."""
    theirs = import_module("deformops.registry").msda
    sizes, starts = inputs.shapes(), inputs.starts()
    return lambda v, x, a: theirs(v, sizes, starts, x, a)


_MAKERS: dict[str, Callable[[Inputs], Function]] = {
    OURS: _ours,
    "grid_sample": _grid_sample,
    COMPILED: _compiled,
    "torch-ms-deform-attn": _torch_ms_deform_attn,
    "deformops": _deformops,
}
_MODULES = {"torch-ms-deform-attn": "torch_ms_deform_attn", "deformops": "deformops"}
