# SPDX-License-Identifier: Apache-2.0
"""A kernel that cannot be compiled or kept: CuPy's cache on disk, NVRTC, an interrupt; by CuPy, without a device."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cupy_msda.cuda import compile as compiler
from cupy_msda.cuda.importing import CACHE_DIR, IN_MEMORY
from tests.processes import run

pytest.importorskip("cupy", reason="needs CuPy for its cache and its binding of NVRTC")

PROGRAM = """
import hashlib, os, sys
from pathlib import Path
from cupy_msda.cuda import compile as compiler
from cupy_msda.cuda.importing import in_memory
from tests.compiling import ROUND, without_device
from tests.processes import in_processes
compiled = without_device()
folder = Path(os.environ["CUPY_CACHE_DIR"])
def is_whole(file):
    data = file.read_bytes()  # CuPy's hash of the rest comes first
    return hashlib.sha1(data[40:]).hexdigest().encode() == data[:40]
def load():
    compiler._functions.clear()
    name, code = compiler.load(ROUND, 0)
    assert "msda_round" in name and code[:4] == b"\\x7fELF"
"""


def python(program: str, folder: Path | str) -> str:
    """What a process prints on stderr in which any warning but that of the cache is an error."""
    finished = run(PROGRAM + program, "-W", "error", "-W", "always::RuntimeWarning",
                   **{CACHE_DIR: str(folder), IN_MEMORY: ""})  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the eight processes")
def test_eight_processes_that_compile_at_once_share_a_cache(tmp_path: Path) -> None:
    program = """
in_processes(load)
(file,) = folder.iterdir()  # and nothing half written
assert is_whole(file)
def again():
    load()
    # CuPy before 14.2 compiles kernels of templates in every process.
    from cupy.cuda import compiler as cupys
    assert not compiled or not hasattr(cupys, "_decode_cache_payload"), compiled
in_processes(again)
assert [is_whole(path) for path in folder.iterdir()] == [True]
"""
    assert python(program, tmp_path) == ""


@pytest.mark.parametrize(
    "damage",
    ["data[:0]", "data[:30]", "data[:-1]", "bytes(len(data))", "data[:900] + b'x' + data[901:]"],
)
def test_a_damaged_cache_is_replaced(damage: str, tmp_path: Path) -> None:
    program = f"""
load()
(file,) = folder.iterdir()
data = file.read_bytes()
file.write_bytes({damage})
assert not is_whole(file)
load()
assert is_whole(file) and compiled == [ROUND.name] * 2
"""
    assert python(program, tmp_path) == ""


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
"""
UNREADABLE = """
load()
(file,) = folder.iterdir()
file.unlink()
file.mkdir()
compiled.clear()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits and /proc")
@pytest.mark.parametrize(
    ("before", "folder"),
    # Not even root can make a file in /proc.
    [(FULL, None), (UNREADABLE, None), ("", "/proc/self/task")],
    ids=["full", "unreadable", "read-only"],
)
def test_a_cache_that_cannot_be_used_costs_one_warning(
    before: str, folder: str | None, tmp_path: Path
) -> None:
    where = folder or str(tmp_path)
    said = python(before + "load(), load()\nassert compiled and in_memory()", where)
    assert said.count("RuntimeWarning") == 1
    assert f"kernel cache '{where}' cannot be used" in said
    assert f"Set {CACHE_DIR} to a folder" in said


def test_a_missing_compiler_is_named_with_its_remedy_and_may_come_later(tmp_path: Path) -> None:
    program = """
import cupy
get_version = cupy.cuda.nvrtc.getVersion
def missing():
    raise RuntimeError("failed to load") from OSError("libnvrtc.so.12: cannot open shared object file")
cupy.cuda.nvrtc.getVersion = missing
try:
    load()
except compiler.KernelCompileError as error:
    text = "CuPy must load the compiler NVRTC, and did not (OSError: libnvrtc.so.12: cannot open"
    assert str(error).startswith(text) and 'pip install "cupy-msda[cuda12x]"' in str(error)
cupy.cuda.nvrtc.getVersion = get_version
load()
"""
    assert python(program, tmp_path) == ""


# --- failures midway -------------------------------------------------------------------------------


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """CuPy whose next compilations raise what is in `failures`."""
    monkeypatch.setenv(CACHE_DIR, str(tmp_path))
    monkeypatch.delenv(IN_MEMORY, raising=False)
    monkeypatch.setattr(compiler, "_functions", {})
    device = SimpleNamespace(compute_capability="90")
    cuda = SimpleNamespace(Device=lambda: device, nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)))
    fake = SimpleNamespace(cuda=cuda, failures=[], modes=[])

    def raw_module(**_: object) -> SimpleNamespace:
        fake.modes.append(os.environ.get(IN_MEMORY))
        if fake.failures:
            raise fake.failures.pop()
        return SimpleNamespace(get_function=lambda name: name)

    fake.RawModule = raw_module
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


KERNEL = compiler.Kernel("round.cu", "some_kernel")


def test_after_a_compiler_that_failed_the_next_call_compiles(cupy: SimpleNamespace) -> None:
    cupy.failures = [RuntimeError("NVRTC_ERROR_OUT_OF_MEMORY")] * 2
    with pytest.raises(compiler.KernelCompileError, match="NVRTC_ERROR_OUT_OF_MEMORY"):
        compiler.load(KERNEL, 0)
    assert compiler.load(KERNEL, 0) == KERNEL.name
    assert cupy.modes == [None, "1", None]  # the cache is still used


@pytest.mark.parametrize("before", [[], [OSError("disk full")]], ids=["", "in memory"])
def test_an_interrupt_passes_and_the_next_call_compiles(
    before: list[Exception], cupy: SimpleNamespace
) -> None:
    """Also while the kernel is compiled again without the cache: nobody has been warned, so nothing may stay."""
    cupy.failures = [KeyboardInterrupt(), *before]
    with pytest.raises(KeyboardInterrupt):
        compiler.load(KERNEL, 0)
    assert os.environ.get(IN_MEMORY) is None
    assert compiler.load(KERNEL, 0) == KERNEL.name
    assert len(cupy.modes) == len(before) + 2
