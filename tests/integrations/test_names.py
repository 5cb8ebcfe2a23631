# SPDX-License-Identifier: Apache-2.0
"""The report names the packages that can be patched, and what of them; they are stand-ins and not imported."""

from __future__ import annotations

import sys

import pytest

from cupy_msda import report
from cupy_msda.integrations import names

VERSION = "Metadata-Version: 2.1\nName: rf-detr\nVersion: 1.2\n"
CLASS = "raise ImportError\nclass MSDeformAttn:\n    def forward(self): ...\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    names._distributions.cache_clear()
    yield tmp_path
    names._distributions.cache_clear()


def write(folder, module: str, text: str) -> None:
    """The file of a module, and those of its packages."""
    *packages, name = module.split(".")
    for package in packages:
        folder /= package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    (folder / f"{name}.py").write_text(text)


def said() -> dict[str, str]:
    return dict(report.integrations())


def test_the_report_names_what_a_patch_would_replace(site):
    write(site, "rfdetr.models.ops.modules.ms_deform_attn", CLASS)
    write(site, "rfdetr.models.ops.functions.ms_deform_attn_func", "def another(): ...")
    (site / "rf_detr-1.2.dist-info").mkdir()
    (site / "rf_detr-1.2.dist-info" / "METADATA").write_text(VERSION)
    (site / "rf_detr-1.2.dist-info" / "top_level.txt").write_text("rfdetr\n")
    assert said()["rfdetr"] == "rf-detr 1.2, patch: rfdetr.patch() replaces MSDeformAttn.forward"
    assert "rfdetr" not in sys.modules


def test_the_report_counts_copies_and_finds_compiled_modules(site):
    for name in ("deim.ms_deform", "dfine.ms_deform"):
        write(site, f"libreyolo.models.{name}", "def deformable_attention_core_func_v2(): ...")
    write(site, "mmcv._ext", "")
    (site / "mmcv" / "_ext.py").rename(site / "mmcv" / "_ext.cpython-311.so")
    start = "installed, patch: "
    said = dict(report.integrations())
    assert (
        said["libreyolo"] == f"{start}ports.patch() replaces deformable_attention_core_func_v2 (2x)"
    )
    assert (
        said["mmcv"]
        == f"{start}mmcv.patch() replaces ms_deform_attn_forward, ms_deform_attn_backward"
    )


def test_the_report_says_that_another_version_has_nothing(site):
    write(site, "ultralytics.nn", "")
    (site / "dfine").mkdir()  # a folder of the user's, no package
    write(site, "ports", "")  # a module of the user's
    assert (
        said()["ultralytics"]
        == "installed, patch: none, since this version has nothing that is known"
    )
    assert not {"dfine", "ports"} & set(said())


def test_the_report_passes_over_a_torch_that_does_not_import(monkeypatch, site):
    write(site, "ultralytics.nn", "")
    monkeypatch.setitem(sys.modules, "cupy_msda.integrations.names", None)
    monkeypatch.delattr("cupy_msda.integrations.names")
    assert said() == {}


def test_every_integration_can_be_named():
    known = names.integration_of()
    assert {"mmcv", "rfdetr", "ultralytics", "kornia", "groundingdino", "ports"} <= set(known)
    assert known["inference_models"] is known["rfdetr"]
    for name, module in known.items():
        assert callable(module.patch)
        assert len(name) <= 16, "the report's column of labels"
