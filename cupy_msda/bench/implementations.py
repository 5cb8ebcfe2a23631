# SPDX-License-Identifier: Apache-2.0
"""This library and its peers, each as a function of value, locations and weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from cupy_msda import ms_deform_attn, ms_deform_attn_core_pytorch
from cupy_msda.bench.cases import SHAPES, Case, Problem

OURS = "cupy_msda"
COMPILED = "grid_sample, compiled"

_MOST_SAMPLES, _MOST_COMPILED = 2**28, 2**26  # on a CPU: 1 GiB and 256 MiB of float32

Function = Callable[[Tensor, Tensor, Tensor], Tensor]
Sizes = tuple[tuple[int, int], ...]


def installed(quick: bool) -> tuple[list[str], dict[str, str]]:
    """The names of what can be measured, ours first, and why the others cannot be."""
    absent = {
        name: f"{module} is not installed"
        for name, module in _MODULES.items()
        if find_spec(module) is None
    }
    if quick:
        absent[COMPILED] = "a quick run leaves it out: compiling takes longer than all the rest"
    return [name for name in _MAKERS if name not in absent], absent


def applies(name: str, case: Case, device: str) -> bool:
    """Whether it takes part in a case.

    grid_sample computes half values in float32, so compiling that is enough. On a CPU what samples
    first and weighs then is left out where it would take minutes and most of the memory.
    """
    if device == "cpu" and name not in (OURS, "torch-ms-deform-attn"):
        most = _MOST_COMPILED if name == COMPILED else _MOST_SAMPLES
        if SHAPES[case.shape].samples > most:
            return False
    return name != COMPILED or case.dtype == "float32"


def make(name: str, problem: Problem) -> Function:
    """The function of one implementation for one problem."""
    return _MAKERS[name](problem)


def _ours(problem: Problem) -> Function:
    """As users call it, with level sizes from the host."""
    sizes = problem.sizes
    return lambda v, x, a: ms_deform_attn(v, sizes, None, x, a)


def _grid_sample(problem: Problem) -> Function:
    """What models fall back to without a kernel."""
    sizes = problem.sizes
    return lambda v, x, a: ms_deform_attn_core_pytorch(v, sizes, x, a)


def _compiled(problem: Problem) -> Function:
    """The same by torch.compile, for these very shapes."""
    shapes = tuple(tensor.shape for tensor in problem.tensors)
    return _compile(problem.sizes, shapes)


@lru_cache(maxsize=1)
def _compile(sizes: Sizes, _shapes: tuple[torch.Size, ...]) -> Function:
    """One function for each set of shapes; what was compiled for the ones before is dropped."""
    torch.compiler.reset()

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_core_pytorch(value, sizes, locations, weights)

    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False)
    return compiled


def _torch_ms_deform_attn(problem: Problem) -> Function:
    """The kernels of Deformable-DETR; they take one dtype, so half values are widened as a caller would."""
    theirs = import_module("torch_ms_deform_attn").ms_deform_attn
    sizes, starts = _level_tensors(problem)

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        wide = locations.dtype
        output: Tensor = theirs(value.to(wide), sizes, starts, locations, weights.to(wide))
        return output.to(value.dtype)

    return function


def _deformops(problem: Problem) -> Function:
    """Its own choice of backend: Triton on a GPU, eager operations on a CPU."""
    theirs = import_module("deformops.registry").msda
    sizes, starts = _level_tensors(problem)
    return lambda v, x, a: theirs(v, sizes, starts, x, a)


def _level_tensors(problem: Problem) -> tuple[Tensor, Tensor]:
    """Level sizes and starts on the device."""
    device = problem.value.device
    starts = [level.start for level in problem.levels]
    return torch.tensor(problem.sizes, device=device), torch.tensor(starts, device=device)


_MAKERS: dict[str, Callable[[Problem], Function]] = {
    OURS: _ours,
    "grid_sample": _grid_sample,
    COMPILED: _compiled,
    "torch-ms-deform-attn": _torch_ms_deform_attn,
    "deformops": _deformops,
}
_MODULES = {"torch-ms-deform-attn": "torch_ms_deform_attn", "deformops": "deformops"}
