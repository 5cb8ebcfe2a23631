# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, and what they write is what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: str, output: Path):
    """Run a benchmark in its own process; what it printed and what it wrote."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    finished = subprocess.run(
        [*command, "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads(output.read_text())


def test_overhead_is_split_into_its_stages(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    arguments = ("--device", "cpu", "--rounds", "2")
    printed, written = run("overhead.py", *arguments, output=tmp_path / "overhead.json")
    for way in ("forward", "forward+backward"):
        times = written["microseconds"][way]
        stages = [times[stage] for stage in ("contract", "exchange", "launch", "dispatch")]
        assert sum(stages) == pytest.approx(times["whole"])
        assert min(stages[:3]) > 0
        assert times["grid_sample"] > 0
        peers = [
            time for name, time in times.items() if name in ("grid_sample", "torch-ms-deform-attn")
        ]
        assert times["above fastest peer"] == pytest.approx(
            times["contract"] + times["dispatch"] - min(peers)
        )
        assert f"{way}, microseconds" in printed
