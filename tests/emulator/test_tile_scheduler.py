# SPDX-License-Identifier: Apache-2.0
"""Queries in tiles: the order itself, what persistent blocks compute, and gradients of value by sorted points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
from cupy_msda.problem import Grids, Level, LevelTable, Problem
from tests.emulator.emulator import Emulated
from tests.emulator.launches import backward, backward_sorted, checked, emulate, forward, poisoned
from tests.problems import Inputs, random_inputs

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TILE = 16
# Tiles cut at the lower and right edges, and levels below one tile.
RAGGED = ((18, 37), (9, 13), (5, 33), (2, 2))
Sizes = Sequence[tuple[int, int]]


def queries(sizes: Sizes) -> int:
    """How many queries lie on the grids."""
    return sum(h * w for h, w in sizes)


def tiled(sizes: Sizes) -> list[int]:
    """The order, spelled out: grids, bands of rows, tiles of a band, rows of a tile, columns."""
    order, start = [], 0
    for h, w in sizes:
        for top, left in product(range(0, h, TILE), range(0, w, TILE)):
            rows, columns = range(top, min(top + TILE, h)), range(left, min(left + TILE, w))
            order += [start + y * w + x for y, x in product(rows, columns)]
        start += h * w
    return order


ORDERS = """
__global__ void orders(int* order, const long long* sizes, const SchedulerParams<4> p) {
  __shared__ Level levels[4];
  __shared__ TileScheduler shared;
  load_levels(levels, sizes, static_cast<const long long*>(nullptr), p);
  load_scheduler(shared, levels, p);
  for (int i = threadIdx.x; i < p.num_queries; i += BLOCK) order[i] = scheduled_query(i, shared);
}
"""


def kernel_order(lq: int, levels: Sizes | None, grids: Sizes = ()) -> list[int]:
    """The order of the kernels for levels on the device or, without, for grids."""
    problem = Problem(1, 10**6, 1, 8, lq, 4, 1, "float32", "float32", "float32")
    params = plans._params(problem, LevelTable(((1, 1),) * 4, (0,) * 4), grids=tuple(grids))
    order = np.full(lq, -1, np.int32)
    sizes = None if levels is None else np.array(levels, np.int64)
    Emulated(assemble("tile_scheduler.cuh") + ORDERS, "orders")(
        (1, 1, 1), (256, 1, 1), [order, sizes, params]
    )
    return list(order)


@pytest.mark.parametrize(
    "sizes",
    [RAGGED, ((16, 16), (32, 48), (1, 1), (1, 70)), ((0, 5), (33, 3), (7, 0), (17, 17))],
    ids=str,
)
def test_order_is_tile_by_tile(sizes: Sizes) -> None:
    assert sorted(tiled(sizes)) == list(range(queries(sizes)))
    assert kernel_order(queries(sizes), sizes) == tiled(sizes)
    assert kernel_order(queries(sizes), None, sizes) == tiled(sizes)


def test_order_of_one_grid_given_by_the_caller() -> None:
    assert kernel_order(20 * 21, RAGGED, ((20, 21),)) == tiled([(20, 21)])


@pytest.mark.parametrize("lq", [queries(RAGGED) - 1, queries(RAGGED) + 1])
def test_queries_that_are_no_grid_are_taken_as_they_come(lq: int) -> None:
    assert kernel_order(lq, RAGGED) == list(range(lq))


def encoder(
    sizes: Sizes = RAGGED,
    n: int = 1,
    m: int = 1,
    d: int = 32,
    p: int = 4,
    dtypes: Sequence[torch.dtype] = (F32, F32),
    reach: float = 0.1,
    lq: int | None = None,
) -> Inputs:
    """Random inputs whose queries are the pixels, near which most points lie; a part is anywhere."""
    lq = queries(sizes) if lq is None else lq
    inputs = random_inputs(sizes, n=n, m=m, d=d, lq=lq, p=p, dtypes=dtypes, reach=reach)
    if lq != queries(sizes):
        return inputs
    centres = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in sizes
    ]
    scale = inputs.shapes().flip(-1)[:, None]
    local = torch.cat(centres).double()[None, :, None, None, None] * scale
    local = local + 6 * (inputs.locations.double() - 0.5)
    local = (local.floor() + local.remainder(1).clamp(0.01, 0.99)) / scale
    locations = torch.where(
        torch.arange(lq)[:, None, None, None, None] % 7 == 0, inputs.locations, local
    )
    return inputs._replace(locations=locations.to(inputs.locations.dtype))


ENCODERS = {
    "f32": encoder(m=2),
    "several-images": encoder(((17, 19), (3, 3)), n=3, m=2),
    "f16": encoder(m=2, dtypes=(F16, F32, F32)),
    "bf16": encoder(m=2, dtypes=(BF16, F32, BF16)),
    "five-levels-three-points": encoder(((16, 21), *RAGGED), p=3),
    "eight-points": encoder(((20, 18), (9, 9)), p=8),
    "d8": encoder(m=3, d=8),
    "d16-two-points": encoder(((24, 24),), m=4, d=16, p=2),
    "d64-bf16": encoder(((17, 23),), d=64, dtypes=(BF16, F32, F32)),
    "one-pixel-wide": encoder(((40, 1), (1, 300), (2, 2)), m=2, p=2),
    "all-inside": encoder(((20, 20), (16, 18)), m=2, reach=-0.2),
}
on_encoders = pytest.mark.parametrize("inputs", ENCODERS.values(), ids=ENCODERS.keys())


def is_ordered(inputs: Inputs, multiprocessors: int, grids: Grids = ()) -> bool:
    """Whether the forward and the gradients of the points are planned on persistent blocks."""
    case = *checked(inputs), multiprocessors
    both = (
        plans.plan_forward(*case, grids),
        plans.plan_backward(*case, False, True, grids=grids),
    )
    ordered = {"_persistent<" in plan.kernel.name for plan in both}
    assert len(ordered) == 1
    return ordered.pop()


def of_points(
    inputs: Inputs, multiprocessors: int, grids: Grids = None, **options: Any
) -> list[torch.Tensor]:
    """The gradients of locations and weights alone; with grids, in their order."""
    needs = False, True
    return backward(inputs, multiprocessors, needs=needs, grids=grids, **options)[1:]


def assert_same_bits(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Both gradients must be whole and equal."""
    for one, other in zip(actual, expected, strict=True):
        assert other.isfinite().all()
        assert torch.equal(one, other)


