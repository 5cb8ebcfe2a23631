# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand: scripts, the notebook's cells and the README's blocks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cupy_msda import ms_deform_attn
from tests.integrations import hugging_face

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SAYS = {
    "deformable_detr_fork.py": r"output \(2, 50, 256\) gradient of value \(2, 750, 8, 32\)",
    "huggingface.py": r"before: \d+ ms a training step on \w+\nafter: \d+ ms.*\n.* \de-0[5-9]\n",
    "numpy_arrays.py": r"output \(1, 100, 256\) float32\n(gradient of \w+ \(.*\) float32\n){3}",
    "serving.py": r"output \(1, 300, 256\) on \w+\nfirst request [\d.]+ ms, median of the others [\d.]+ ms\n$",
    "torch_training.py": r"mean loss on \w+: 0\.\d+ in the first ten steps, 0\.0\d+ in the last ten",
}


def test_every_script_is_run():
    assert {file.name for file in EXAMPLES.glob("*.py")} == SAYS.keys()


@pytest.mark.parametrize("script", SAYS)
def test_script(script, tmp_path):
    if script == "huggingface.py" and (reason := hugging_face.why_not()):
        pytest.skip(reason)
    finished = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / script],
        cwd=tmp_path,
        # One thread: several that wait for a busy machine's cores cost a model of many small calls minutes.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert re.match(SAYS[script], finished.stdout), finished.stdout


def test_notebook_cells():
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    namespace = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        assert cell["outputs"] == []
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    assert namespace["attended"].shape == (1, 10, 64)


def readme_blocks() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_readme_example(capsys):
    exec(readme_blocks()[0], {})
    sizes = (
        "torch.Size([2, 300, 256]) torch.Size([2, 5376, 8, 32]) torch.Size([2, 300, 8, 3, 4, 2])\n"
    )
    assert capsys.readouterr().out == sizes


def test_readme_equivalent():
    namespace = {}
    exec(readme_blocks()[1], namespace)
    generator = torch.Generator().manual_seed(0)
    levels, starts = [(5, 7), (3, 4)], [0, 35]
    value = torch.randn(2, 47, 3, 6, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 9, 3, 2, 4, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, 9, 3, 2, 4, generator=generator, dtype=torch.float64)
    arguments = (value, levels, starts, locations, weights)
    torch.testing.assert_close(
        ms_deform_attn(*arguments), namespace["equivalent"](*arguments), rtol=1e-12, atol=1e-12
    )
