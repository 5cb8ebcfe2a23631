# SPDX-License-Identifier: Apache-2.0
"""Our functions in the forms of others: dtypes under autocast, and in graphs."""

from __future__ import annotations

import pytest
import torch

from cupy_msda.budget import assert_within_budget
from cupy_msda.integrations import forms, rfdetr
from tests.integrations import stand_ins
from tests.integrations.stand_ins import SIZES, arrays, assert_equal, results
from tests.integrations.test_rfdetr import new_class

POINTS = [3, 1, 2]


def theirs(value, sizes, locations, weights, num_points_list):
    return stand_ins.sampled(value, sizes, locations, weights, num_points_list)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_theirs_under_autocast(dtype):
    """A projected value is of 16 bits there, locations and weights are not."""
    value, locations, weights = (each.float() for each in arrays(POINTS))
    given = value.to(dtype), SIZES, locations, weights, POINTS
    with torch.autocast("cpu", dtype):
        expected, output = theirs(*given), forms.ragged(theirs)(*given)
    assert output.dtype == expected.dtype == torch.float32
    exact = theirs(value.to(dtype).double(), SIZES, locations.double(), weights.double(), POINTS)
    # The operator has computed in 16 bits, whose rounding is in the budget.
    assert_within_budget(output.to(dtype), expected.to(dtype), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_has_the_dtype_of_theirs_under_autocast(dtype, monkeypatch):
    kind = new_class()
    stand_ins.install(monkeypatch, "rfdetr.models.ops.modules.ms_deform_attn", MSDeformAttn=kind)
    module = kind()
    given = [each.float() for each in stand_ins.module_inputs(4)]
    with torch.autocast("cpu", dtype):
        expected = module(*given, torch.tensor(SIZES), None)
        with rfdetr.patch():
            output = module(*given, torch.tensor(SIZES), None)
    assert output.dtype == expected.dtype == dtype
    assert module.own == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("form", ["plain", "ragged"])
def test_a_graph_holds_the_function_whole(form):
    if form == "ragged" and torch.__version__ < (2, 5):
        pytest.skip("torch 2.4 breaks a graph before any call with num_points")
    points = POINTS if form == "ragged" else None
    function, rest = getattr(forms, form)(theirs), [points] * (form == "ragged")

    def call(value, locations, weights):
        levels = value.permute(0, 2, 3, 1).split([h * w for h, w in SIZES], dim=-1)
        return function(levels, SIZES, locations, weights, *rest)

    inputs = arrays(points)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = results(lambda v, x, w: theirs(v, SIZES, x, w, points), inputs)
    assert_equal(results(compiled, inputs), expected)
