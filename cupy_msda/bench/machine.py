# SPDX-License-Identifier: Apache-2.0
"""The conditions of a run: device, driver, threads, load, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import cupy_msda
from cupy_msda import report

_PACKAGES = (
    "numpy",
    "numba",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "triton",
    "torch-ms-deform-attn",
    "deformops",
)


def describe(device: str) -> dict[str, Any]:
    """The machine and the versions in use."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "driver": dict(report.environment())["driver"] if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average_before": load(),
        "versions": _versions(),
    }


def _processor() -> str:
    """The processor's name, or its architecture where the system names none, and the count."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} processors"


def load() -> float | None:
    """Load average of the last minute: other load slows baselines on OpenMP most, whose threads spin."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter."""
    found = {"python": platform.python_version(), "cupy_msda": cupy_msda.__version__}
    # Not from the metadata: a wheel from PyPI leaves its build, "+cu130", out of there.
    found["torch"] = str(torch.__version__)
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
