# SPDX-License-Identifier: Apache-2.0
"""CuPy where it does not import, or where its kernel cache cannot be written: without a GPU, by processes and fakes."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
import warnings
from types import SimpleNamespace

import pytest

from cupy_msda import report
from cupy_msda.cuda import compile as compiler
from cupy_msda.cuda import importing
from tests.processes import run


@pytest.fixture
def no_folder(tmp_path):
    """A folder that nobody can make, not even root: it lies below a file."""
    file = tmp_path / "file"
    file.touch()
    return str(file / "folder")


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """CuPy's environment variables as they are without a user's: a cache in an empty folder."""
    monkeypatch.setenv(importing.CACHE_DIR, str(tmp_path / "cache"))
    monkeypatch.setenv(importing.IN_MEMORY, "")
    importing._make_cache_folder.cache_clear()
    yield monkeypatch
    importing._make_cache_folder.cache_clear()


# --- importing CuPy --------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HOME", importing.CACHE_DIR])
def test_cupy_imports_where_its_cache_cannot_be_made(variable, no_folder):
    pytest.importorskip("cupy", reason="imports CuPy")
    code = f"""
        import os
        from cupy_msda.cuda.importing import require_cupy
        for _ in range(2):
            assert require_cupy().cuda.compiler
        assert os.environ["{importing.IN_MEMORY}"] == "1"
        assert os.environ.get("{importing.CACHE_DIR}") in (None, {no_folder!r})
    """
    environment = {variable: no_folder}
    if variable == "HOME":
        environment = {"HOME": no_folder}
        code = f"import os; os.environ.pop({importing.CACHE_DIR!r}, None)\n" + textwrap.dedent(code)
    finished = run(code, **environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("RuntimeWarning") == 1
    assert no_folder in finished.stderr
    assert f"Set {importing.CACHE_DIR} to a folder" in finished.stderr


def test_the_report_where_the_cache_cannot_be_made(no_folder):
    pytest.importorskip("cupy", reason="imports CuPy")
    code = "import runpy; runpy.run_module('cupy_msda', run_name='__main__', alter_sys=True)"
    finished = run(code, "-W", "error", CUPY_CACHE_DIR=no_folder)
    assert finished.returncode == 0, finished.stderr
    lines = {line[:17].strip(): line[17:] for line in finished.stdout.splitlines()}
    assert re.search(
        r"cannot be written \(NotADirectoryError.*set CUPY_CACHE_DIR", lines["kernel cache"]
    )
    assert re.match(r"\d+\.\d+$", lines["nvrtc"])
    assert "NotADirectory" not in lines["CuPy arrays"]


BROKEN = {
    "shared library": (
        "raise ImportError('\\n====\\nFailed to import CuPy.\\n====') "
        "from ImportError('libcublas.so.12: cannot open shared object file')",
        r"\(ImportError: libcublas\.so\.12: cannot open shared object file\)",
    ),
    "library of ctypes": (
        "raise OSError('libnvrtc.so.12: cannot open')",
        r"\(OSError: libnvrtc\.so\.12: cannot open\)",
    ),
    "NumPy": (
        "raise AttributeError(\"module 'numpy' has no attribute 'byte_bounds'\")",
        r"\(AttributeError: module 'numpy' has no attribute 'byte_bounds'\)",
    ),
    "its own dependency": (
        "import no_such_fastrlock",
        r"\(ModuleNotFoundError: No module named 'no_such_fastrlock'\)",
    ),
    "nothing in it": ("", r"\(ImportError: \[.*\] holds no CuPy\)"),
    "no message": ("raise RuntimeError", r"\(RuntimeError: ?\)"),
}


@pytest.mark.parametrize(("source", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_cupy_that_does_not_import_is_told_with_its_cause(source, expected, tmp_path):
    package = tmp_path / "cupy"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from cupy_msda import report
        print(report.cupy_obstacle())
        print(dict(report.environment())["nvrtc"])
        from cupy_msda.cuda.importing import require_cupy
        require_cupy("12.8")
    """
    finished = run(code)
    assert finished.returncode == 1
    told, nvrtc = finished.stdout.splitlines()
    assert nvrtc == "unknown: CuPy does not import"
    error = finished.stderr.splitlines()[-1]
    assert error.startswith("ImportError: ")
    for text in (told, error):
        assert re.search(r"is installed and does not import " + expected, text)
        assert 'pip install --force-reinstall "cupy-msda[cuda' in text  # 12x or 13x, as torch is


def test_two_distributions_of_cupy_are_the_cause(monkeypatch):
    def distribution(name, version):
        return SimpleNamespace(metadata={"Name": name}, version=version)

    installed = [
        *(distribution(f"cupy-cuda{cuda}x", "14.2.0") for cuda in (13, 12)),
        *(distribution(name, "1") for name in ("numpy", "cupy-xarray", None)),
    ]
    monkeypatch.setattr(importing.metadata, "distributions", lambda: installed)
    monkeypatch.setattr(importing, "_make_cache_folder", lambda: 1 / 0)
    both = "cupy-cuda12x 14.2.0 and cupy-cuda13x 14.2.0"
    with pytest.raises(ImportError, match=both + ".*: uninstall all and install one"):
        importing.require_cupy()
    monkeypatch.setattr(report, "find_spec", lambda name: name == "cupy" or None)
    assert report._cupy_version().startswith(both)


