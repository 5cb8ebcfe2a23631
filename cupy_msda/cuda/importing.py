# SPDX-License-Identifier: Apache-2.0
"""CuPy itself: why it does not import, and what to do where its kernel cache cannot be written.

CuPy keeps compiled kernels in a folder. If it cannot make the folder, importing CuPy 14.2 fails; if it cannot save a
kernel there, compiling fails. Here kernels are then compiled in memory.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from threading import Lock
from typing import Any

from cupy_msda.faults import reason

CACHE_DIR, IN_MEMORY = "CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY"  # CuPy's environment variables


def fork_safe_lock() -> Any:
    """A lock that is open in a forked child, where the thread that held it is gone."""
    lock: Any = Lock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)
    return lock


_lock = fork_safe_lock()


def require_cupy(torch_cuda: str | None = None) -> Any:
    """CuPy, or an error that says what to install, for a torch of this CUDA version if given."""
    try:
        _make_cache_folder()
        import cupy

        if (
            getattr(cupy, "cuda", None) is None
        ):  # what pip leaves behind may import as an empty package
            raise ImportError(f"{list(getattr(cupy, '__path__', []))} holds no CuPy")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise ModuleNotFoundError(
                "the CUDA kernels run through CuPy, which is not installed: pip install "
                + fitting(torch_cuda),
                name="cupy",
            ) from error
        raise ImportError(
            f"the CUDA kernels run through CuPy, which is installed and does not import ({reason(error)}): "
            + _remedy(torch_cuda),
            name="cupy",
        ) from error
    return cupy


def fitting(torch_cuda: str | None = None) -> str:
    """What to install for a torch of this CUDA version."""
    if torch_cuda is None:
        return '"cupy-msda[cuda12x]" or, for a driver and torch of CUDA 13, "cupy-msda[cuda13x]"'
    major = torch_cuda.partition(".")[0]
    return f'"cupy-msda[cuda{major}x]" fits this torch, built for CUDA {major}'


def _remedy(torch_cuda: str | None) -> str:
    """What to do about a CuPy that does not import."""
    found = distributions()
    if len(found) > 1:
        return f"{' and '.join(found)} overwrite each other: uninstall all and install one"
    return f"install it anew, for this NumPy and CUDA: pip install --force-reinstall {fitting(torch_cuda)}"


def distributions() -> list[str]:
    """The installed distributions that provide CuPy, with their versions."""
    found = (
        (distribution.metadata["Name"] or "", distribution.version)
        for distribution in metadata.distributions()
    )
    return sorted(
        {
            f"{name} {version}"
            for name, version in found
            if re.fullmatch(r"cupy(-(cuda|rocm)[\w-]*)?", name)
        }
    )


def cache_folder() -> str:
    """The folder of CuPy's kernel cache, as CuPy finds it."""
    default = os.path.expanduser(os.path.join("~", ".cupy", "kernel_cache"))
    return os.environ.get(CACHE_DIR, default)


def cache_obstacle() -> str | None:
    """Why CuPy's kernel cache cannot be written; None if it can. Makes the folder, as CuPy would."""
    folder = cache_folder()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        return reason(error)
    return None if os.access(folder, os.W_OK | os.X_OK) else "no permission to write"


def in_memory() -> bool:
    """Whether CuPy compiles in memory, without its kernel cache."""
    return os.environ.get(IN_MEMORY) == "1"


@contextmanager
def without_disk_cache(obstacle: str) -> Iterator[None]:
    """Let CuPy compile in memory from now on, unless what is done first fails, too."""
    before = os.environ.get(IN_MEMORY)
    os.environ[IN_MEMORY] = "1"
    try:
        yield
    except BaseException:
        _restore(IN_MEMORY, before)
        raise
    if before != "1":
        warnings.warn(
            f"CuPy's kernel cache {cache_folder()!r} cannot be used ({obstacle}): kernels are compiled anew in every "
            f"process. Set {CACHE_DIR} to a folder that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )


def _restore(variable: str, value: str | None) -> None:
    """Give an environment variable the value that it had."""
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value


@cache
def _make_cache_folder() -> None:
    """Make CuPy's cache folder; where it cannot be written, compile in memory, and import CuPy without the folder."""
    with _lock:
        obstacle = cache_obstacle()
        if obstacle is None:
            return
        with without_disk_cache(obstacle):
            if not os.path.isdir(cache_folder()):
                _import_with_temporary_folder()


def _import_with_temporary_folder() -> None:
    """Import CuPy with a folder that is there for that moment: it is not used in memory."""
    before = os.environ.get(CACHE_DIR)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE_DIR] = folder
        try:
            import cupy  # noqa: F401
        finally:
            _restore(CACHE_DIR, before)
