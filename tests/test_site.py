# SPDX-License-Identifier: Apache-2.0
"""The site is built without a warning, and has what the package offers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cupy_msda

pytest.importorskip("mkdocs", reason="mkdocs is not installed")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    finished = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


def test_every_page_of_the_navigation_is_there(site):
    pages = re.findall(r": (\S+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(pages) >= 14
    for page in pages:
        name = re.sub(r"(^|/)(index|README)$", "", page)
        assert (site / name / "index.html").is_file(), page


def test_the_api_page_has_every_public_name(site):
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    documented = set(re.findall(r'<h3 id="cupy_msda\.[\w.]*?(\w+)"', text))
    assert set(cupy_msda.__all__) <= documented


def test_the_start_page_shows_its_picture(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'<img alt="[^"]+" src="([^"]+)"', text)
    assert sources
    assert all((site / source).is_file() for source in sources)


def test_the_tutorial_has_the_cells_of_the_notebook(site):
    text = (site / "tutorial" / "index.html").read_text(encoding="utf-8")
    assert "Multi-scale deformable attention in five steps" in text
    assert text.count('class="highlight"') >= 5