# --- compiling -------------------------------------------------------------------------------------


class FakeCupy:
    """CuPy whose compiler uses a disk cache unless it is to compile in memory."""

    def __init__(self, of_disk: Exception | None, of_compiler: Exception | None = None, arch="90"):
        self.of_disk, self.of_compiler, self.compiled = of_disk, of_compiler, 0
        self.nvrtc_version = 12, 9
        nvrtc = SimpleNamespace(getVersion=lambda: self.nvrtc_version)
        device = SimpleNamespace(compute_capability=arch)
        self.cuda = SimpleNamespace(nvrtc=nvrtc, Device=lambda: device)

    def RawModule(self, **arguments):  # noqa: N802
        if self.of_compiler is not None:
            raise self.of_compiler
        self.compiled += 1
        if self.of_disk is not None and os.environ.get(importing.IN_MEMORY) != "1":
            raise self.of_disk
        return SimpleNamespace(get_function=lambda name: name)


def compiled(kernel_of: FakeCupy, settings, count: int = 1) -> list[str]:
    """Compile so many kernels."""
    settings.setitem(sys.modules, "cupy", kernel_of)
    names = [f"some<{time.monotonic_ns()}, {i}>" for i in range(count)]
    return [compiler.load(compiler.Kernel("forward.cu", name), 0) for name in names]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "/home/x/.cupy/kernel_cache/tmp"),
        OSError(28, "No space left on device"),
        OSError(30, "Read-only file system"),
        RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"),
    ],
    ids=["permission", "space", "read-only", "damaged"],
)
def test_a_cache_that_fails_costs_one_warning(error, settings):
    cupy = FakeCupy(error)
    with pytest.warns(RuntimeWarning) as warned:
        assert len(compiled(cupy, settings, 3)) == 3
    (warning,) = warned
    text = str(warning.message)
    assert importing.CACHE_DIR in text
    assert importing.cache_folder() in text
    assert str(error) in text
    assert cupy.compiled == 4


def test_a_folder_that_cannot_be_made_costs_one_warning(settings, no_folder):
    settings.setenv(importing.CACHE_DIR, no_folder)
    with pytest.warns(RuntimeWarning, match=importing.CACHE_DIR) as warned:
        assert len(compiled(FakeCupy(OSError()), settings, 2)) == 2
    assert len(warned) == 1


def test_a_folder_without_permission_is_known_beforehand(settings):
    """So that CuPy's own kernels, which copy arrays, do not fail either."""
    settings.setattr(os, "access", lambda *_: False)
    settings.setitem(sys.modules, "cupy", FakeCupy(None))
    with pytest.warns(RuntimeWarning, match="no permission to write"):
        importing.require_cupy()
    assert importing.in_memory()


def test_who_compiles_in_memory_is_not_warned(settings, no_folder):
    settings.setenv(importing.CACHE_DIR, no_folder)
    settings.setenv(importing.IN_MEMORY, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled(FakeCupy(OSError()), settings)


def test_what_the_compiler_refuses_is_no_fault_of_the_cache(settings):
    with pytest.raises(compiler.KernelCompileError, match="planted"):
        compiled(FakeCupy(None, RuntimeError("planted")), settings)
    assert not importing.in_memory()


# --- compute capabilities --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "cuda", "expected"),
    [
        ("61", 12, r"compute capability 7\.0 or later .*got 6\.1"),
        ("52", 13, r"compute capability 7\.0 or later .*got 5\.2"),
        ("70", 13, r'compiler of CUDA 13 .* 7\.5 or later, got 7\.0: pip install ".*cuda12x'),
        ("72", 13, r"7\.5 or later, got 7\.2"),
        *((arch, 12, None) for arch in ("70", "72", "75", "103", "121")),
        *((arch, 13, None) for arch in ("75", "90", "103", "121")),
    ],
)
def test_a_gpu_that_is_too_old_is_refused_before_compiling(arch, cuda, expected, settings):
    cupy = FakeCupy(None, arch=arch)
    cupy.nvrtc_version = cuda, 0
    if expected is None:
        assert compiled(cupy, settings)
    else:
        with pytest.raises(compiler.KernelCompileError, match=expected):
            compiled(cupy, settings)
        assert cupy.compiled == 0
    cupy.cuda.runtime = SimpleNamespace(getDeviceCount=lambda: 1)
    settings.setattr(report, "find_spec", lambda name: name == "cupy" or None)
    said = report.cupy_obstacle.__wrapped__()
    assert said is None if expected is None else re.search(expected, said)
