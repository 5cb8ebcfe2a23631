# SPDX-License-Identifier: Apache-2.0
"""The tile scheduler: the order itself, and what persistent blocks compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
from cupy_msda.cuda.plans import Choice
from cupy_msda.problem import Grids, LevelTable, Problem
from tests.emulator.cases import UNKNOWN, check_value
from tests.emulator.emulator import Emulated
from tests.emulator.encoders import (
    ENCODERS,
    RAGGED,
    Sizes,
    encoder,
    on_encoders,
    queries,
)
from tests.emulator.launches import backward, backward_binned, checked, device, forward
from tests.problems import Inputs

TILES = {"TILE, TILE": (16, 16), "4, 8": (4, 8)}
BY_QUERY_TILES = Choice("query tiles", "test")


def tiled(sizes: Sizes, tile: tuple[int, int] = (16, 16)) -> list[int]:
    """The order, spelled out: grids, bands of rows, tiles of a band, rows of a tile, columns."""
    order, start = [], 0
    high, wide = tile
    for h, w in sizes:
        for top, left in product(range(0, h, high), range(0, w, wide)):
            rows, columns = range(top, min(top + high, h)), range(left, min(left + wide, w))
            order += [start + y * w + x for y, x in product(rows, columns)]
        start += h * w
    return order


ORDERS = """
__global__ void orders(int* order, const long long* sizes, const SchedulerParams<4> p) {
  __shared__ Level levels[4];
  __shared__ TileScheduler shared;
  load_levels(levels, sizes, static_cast<const long long*>(nullptr), p);
  load_scheduler(shared, levels, p);
  for (int i = threadIdx.x; i < p.num_queries; i += BLOCK) order[i] = scheduled_query<TILE_SIZES>(i, shared);
}
"""
RANGES = """
__global__ void ranges(unsigned* begins, const long long* sizes, const SchedulerParams<4> p) {
  __shared__ Level levels[4];
  __shared__ TileScheduler shared;
  load_levels(levels, sizes, static_cast<const long long*>(nullptr), p);
  load_scheduler(shared, levels, p);
  if (threadIdx.x < 2) begins[blockIdx.x + threadIdx.x] = range_begin(shared, p, blockIdx.x + threadIdx.x);
}
"""
VISITS = """
__global__ void visits(int* times, const long long* sizes, const SchedulerParams<4> p) {
  __shared__ Level levels[4];
  __shared__ TileScheduler shared;
  load_levels(levels, sizes, static_cast<const long long*>(nullptr), p);
  load_scheduler(shared, levels, p);
  visit_rows<8>(shared, p, [&](unsigned row, unsigned, bool counts) {
    if (counts && threadIdx.x % 8 == 0) atomicAdd(&times[row], 1);
  });
}
"""


def kernel_order(
    lq: int, levels: Sizes | None, grids: Sizes = (), tile: str = "TILE, TILE"
) -> list[int]:
    """The order of the kernels for levels on the device or, without, for grids."""
    order = np.full(lq, -1, np.int32)
    source = ORDERS.replace("TILE_SIZES", tile)
    run_scheduler(source, "orders", 1, order, levels, grids)
    return list(order)


def run_scheduler(
    source: str,
    name: str,
    blocks: int,
    out: np.ndarray,
    levels: Sizes | None,
    grids: Sizes,
    threads: int = 256,
) -> None:
    """Run a kernel on the scheduler of two heads of as many queries as the grids or levels have."""
    lq = out.size if name == "orders" else queries(grids or levels or ())
    problem = Problem(1, 10**6, 2, 8, lq, 4, 1, "float32", "float32", "float32")
    table = LevelTable(((1, 1),) * 4, (0,) * 4)
    # Planned for a device that any number of queries fills, and with grids even where the kernel is to take the levels.
    (launch,) = plans.plan_forward(problem, table, device(0), tuple(grids) or ((1, lq),)).launches
    params = launch.params.copy()
    params["num_grids"] = len(grids)
    sizes = None if levels is None else np.array(levels, np.int64)
    kernel = Emulated(assemble("tile_scheduler.cuh") + source, name)
    kernel((blocks, 1, 1), (threads, 1, 1), [out, sizes, params])


@pytest.mark.parametrize(
    "sizes",
    [RAGGED, ((16, 16), (32, 48), (1, 1), (1, 70)), ((0, 5), (33, 3), (7, 0), (17, 17))],
    ids=str,
)
@pytest.mark.parametrize(("name", "tile"), TILES.items())
def test_order_is_tile_by_tile(sizes: Sizes, name: str, tile: tuple[int, int]) -> None:
    assert sorted(tiled(sizes, tile)) == list(range(queries(sizes)))
    assert kernel_order(queries(sizes), sizes, tile=name) == tiled(sizes, tile)
    assert kernel_order(queries(sizes), None, sizes, tile=name) == tiled(sizes, tile)


@pytest.mark.parametrize(
    "levels", [((20, 30), (10, 15), (5, 8), (3, 4)), ((3, 4), (20, 30), (5, 8), (1, 1))], ids=str
)
def test_ranges_of_persistent_blocks_cost_the_same(levels: Sizes) -> None:
    """A row of the largest level costs 11, the others 12; a range ends where a row does."""
    of_head = np.concatenate([np.full(h * w, 11 if (h, w) == (20, 30) else 12) for h, w in levels])
    costs = np.tile(of_head, 2)
    begins = np.zeros(8, np.uint32)
    run_scheduler(RANGES, "ranges", 7, begins, levels, ())
    assert begins[0] == 0
    assert begins[-1] == costs.size
    shares = [costs[begin:end].sum() for begin, end in pairwise(begins)]
    assert max(abs(share - costs.sum() / 7) for share in shares) <= 12
    rows = np.diff(begins.astype(int))
    assert rows.max() - rows.min() > 2  # equal numbers of rows would not cost the same


def test_ranges_of_queries_that_are_no_grid_are_equal() -> None:
    begins = np.zeros(8, np.uint32)
    levels = ((20, 30), (10, 15), (5, 8), (3, 4))
    run_scheduler(RANGES, "ranges", 7, begins, levels, ((1, queries(levels)),))
    assert np.ptp(np.diff(begins.astype(int))) <= 1


@pytest.mark.parametrize("blocks", [1, 3, 7])
@pytest.mark.parametrize("levels", [RAGGED, ((2, 3), (1, 1), (0, 4), (3, 1))], ids=str)
def test_persistent_blocks_visit_every_row_once(levels: Sizes, blocks: int) -> None:
    times = np.zeros(2 * queries(levels), np.int32)  # of two heads
    run_scheduler(VISITS, "visits", blocks, times, levels, (), threads=1024)
    assert (times == 1).all()


def test_order_of_one_grid_given_by_the_caller() -> None:
    assert kernel_order(20 * 21, RAGGED, ((20, 21),)) == tiled([(20, 21)])


@pytest.mark.parametrize("lq", [queries(RAGGED) - 1, queries(RAGGED) + 1])
def test_queries_that_are_no_grid_are_taken_as_they_come(lq: int) -> None:
    assert kernel_order(lq, RAGGED) == list(range(lq))


def is_persistent(inputs: Inputs, multiprocessors: int, grids: Grids = None) -> bool:
    """Whether the forward and the gradients of the points are planned on persistent blocks."""
    case = *checked(inputs), device(multiprocessors), grids
    both = plans.plan_forward(*case), plans.plan_backward(*case, needs_value=False)
    persistent = {"_persistent<" in plan.launches[0].kernel.name for plan in both}
    assert len(persistent) == 1
    return persistent.pop()


def of_points(
    inputs: Inputs, multiprocessors: int, grids: Grids = (), **options: Any
) -> list[torch.Tensor]:
    """The gradients of locations and weights alone; persistent unless `grids` is ()."""
    needs = False, True
    return backward(inputs, multiprocessors, needs=needs, grids=grids, **options)[1:]


def assert_same_bits(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Both gradients must be whole and equal."""
    for one, other in zip(actual, expected, strict=True):
        assert other.isfinite().all()
        assert torch.equal(one, other)


