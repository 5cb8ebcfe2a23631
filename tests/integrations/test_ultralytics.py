# SPDX-License-Identifier: Apache-2.0
"""The attention of ultralytics' RT-DETR is computed by ours.

ultralytics needs torchvision: this is a stand-in with the signatures and shapes of ultralytics 8.4.190.
"""

from __future__ import annotations

import pytest
import torch

from cupy_msda.integrations import ultralytics
from tests.integrations import stand_ins
from tests.integrations.stand_ins import SIZES, N, S, check, results

NAME = "multi_scale_deformable_attn_pytorch"


def attention_class():
    class MSDeformAttn(stand_ins.Attention):
        def __init__(self):
            super().__init__(**stand_ins.HEADS)
            self.n_heads, self.n_levels, self.n_points = self.samples
            self.own = 0

        def forward(self, query, refer_bbox, value, value_shapes, value_mask=None):
            self.own += 1
            return self.attend(query, refer_bbox, value, value_shapes, value_mask)

    return MSDeformAttn


@pytest.fixture
def package(monkeypatch):
    """The module of the class, which has imported the function by name."""

    def function(value, value_spatial_shapes, sampling_locations, attention_weights):
        assert sampling_locations.ndim == 5
        return stand_ins.sampled(value, value_spatial_shapes, sampling_locations, attention_weights)

    stand_ins.install(monkeypatch, "ultralytics.nn.modules.utils", **{NAME: function})
    contents = {"MSDeformAttn": attention_class(), NAME: function}
    module = stand_ins.install(monkeypatch, "ultralytics.nn.modules.transformer", **contents)
    function.__module__ = "ultralytics.nn.modules.utils"
    return module


def test_the_function_gives_the_same(package):
    value, locations, weights = stand_ins.arrays()
    inputs = value, locations.flatten(3, 4), weights.flatten(3)

    def call():
        function = getattr(package, NAME)
        return results(lambda v, x, w: function(v, SIZES, x, w), inputs)

    done = check(ultralytics.patch, call)
    modules = "ultralytics.nn.modules"
    assert {str(one) for one in done.replaced} == {
        f"{modules}.transformer.MSDeformAttn.forward",
        f"{modules}.transformer.{NAME}",
        f"{modules}.utils.{NAME}",
    }


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_the_module_gives_the_same(coordinates, padded, package):
    module = package.MSDeformAttn().double()
    inputs = stand_ins.module_inputs(coordinates, levels=1)
    mask = torch.rand(N, S) < 0.3 if padded else None

    def call():
        return results(lambda *given: module(*given, SIZES, mask), inputs, *module.parameters())

    check(ultralytics.patch, call)
    check(lambda: ultralytics.patch(module), call)
    assert module.own == 4  # before and after each