@on_encoders
def test_forward_in_order_has_the_same_bits(inputs: Inputs) -> None:
    plain = forward(inputs, 0)
    for multiprocessors, seed in ((1, 0), (2, 1)):
        assert is_ordered(inputs, multiprocessors)
        assert torch.equal(forward(inputs, multiprocessors, grids=(), seed=seed), plain)


def test_blocks_share_out_all_rows_whatever_their_number() -> None:
    inputs = ENCODERS["several-images"]
    plain = forward(inputs, 0)
    for multiprocessors in range(3, 16, 3):
        assert is_ordered(inputs, multiprocessors)
        assert torch.equal(forward(inputs, multiprocessors, grids=()), plain)


# Three images, 16 bits, points in a last stage that is not full, and in no full one.
@pytest.mark.parametrize(
    "case", ["several-images", "bf16", "five-levels-three-points", "d16-two-points"]
)
def test_gradients_of_points_in_order_have_the_same_bits(case: str) -> None:
    inputs = ENCODERS[case]
    plain = of_points(inputs, 0)
    for multiprocessors, seed in ((1, 0), (2, 1)):
        assert is_ordered(inputs, multiprocessors)
        assert_same_bits(of_points(inputs, multiprocessors, (), seed=seed), plain)


def test_the_order_of_the_callers_grids() -> None:
    inputs = encoder(((9, 13), (4, 5)), m=2, lq=20 * 18)
    assert not is_ordered(inputs, 1)
    assert is_ordered(inputs, 1, ((20, 18),))
    assert torch.equal(forward(inputs, 1, grids=((20, 18),)), forward(inputs, 0))
    assert_same_bits(of_points(inputs, 1, ((20, 18),)), of_points(inputs, 0))


