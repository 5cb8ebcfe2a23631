# SPDX-License-Identifier: Apache-2.0
"""The extension module under the names that descendants of Deformable-DETR give it; the packages are stand-ins."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from cupy_msda import ms_deform_attn
from cupy_msda.integrations import deformable_detr
from tests.problems import random_inputs


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that can be imported; what the test imports is forgotten."""
    folder = tmp_path / "some_detr"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "some_detr"]:
        del sys.modules[name]


IMPORTS = [
    "from some_detr import _C",
    "import some_detr._C as _C",
    "import some_detr._C; _C = some_detr._C",
    "import some_detr; _C = some_detr._C",
]


@pytest.mark.parametrize("statement", IMPORTS)
@pytest.mark.parametrize("imported", [False, True])
def test_every_import_of_a_dotted_name_finds_it(statement, imported, package):
    if imported:
        importlib.import_module("some_detr")
    deformable_detr.install("some_detr._C")
    found = {}
    exec(statement, found)
    assert found["_C"] is deformable_detr
    assert importlib.util.find_spec("some_detr._C") is not None  # how some ask whether it is built


def test_a_package_that_imports_its_extension_finds_it(package):
    (package / "__init__.py").write_text("from some_detr import _C as kept\n")
    deformable_detr.install("some_detr._C")
    assert importlib.import_module("some_detr").kept is deformable_detr


def test_a_package_that_does_not_import_leaves_nothing(package):
    (package / "__init__.py").write_text("raise ImportError('no library')")
    with pytest.raises(ImportError, match="no library"):
        deformable_detr.install("some_detr._C")
    assert "some_detr._C" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_detr'"):
        deformable_detr.install("no_such_detr._C")


def test_an_extension_that_is_already_imported_is_named(package):
    (package / "_C.py").write_text("")
    importlib.import_module("some_detr._C")
    with pytest.raises(ImportError, match=r"some_detr\._C must not be imported before .*_C\.py"):
        deformable_detr.install("some_detr._C")


def test_im2col_step_may_be_left_out():
    """As in the forward of nvidia-tao's fork."""
    inputs = random_inputs()
    table = inputs.shapes(), inputs.starts()
    given = inputs.value, *table, inputs.locations, inputs.weights
    output = deformable_detr.ms_deform_attn_forward(*given)
    assert torch.equal(output, ms_deform_attn(*given))
    gradients = deformable_detr.ms_deform_attn_backward(*given, inputs.grad_output)
    assert [g.shape for g in gradients] == [t.shape for t in inputs.tensors]
