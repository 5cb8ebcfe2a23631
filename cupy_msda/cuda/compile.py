# SPDX-License-Identifier: Apache-2.0
"""Find, assemble, compile and cache one instantiation of the .cu sources."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

from cupy_msda.cuda.importing import (
    fitting,
    fork_safe_lock,
    in_memory,
    require_cupy,
    without_disk_cache,
)
from cupy_msda.faults import reason
from cupy_msda.problem import MAX_GRIDS, MAX_HOST_LEVELS, MAX_UNEVEN_LEVELS

OPTIONS = ("-std=c++17",)
# Compute capabilities, times ten.
LOWEST_CAPABILITY = 70  # of `__grid_constant__`
LOWEST_OF_CUDA_13 = 75  # of its compiler

BLOCK = 256  # threads of a block, the most of any but a persistent one
PERSISTENT_BLOCK = 1024  # threads of a persistent block: the most that have 64 registers each
WARP = 32
DERIVED_START = -1  # in the level table: the level starts where the one before it ends
MAX_SPECIALISED_LEVELS = 16
# backward_value_binned.cu: queries of a block, and bounds of its counters and of its list in shared memory.
BINNED_QUERIES = 128
MAX_BINNED_LEVELS = 8
MAX_BINNED_POINTS = 32  # of a row, over all levels

# What the kernels share with the host: `assemble` emits each as a constexpr int.
CONSTANTS = {
    "BLOCK": BLOCK,
    "PERSISTENT_BLOCK": PERSISTENT_BLOCK,
    "WARP": WARP,
    "MAX_LEVELS": MAX_HOST_LEVELS,
    "MAX_UNEVEN_LEVELS": MAX_UNEVEN_LEVELS,
    "MAX_GRIDS": MAX_GRIDS,
    "DERIVED_START": DERIVED_START,
    "MAX_SPECIALISED_LEVELS": MAX_SPECIALISED_LEVELS,
    "BINNED_QUERIES": BINNED_QUERIES,
    "MAX_BINNED_LEVELS": MAX_BINNED_LEVELS,
    "MAX_BINNED_POINTS": MAX_BINNED_POINTS,
}

_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


class Kernel(NamedTuple):
    """One instantiation: the source file and the C++ name expression, template arguments included."""

    file: str
    name: str


class KernelCompileError(RuntimeError):
    """The CUDA compiler refused a kernel or could not be loaded, or the GPU is too old for the kernels.

    The message names the kernel with its template arguments, the architecture and the options, and ends with the
    compiler's log; for an old GPU it names the compute capabilities.
    """


def kernel_dir() -> Any:
    """The folder of the .cu and .cuh files: in the installed package, else beside it in a source tree.

    A path or, where the package is imported from a zip file, what `importlib.resources` has instead.
    """
    package: Any = resources.files("cupy_msda")
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "forward.cu").is_file():
            return folder
    raise FileNotFoundError(
        f"the kernel sources of cupy_msda must be in {package / 'kernels'} or {package.parent / 'kernels'}, "
        "and neither holds forward.cu: reinstall cupy-msda"
    )


@cache
def assemble(file: str) -> str:
    """`file` after the shared constants, its includes expanded, each part under its own name for error messages.

    One string, because CuPy's disk cache is keyed by the source it is given and does not look into headers.
    """
    constants = "".join(f"constexpr int {name} = {value};\n" for name, value in CONSTANTS.items())
    return f'#line 1 "kernels/constants (generated)"\n{constants}{_expand(file, set())}'


@cache
def fingerprint() -> str:
    """A short hash of all kernels' sources as they are compiled."""
    files = sorted(file.name for file in kernel_dir().iterdir() if file.name.endswith(".cu"))
    sources = "".join(map(assemble, files))
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


def _expand(file: str, seen: set[str]) -> str:
    """The text of `file`, its includes expanded where they stand, each file once."""
    seen.add(file)
    text = (kernel_dir() / file).read_text(encoding="utf-8").replace("#pragma once\n", "\n")

    def included(match: re.Match[str]) -> str:
        name = match[1]
        inner = "" if name in seen else _expand(name, seen)
        line = text.count("\n", 0, match.end()) + 2
        return f'{inner}\n#line {line} "kernels/{file}"'

    return f'#line 1 "kernels/{file}"\n{_INCLUDE.sub(included, text)}'


_functions: dict[tuple[Kernel, int], Any] = {}
_lock = fork_safe_lock()


def load(kernel: Kernel, device: int) -> Any:
    """The compiled function for CuPy's current device, which must be `device`; compiled once per process."""
    function = _functions.get((kernel, device))
    if function is None:
        with _lock:
            function = _functions.get((kernel, device))
            if function is None:
                function = _functions[kernel, device] = _compile(kernel)
    return function


def _compile(kernel: Kernel) -> Any:
    """Compile for CuPy's current device, or find it in CuPy's disk cache, which is given up if it fails."""
    cupy = require_cupy()
    arch = int(cupy.cuda.Device().compute_capability)
    obstacle = _nvrtc_obstacle(cupy) or capability_obstacle(cupy, arch)
    if obstacle is not None:
        raise KernelCompileError(obstacle)
    try:
        try:
            return _build(cupy, kernel)
        except Exception as error:
            if in_memory():
                raise
            with without_disk_cache(reason(error)):
                return _build(cupy, kernel)
    except Exception as error:
        raise KernelCompileError(
            f"{kernel.name} from kernels/{kernel.file} must compile for sm_{arch} with options "
            f"{' '.join(OPTIONS)}, and did not:\n{error}"
        ) from error


def _build(cupy: Any, kernel: Kernel) -> Any:
    """The function of a kernel, by CuPy."""
    module = cupy.RawModule(
        code=assemble(kernel.file), options=OPTIONS, name_expressions=(kernel.name,)
    )
    return module.get_function(kernel.name)


def _nvrtc_obstacle(cupy: Any) -> str | None:
    """Why the compiler cannot be loaded; None if it can."""
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return f"CuPy must load the compiler NVRTC, and did not ({reason(error)}): pip install {fitting()}"
    return None


def capability_obstacle(cupy: Any, capability: int) -> str | None:
    """Why the kernels cannot be compiled for a compute capability, times ten; None if they can."""
    if capability >= LOWEST_OF_CUDA_13:
        return None
    got = f"got {capability // 10}.{capability % 10}"
    if capability < LOWEST_CAPABILITY:
        return (
            "the CUDA kernels need a GPU of compute capability 7.0 or later (7.5 or later with CUDA 13), "
            f"{got}: use arrays on the CPU"
        )
    if cupy.cuda.nvrtc.getVersion()[0] >= 13:
        return (
            f"the compiler of CUDA 13 needs a GPU of compute capability 7.5 or later, {got}: "
            'pip install "cupy-msda[cuda12x]", whose compiler takes 7.0 and later'
        )
    return None
