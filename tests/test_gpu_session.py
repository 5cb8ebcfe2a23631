# SPDX-License-Identifier: Apache-2.0
"""`scripts/test-gpu` without a GPU: an emulated device runs every kernel, stand-ins the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from shutil import which

import pytest
import torch

from tests.conftest import why_no_gpu
from tests.gpu import every_kernel, session
from tests.processes import ROOT


def test_the_small_run_launches_every_kernel_that_exists(idle_device, monkeypatch):
    """Nothing is computed here, so nothing is compared: the emulator's own tests do that."""
    for name in ("check_against_reference", "check_forward", "check_backward"):
        monkeypatch.setattr(every_kernel, name, lambda *_: None)
    in_sources = every_kernel.in_sources()
    assert len(in_sources) >= 13
    assert every_kernel.run_every_kernel(torch.device("cpu")) == in_sources


def test_without_a_gpu_nothing_runs_and_the_reason_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(session, "why_no_gpu", lambda: "needs a CUDA device")
    monkeypatch.setattr(session, "perform", lambda _: 1 / 0)
    with pytest.raises(SystemExit) as ended:
        session.main(["--report", str(tmp_path / "report")])
    assert ended.value.code == 2
    assert "no GPU that torch and CuPy can use: needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


STAND_IN = """#!/bin/sh
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"
[ "$2" != racecheck ] || exit 1
"""


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    """A machine with a device, whose test runner is a stand-in; returns the report of a session and its exit status."""
    runner = tmp_path / "python"
    runner.write_text("#!/bin/sh\necho ran $*\nexit 0\n")
    runner.chmod(0o755)
    monkeypatch.setattr(session, "why_no_gpu", lambda: None)
    monkeypatch.setattr(session.sys, "executable", str(runner))
    monkeypatch.setattr(session.report, "environment", lambda: [("GPU 0", "a device"), ("", "")])
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    # Not of this machine.
    monkeypatch.setattr(session.shutil, "which", lambda name, path: which(name, path=str(tmp_path)))

    def run(*arguments):
        file = tmp_path / "report.txt"
        status = session.main(["--report", str(file), *arguments])
        return status, file.read_text()

    return run


def test_a_session_reports_device_versions_and_what_failed(on_a_gpu, tmp_path):
    stand_in = tmp_path / "compute-sanitizer"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    status, said = on_a_gpu("-k", "edge")
    assert status == 1
    assert re.search(r"^GPU 0 +a device$", said, re.MULTILINE)
    assert re.search(r"commit \w+", said)
    assert re.search(r"^ran -m pytest -m gpu -p no:benchmark .*-k edge$", said, re.MULTILINE)
    verdicts = dict(
        re.findall(r"^(\S.*?) +(passed|NOT RUN|FAILED, exit status 1) \(", said, re.MULTILINE)
    )
    assert verdicts == {
        "tests marked gpu": "passed",
        "memcheck": "passed",
        "racecheck": "FAILED, exit status 1",
        "initcheck": "passed",
        "synccheck": "passed",
    }
    command = r"^1 --tool initcheck --error-exitcode 1 \S+ -m tests\.gpu\.every_kernel$"
    assert re.search(command, said, re.MULTILINE)


def test_without_the_sanitizer_the_tests_run_and_the_session_fails(on_a_gpu):
    status, said = on_a_gpu()
    assert status == 1
    assert "tests marked gpu passed" in said
    assert len(re.findall("NOT RUN", said)) == 4
    assert "compute-sanitizer must be on PATH or in CUDA_HOME/bin" in said


def test_the_script_says_what_is_missing():
    pytest.importorskip("torch")
    if why_no_gpu() is None:
        pytest.skip("a machine with a GPU runs the whole session")
    finished = subprocess.run(
        [ROOT / "scripts" / "test-gpu"], env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 2
    assert "scripts/test-gpu: no GPU that torch and CuPy can use: needs" in finished.stderr
