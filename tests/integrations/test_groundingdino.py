# SPDX-License-Identifier: Apache-2.0
"""Grounding DINO's attention is computed by ours.

The packages need torchvision: this is a stand-in with the signatures and shapes of groundingdino-py 0.4.0 and
rf-groundingdino 0.3.0.
"""

from __future__ import annotations

import pytest
import torch

from cupy_msda.integrations import groundingdino
from tests.integrations import stand_ins
from tests.integrations.stand_ins import SIZES, N, S, check, results

MODULE = "groundingdino.models.GroundingDINO.ms_deform_attn"
SHAPES = torch.tensor(SIZES)
STARTS = torch.tensor([0, 35, 41])


def attention_class():
    class MultiScaleDeformableAttention(stand_ins.Attention):
        def __init__(self, batch_first):
            super().__init__(**stand_ins.HEADS)
            self.num_heads, self.num_levels, self.num_points = self.samples
            self.batch_first, self.own = batch_first, 0

        def forward(
            self,
            query,
            key=None,
            value=None,
            query_pos=None,
            key_padding_mask=None,
            reference_points=None,
            spatial_shapes=None,
            level_start_index=None,
            **kwargs,
        ):
            self.own += 1
            value = query if value is None else value
            query = query if query_pos is None else query + query_pos
            if not self.batch_first:
                query, value = query.transpose(0, 1), value.transpose(0, 1)
            output = self.attend(query, reference_points, value, spatial_shapes, key_padding_mask)
            return output if self.batch_first else output.transpose(0, 1)

    return MultiScaleDeformableAttention


@pytest.fixture
def package(monkeypatch):
    def function(value, value_spatial_shapes, sampling_locations, attention_weights):
        return stand_ins.sampled(value, value_spatial_shapes, sampling_locations, attention_weights)

    contents = {"MultiScaleDeformableAttention": attention_class()}
    contents["multi_scale_deformable_attn_pytorch"] = function
    return stand_ins.install(monkeypatch, MODULE, **contents)


def test_the_function_gives_the_same(package):
    def call():
        function = package.multi_scale_deformable_attn_pytorch
        return results(lambda v, x, w: function(v, SHAPES, x, w), inputs)

    inputs = stand_ins.arrays()
    assert len(check(groundingdino.patch, call).replaced) == 2


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("is_encoder", [False, True])
def test_the_module_gives_the_same(coordinates, batch_first, is_encoder, package):
    module = package.MultiScaleDeformableAttention(batch_first).double()
    query, references, value = stand_ins.module_inputs(coordinates)
    keywords = {"spatial_shapes": SHAPES, "level_start_index": STARTS, "key": None}
    if is_encoder:  # which attends to its queries
        sequences, references = [value], references[:, :1].expand(-1, S, -1, -1)
        keywords["key_padding_mask"] = torch.rand(N, S) < 0.3
    else:
        sequences = [query, torch.randn_like(query), value]
    if not batch_first:
        sequences = [each.transpose(0, 1) for each in sequences]

    def attend(references, query, query_pos=None, value=None):
        named = {"query_pos": query_pos, "value": value, "reference_points": references}
        return module(query=query, **named, **keywords)

    check(
        groundingdino.patch, lambda: results(attend, [references, *sequences], *module.parameters())
    )
    assert module.own == 2
