# SPDX-License-Identifier: Apache-2.0
"""For all tests: when those marked `gpu` are skipped, and seeds."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest


def why_no_gpu() -> str | None:
    """Why tests of the CUDA kernels cannot run here, or None where they can."""
    try:
        import cupy
        import torch
    except ModuleNotFoundError as error:
        return f"needs torch and CuPy: {error}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and CuPy warn of drivers that they cannot use
        if not torch.cuda.is_available():
            return "needs a CUDA device and a torch built for it"
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return f"needs a CUDA device that CuPy can use: {error}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reason = why_no_gpu()
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """torch's default generator starts at the same place in every test; NumPy's is never used."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads that a call of the CPU kernels may use take part in it, however little there is to do."""
    from cupy_msda.cpu import kernels

    share_out = kernels._share_out

    def share_out_at_once(kernel: Any, threads: int, *arguments: Any) -> None:
        barrier = threading.Barrier(threads)

        def kernel_at_once(*given: Any) -> None:
            barrier.wait(timeout=60)
            kernel(*given)

        share_out(kernel_at_once, threads, *arguments)

    monkeypatch.setattr(kernels, "_GRAIN", 1)
    monkeypatch.setattr(kernels, "_share_out", share_out_at_once)


@pytest.fixture(params=[True, False], ids=["driver", "raw-kernel"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An emulated CUDA device, of a CuPy with the driver's launchKernel and of one without."""
    from tests.emulated_device import emulated_device

    with emulated_device(monkeypatch, has_driver=request.param) as device:
        yield device


@pytest.fixture
def driver_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An emulated CUDA device."""
    from tests.emulated_device import emulated_device

    with emulated_device(monkeypatch) as device:
        yield device


@pytest.fixture
def idle_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One on which launches compute nothing."""
    from tests.emulated_device import emulated_device

    with emulated_device(monkeypatch, runs=False) as device:
        yield device
