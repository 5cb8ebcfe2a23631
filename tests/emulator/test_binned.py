# SPDX-License-Identifier: Apache-2.0
"""Gradients of value by points binned by cell."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.cuda.compile import assemble
from cupy_msda.problem import Level, LevelTable
from tests.emulator.cases import check_value
from tests.emulator.encoders import (
    ENCODERS,
    WALKS,
    encoder,
    on_encoders,
    placed,
)
from tests.emulator.launches import backward_binned, checked
from tests.problems import Inputs, random_inputs


def reference_value(inputs: Inputs, levels: Sequence[Level]) -> torch.Tensor:
    """The gradient of value by the reference."""
    points = inputs.locations, inputs.weights
    return reference.backward(inputs.grad_output, inputs.value, levels, *points)[0]


@on_encoders
def test_gradient_of_value(inputs: Inputs) -> None:
    for seed in (0, 1):
        check_value(inputs, backward_binned(inputs, seed=seed))


def test_the_callers_grids() -> None:
    inputs = encoder(((9, 13), (4, 5)), m=2, lq=20 * 18)
    check_value(inputs, backward_binned(inputs, grids=((20, 18),)))


@pytest.mark.parametrize("cells", WALKS.values(), ids=WALKS.keys())
def test_walks_from_cell_to_cell(cells: Sequence[tuple[float, float]]) -> None:
    """The sums go on in the right column's place only where the next cell has the same pixels there."""
    inputs = placed(cells, [(8, 8)])
    check_value(inputs, backward_binned(inputs))


def test_cells_of_another_level_in_the_same_memory() -> None:
    """Levels that overlap, of other widths: one cell's pixels are partly those of another's."""
    inputs = placed(WALKS["every-cell"], [(8, 8), (4, 16), (16, 4)])
    problem, _ = checked(inputs)
    table = LevelTable(((8, 8), (4, 16), (16, 4)), (0, 0, 0))
    grad_value = backward_binned(inputs, table=table)
    levels = [level._replace(start=0) for level in inputs.levels]
    same, exact = (reference_value(case, levels) for case in (inputs, inputs.to(torch.float64)))
    assert problem.spatial_size == same.shape[1]
    assert_within_budget(grad_value, same, exact)


def at_one_pixel(column: float) -> Inputs:
    """All points on one cell of (8, 8), which begins with pixel 9, and on one of (4, 16) in the same memory.

    A quarter of the former lie outside, so that a group comes from the one to the other within its segment of the list.
    """
    inputs = random_inputs([(8, 8), (4, 16)], n=1, m=1, d=32, lq=300, p=4)
    inputs.locations[:, :, :, 0] = torch.tensor([(1.3 + 0.5) / 8, (1.6 + 0.5) / 8])
    inputs.locations[:, :, :, 0, 0] = -5
    inputs.locations[:, :, :, 1] = torch.tensor([(column + 0.5) / 16, (0.6 + 0.5) / 4])
    return inputs


def check_at_one_pixel(column: float, source: str | None = None) -> None:
    """The gradient of value where both levels begin with the first position."""
    inputs, table = at_one_pixel(column), LevelTable(((8, 8), (4, 16)), (0, 0))
    grad_value = backward_binned(inputs, table=table, source=source)
    levels = [level._replace(start=0) for level in inputs.levels]
    same, exact = (reference_value(case, levels) for case in (inputs, inputs.to(torch.float64)))
    assert_within_budget(grad_value, same, exact)


# The same pixel, and the one to the right of it.
@pytest.mark.parametrize("column", [9.3, 10.3])
def test_a_cell_of_another_level_at_the_same_pixel_is_another(column: float) -> None:
    check_at_one_pixel(column)


@pytest.mark.parametrize(
    ("right", "wrong", "column"),
    [
        ("place.x != cell.place.x || place.y != cell.place.y", "place.x != cell.place.x", 9.3),
        ("next.y == place.y && ", "", 10.3),
    ],
)
def test_a_cell_is_not_known_by_its_first_pixel_alone(
    right: str, wrong: str, column: float
) -> None:
    source = assemble("backward_value_binned.cu")
    assert source.count(right) == 1
    with pytest.raises(AssertionError):
        check_at_one_pixel(column, source.replace(right, wrong))


WRONG = [
    ("(place.x >> 1 & 5) == (next.x & 5)", "true", "end-of-a-row-and-the-next"),
    ("if (!beside) {", "if (false) {", "two-rows"),
    ("beside ? sum[1][c]", "beside ? sum[0][c]", "a-row-of-cells"),
    ("  cell.move({0, 0});", "", "one-cell"),
]


@pytest.mark.parametrize(("right", "wrong", "walk"), WRONG, ids=str)
def test_a_wrong_walk_shows(right: str, wrong: str, walk: str) -> None:
    source = assemble("backward_value_binned.cu")
    assert source.count(right) == 1
    inputs = placed(WALKS[walk], [(8, 8)])
    with pytest.raises(AssertionError):
        check_value(inputs, backward_binned(inputs, source=source.replace(right, wrong)))


def test_sums_reach_memory_once_for_many_points() -> None:
    """Four batches of points of one cell, added up by 32 groups each: 128 additions to each of its corners."""
    inputs = placed(WALKS["one-cell"], [(8, 8)], lq=512)
    counting = assemble("backward_value_binned.cu").replace(
        "s[0], s[1], s[2],", "1.0f, 1.0f, 1.0f,"
    )
    counts = backward_binned(inputs, source=counting.replace("s[3]);", "1.0f);"))
    assert counts.unique().tolist() == [0, 128]
    assert (counts > 0).sum() == 4 * 32


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_non_finite_gradients(bad: float) -> None:
    """They reach the pixels of their own points and no others."""
    inputs = ENCODERS["several-images"]
    grad_output = inputs.grad_output.clone()
    grad_output[1, 5] = bad
    non_finite = inputs._replace(grad_output=grad_output)
    expected = reference_value(non_finite, inputs.levels)
    assert torch.equal(backward_binned(non_finite).isfinite(), expected.isfinite())
