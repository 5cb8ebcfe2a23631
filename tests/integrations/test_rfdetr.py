# SPDX-License-Identifier: Apache-2.0
"""RF-DETR's attention is computed by ours.

rfdetr and inference-models need torchvision and are large: these are stand-ins with the signatures and shapes of
rfdetr 1.11.2 and inference-models 0.39.6.
"""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cupy_msda.integrations import rfdetr
from tests.integrations import stand_ins
from tests.integrations.stand_ins import SIZES, check, results

SHAPES = torch.tensor(SIZES)
STARTS = torch.tensor([0, 35, 41])
CORE = "ms_deform_attn_core_pytorch"


def new_core():
    def core(
        value,
        value_spatial_shapes,
        sampling_locations,
        attention_weights,
        value_spatial_shapes_hw=None,
    ):
        pairs = value_spatial_shapes_hw
        shapes = value_spatial_shapes if pairs is None else pairs
        value = value.permute(0, 3, 1, 2)  # from N, M, D, S
        return stand_ins.sampled(value, shapes, sampling_locations, attention_weights)

    return core


def old_core():
    def core(value, value_spatial_shapes, sampling_locations, attention_weights):
        return new_core()(value, value_spatial_shapes, sampling_locations, attention_weights)

    return core


def new_class():
    class MSDeformAttn(stand_ins.Attention):
        def __init__(self):
            super().__init__(**stand_ins.HEADS)
            self.n_heads, self.n_levels, self.n_points = self.samples
            self._export = False
            self.own = 0

        def forward(
            self,
            query,
            reference_points,
            input_flatten,
            input_spatial_shapes,
            input_level_start_index,
            input_padding_mask=None,
            input_spatial_shapes_hw=None,
        ):
            self.own += 1
            pairs = input_spatial_shapes_hw
            shapes = input_spatial_shapes if pairs is None else pairs
            return self.attend(query, reference_points, input_flatten, shapes, input_padding_mask)

    return MSDeformAttn


def old_class():
    class MSDeformAttn(new_class()):
        def forward(
            self,
            query,
            reference_points,
            input_flatten,
            input_spatial_shapes,
            input_level_start_index,
            input_padding_mask=None,
        ):
            given = query, reference_points, input_flatten, input_spatial_shapes
            self.own += 1
            return self.attend(*given, input_padding_mask)

    return MSDeformAttn


PACKAGES = {
    "rfdetr": (
        "rfdetr.models.ops.modules.ms_deform_attn",
        "rfdetr.models.ops.functions.ms_deform_attn_func",
    ),
    "inference_models": (
        "inference_models.models.rfdetr.ms_deform_attn",
        "inference_models.models.rfdetr.ms_deform_attn_func",
    ),
}


@pytest.fixture(params=PACKAGES)
def package(request, monkeypatch):
    """The module and the function, which the module's file has imported by name."""
    is_new = request.param == "rfdetr"
    kind, core = (new_class(), new_core()) if is_new else (old_class(), old_core())
    of_class, of_core = PACKAGES[request.param]
    where = stand_ins.install(monkeypatch, of_core, **{CORE: core})
    user = stand_ins.install(monkeypatch, of_class, MSDeformAttn=kind, **{CORE: core})
    return SimpleNamespace(name=request.param, is_new=is_new, kind=kind, core=where, user=user)


def pairs(package):
    """The keywords of a call: newer versions may give the sizes as pairs, too."""
    return [{}, {"input_spatial_shapes_hw": SIZES}] if package.is_new else [{}]


@pytest.mark.parametrize("flat", [False, True])
def test_the_function_gives_the_same(flat, package):
    value, locations, weights = stand_ins.arrays()
    inputs = value.permute(0, 2, 3, 1), locations, weights.flatten(-2) if flat else weights

    for table in [(SHAPES,)] + [(SHAPES, SIZES)] * package.is_new:

        def call(table=table):
            core = getattr(package.user, CORE)
            return results(lambda v, x, w: core(v, table[0], x, w, *table[1:]), inputs)

        done = check(rfdetr.patch, call)
        assert {str(one) for one in done.replaced} >= {
            f"{package.core.__name__}.{CORE}",
            f"{package.user.__name__}.{CORE}",
            f"{package.user.__name__}.MSDeformAttn.forward",
        }


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("levels", [1, len(SIZES)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_module_gives_the_same(coordinates, levels, padded, package):
    module = package.kind().double()
    inputs = stand_ins.module_inputs(coordinates, levels)
    padding = torch.rand(inputs[2].shape[:2]) < 0.3 if padded else None
    for keywords in pairs(package):

        def call(keywords=keywords):
            return results(
                lambda *given: module(*given, SHAPES, STARTS, padding, **keywords),
                inputs,
                *module.parameters(),
            )

        check(rfdetr.patch, call)
    assert module.own == 2 * len(pairs(package))  # before and after


def test_export_mode_keeps_the_code_of_the_package(package):
    module = package.kind().double()
    module._export = True
    given = *stand_ins.module_inputs(4), SHAPES, STARTS
    with rfdetr.patch():
        module(*given)
        assert module.own == 1
        value, locations, weights = stand_ins.arrays()
        merged = locations.flatten(3, 4)
        if package.is_new:  # rank 5, which the stand-in knows
            getattr(package.core, CORE)(
                value.permute(0, 2, 3, 1), SHAPES, merged, weights.flatten(3), SIZES
            )


def test_one_model_alone_can_be_patched(package):
    model, other = nn.Sequential(package.kind()).double(), package.kind().double()
    given = *stand_ins.module_inputs(4), SHAPES, STARTS
    expected = model[0](*given), other(*given)
    with rfdetr.patch(model) as done:
        assert len(done.replaced) == 1
        torch.testing.assert_close(model[0](*given), expected[0])
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied[0].output_proj.bias += 1
        torch.testing.assert_close(copied[0](*given), expected[0] + 1)
        assert torch.equal(other(*given), expected[1])
    assert (model[0].own, copied[0].own, other.own) == (1, 1, 2)
    assert "forward" not in vars(model[0])


def test_what_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        ModuleNotFoundError, match="one of rfdetr, inference_models must be installed, found none"
    ):
        rfdetr.patch()
    assert rfdetr.patch(strict=False).replaced == ()
    with pytest.raises(LookupError, match=r"the model Linear must hold .* found none"):
        rfdetr.patch(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="target must be None, a module or a torch module, got str"):
        rfdetr.patch("rfdetr")


def test_another_version_without_it_is_named(monkeypatch):
    stand_ins.install(monkeypatch, "rfdetr.models")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(LookupError, match=r"rfdetr, inference_models must hold .* found none"):
        rfdetr.patch()


def test_a_package_that_does_not_import_is_no_silent_loss(monkeypatch, tmp_path):
    folder = tmp_path / "rfdetr" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        rfdetr.patch()
    assert rfdetr.patch(strict=False).replaced == ()
    for name in [name for name in sys.modules if name.partition(".")[0] == "rfdetr"]:
        monkeypatch.delitem(sys.modules, name)
