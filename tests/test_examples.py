# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand: scripts, the notebook's cells and the README's blocks."""

import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cupy_msda import ms_deform_attn
from tests.integrations import hugging_face

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SAYS = {
    "deformable_detr_fork.py": (
        r"output \(2, 300, 256\) gradient of value \(2, 5440, 8, 32\)\n"
        r"a training step on \w+: [\d.]+ ms before, [\d.]+ ms after\n$"
    ),
    "huggingface.py": r"before: \d+ ms a training step on \w+\nafter: \d+ ms.*\n.* \de-0[5-9]\n",
    "numpy_arrays.py": r"output \(1, 100, 256\) float32\n(gradient of \w+ \(.*\) float32\n){3}",
    "rfdetr_model.py": (
        r"inference before: \d+ ms on \w+\ninference after: \d+ ms.*\n.* \de-0[5-9]\n"
        r"training_step before: \d+ ms on \w+\ntraining_step after: \d+ ms.*\n.* \de-0[5-9]\n$"
    ),
    "serving.py": r"output \(1, 300, 256\) on \w+\nfirst request [\d.]+ ms, median of the others [\d.]+ ms\n$",
    "torch_training.py": r"mean loss on \w+: 0\.\d+ in the first ten steps, 0\.0\d+ in the last ten",
    "train_detector.py": (
        r"[\d.]+ steps per second on \w+\n"
        r"mean loss [\d.]+ in the first 10 steps, [\d.]+ in the last 10: lower by a factor of [\d.]+\n"
        r"average precision at IoU 0.5 on 500 fresh pictures: 0\.\d+, "
        r"of rectangle 0\.\d+, ellipse 0\.\d+, triangle 0\.\d+\nwrote loss.png\n$"
    ),
}
ARGUMENTS = {"train_detector.py": ["--steps", "60"]}


def test_every_script_is_run():
    assert {file.name for file in EXAMPLES.glob("*.py")} == SAYS.keys()


@pytest.mark.parametrize("script", SAYS)
def test_script(script, tmp_path):
    if script == "huggingface.py" and (reason := hugging_face.why_not()):
        pytest.skip(reason)
    if script == "rfdetr_model.py":
        pytest.importorskip("rfdetr", reason="rfdetr is not installed")
    if script == "train_detector.py":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    finished = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / script, *ARGUMENTS.get(script, [])],
        cwd=tmp_path,
        # Beside other tests a thread for each core is slower: threads spin while they wait for one without a core.
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert re.match(SAYS[script], finished.stdout), finished.stdout
    if script == "train_detector.py":
        assert float(re.search(r"factor of ([\d.]+)", finished.stdout)[1]) > 1.4
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def detector():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "train_detector.py")))


def test_detector_refuses_too_few_steps(detector, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_detector.py", "--steps", "9"])
    with pytest.raises(SystemExit, match="2"):
        detector.main()
    assert capsys.readouterr().err.endswith("error: --steps must be at least 10, got 9\n")


def test_detector_boxes_fit_the_shapes(detector):
    scenes = detector.make_scenes(40, torch.Generator().manual_seed(0))
    bright = scenes.pictures.amin(1).cpu() >= 0.4  # N, H, W; the noise alone is below 0.3
    for picture, boxes, present in zip(bright, scenes.boxes.cpu(), scenes.present, strict=True):
        begin, end = (64 * corner for corner in detector.corners(boxes[present.cpu()]))
        covered = torch.zeros_like(picture)
        for (left, top), (right, bottom) in zip(begin.tolist(), end.tolist(), strict=True):
            rows, columns = slice(round(top), round(bottom)), slice(round(left), round(right))
            assert not covered[rows, columns].any()
            covered[rows, columns] = True
            y, x = picture[rows, columns].nonzero(as_tuple=True)
            # A row or column of an ellipse or of a triangle's tip can fall between the pixels' centres.
            assert (bottom - top) - (y.max() - y.min() + 1) < 4
            assert (right - left) - (x.max() - x.min() + 1) < 4
        assert not picture[~covered].any()


def test_detector_ious(detector):
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.7, 0.5, 0.4, 0.4], [0.1, 0.1, 0.2, 0.2]]])
    overlap, generalised = detector.box_ious(boxes, boxes)
    torch.testing.assert_close(overlap[0, 0], torch.tensor([1, 1 / 3, 0]))
    # The hull of the first and the last has an area of 0.49, they have 0.2 of it.
    torch.testing.assert_close(generalised[0, 0], torch.tensor([1, 1 / 3, -0.29 / 0.49]))


def test_detector_matches_at_the_least_cost(detector):
    generator = torch.Generator().manual_seed(0)
    cost = torch.randn(20, 8, 3, generator=generator, dtype=torch.float64)
    present = torch.arange(3) < torch.randint(1, 4, (20, 1), generator=generator)
    chosen = detector.match(cost.to(detector.DEVICE), present.to(detector.DEVICE)).tolist()
    for costs, queries, count in zip(cost.tolist(), chosen, present.sum(1).tolist(), strict=True):
        assert len(set(queries)) == 3
        totals = [
            sum(costs[query][thing] for thing, query in enumerate(assignment))
            for assignment in itertools.permutations(range(8), count)
        ]
        got = sum(costs[query][thing] for thing, query in enumerate(queries[:count]))
        assert got == min(totals)


def test_detector_average_precision(detector):
    # Two pictures with three objects; a fourth is of another class. By falling score: the detection of an object, a
    # second one of it, one of another object, one of the other class, and one whose box is off.
    wanted = torch.tensor([[True, False], [True, True]])
    scores = torch.tensor([[0.9, 0.8, 0.6], [0.7, 0.5, 0.1]])
    ious = torch.zeros(2, 3, 2)
    ious[0, 0, 0] = ious[0, 1, 0] = ious[1, 0, 1] = ious[0, 2, 1] = 0.75
    ious[1, 1, 0] = 0.49
    # Recall rises to 1/3 at a precision of 1, and to 2/3 at 2 of 3.
    assert detector.average_precision(scores, ious, wanted) == pytest.approx((1 + 2 / 3) / 3)
    ious[1, 1, 0] = 0.5  # found, as the fifth
    assert detector.average_precision(scores, ious, wanted) == pytest.approx(
        (1 + 2 / 3 + 3 / 5) / 3
    )
    # A later hit at a higher precision counts for the recall before it.
    scores = torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.7, 0.6]])
    ious[:] = 0
    ious[1, 0, 0] = ious[1, 1, 1] = 1
    assert detector.average_precision(scores, ious, wanted) == pytest.approx((2 / 3 + 2 / 3) / 3)


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
    namespace = {"torch": torch}
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
