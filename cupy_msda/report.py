# SPDX-License-Identifier: Apache-2.0
"""Versions and devices, the backend of each kind of array with reasons, and a check of each against the reference."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cupy_msda
from cupy_msda import api, budget, contract, reference
from cupy_msda.cpu import backend
from cupy_msda.cuda import launch, tuned
from cupy_msda.cuda.compile import capability_obstacle, kernel_dir
from cupy_msda.cuda.importing import (
    CACHE_DIR,
    cache_folder,
    cache_obstacle,
    distributions,
    require_cupy,
)
from cupy_msda.cuda.plans import Launch, plan_backward, plan_forward
from cupy_msda.faults import reason
from cupy_msda.problem import LevelTable, Problem


def environment() -> Iterator[tuple[str, str]]:
    """Label and text, line by line: versions, devices, sources, kernel cache, and the backend of each kind of array.

    What cannot be found out is said in its line, whatever the reason.
    """
    yield "cupy-msda", f"{cupy_msda.__version__} in {Path(__file__).parent}"
    yield "kernel sources", _told(_kernel_sources)
    yield "kernel cache", _told(_kernel_cache)
    yield "python", _told(_python)
    for name in ("numpy", "array-api-compat", "numba"):
        yield name, _told(_version, name)
    yield "torch", _told(_torch_version)
    yield from _hidden_packages()
    yield from _compiled_extension()
    yield "cupy", _told(_cupy_version)
    yield "nvrtc", _told(_nvrtc_version)
    yield from _devices()
    yield "", ""
    yield "CPU arrays", _told(cpu_backend)
    for label, find in (("torch on CUDA", torch_obstacle), ("CuPy arrays", cupy_obstacle)):
        yield label, _told(_cuda_backend, find)


def _told(describe: Callable[..., str], *arguments: Any) -> str:
    """What `describe` returns, or why it cannot."""
    try:
        return describe(*arguments)
    except Exception as error:
        return f"cannot be told ({reason(error)})"


def _python() -> str:
    """Python, the system and its processors."""
    return f"{platform.python_version()} on {platform.platform()}, {os.cpu_count()} processors"


def _cuda_backend(find: Callable[[], str | None]) -> str:
    """Whether arrays on a GPU run, or the obstacle."""
    obstacle = find()
    return "CUDA kernels" if obstacle is None else f"cannot run: {obstacle}"


@cache
def cupy_obstacle() -> str | None:
    """Why CuPy arrays cannot run the CUDA kernels, and the remedy; None if they can."""
    if find_spec("cupy") is None:
        return f"CuPy is not installed: {_cupy_command()}"
    try:
        return _device_obstacle(_import_cupy())
    except ImportError as error:
        return str(error)


def _device_obstacle(cupy: Any) -> str | None:
    """Why CuPy, which imports, cannot run the kernels on its current device."""
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "the driver offers no CUDA device: see nvidia-smi and CUDA_VISIBLE_DEVICES"
    except Exception as error:
        return _driver_obstacle(cupy, reason(error))
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return f"the compiler NVRTC does not load ({reason(error)}): {_cupy_command()}"
    with suppress(Exception):  # what else is wrong with the device, the self-check tells
        return capability_obstacle(cupy, int(cupy.cuda.Device().compute_capability))
    return None


def _driver_obstacle(cupy: Any, text: str) -> str:
    """What to do about the error of CuPy's first call to the driver."""
    known = 0  # the CUDA version of the driver, times 1000: none installed is told as one that is too old
    with suppress(Exception):
        known = cupy.cuda.runtime.driverGetVersion()
    if known and "cudaErrorInsufficientDriver" in text:
        return (
            f"the NVIDIA driver, for CUDA {known // 1000}.{known % 1000 // 10}, is too old for this CuPy ({text}): "
            'install a newer driver or, for one of CUDA 12, pip install "cupy-msda[cuda12x]" and a torch of CUDA 12'
        )
    if "cudaError" in text:
        return f"no usable NVIDIA driver or device ({text}): install the driver, or use CPU arrays"
    return f"CuPy is installed and does not work ({text}): {_cupy_command()}"


