# SPDX-License-Identifier: Apache-2.0
"""The last problem that a kernel takes, and the first that it does not; sizes of what a plan allocates."""

from __future__ import annotations

import pytest

from cupy_msda.cuda.plans import Device, Fill, plan_backward, plan_forward
from cupy_msda.problem import NO_TABLE, Problem

H100 = Device(132, "90")
ENCODER = Problem(2, 22223, 8, 32, 22223, 4, 4, *["float32"] * 3)


def kernels(plan):
    """The names of a plan's kernels, without template arguments."""
    return [s.kernel.name.partition("<")[0] for s in plan.launches if not isinstance(s, Fill)]


def test_persistent_kernels_number_positions_in_32_bits():
    """N * M * S, too: few queries alone are not enough."""
    problem = Problem(255, 2**20, 8, 32, 10000, 1, 4, *["float32"] * 3)
    grids = ((100, 100),)
    plans = [
        plan_forward(problem._replace(batch=batch), NO_TABLE, H100, grids) for batch in (255, 256)
    ]
    assert [kernels(plan) for plan in plans] == [["msda_forward_persistent"], ["msda_forward"]]


@pytest.mark.parametrize(
    ("num_points", "binned"), [((8, 8, 8, 8), True), ((9, 8, 8, 8), False)], ids=str
)
def test_a_list_of_points_has_room_for_32_of_a_row(num_points, binned):
    plan = plan_backward(ENCODER._replace(num_points=num_points), NO_TABLE, H100)
    assert ("msda_backward_value_binned" in kernels(plan)) == binned


@pytest.mark.parametrize(("dtype", "size"), [("float16", 4), ("bfloat16", 4)])
def test_a_16_bit_gradient_is_accumulated_in_float32(dtype, size):
    plan = plan_backward(ENCODER._replace(value_dtype=dtype), NO_TABLE, H100)
    assert plan.workspace == size * ENCODER.value_elements
    assert plan.launches[0] == Fill("accumulator", plan.workspace)


@pytest.mark.parametrize(("queries", "points", "tiled"), [(4096, 2, True), (2731, 3, False)])
def test_tiles_take_8192_points_of_a_level(queries, points, tiled):
    problem = ENCODER._replace(num_queries=queries, num_points=points)
    plan = plan_backward(problem, NO_TABLE, H100, deterministic=True)
    assert ("msda_backward_value_tiled" in kernels(plan)) == tiled


def test_passes_over_few_rows_have_a_block():
    few = Problem(1, 3, 1, 30, 3, 1, 4, *["float32"] * 3)
    plan = plan_backward(few, NO_TABLE, H100, deterministic=True)
    grids = [step.grid for step in plan.launches if not isinstance(step, Fill)]
    assert len(grids) == 3
    assert all(grid == (1, 1, 1) for grid in grids)