def test_order_from_a_table_on_the_device() -> None:
    inputs = ENCODERS["several-images"]
    unknown: dict[str, Any] = {"table": LevelTable(None, None), "tables": (inputs.shapes(), None)}
    assert torch.equal(forward(inputs, 2, grids=(), **unknown), forward(inputs, 0))
    assert_same_bits(of_points(inputs, 2, (), **unknown), of_points(inputs, 0))
    assert_value(inputs, backward_sorted(inputs, **unknown))


def test_levels_that_do_not_fit_give_nan_in_order_too() -> None:
    inputs = ENCODERS["several-images"]
    sizes = inputs.shapes()
    sizes[1, 0] = 10**6
    unknown: dict[str, Any] = {"table": LevelTable(None, None), "tables": (sizes, inputs.starts())}
    assert forward(inputs, 2, grids=(), **unknown).isnan().all()
    assert forward(inputs, 0, **unknown).isnan().all()
    gradients = zip(of_points(inputs, 2, (), **unknown), of_points(inputs, 0), strict=True)
    for actual, plain in gradients:
        assert actual[:, :, :, 1].isnan().all()
        assert torch.equal(actual[:, :, :, 0], plain[:, :, :, 0])


def test_order_waits_until_every_multiprocessor_has_a_full_block() -> None:
    problem, table = checked(ENCODERS["f32"])  # rows of 8 lanes, blocks of 1024
    most = problem.num_queries * problem.num_heads * 8 // 1024
    assert is_ordered(ENCODERS["f32"], most)
    assert not is_ordered(ENCODERS["f32"], most + 1)
    assert plans.plan_forward(problem, table, most, None).kernel.name.startswith("msda_forward<")


def assert_value(inputs: Inputs, grad_value: torch.Tensor) -> None:
    """The gradient of value must stay within the error budget."""
    same, exact = (
        reference_value(case, case.levels) for case in (inputs, inputs.to(torch.float64))
    )
    assert_within_budget(grad_value, same, exact)


def reference_value(inputs: Inputs, levels: Sequence[Level]) -> torch.Tensor:
    """The gradient of value by the reference."""
    points = inputs.locations, inputs.weights
    return reference.backward(inputs.grad_output, inputs.value, levels, *points)[0]


@on_encoders
def test_sums_of_sorted_points(inputs: Inputs) -> None:
    for seed in (0, 1):
        assert_value(inputs, backward_sorted(inputs, seed=seed))


def test_sorted_points_of_the_callers_grids() -> None:
    inputs = encoder(((9, 13), (4, 5)), m=2, lq=20 * 18)
    assert_value(inputs, backward_sorted(inputs, grids=((20, 18),)))


def placed(cells: Sequence[tuple[float, float]], sizes: Sizes, lq: int = 300) -> Inputs:
    """Inputs all of whose points lie at these pixel coordinates (x, y) of the first level, taking turns."""
    inputs = random_inputs(sizes, n=1, m=1, d=32, lq=lq, p=4)
    at = torch.tensor(cells, dtype=torch.float64)[torch.arange(lq * 4) % len(cells)]
    locations = (at.view(1, lq, 1, 1, 4, 2) + 0.5) / torch.tensor(sizes[0][::-1])
    return inputs._replace(locations=locations.expand_as(inputs.locations).float().contiguous())


WALKS = {
    "one-cell": [(3.3, 4.6)],
    "a-row-of-cells": [(x + 0.3, 2.7) for x in range(-1, 8)],
    "two-rows": [(x + 0.3, y + 0.2) for y in (2, 3) for x in range(-1, 8)],
    "end-of-a-row-and-the-next": [(7.25, 2.5), (-0.75, 3.5), (0.25, 3.5), (7.25, 3.5)],
    "every-cell": [(x + 0.4, y + 0.6) for y in range(-1, 8) for x in range(-1, 8)],
    "outside": [(-5.0, 3.0), (9.5, 3.0), (3.0, 40.0)],
    "corners": [(-0.5, -0.5), (7.5, -0.5), (-0.5, 7.5), (7.5, 7.5)],
}