@on_encoders
def test_persistent_forward_is_bitwise_identical(inputs: Inputs) -> None:
    plain = forward(inputs, 0)
    for multiprocessors, seed in ((1, 0), (2, 1)):
        assert is_persistent(inputs, multiprocessors)
        assert torch.equal(forward(inputs, multiprocessors, grids=None, seed=seed), plain)


def test_any_number_of_blocks_takes_all_rows() -> None:
    inputs = ENCODERS["several-images"]
    plain = forward(inputs, 0)
    for multiprocessors in range(3, 16, 3):
        assert is_persistent(inputs, multiprocessors)
        assert torch.equal(forward(inputs, multiprocessors, grids=None), plain)


@pytest.mark.parametrize("case", ["several-images", "bf16", "d16-two-points"])
def test_query_tiles_are_bitwise_identical(case: str) -> None:
    inputs = ENCODERS[case]
    by_tiles = {"grids": None, "choice": BY_QUERY_TILES}
    plain = forward(inputs, 0)
    for options in ({"seed": 1}, {"table": UNKNOWN, "tables": (inputs.shapes(), None), "seed": 2}):
        assert torch.equal(forward(inputs, 1, **by_tiles, **options), plain)


def test_query_tiles_by_the_callers_grids_and_under_the_sanitizers() -> None:
    inputs = encoder(((9, 13), (4, 5)), m=2, lq=20 * 18)
    output = forward(inputs, 1, grids=((20, 18),), choice=BY_QUERY_TILES, sanitize=True)
    assert torch.equal(output, forward(inputs, 0))