@cache
def torch_obstacle() -> str | None:
    """Why CUDA tensors of torch cannot run the CUDA kernels, and the remedy; None if they can."""
    if find_spec("torch") is None:
        return 'torch is not installed: pip install "cupy-msda[torch]"'
    try:
        obstacle = _torch_build_obstacle()
    except Exception as error:
        return f"torch is installed and does not work ({reason(error)}): install it again"
    return obstacle or cupy_obstacle()


def _torch_build_obstacle() -> str | None:
    """What keeps torch itself from a GPU of NVIDIA."""
    import torch

    if torch.version.hip is not None:
        return f"torch {torch.__version__} is built for AMD GPUs, and the kernels need an NVIDIA one: use CPU tensors"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a CPU build: pip install --force-reinstall torch from an index of CUDA "
            "builds (https://pytorch.org/get-started)"
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no usable device: install an NVIDIA driver "
            "that is new enough, or a torch build for an older CUDA (https://pytorch.org/get-started)"
        )
    return None


def _import_cupy() -> Any:
    """CuPy, or an ImportError with the cause; the report tells of its cache in a line of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return require_cupy(_torch_cuda())


def _cupy_command() -> str:
    """The pip command for the CuPy that fits torch's CUDA."""
    return f'pip install "cupy-msda[{_extra()}]"'


def _extra() -> str:
    """The extra whose CuPy fits torch's CUDA; CUDA 12's where torch names none."""
    return "cuda13x" if (_torch_cuda() or "12").startswith("13") else "cuda12x"


def _torch_cuda() -> str | None:
    """The CUDA that torch is built for; None for other builds, and without a torch that imports."""
    try:
        import torch

        return torch.version.cuda
    except Exception:  # also where another file of that name is imported
        return None


def _kernel_sources() -> str:
    """Where the .cu sources are and how many, or that they are missing."""
    try:
        sources = kernel_dir()
    except FileNotFoundError as error:
        return f"missing: {error}"
    count = sum(file.name.endswith((".cu", ".cuh")) for file in sources.iterdir())
    return f"{sources} ({count} files)"


def _kernel_cache() -> str:
    """CuPy's cache of compiled kernels: where, how large, and why it cannot be written."""
    folder = cache_folder()
    try:
        sizes = [file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()]
        text = f"{folder} ({len(sizes)} files, {sum(sizes) / 1e6:.1f} MB)"
    except OSError as error:
        text = f"{folder} (cannot be read: {reason(error)})"
    obstacle = None if find_spec("cupy") is None else cache_obstacle()
    if obstacle is None:
        return text
    return f"{text}, cannot be written ({obstacle}): set {CACHE_DIR} to a folder that can"


def cpu_backend() -> str:
    """Which backend runs NumPy arrays and CPU tensors, and why."""
    obstacle = backend.obstacle()
    return "Numba kernels" if obstacle is None else f"the reference, slow: {obstacle}"


def _version(distribution: str) -> str:
    """The installed version of a distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _torch_version() -> str:
    """torch's version and the platform that it was built for."""
    if find_spec("torch") is None:
        return "not installed"
    import torch

    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    of = [f"built for {name} {number}" for name, number in builds.items() if number is not None]
    return f"{torch.__version__} ({', '.join(of) or 'CPU build'})"


def _hidden_packages() -> Iterator[tuple[str, str]]:
    """Files such as a torch.py in the current folder, which Python imports in place of a package."""
    for name in ("torch", "cupy", "numba", "numpy"):
        with suppress(ValueError):  # a module without a spec
            spec = find_spec(name)
            if spec is not None and spec.submodule_search_locations is None:
                yield f"{name} is hidden", f"by {spec.origin}: rename that file"


def _compiled_extension() -> Iterator[tuple[str, str]]:
    """An extension of Deformable-DETR that is imported or installed, which old code then runs in place of ours."""
    name, ours = "MultiScaleDeformableAttention", "cupy_msda.integrations.deformable_detr"
    cure = f"call {ours}.install() before anything imports it"
    module = sys.modules.get(name)
    if module is not None and module is not sys.modules.get(ours):
        yield "extension", f"{name} is imported from {getattr(module, '__file__', None)}: {cure}"
    elif module is None and (spec := find_spec(name)) is not None:
        yield "extension", f"{name} is installed in {spec.origin}: {cure}"