@pytest.mark.parametrize("cells", WALKS.values(), ids=WALKS.keys())
def test_walks_from_cell_to_cell(cells: Sequence[tuple[float, float]]) -> None:
    """The sums go on in the right column's place only where the next cell has the same pixels there."""
    inputs = placed(cells, [(8, 8)])
    assert_value(inputs, backward_sorted(inputs))


def test_cells_of_another_level_in_the_same_memory() -> None:
    """Levels that overlap, of other widths: one cell's pixels are partly those of another's."""
    inputs = placed(WALKS["every-cell"], [(8, 8), (4, 16), (16, 4)])
    problem, _ = checked(inputs)
    table = LevelTable(((8, 8), (4, 16), (16, 4)), (0, 0, 0))
    grad_value = backward_sorted(inputs, table)
    levels = [level._replace(start=0) for level in inputs.levels]
    same, exact = (reference_value(case, levels) for case in (inputs, inputs.to(torch.float64)))
    assert problem.spatial_size == same.shape[1]
    assert_within_budget(grad_value, same, exact)


BROKEN = [
    ("(place.x >> 1 & 5) == (next.x & 5)", "true", "end-of-a-row-and-the-next"),
    ("if (!beside) {", "if (false) {", "two-rows"),
    ("beside ? sum[1][c]", "beside ? sum[0][c]", "a-row-of-cells"),
    ("  cell.move({0, 0});", "", "one-cell"),
]


@pytest.mark.parametrize(("right", "wrong", "walk"), BROKEN, ids=str)
def test_a_wrong_walk_shows(right: str, wrong: str, walk: str) -> None:
    source = assemble("backward_value_binned.cu")
    assert source.count(right) == 1
    inputs = placed(WALKS[walk], [(8, 8)])
    with pytest.raises(AssertionError):
        assert_value(inputs, backward_sorted(inputs, source=source.replace(right, wrong)))


def test_sums_reach_memory_once_for_many_points() -> None:
    """Two batches of 1024 points of one cell, added up by 32 groups each: 64 additions to each of its corners."""
    inputs = placed(WALKS["one-cell"], [(8, 8)], lq=512)
    counting = assemble("backward_value_binned.cu").replace(
        "s[0], s[1], s[2],", "1.0f, 1.0f, 1.0f,"
    )
    counts = backward_sorted(inputs, source=counting.replace("s[3]);", "1.0f);"))
    assert counts.unique().tolist() == [0, 64]
    assert (counts > 0).sum() == 4 * 32


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_sorted_sums_of_what_is_not_finite(bad: float) -> None:
    """It reaches the pixels of its own points and no other."""
    inputs = ENCODERS["several-images"]
    grad_output = inputs.grad_output.clone()
    grad_output[1, 5] = bad
    broken = inputs._replace(grad_output=grad_output)
    expected = reference_value(broken, inputs.levels)
    assert torch.equal(backward_sorted(broken).isfinite(), expected.isfinite())


@pytest.mark.parametrize("case", ["several-images", "d16-two-points"])
def test_order_under_sanitizers(case: str) -> None:
    inputs = ENCODERS[case]
    assert torch.equal(forward(inputs, 2, grids=(), sanitize=True), forward(inputs, 0))
    assert_value(inputs, backward_sorted(inputs, sanitize=True))


def test_gradients_of_points_in_order_under_sanitizers() -> None:
    inputs = ENCODERS["d16-two-points"]
    assert_same_bits(of_points(inputs, 2, (), sanitize=True), of_points(inputs, 0))


def test_ordered_forward_writes_every_output_once() -> None:
    inputs = ENCODERS["several-images"]
    problem, table = checked(inputs)
    output = poisoned(inputs.value, problem.output_shape)
    emulate(plans.plan_forward(problem, table, 2, ()), (*inputs.tensors, output))
    assert output.isfinite().all()
