# SPDX-License-Identifier: Apache-2.0
"""The attention of kornia's RT-DETR is computed by ours, in kornia itself."""

from __future__ import annotations

import pytest

from cupy_msda.integrations import kornia
from tests.integrations import stand_ins
from tests.integrations.stand_ins import SIZES, D, M, P, check, results

rtdetr_head = pytest.importorskip(
    "kornia.models.rt_detr.architecture.rtdetr_head",
    reason="needs kornia, which wants Python 3.11 and torch 2.5.1",
)


def test_the_function_gives_the_same():
    def call():
        function = rtdetr_head._deformable_attention_kernel
        return results(lambda v, x, w: function(v, SIZES, x, w), inputs)

    inputs = stand_ins.arrays()
    assert len(check(kornia.patch, call).replaced) == 2


@pytest.fixture
def decoder_layer():
    """One layer of RT-DETR's decoder, with weights under which points and their weights vary."""
    layer = rtdetr_head.TransformerDecoderLayer(M * D, M, 0.0, len(SIZES), P).double()
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    return layer


def test_a_decoder_layer_gives_the_same(decoder_layer):
    inputs = stand_ins.module_inputs(4)

    def call():
        attention = decoder_layer.cross_attn
        return results(lambda *given: attention(*given, SIZES), inputs, *attention.parameters())

    check(kornia.patch, call)
    check(lambda: kornia.patch(decoder_layer), call)


def test_points_without_a_box_are_refused_as_kornia_refuses_them(decoder_layer):
    given = *stand_ins.module_inputs(2), SIZES
    with pytest.raises(RuntimeError) as theirs:
        decoder_layer.cross_attn(*given)
    with kornia.patch(), pytest.raises(RuntimeError) as ours:
        decoder_layer.cross_attn(*given)
    assert str(ours.value) == str(theirs.value)
