# SPDX-License-Identifier: Apache-2.0
"""What an import costs and what the package needs: nothing heavy until it is used."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import cupy_msda

PACKAGE = Path(cupy_msda.__file__).parent
# report.py, demo.py and bench are commands: they say what is installed, draw and measure.
MAY_IMPORT = {
    "torch": {
        "torch",
        "distributed.py",
        "modules.py",
        "report.py",
        "demo.py",
        "bench",
        "integrations",
    },
    "cupy": {"cuda", "report.py", "bench"},
    "numba": {"cpu"},
    "llvmlite": {"cpu"},
    "matplotlib": {"demo.py", "bench"},
    "PIL": {"demo.py"},
}
HEAVY = [*MAY_IMPORT, "cupy_backends"]


def run(code: str, *absent: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, in which some modules cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({list(absent)}))\n"
    command = [sys.executable, "-W", "error", "-c", hide + textwrap.dedent(code)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=120
    )


def output(code: str, *absent: str) -> str:
    finished = run(code, *absent)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def imported_modules(file: Path):
    """Top-level names of all that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", ""))
            in ("import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value.partition(".")[0]


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_only_its_own_files_import_a_library(module):
    importers = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if module in imported_modules(file)
    }
    assert importers <= MAY_IMPORT[module]


@pytest.mark.parametrize(
    "name", ["cupy_msda", "cupy_msda.api", "cupy_msda.cuda.compile", "cupy_msda.cuda.launch"]
)
def test_import_loads_nothing_heavy(name):
    loaded = output(f"import {name}, sys; print(*sorted(sys.modules.keys() & set({HEAVY})))")
    assert loaded == ""


def test_host_arrays_of_numpy_need_neither_torch_nor_cupy():
    loaded = output(
        f"""
        import sys
        import numpy as np
        from cupy_msda import ms_deform_attn
        value, locations = np.ones((1, 6, 1, 4), np.float32), np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
        ms_deform_attn(value, [(2, 3)], None, locations, np.ones((1, 1, 1, 1, 1), np.float32))
        print(*sorted(sys.modules.keys() & set({HEAVY})))
        """
    )
    assert set(loaded.split()) <= {"numba", "llvmlite"}


def test_every_public_name_resolves():
    assert set(cupy_msda.__all__) <= set(dir(cupy_msda))
    for name in cupy_msda.__all__:
        value = getattr(cupy_msda, name)
        assert value.__doc__, name
        assert value.__name__ == name


def test_lazy_names_are_the_public_ones():
    assert sorted(cupy_msda._HOMES) == sorted(cupy_msda.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match=r"module 'cupy_msda' has no attribute 'ms_deform'"):
        cupy_msda.ms_deform  # noqa: B018


SMALL_CALL = """
    import numpy as np
    from cupy_msda import ms_deform_attn, ms_deform_attn_backward
    value = np.arange(24, dtype=np.float32).reshape(1, 6, 1, 4)
    locations = np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
    weights = np.full((1, 1, 1, 1, 1), 2, np.float32)
    out = ms_deform_attn(value, [(2, 3)], None, locations, weights)
    grads = ms_deform_attn_backward(np.ones_like(out), value, [(2, 3)], None, locations, weights)
    print(out.ravel().tolist(), float(grads.value.sum()))
"""
# The centre of a 2 x 3 level is halfway between rows 1 and 4 of value, which start at 4 and 16.
SMALL_RESULT = "[20.0, 22.0, 24.0, 26.0] 8.0"


@pytest.mark.parametrize(
    "absent",
    [(), ("numba",), ("torch",), ("cupy",), ("torch", "cupy", "numba", "matplotlib", "PIL")],
)
def test_numpy_arrays_run_whatever_is_absent(absent):
    assert output(SMALL_CALL, *absent) == SMALL_RESULT


def test_without_numba_the_reference_runs():
    code = "from cupy_msda.cpu import backend as host; print(host.backend().__name__)"
    assert output(code, "numba") == "cupy_msda.reference"
    assert output(code) == "cupy_msda.cpu.kernels"


@pytest.mark.parametrize(
    "name",
    ["MSDeformAttn", "MSDeformAttnFunction", "decompositions", "ms_deform_attn_core_pytorch"],
)
def test_names_that_need_torch_say_so(name):
    finished = run(f"from cupy_msda import {name}", "torch")
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("ModuleNotFoundError: ")
    assert 'pip install "cupy-msda[torch]"' in finished.stderr


def test_names_that_need_no_torch_resolve_without_it():
    names = "ms_deform_attn, ms_deform_attn_backward, MSDeformAttnGradients, KernelCompileError"
    assert output(f"from cupy_msda import {names}; print('fine')", "torch", "cupy") == "fine"


def test_cuda_array_without_cupy_says_what_to_install():
    code = """
        from cupy_msda.cuda.launch import require_cupy
        require_cupy()
    """
    finished = run(code, "cupy")
    assert finished.returncode == 1
    assert 'pip install "cupy-msda[cuda12x]"' in finished.stderr
