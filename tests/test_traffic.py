# SPDX-License-Identifier: Apache-2.0
"""The model of memory traffic, on cases small enough to count by hand."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="Numba is not installed")
pytest.importorskip("torch", reason="torch is not installed")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
HEADS, POINTS = 8, 4
LEVEL_SIZES = [
    [(1, 1)],
    [(3, 5)],
    [(16, 16), (8, 8)],
    [(100, 167), (50, 84), (25, 42), (13, 21)],
    [(0, 7), (5, 1), (0, 0), (1, 9), (1, 1), (4, 0)],
    [(17, 33), (7, 9), (1, 40), (40, 1)],
]


@pytest.fixture(scope="module")
def model():
    """The model's module, found beside the script as the script finds it."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_model

        yield gpu_model
    finally:
        sys.path.remove(str(BENCHMARKS))


def access_of(model, cells, dtype="float32"):
    """Gathers from one level of 4 x 4."""
    return model.make_access(np.array([(4, 4, 0)]), cells.astype(np.int16), dtype)


def points_at(*places):
    """Cells of the first head of one query; all other points lie outside."""
    cells = np.full((1, HEADS, POINTS, 2), -2)
    cells[0, 0, : len(places)] = places
    return cells


def flushed(model, *places, walkers=1, fold=(64, 64)):
    """Rows that points in these cells add, directly and summed."""
    access = access_of(model, points_at(*places))
    return model.flushed_rows(access, np.arange(HEADS), 256, walkers, fold, 1)