def _cupy_version() -> str:
    """CuPy's version, the distribution that provides it, and whether that fits torch."""
    if find_spec("cupy") is None:
        return "not installed"
    found = distributions()
    text = " and ".join(found) or "installed, from no distribution known here"
    if len(found) > 1:
        text += " (uninstall all and install one: they overwrite each other)"
    elif found:
        cuda = _torch_cuda()
        if cuda is not None and f"cuda{cuda.partition('.')[0]}x" not in text and "-" in text:
            text += f" (torch is built for CUDA {cuda}: {_cupy_command()} fits it)"
    return text


def _nvrtc_version() -> str:
    """The version of the compiler that CuPy loads."""
    if find_spec("cupy") is None:
        return "none without CuPy"
    try:
        cupy = _import_cupy()
    except ImportError:
        return "unknown: CuPy does not import"
    try:
        number = cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        return f"does not load ({reason(error)}): {_cupy_command()}"
    return ".".join(map(str, number)) + _nvrtc_lag(cupy, number[0])


def _nvrtc_lag(cupy: Any, major: int) -> str:
    """What to install if the GPU is newer than the compiler, which then compiles for an older one."""
    with suppress(Exception):  # no device, or a compiler that does not tell
        known = max(cupy.cuda.nvrtc.getSupportedArchs())
        capability = int(cupy.cuda.Device().compute_capability)
        if capability > known:
            package = "nvidia-cuda-nvrtc" if major >= 13 else f"nvidia-cuda-nvrtc-cu{major}"
            return (
                f" (knows GPUs up to compute capability {known / 10}, got {capability / 10}, for which the driver "
                f"compiles once more: pip install --upgrade {package})"
            )
    return ""


