# SPDX-License-Identifier: Apache-2.0
"""python -m cupy_msda run: a program behaves as without it, and finds the replaced functions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cupy_msda import __main__
from cupy_msda.integrations import deformable_detr, names, ports
from tests.processes import ROOT

# All that a program can see of how it was started; argv[0] apart, since -m makes it a path.
LOOK = """
import atexit, json, pickle, sys
class Here:
    pass
def later():
    print("later", type(pickle.loads(pickle.dumps(Here()))).__module__)
atexit.register(later)
main = sys.modules["__main__"]
print(json.dumps([sys.argv, __name__, __file__, sys.path[0], main.__dict__ is globals()]))
print(__package__, __spec__ and __spec__.name, __builtins__.__class__, __annotations__ is not None)
x: int = 1
print(sys.stdout.errors, "MPLBACKEND" in __import__("os").environ)
"""
EXTENSION = "MultiScaleDeformableAttention"
IMPORT = f"import {EXTENSION} as MSDA\nprint(MSDA.ms_deform_attn_forward.__module__)\n"


def python(*arguments, cwd) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    environment.pop("MPLBACKEND", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def run(*arguments, cwd) -> subprocess.CompletedProcess[str]:
    return python("-m", "cupy_msda", "run", "--patch", "deformable_detr", *arguments, cwd=cwd)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A script in a folder of its own, a module and a package."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("")
    (tmp_path / "scripts" / "script.py").write_text(f"import beside\n{LOOK}")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(f"from . import __name__ as own\n{LOOK}")
    (tmp_path / "module.py").write_text(LOOK)
    return tmp_path


@pytest.mark.parametrize(
    "program",
    [["scripts/script.py"], ["-m", "module"], ["-m", "package"], ["-m", "package.__main__"]],
)
def test_a_program_sees_what_it_sees_without(program, folder):
    arguments = [*program, "-h", "--patch", "x", "--", "-m", "a b"]
    expected = python(*arguments, cwd=folder)
    assert expected.returncode == 0, expected.stderr
    assert "later __main__" in expected.stdout
    finished = run(*arguments, cwd=folder)
    assert (finished.returncode, finished.stdout) == (0, expected.stdout), finished.stderr


ENDS = {
    "exit 7": "raise SystemExit(7)",
    "error": "1 / 0",
    "pipe": "raise BrokenPipeError('theirs')",
    # Where the tests run in the background of a shell, they have inherited that interrupts are ignored.
    "interrupt": "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "os.kill(os.getpid(), signal.SIGINT)",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_it_ends_without(end, tmp_path):
    (tmp_path / "script.py").write_text(ENDS[end])
    expected, finished = python("script.py", cwd=tmp_path), run("script.py", cwd=tmp_path)
    assert finished.returncode == expected.returncode != 0
    assert finished.stderr.splitlines()[1:][-1:] == expected.stderr.splitlines()[-1:]


@pytest.mark.parametrize("program", [["script.py"], ["-m", "script"]])
def test_a_program_finds_the_replaced_extension(program, tmp_path):
    (tmp_path / "script.py").write_text(IMPORT)
    assert "No module named" in python("script.py", cwd=tmp_path).stderr
    finished = run(*program, cwd=tmp_path)
    assert finished.stdout == "cupy_msda.integrations.deformable_detr\n", finished.stderr
    assert "stands for the extension MultiScaleDeformableAttention" in finished.stderr


def test_the_extension_may_have_another_name(tmp_path):
    (tmp_path / "script.py").write_text("import package\nprint(package._C.__name__)\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    command = ("-m", "cupy_msda", "run", "--patch", "deformable_detr=package._C", "script.py")
    assert python(*command, cwd=tmp_path).stdout == "cupy_msda.integrations.deformable_detr\n"


STAND_IN = "def deformable_attention_core_func_v2():\n    pass\n"


@pytest.mark.parametrize("patches", ["dfine_seg", "ports"])
def test_a_package_is_patched_by_its_name(patches, tmp_path):
    """Where the package of a port is installed, here a stand-in."""
    inside = tmp_path / "dfine_seg" / "model" / "arch"
    inside.mkdir(parents=True)
    (tmp_path / "dfine_seg" / "__init__.py").write_text("")
    (inside / "utils.py").write_text(STAND_IN)
    name = "deformable_attention_core_func_v2"
    (tmp_path / "script.py").write_text(
        f"from dfine_seg.model.arch.utils import {name}\nprint({name}.__code__.co_filename)\n"
    )
    command = ("-m", "cupy_msda", "run", "--patch", patches, "script.py")
    finished = python(*command, cwd=tmp_path)
    assert finished.stdout.endswith("integrations/forms.py\n"), finished.stderr
    assert f"<Patch of dfine_seg.model.arch.utils.{name}>" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["--patch", "mmvc", "script.py"],
            2,
            "--patch must name some of deformable_detr, .*, got 'mmvc'",
        ),
        (["no_such.py"], 2, ".*No such file or directory: '.*no_such.py'"),
        (["-m", "no_such"], 1, "-m must name a module or a package with a __main__, got no_such"),
        (["-m", "email"], 1, "-m must name a module or a package with a __main__, got email"),
        (["-m", "no.such"], 1, "No module named 'no'"),
        (
            ["--patch", "groundingdino", "script.py"],
            1,
            "cannot patch groundingdino: ModuleNotFoundError: one of",
        ),
    ],
)
def test_what_cannot_run_is_named(arguments, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv.copy())
    monkeypatch.setitem(sys.modules, EXTENSION, deformable_detr)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "script.py").write_text("")
    start = [] if "--patch" in arguments else ["--patch", "deformable_detr"]
    with pytest.raises(SystemExit) as end:
        __main__.main(["run", *start, *arguments])
    assert end.value.code == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(f"python -m cupy_msda run: {message}.*", last), last


def test_without_names_what_cannot_be_patched_is_passed_over(tmp_path, monkeypatch, capsys):
    """Of all that is installed, here a stand-in that does not import."""
    (tmp_path / "broken_package.py").write_text("raise OSError('no library')")
    (tmp_path / "script.py").write_text("print('ran')")
    monkeypatch.setattr(names, "installed", lambda: ["broken_package"])
    monkeypatch.setattr(names, "integration_of", lambda: {"broken_package": ports})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv.copy())
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setitem(sys.modules, EXTENSION, deformable_detr)
    with pytest.raises(SystemExit) as end:
        __main__.main(["run", str(tmp_path / "script.py")])
    assert end.value.code == 0
    said = capsys.readouterr()
    assert said.out == "ran\n"
    assert "run: broken_package: not patched: OSError: no library" in said.err
