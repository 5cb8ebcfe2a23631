# SPDX-License-Identifier: Apache-2.0
"""The tile scheduler: the order itself, and what persistent blocks compute."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
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

TILE = 16


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
    table = LevelTable(((1, 1),) * 4, (0,) * 4)
    # Planned for a device that any number of queries fills, and with grids even where the kernel is to take the levels.
    (launch,) = plans.plan_forward(problem, table, device(0), tuple(grids) or ((1, lq),)).launches
    params = launch.params.copy()
    params["num_grids"] = len(grids)
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