def _devices() -> Iterator[tuple[str, str]]:
    """The driver and its devices, as nvidia-smi names them."""
    command = shutil.which("nvidia-smi")
    if command is None:
        yield "driver", "none: nvidia-smi is not on PATH"
        return
    query = "--query-gpu=driver_version,index,name,compute_cap,memory.total"
    try:
        answer = subprocess.run(
            [command, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=60,
        )
    except Exception as error:  # not a program, or one that hangs
        yield "driver", f"nvidia-smi failed: {reason(error)}"
        return
    rows = [line.split(", ") for line in answer.stdout.splitlines()]
    if answer.returncode != 0 or any(len(row) != query.count(",") + 1 for row in rows):
        yield "driver", f"nvidia-smi failed: {(answer.stdout + answer.stderr).strip()}"
        return
    yield "driver", rows[0][0] if rows else "no device"
    for _, index, *facts in rows:
        yield f"device {index}", ", ".join(facts)


# Deformable-DETR on an image of 800 x 1333, with 300 queries in the decoder.
PYRAMID = LevelTable(((100, 167), (50, 84), (25, 42), (13, 21)), (0, 16700, 20900, 21950))
_ENCODER = Problem(1, 22223, 8, 32, 22223, 4, 4, "float32", "float32", "float32")
TYPICAL = {"encoder": _ENCODER, "decoder": _ENCODER._replace(num_queries=300)}


def plans() -> Iterator[tuple[str, str]]:
    """Label and text: the kernels for typical problems on CuPy's current device, and why; empty without a device."""
    if cupy_obstacle() is not None:
        return
    try:
        import cupy

        device = launch.describe(cupy.cuda.runtime.getDevice())
    except Exception as error:
        yield "plans", f"cannot be told ({reason(error)})"
        return
    for name, problem in TYPICAL.items():
        for way, planner in (("forward", plan_forward), ("backward", plan_backward)):
            plan = planner(
                problem, PYRAMID, device, choice=tuned.choice(way, problem, device, None)
            )
            kernels = [
                s.kernel.name.partition("<")[0] for s in plan.launches if isinstance(s, Launch)
            ]
            yield f"{name} {way}", f"{', '.join(kernels)}: {plan.reason}"


def integrations() -> Iterator[tuple[str, str]]:
    """Label and text: each installed package whose attention can be replaced, and which functions; none is imported."""
    try:
        from cupy_msda.integrations import names
    except Exception:  # torch is missing or does not work, as its own line says
        return
    installed = names.installed()
    if installed:
        yield "", ""
    for package in installed:
        yield package, _told(names.describe, package)


class _Case(NamedTuple):
    """A problem in float32 NumPy arrays, with a gradient of its output."""

    grad_output: Any
    value: Any
    locations: Any
    weights: Any


_SHAPES = ((6, 8), (3, 4))


def self_check() -> Iterator[tuple[str, bool, str]]:
    """Run each available backend on a small problem, forward and backward: its name, whether it passed, figures.

    The figures are the relative error of each result, root mean square, and the part of its budget that it takes.
    """
    case = _small_problem()
    plain, exact = _reference(case), _reference([array.astype(np.float64) for array in case])
    labels = ("output", "grad value", "grad locations", "grad weights")
    for name, run in _backends():
        try:
            results = run(case)
        except Exception as failure:
            yield name, False, f"{type(failure).__name__}: {failure}"
            continue
        parts = [budget.used(*arrays) for arrays in zip(results, plain, exact, strict=True)]
        errors = [budget.relative_error(*pair) for pair in zip(results, exact, strict=True)]
        figures = (
            f"{label} {error:.0e} ({part:.2f} of its budget)"
            for label, error, part in zip(labels, errors, parts, strict=True)
        )
        yield name, all(part <= 1 for part in parts), ", ".join(figures)


def _small_problem() -> _Case:
    """Two images, two levels, points inside and outside."""
    rng = np.random.default_rng(0)
    n, m, d, lq, p = 2, 2, 16, 9, 4
    spatial_size = sum(h * w for h, w in _SHAPES)
    points = (n, lq, m, len(_SHAPES), p)
    arrays = (
        rng.standard_normal((n, lq, m * d)),
        rng.standard_normal((n, spatial_size, m, d)),
        rng.uniform(-0.1, 1.1, (*points, 2)),
        rng.uniform(0, 1, points),
    )
    return _Case(*(array.astype(np.float32) for array in arrays))


def _reference(case: Any) -> tuple[Any, ...]:
    """Output and gradients from the reference, in the dtype of the case."""
    grad_output, value, locations, weights = case
    table = contract.check(value, _SHAPES, None, locations, weights)[1]
    levels = table.levels or ()
    output = reference.forward(value, levels, locations, weights)
    return output, *reference.backward(grad_output, value, levels, locations, weights)


def _backends() -> Iterator[tuple[str, Callable[[_Case], tuple[Any, ...]]]]:
    """The available backends: a name, and a function from a case to output and gradients in NumPy arrays."""
    yield "NumPy arrays", _run_arrays
    if find_spec("torch") is not None:
        yield "torch on the CPU", lambda case: _run_torch(case, "cpu")
        if torch_obstacle() is None:
            yield "torch on CUDA", lambda case: _run_torch(case, "cuda")
    if cupy_obstacle() is None:
        yield "CuPy arrays", _run_cupy


def _run_arrays(case: Any) -> tuple[Any, ...]:
    """The array functions, in the array type of the case."""
    grad_output, value, *points = case
    output = api.ms_deform_attn(value, _SHAPES, None, *points)
    return output, *api.ms_deform_attn_backward(grad_output, value, _SHAPES, None, *points)


def _run_cupy(case: _Case) -> tuple[Any, ...]:
    """The array functions on CuPy's current device."""
    import cupy

    return tuple(map(cupy.asnumpy, _run_arrays(tuple(map(cupy.asarray, case)))))


def _run_torch(case: _Case, device: str) -> tuple[Any, ...]:
    """Through autograd."""
    import torch

    grad_output, *inputs = (torch.from_numpy(array).to(device) for array in case)
    value, locations, weights = leaves = [array.requires_grad_() for array in inputs]
    output = api.ms_deform_attn(value, _SHAPES, None, locations, weights)
    gradients = torch.autograd.grad(output, leaves, grad_output)
    return tuple(result.detach().cpu().numpy() for result in (output, *gradients))


def as_data() -> dict[str, Any]:
    """The whole report for a file: environment, integrations and plans by label, and the results of the self-check."""
    names = ("backend", "passed", "figures")
    return {
        "environment": {label: text for label, text in environment() if label},
        "integrations": {label: text for label, text in integrations() if label},
        "plans": {label: text for label, text in plans() if label},
        "self_check": [dict(zip(names, row, strict=True)) for row in self_check()],
    }