@pytest.mark.parametrize("sizes", LEVEL_SIZES, ids=str)
@pytest.mark.parametrize("tile", [(1, 1), (2, 2), (4, 8), (16, 16)])
def test_the_tiled_order_is_a_permutation_that_keeps_tiles_together(model, sizes, tile):
    order = model.tiled_order(np.array(sizes), tile)
    assert sorted(order) == list(range(sum(h * w for h, w in sizes)))
    tile_of = [
        (level, y // tile[0], x // tile[1])
        for level, (h, w) in enumerate(sizes)
        for y, x in product(range(h), range(w))
    ]
    visited = [tile_of[query] for query in order]
    assert visited == sorted(visited)


def test_the_tiled_order_by_hand(model):
    order = model.tiled_order(np.array([(1, 2), (3, 5)]), (2, 2))
    within = [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert order.tolist() == [0, 1] + [2 + query for query in within]


def test_the_oldest_line_goes(model):
    cache = model.new_cache(3, 2)
    assert [model.touch(cache, line, 15) for line in (0, 1, 0, 2, 0, 1)] == [4, 4, 0, 4, 0, 4]


def test_lines_fill_by_sectors(model):
    cache = model.new_cache(2, 2)
    touched = [(0, 0b0011), (0, 0b0110), (0, 0b0111), (1, 0b1000), (0, 0b1111)]
    assert [model.touch(cache, *each) for each in touched] == [2, 1, 0, 1, 1]


@pytest.mark.parametrize(("capacity", "second_pass"), [(9, 4), (10, 0)])
def test_a_stream_longer_than_the_cache_never_hits(model, capacity, second_pass):
    cache = model.new_cache(10, capacity)
    missed = [model.touch(cache, line, 15) for line in [*range(10), *range(10)]]
    assert missed == [4] * 10 + [second_pass] * 10


@pytest.mark.parametrize(("dtype", "sectors"), [("float32", 4), ("float16", 2)])
def test_a_tile_reads_its_working_set_once(model, dtype, sectors):
    cells = np.array(list(product(range(4), range(4))))[:, None, None]
    access = access_of(model, np.tile(cells, (1, HEADS, POINTS, 1)), dtype)
    work, steps = np.arange(16 * HEADS), np.arange(4).reshape(2, 2)
    read, missed = model.run_sm(model.new_cache(128, 128), access, work, steps, 32)
    # Along an axis, four cells have two positions inside, but the last has one.
    assert read == 7 * 7 * HEADS * POINTS * sectors
    assert missed == 4 * 4 * HEADS * sectors


@pytest.mark.parametrize("blocks", [1, 5, 24, 25, 100])
def test_every_block_of_work_is_done_once(model, blocks):
    gpu = model.Gpu(sms=3, resident=4)
    for share in (model.PLAIN, model.CHUNK):
        steps = np.concatenate([step.ravel() for step in model.assign(share, blocks, gpu)])
        assert sorted(steps[steps >= 0]) == list(range(blocks))


def test_a_plain_grid_deals_blocks_and_chunks_are_contiguous(model):
    gpu = model.Gpu(sms=2, resident=2)
    plain, chunk = (model.assign(share, 8, gpu)[0].tolist() for share in (model.PLAIN, model.CHUNK))
    assert plain == [[0, 2], [4, 6]]
    assert chunk == [[0, 1], [2, 3]]


def test_sums_leave_when_the_cell_changes(model):
    # Two points share a cell, a third shares a column with it, the fourth shares nothing.
    assert flushed(model, (0, 0), (2, 2), (0, 1), (0, 0)) == (16, 4 + 2 + 4)
    assert flushed(model, (0, 0), (2, 2), (0, 1), (0, 0), walkers=2) == (16, 4 + 4 + 4)


def test_corners_outside_add_nothing(model):
    assert flushed(model, (-1, -1), (3, 3), (3, 0), (-1, 2)) == (1 + 1 + 2 + 2,) * 2
    assert flushed(model, (4, 0), (0, -2)) == (0, 0)


def test_cells_that_share_a_bin_interrupt_each_other(model):
    cells = (0, 0), (2, 0), (0, 0)
    assert flushed(model, *cells) == (12, 8)
    assert flushed(model, *cells, fold=(2, 64)) == (12, 12)


def test_the_script_predicts_less_traffic_in_tiles(model, tmp_path, monkeypatch, capsys):
    import traffic

    from cupy_msda.bench.cases import Shape

    # A level of 1 MB on four multiprocessors with 16 KB of L1 each: nothing large fits, as on a GPU.
    monkeypatch.setitem(traffic.SHAPES, "one level", Shape(1, ((32, 32),), None))
    monkeypatch.setattr(traffic, "ENCODERS", ("one level",))
    monkeypatch.setattr(traffic, "LOCATIONS", ("uniform", "sigma 2"))
    output = tmp_path / "traffic.json"
    arguments = ["--l1", "16", "--sms", "4", "--sampled", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["traffic.py", *arguments])
    traffic.main()
    assert "not measured" in output.read_text()
    rows = json.loads(output.read_text())["forward"]
    moved = {(row["locations"], row["dtype"], row["order"]): row["l2_mb"] for row in rows}
    assert (
        moved["sigma 2", "float32", "chunk, tiles of 16"]
        < moved["sigma 2", "float32", "head-major"]
    )
    assert "one level, float16, sigma 2" in capsys.readouterr().out


def image_pairs(model, sizes=((4, 4, 0),), grids=((2, 8),), cell=(0, 0)):
    """Two images of 16 queries; only the first quarter of the queries of each samples anything, one cell."""
    cells = np.full((2 * 16, HEADS, POINTS, 2), -2)
    for image in range(2):
        cells[16 * image : 16 * image + 4] = cell
    levels, grids = np.array(sizes), np.array(grids)
    return model.make_access(levels, cells.astype(np.int16), "float32", images=2, grids=grids)


def test_images_share_no_value(model):
    access = image_pairs(model)
    cache = model.new_cache(2 * 16 * HEADS, 2 * 16 * HEADS)
    first, again, second = (model.gather(cache, access, row * HEADS, 0) for row in (0, 1, 16))
    assert (first, again, second) == ((16, 16), (16, 0), (16, 16))
    assert model.gather(cache, access, 4 * HEADS, 0) == (0, 0)


def test_work_goes_image_by_image_in_tiles_of_the_given_grids(model):
    access = image_pairs(model)
    work = model.make_work(model.Order((2, 2)), access)
    assert sorted(work) == list(range(2 * 16 * HEADS))
    of_head = (work // HEADS).reshape(2, HEADS, 16)
    tiles = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert (of_head[0] == tiles).all()
    assert (of_head[1] == [16 + query for query in tiles]).all()
    assert (work.reshape(2, HEADS, 16) % HEADS == np.arange(HEADS)[:, None]).all()


def test_ranges_are_uneven_where_only_some_queries_sample(model):
    """As in BEVFormer's cameras: a plain grid deals blocks out, a contiguous range lies inside or outside the view."""
    cells = np.full((1280, HEADS, POINTS, 2), -2)
    cells[:256] = 0
    access = model.make_access(np.array([(32, 32, 0)]), cells.astype(np.int16), "float32")
    gpu = model.Gpu(l1=16, sms=32, sampled=32)
    plain, chunk = (
        model.traffic(access, order, gpu, 32)[2]
        for order in (model.Order(), model.Order((1, 1), model.CHUNK))
    )
    # Each of the 8 heads has four ranges: the first does all the work.
    assert chunk == 4
    assert plain == 1
