# SPDX-License-Identifier: Apache-2.0
"""What the contract accepts: forms of the level table and of the grids, dtypes, sizes."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import cupy_msda  # noqa: E402
from cupy_msda import arrays, contract  # noqa: E402
from tests.contract.inputs import (  # noqa: E402
    LEVELS,
    LQ,
    PROBLEM,
    SHAPE,
    SIZES,
    STARTS,
    NumPy,
    Torch,
    check_with,
    good_inputs,
)

SHAPES_FORMS = {
    "a list of tuples": SIZES,
    "a tuple of lists": tuple(map(list, SIZES)),
    "a list of torch.Size": [torch.Size(size) for size in SIZES],
    "NumPy int64": np.array(SIZES),
    "NumPy int32": np.array(SIZES, np.int32),
    "NumPy uint8": np.array(SIZES, np.uint8),
    "NumPy, Fortran order": np.asfortranarray(SIZES),
    "NumPy, a view with gaps": np.array([(h, w, 0, 0) for h, w in SIZES])[:, :2],
    "a list of NumPy rows": list(np.array(SIZES)),
    "a list of NumPy integers": [(np.int32(h), np.uint8(w)) for h, w in SIZES],
    "torch int64": torch.tensor(SIZES),
    "torch int32": torch.tensor(SIZES, dtype=torch.int32),
    "torch uint8": torch.tensor(SIZES, dtype=torch.uint8),
    "torch, transposed view": torch.tensor(SIZES).t().contiguous().t(),
    "a list of torch rows": list(torch.tensor(SIZES)),
    "a list of 0-dim tensors": [(torch.tensor(h), torch.tensor(w)) for h, w in SIZES],
}
STARTS_FORMS = {
    "None": None,
    "a list": STARTS,
    "a tuple": tuple(STARTS),
    "NumPy int64": np.array(STARTS),
    "NumPy uint16": np.array(STARTS, np.uint16),
    "a list of NumPy integers": list(np.array(STARTS)),
    "torch int64": torch.tensor(STARTS),
    "torch int32": torch.tensor(STARTS, dtype=torch.int32),
    "a list of 0-dim tensors": list(torch.tensor(STARTS)),
}


def plain_ints(levels):
    """Whether the levels hold ints and nothing that only acts like one."""
    return all(type(number) is int for level in levels for number in level)


@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
@pytest.mark.parametrize("form", SHAPES_FORMS)
def test_forms_of_spatial_shapes(lib, form):
    _, table = check_with(lib, spatial_shapes=SHAPES_FORMS[form], level_start_index=None)
    assert table.levels == LEVELS
    assert plain_ints(table.levels)
    assert table.device_sizes is None
    assert table.device_starts is None


@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
@pytest.mark.parametrize("form", STARTS_FORMS)
def test_forms_of_level_start_index(lib, form):
    _, table = check_with(lib, level_start_index=STARTS_FORMS[form])
    assert table.levels == LEVELS
    assert plain_ints(table.levels)


@pytest.mark.parametrize("form", SHAPES_FORMS)
def test_every_form_runs_through_the_public_function(form):
    inputs = good_inputs(Torch())
    del inputs["grad_output"]
    expected = cupy_msda.ms_deform_attn(*inputs.values())
    output = cupy_msda.ms_deform_attn(*(inputs | {"spatial_shapes": SHAPES_FORMS[form]}).values())
    assert torch.equal(output, expected)


def test_iterators_are_read_once():
    _, table = check_with(NumPy(), spatial_shapes=iter(SIZES), level_start_index=iter(STARTS))
    assert table.levels == LEVELS


GRIDS = [(1, 2), (3, 1)]
GRIDS_FORMS = {
    "a list of tuples": GRIDS,
    "a tuple of lists": tuple(map(list, GRIDS)),
    "a list of torch.Size": list(map(torch.Size, GRIDS)),
    "NumPy int64": np.array(GRIDS),
    "NumPy uint8": np.array(GRIDS, np.uint8),
    "a list of NumPy rows": list(np.array(GRIDS)),
    "a list of NumPy integers": [(np.int32(h), np.uint8(w)) for h, w in GRIDS],
}


@pytest.mark.parametrize("form", GRIDS_FORMS)
def test_forms_of_query_order(form):
    grids = contract.check_query_order(GRIDS_FORMS[form], LQ)
    assert grids == tuple(GRIDS)
    assert plain_ints(grids)
    assert contract.check_query_order(iter(GRIDS), LQ) == grids


def test_auto_is_none_and_none_is_no_grids():
    assert contract.check_query_order("auto", LQ) is None
    assert contract.check_query_order(None, LQ) == ()


@pytest.mark.parametrize("grids", [[(0, 7), (5, 1), (3, 0)], [(1, 5), *[(0, 0)] * 15]], ids=str)
def test_grids_that_hold_the_queries(grids):
    assert contract.check_query_order(grids, LQ) == tuple(grids)


@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
@pytest.mark.parametrize("order", ["auto", None, *GRIDS_FORMS.values()], ids=str)
def test_every_order_gives_the_same(lib, order):
    inputs = good_inputs(lib)
    grad_output = inputs.pop("grad_output")
    output = cupy_msda.ms_deform_attn(*inputs.values(), query_order=order)
    assert (output == cupy_msda.ms_deform_attn(*inputs.values())).all()
    arguments = (grad_output, *inputs.values())
    gradients = cupy_msda.ms_deform_attn_backward(*arguments, query_order=order)
    expected = cupy_msda.ms_deform_attn_backward(*arguments)
    assert all((a == b).all() for a, b in zip(gradients, expected, strict=True))


LEVELS_THAT_FIT = {
    "gaps": ([(2, 2), (2, 3), (1, 2)], [1, 10, 20]),
    "overlaps": ([(4, 5), (4, 5), (2, 3)], [0, 8, 3]),
    "any order": ([(1, 2), (2, 3), (4, 5)], [26, 20, 0]),
    "empty levels, at the end too": ([(0, 0), (0, 5), (4, 0)], [28, 0, 28]),
    "positions left over": ([(2, 3), (1, 2), (1, 1)], [0, 6, 8]),
    "all positions": ([(4, 5), (2, 3), (1, 2)], None),
    "the same positions": ([(1, 28), (28, 1), (4, 7)], [0, 0, 0]),
}


@pytest.mark.parametrize("case", LEVELS_THAT_FIT)
def test_levels_that_fit(case):
    sizes, starts = LEVELS_THAT_FIT[case]
    _, table = check_with(NumPy(), spatial_shapes=sizes, level_start_index=starts)
    assert table.sizes == tuple(sizes)
    assert table.starts == tuple(starts or STARTS)


@pytest.mark.parametrize("lib", [NumPy(), Torch()], ids=["NumPy", "Torch"])
@pytest.mark.parametrize(
    ("value", "locations", "weights"),
    [
        ("float32", "float32", "float32"),
        ("float64", "float64", "float64"),
        ("float64", "float32", "float64"),
        ("float64", "float64", "float32"),
        ("float64", "float32", "float32"),
        ("float16", "float16", "float16"),
        ("float16", "float32", "float32"),
        ("float16", "float32", "float16"),
        ("float16", "float16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16"),
    ],
)
def test_dtypes(lib, value, locations, weights):
    if value == "bfloat16" and isinstance(lib, NumPy):
        pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 from ml_dtypes")
    problem, _ = check_with(
        lib,
        value=lib.array(SHAPE["value"], value),
        sampling_locations=lib.array(SHAPE["sampling_locations"], locations),
        attention_weights=lib.array(SHAPE["attention_weights"], weights),
    )
    assert problem[7:10] == (value, locations, weights)


def test_sizes_are_those_of_the_arrays():
    problem, _ = check_with(NumPy())
    assert problem[:7] == tuple(PROBLEM.values())
    assert problem.output_shape == SHAPE["grad_output"]


@pytest.mark.parametrize("zero", PROBLEM)
def test_empty_dimensions(zero):
    n, s, m, d, lq, levels, p = (PROBLEM | {zero: 0}).values()
    sizes = SIZES[:levels] if s else [(0, 0)] * levels
    problem, table = contract.check(
        np.ones((n, s, m, d)),
        np.array(sizes, np.int64).reshape(levels, 2),
        None,
        np.ones((n, lq, m, levels, p, 2)),
        np.ones((n, lq, m, levels, p)),
    )
    assert problem[:7] == (n, s, m, d, lq, levels, p)
    assert len(table.levels) == levels


def test_subclasses_count_as_their_library():
    value = torch.nn.Parameter(torch.ones(SHAPE["value"]))
    assert arrays.library(value) == "torch"
    check_with(Torch(), value=value)
    mapped = np.ones(SHAPE["value"], np.float32).view(np.recarray)
    assert arrays.library(mapped) == "numpy"
