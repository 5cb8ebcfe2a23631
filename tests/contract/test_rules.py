# SPDX-License-Identifier: Apache-2.0
"""Wrong points of levels, interpolations, masks and fused inputs: argument, contract and fact, for both libraries."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cupy_msda import contract, ms_deform_attn, ms_deform_attn_fused
from tests.contract.inputs import LQ, SHAPE, SIZES, STARTS, D, L, M, N, NumPy, S, Torch, good_inputs

LIBRARIES = pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=lambda lib: lib.name)
POINTS = [3, 0, 2]
ROWS = (N, LQ, M, sum(POINTS))


def flat(lib):
    """Inputs with points level after level."""
    return {
        "sampling_locations": lib.array((*ROWS, 2)),
        "attention_weights": lib.array(ROWS),
        "num_points": POINTS,
    }


def raises(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


WRONG = {
    "a number": (
        {"num_points": 3},
        TypeError,
        "num_points must be None or a sequence of integers, one for each level, got 3",
    ),
    "floats": (
        {"num_points": [3.0, 0.0, 2.0]},
        TypeError,
        "num_points must be None or a sequence of integers, one for each level, got [3.0, 0.0, 2.0]",
    ),
    "negative": (
        {"num_points": [3, -1, 2]},
        ValueError,
        "num_points must be from 0 to 2**31 - 1, got -1 for level 1",
    ),
    "another sum": (
        {"num_points": [3, 1, 2]},
        ValueError,
        "sampling_locations must have shape (N, Lq, M, K, 2) = (4, any, 2, 6, 2) since K, the sum of num_points, "
        "is 6 and value has shape (4, 28, 2, 7), got (4, 5, 2, 5, 2)",
    ),
    "another number of levels": (
        {"num_points": [3, 2]},
        ValueError,
        "spatial_shapes must have one entry for each of the L = 2 levels of num_points, got 3",
    ),
    "points on an axis of levels": (
        {"num_points": None},
        ValueError,
        "sampling_locations must have shape (N, Lq, M, L, P, 2) = (4, any, 2, any, any, 2) since value has "
        "shape (4, 28, 2, 7), got (4, 5, 2, 5, 2)",
    ),
    "an unknown interpolation": (
        {"interpolation": "bicubic"},
        ValueError,
        'interpolation must be "bilinear" or "nearest", got \'bicubic\'',
    ),
    "no interpolation": (
        {"interpolation": None},
        ValueError,
        'interpolation must be "bilinear" or "nearest", got None',
    ),
}


@LIBRARIES
@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules(lib, name):
    change, error, message = WRONG[name]
    inputs = good_inputs(lib) | flat(lib) | change
    del inputs["grad_output"]
    with raises(error, message):
        ms_deform_attn(**inputs)


@LIBRARIES
def test_wrong_masks(lib):
    inputs = good_inputs(lib)
    del inputs["grad_output"]
    with raises(
        TypeError, "value_mask must have dtype bool, True where a position is valid, got uint8"
    ):
        ms_deform_attn(**inputs, value_mask=lib.array((N, S), "uint8"))
    message = "value_mask must have shape (N, S) = (4, 28) since value has shape (4, 28, 2, 7), got (4, 27)"
    with raises(ValueError, message):
        ms_deform_attn(**inputs, value_mask=lib.array((N, S - 1), "bool"))
    other = torch.ones(N, S, dtype=torch.bool) if isinstance(lib, NumPy) else np.ones((N, S), bool)
    with pytest.raises(TypeError, match=r"^value_mask must be an array of the library of value"):
        ms_deform_attn(**inputs, value_mask=other)


def fused_inputs(lib):
    """A right call."""
    return {
        "value": lib.array(SHAPE["value"]),
        "spatial_shapes": SIZES,
        "level_start_index": STARTS,
        "reference_points": lib.array((N, LQ, L, 4)),
        "sampling_offsets": lib.array(SHAPE["sampling_locations"]),
        "attention_logits": lib.array(SHAPE["attention_weights"]),
    }


@LIBRARIES
@pytest.mark.parametrize(
    "shape", [(N, LQ, L, 3), (N, LQ, L, 6), (N, LQ, 2, 2), (2, LQ, L, 2), (N, LQ, 2)]
)
def test_wrong_shapes_of_reference_points(lib, shape):
    message = (
        "reference_points must have shape (N or 1, Lq, L or 1, 2 or 4) = (4 or 1, 5, 3 or 1, 2 or 4) since "
        f"sampling_offsets has shape (4, 5, 2, 3, 6, 2), got {shape}"
    )
    with raises(ValueError, message):
        ms_deform_attn_fused(**fused_inputs(lib) | {"reference_points": lib.array(shape)})


@LIBRARIES
@pytest.mark.parametrize("name", ["reference_points", "sampling_offsets", "attention_logits"])
def test_wrong_dtypes_of_fused_inputs(lib, name):
    inputs = fused_inputs(lib)
    wrong = lib.array(tuple(inputs[name].shape), "float64")
    with raises(TypeError, f"{name} must have dtype float32, got float64"):
        ms_deform_attn_fused(**inputs | {name: wrong})


@LIBRARIES
def test_fused_errors_name_the_arguments_of_the_fused_call(lib):
    inputs = fused_inputs(lib)
    with pytest.raises(
        ValueError, match=r"^attention_logits must have shape .* since sampling_offsets has"
    ):
        ms_deform_attn_fused(**inputs | {"attention_logits": lib.array((N, LQ, M, L, 5))})
    with pytest.raises(
        ValueError, match=r"^query_order must have grids .* queries of sampling_offsets"
    ):
        ms_deform_attn_fused(**inputs, query_order=[(2, 2)])
    with pytest.raises(TypeError, match=r"^offset_scale must be a finite number, got nan"):
        ms_deform_attn_fused(**inputs, offset_scale=float("nan"))


@LIBRARIES
def test_uneven_points_make_a_problem(lib):
    problem, table = contract.check(
        lib.array(SHAPE["value"]), SIZES, None, *list(flat(lib).values())[:2], num_points=POINTS
    )
    assert (problem.num_levels, problem.num_points, problem.row_points) == (3, (3, 0, 2), 5)
    assert problem.level_points == (3, 0, 2)
    assert problem.point_elements == N * LQ * M * 5
    assert len(table.levels) == L
    even, _ = contract.check(
        lib.array(SHAPE["value"]),
        *(SIZES, None, lib.array((N, LQ, M, 6, 2)), lib.array((N, LQ, M, 6))),
        num_points=[2, 2, 2],
    )
    assert even.num_points == 2
    assert even.output_shape == (N, LQ, M * D)