# Three images, 16 bits, points in a last stage that is not full, and in no full one.
@pytest.mark.parametrize(
    "case", ["several-images", "bf16", "five-levels-three-points", "d16-two-points"]
)
def test_persistent_gradients_of_points_are_bitwise_identical(case: str) -> None:
    inputs = ENCODERS[case]
    plain = of_points(inputs, 0)
    for multiprocessors, seed in ((1, 0), (2, 1)):
        assert is_persistent(inputs, multiprocessors)
        assert_same_bits(of_points(inputs, multiprocessors, None, seed=seed), plain)


def test_the_order_of_the_callers_grids() -> None:
    inputs = encoder(((9, 13), (4, 5)), m=2, lq=20 * 18)
    assert not is_persistent(inputs, 1)
    assert is_persistent(inputs, 1, ((20, 18),))
    assert torch.equal(forward(inputs, 1, grids=((20, 18),)), forward(inputs, 0))
    assert_same_bits(of_points(inputs, 1, ((20, 18),)), of_points(inputs, 0))


def test_order_by_a_table_on_the_device() -> None:
    inputs = ENCODERS["several-images"]
    unknown: dict[str, Any] = {"table": UNKNOWN, "tables": (inputs.shapes(), None)}
    assert torch.equal(forward(inputs, 2, grids=None, **unknown), forward(inputs, 0))
    assert_same_bits(of_points(inputs, 2, None, **unknown), of_points(inputs, 0))
    check_value(inputs, backward_binned(inputs, **unknown))


def test_levels_that_do_not_fit_give_nan() -> None:
    inputs = ENCODERS["several-images"]
    sizes = inputs.shapes()
    sizes[1, 0] = 10**6
    unknown: dict[str, Any] = {"table": UNKNOWN, "tables": (sizes, inputs.starts())}
    assert forward(inputs, 2, grids=None, **unknown).isnan().all()
    assert forward(inputs, 0, **unknown).isnan().all()
    gradients = zip(of_points(inputs, 2, None, **unknown), of_points(inputs, 0), strict=True)
    for actual, plain in gradients:
        assert actual[:, :, :, 1].isnan().all()
        assert torch.equal(actual[:, :, :, 0], plain[:, :, :, 0])


def test_persistent_only_if_every_multiprocessor_has_a_full_block() -> None:
    problem, _ = checked(ENCODERS["f32"])  # rows of 8 lanes, blocks of 1024
    most = problem.num_queries * problem.num_heads * 8 // 1024
    assert is_persistent(ENCODERS["f32"], most)
    assert not is_persistent(ENCODERS["f32"], most + 1)
    assert not is_persistent(ENCODERS["f32"], most, ())


@pytest.mark.parametrize("case", ["several-images", "d16-two-points"])
def test_under_the_sanitizers(case: str) -> None:
    inputs = ENCODERS[case]
    assert torch.equal(forward(inputs, 2, grids=None, sanitize=True), forward(inputs, 0))
    check_value(inputs, backward_binned(inputs, sanitize=True))


def test_gradients_of_points_under_the_sanitizers() -> None:
    inputs = ENCODERS["d16-two-points"]
    assert_same_bits(of_points(inputs, 2, None, sanitize=True), of_points(inputs, 0))


def test_persistent_forward_writes_every_output() -> None:
    assert forward(ENCODERS["several-images"], 2, grids=None).isfinite().all()  # of poisoned memory
