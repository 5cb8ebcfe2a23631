# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, what they write is what they say, and the documents say what the result files do."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {"README.md": 3, "docs/performance.md": 3, "benchmarks/README.md": 2}  # tables at least


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


@pytest.mark.parametrize("device", ["none", "cpu"])
def test_overhead_stands_beside_bare_calls(device, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if device == "none":
        pytest.importorskip("cupy", reason="goes the way of CUDA tensors, through CuPy")
        if torch.version.cuda and not torch.cuda.is_available():
            pytest.skip("a torch that is built for CUDA has no current stream without a driver")
    arguments = ("--device", device, "--rounds", "2")
    printed, written = run("overhead.py", *arguments, output=tmp_path / "overhead.json")
    times = written["microseconds"]
    for way, bare in (("forward", "operator"), ("forward+backward", "Function")):
        for form in ("tensors", "integers"):
            ours, least = times[f"{way}, {form}, cupy_msda"], times[f"{way}, {form}, {bare}"]
            assert ours > 0 < least
            assert written["ratios"][f"{way}, {form}"] == pytest.approx(ours / least)
        assert times[f"{way}, integers, grid_sample"] > 0
        assert f"{way}, integers, cupy_msda" in printed
    assert ("check" in times) == (device == "none")


def test_fused_calls_stand_beside_what_they_replace(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    arguments = ("--device", "cpu", "--seconds", "0.1", "--cases", "dfine-decoder")
    printed, written = run("fused.py", *arguments, output=tmp_path / "fused.json")
    case = written["cases"]["dfine-decoder"]
    names = {"fused", "torch, then cupy_msda", "fused, padded"}
    assert set(case["microseconds"]) == names
    assert set(case["peak_bytes"]) == names - {"fused, padded"}
    for name, of_ways in case["microseconds"].items():
        assert set(of_ways) == {"forward", "forward+backward"}
        assert min(of_ways.values()) > 0
        assert name in printed


@pytest.fixture(scope="module")
def readme_tables():
    """The script, as a module."""
    path = ROOT / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def between_markers(text: str) -> list[str]:
    return re.findall(r"<!-- table: .*? -->\n(.*?)<!-- end of table -->", text, re.DOTALL)


@pytest.mark.parametrize(("document", "least"), DOCUMENTS.items())
def test_tables_are_those_of_the_result_files(document, least, readme_tables):
    assert document in readme_tables.DOCUMENTS
    text = (ROOT / document).read_text(encoding="utf-8")
    tables = between_markers(text)
    assert len(tables) >= least
    assert readme_tables.updated(text) == text
    changed = text
    for table in tables:
        changed = changed.replace(table, re.sub(r"\d", "9", table))
    assert changed != text
    assert readme_tables.updated(changed) == text


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 150
    for table in between_markers(text):
        rows = [line for line in table.splitlines() if line.startswith("| ")]
        assert 2 < len(rows) <= 2 + 8


def result_row(implementation, time, verdict="right", **more):
    names = {"case": "shape", "distribution": "uniform", "dtype": "float32", "way": "forward"}
    return names | {"implementation": implementation, "verdict": verdict, **more}


def test_kernels_of_a_call_are_added_and_wrong_results_not_compared(readme_tables):
    terms = {"memory": 0.002, "gather": 0.004, "launch": 0.5}
    rows = [result_row("cupy_msda", 1.0, roofline_terms_ms=terms)]
    rows += [result_row("deformops", 1.0, "wrong"), result_row("torch-ms-deform-attn", 1.0)]
    profile = {
        "shape, uniform, float32 | ours | forward": [["fill", 5, 2.0], ["kernel", 5, 6.0]],
        "shape, uniform, float32 | deformops | forward": [["kernel", 5, 1.0]],
        "shape, uniform, float32 | original | forward": [["copy", 10, 4.0], ["kernel", 5, 12.0]],
    }
    machine = {"device": "Some GPU", "driver": "580", "versions": {"torch": "2.11"}}
    results = {"machine": machine, "date": "2026-11-27", "commit": "f604db1"}
    written = readme_tables.gpu_kernels(results | {"rows": rows, "kernels_us": profile})
    assert (
        written.splitlines()[0] == "Some GPU, driver 580, torch 2.11; 2026-11-27, commit f604db1."
    )
    ours = "| shape, uniform, float32 | forward | 8.00 | 4.00, 50% |"
    assert written.splitlines()[-1] == f"{ours}  |  | wrong | 16.0, 2.0x |"


def test_every_row_of_the_gpu_has_its_kernels(readme_tables):
    results = json.loads((ROOT / "benchmarks" / "results" / "h200-f604db1.json").read_text())
    found = readme_tables.cases(results)
    rows = [row for ways in found.values() for way in ways.values() for row in way.values()]
    assert len(rows) == len(results["rows"]) == len(results["kernels_us"])
    assert all(row["kernels_us"] > 0 for row in rows)
