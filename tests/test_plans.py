# SPDX-License-Identifier: Apache-2.0
"""Which kernels, grids, arguments and fills a call launches; no device runs anything."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.plans import ARRAYS, Device, Fill, Launch, plan_backward, plan_forward
from cupy_msda.problem import (
    MAX_GRIDS,
    MAX_HOST_LEVELS,
    MAX_UNEVEN_LEVELS,
    NO_TABLE,
    LevelTable,
    Problem,
    References,
)
from tests.emulator import launches
from tests.problems import random_inputs

H100 = Device(132, "90")
DECODER = Problem(2, 22223, 8, 32, 900, 4, 4, *["float32"] * 3)
FEW = DECODER._replace(batch=1, num_queries=10)
MANY_QUERIES = DECODER._replace(num_queries=9000)  # no grid is known, and too many points for tiles
ENCODER = DECODER._replace(num_queries=22223)
GENERIC = DECODER._replace(head_dim=30)
HALF = {"value_dtype": "float16"}
DOUBLE = dict.fromkeys(("value_dtype", "location_dtype", "weight_dtype"), "float64")

SIZES, STARTS = ((100, 167), (50, 84), (25, 42), (13, 21)), (0, 16700, 20900, 21950)
TABLES = {
    "host": LevelTable(SIZES, STARTS),
    "sizes": LevelTable(SIZES, None),
    "starts": LevelTable(None, STARTS),
    "device": NO_TABLE,
}


def steps(plan):
    """Kernels by name, without template arguments; fills by array."""
    return [
        f"fill {step.array}" if isinstance(step, Fill) else step.kernel.name.partition("<")[0]
        for step in plan.launches
    ]


def forward_of(problem, multiprocessors=132, grids=None, table=NO_TABLE):
    """The one launch of a forward."""
    (launch,) = plan_forward(problem, table, Device(multiprocessors, "90"), grids).launches
    return launch


def points_of(problem, multiprocessors=132, grids=None):
    """The one launch of a backward without the gradient of value."""
    device = Device(multiprocessors, "90")
    (launch,) = plan_backward(problem, NO_TABLE, device, grids, needs_value=False).launches
    return launch


def split_k(launch):
    """The template argument after M, D and how points are sampled."""
    return int(launch.kernel.name.partition("Sampling<")[2].split(">")[1].split(", ")[1])


# --- which steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "kernel", "reason"),
    [
        (DECODER, "msda_forward", "plain, split-K 1, blocks of 64: model"),
        (FEW, "msda_forward", "plain, split-K 4, blocks of 64: model"),
        (MANY_QUERIES, "msda_forward", "plain, split-K 1: model"),
        (ENCODER, "msda_forward_persistent", "persistent, 1 per multiprocessor: model"),
        (GENERIC, "msda_forward_generic", "generic, D = 30: model"),
        (ENCODER._replace(**DOUBLE), "msda_forward_generic", "generic, float64: model"),
    ],
)
def test_forward(problem, kernel, reason):
    plan = plan_forward(problem, NO_TABLE, H100)
    assert steps(plan) == [kernel]
    assert plan.workspace == 0
    assert plan.reason.startswith(reason)


POINTS = {"needs_value": False}
VALUE = {"needs_points": False}
BACKWARDS = {
    "float32": (DECODER, {}, ["fill grad_value", "msda_backward"]),
    "float32, value alone": (DECODER, VALUE, ["fill grad_value", "msda_backward"]),
    "float32, points alone": (DECODER, POINTS, ["msda_backward"]),
    "16 bits": (DECODER._replace(**HALF), {}, ["fill accumulator", "msda_backward", "msda_round"]),
    "16 bits, points alone": (DECODER._replace(**HALF), POINTS, ["msda_backward"]),
    "generic": (GENERIC, {}, ["fill grad_value", "msda_backward_generic"]),
    "generic, points alone": (GENERIC, POINTS, ["msda_backward_generic"]),
    "generic, 16 bits": (
        GENERIC._replace(value_dtype="bfloat16"),
        {},
        ["fill accumulator", "msda_backward_generic", "msda_round"],
    ),
    "encoder": (
        ENCODER,
        {},
        ["fill grad_value", "msda_backward_value_binned", "msda_backward_persistent"],
    ),
    "encoder, value alone": (ENCODER, VALUE, ["fill grad_value", "msda_backward_value_binned"]),
    "encoder, points alone": (ENCODER, POINTS, ["msda_backward_persistent"]),
    "encoder, 16 bits": (
        ENCODER._replace(**HALF),
        VALUE,
        ["fill accumulator", "msda_backward_value_binned", "msda_round"],
    ),
    "a whole warp to a row": (
        ENCODER._replace(head_dim=128, num_heads=2),
        {},
        ["fill grad_value", "msda_backward_value_binned", "msda_backward"],
    ),
}
TILED = {
    "all": (DECODER, {}, ["msda_backward_value_tiled", "msda_backward"]),
    "16 bits": (DECODER._replace(**HALF), {}, ["msda_backward_value_tiled", "msda_backward"]),
    "value alone": (DECODER, VALUE, ["msda_backward_value_tiled"]),
    "points alone": (DECODER, POINTS, ["msda_backward"]),
}
FIXED_POINT = {
    "direct": (MANY_QUERIES, {}, ["msda_backward"]),
    "16 bits, value alone": (MANY_QUERIES._replace(**HALF), VALUE, ["msda_backward"]),
    "generic": (GENERIC, {}, ["msda_backward_generic"]),
    "float64": (DECODER._replace(**DOUBLE), {}, ["msda_backward_generic"]),
    "binned": (ENCODER, {}, ["msda_backward_value_binned", "msda_backward_persistent"]),
    "binned, value alone": (ENCODER, VALUE, ["msda_backward_value_binned"]),
}


@pytest.mark.parametrize(("problem", "needs", "expected"), BACKWARDS.values(), ids=BACKWARDS.keys())
def test_backward(problem, needs, expected):
    plan = plan_backward(problem, NO_TABLE, H100, **needs)
    assert steps(plan) == expected
    accumulates = "fill accumulator" in expected
    assert plan.workspace == (4 * problem.value_elements if accumulates else 0)


@pytest.mark.parametrize(("problem", "needs", "expected"), TILED.values(), ids=TILED.keys())
def test_deterministic_backward_of_few_points(problem, needs, expected):
    plan = plan_backward(problem, NO_TABLE, H100, **needs, deterministic=True)
    assert steps(plan) == expected
    assert plan.workspace == 0


@pytest.mark.parametrize(
    ("problem", "needs", "expected"), FIXED_POINT.values(), ids=FIXED_POINT.keys()
)
def test_deterministic_backward_in_fixed_point(problem, needs, expected):
    plan = plan_backward(problem, NO_TABLE, H100, **needs, deterministic=True)
    before, after = ["fill accumulator", "msda_fixed_point_scale"], ["msda_fixed_point_finish"]
    assert steps(plan) == before + expected + after
    assert plan.workspace == 8 * plans.num_fixed_point(problem)
    # The last template argument says that the accumulator is in fixed point.
    assert plan.launches[2].kernel.name.endswith(", true>")


def test_words_of_the_fixed_point_accumulators():
    """One 64-bit word for each element of value, or two for float64, and a unit for each image and head."""
    small = Problem(2, 10, 3, 4, 5, 1, 1, *["float32"] * 3)
    assert plans.num_fixed_point(small) == 2 * 10 * 3 * 4 + 2 * 3
    assert plans.num_fixed_point(small._replace(**HALF)) == 2 * 10 * 3 * 4 + 2 * 3
    assert plans.num_fixed_point(small._replace(**DOUBLE)) == 2 * 2 * 10 * 3 * 4 + 2 * 3


def test_only_what_is_needed_is_in_the_template():
    """Whether the kernel has gradients of value, of points, and in fixed point."""

    def flags(**needs):
        plan = plan_backward(MANY_QUERIES, NO_TABLE, H100, **needs)
        kernel = plan.launches[steps(plan).index("msda_backward")].kernel
        return kernel.name.rstrip(">").split(", ")[-3:]

    assert flags() == ["true", "true", "false"]
    assert flags(**VALUE) == ["true", "false", "false"]
    assert flags(**POINTS) == ["false", "true", "false"]
    assert flags(deterministic=True) == ["true", "true", "true"]


def test_no_gradient_is_no_launch():
    plan = plan_backward(DECODER, NO_TABLE, H100, needs_value=False, needs_points=False)
    assert (plan.launches, plan.workspace) == ((), 0)


@pytest.mark.parametrize("name", Problem._fields[:7])
@pytest.mark.parametrize("deterministic", [False, True])
def test_empty_problems_are_filled_with_zeros(name, deterministic):
    problem = Problem(2, 12, 3, 8, 5, 2, 4, "float16", "float32", "float32")
    problem = problem._replace(**{name: 0})
    output = plan_forward(problem, NO_TABLE, H100)
    backward = plan_backward(problem, NO_TABLE, H100, deterministic=deterministic)
    rows = problem.batch * problem.num_queries * problem.num_heads
    points = rows * problem.num_levels * problem.num_points
    value = problem.batch * problem.spatial_size * problem.num_heads * problem.head_dim
    expected = {
        "output": 2 * rows * problem.head_dim,
        "grad_value": 2 * value,
        "grad_locations": 4 * 2 * points,
        "grad_weights": 4 * points,
    }
    fills = [*output.launches, *backward.launches]
    assert fills == [Fill(array, size) for array, size in expected.items() if size]
    assert output.workspace == backward.workspace == 0


def test_an_empty_problem_fills_no_gradient_that_is_not_needed():
    empty = DECODER._replace(num_queries=0)
    assert steps(plan_backward(empty, NO_TABLE, H100, needs_points=False)) == ["fill grad_value"]
    assert steps(plan_backward(empty, NO_TABLE, H100, needs_value=False)) == []


# --- which kernels take a problem -------------------------------------------------------------------

LARGE = {
    "positions": {"spatial_size": 2**22, "num_heads": 1},
    "bytes": {"spatial_size": 2**21, "num_heads": 8, "head_dim": 32},
    "levels": {"num_levels": 17},
    "head-dim": {"head_dim": 256},
    "odd-head-dim": {"head_dim": 30},
    "narrow-head-dim": {"head_dim": 4},
    "no-power-of-two": {"head_dim": 48},
    "double": DOUBLE,
}


@pytest.mark.parametrize("change", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("deterministic", [False, True])
def test_generic_kernels_take_what_the_specialised_cannot(change, deterministic):
    def files(problem, grids):
        plan = plan_backward(problem, NO_TABLE, H100, grids, deterministic=deterministic)
        both = (plan_forward(problem, NO_TABLE, H100, grids), plan)
        found = {s.kernel.file for p in both for s in p.launches if isinstance(s, Launch)}
        return found - {"fixed_point.cu"}

    changed = DECODER._replace(**change)
    for grids in (None, ((30, 30),)):
        assert "generic.cu" not in files(DECODER, grids)
        assert files(changed, grids) == {"generic.cu"}
    assert plan_forward(changed, NO_TABLE, H100).reason.startswith("generic, ")


@pytest.mark.parametrize("name", ["positions", "bytes", "levels"])
def test_specialised_kernels_take_all_below_their_limits(name):
    change = dict(LARGE[name])
    first = next(iter(change))
    assert forward_of(DECODER._replace(**change)).kernel.file == "generic.cu"
    change[first] -= 1
    assert forward_of(DECODER._replace(**change)).kernel.file == "forward.cu"


def test_the_forward_of_16_bits_has_twice_the_channels_to_a_lane():
    """So that it takes D = 256, which the backward, in float32, does not."""
    wide = DECODER._replace(head_dim=256, **HALF)
    assert forward_of(wide).kernel.file == "forward.cu"
    assert points_of(wide).kernel.file == "generic.cu"


def test_tiles_take_few_points_of_what_the_specialised_kernels_take():
    few = DECODER._replace(num_queries=plans.MAX_POINTS_TILED // 4)
    assert plans.is_tiled(few)
    (tiled,) = plan_backward(few, NO_TABLE, H100, deterministic=True, **VALUE).launches
    assert tiled.grid == (2 * 8 * 174, 1, 1)  # of 128 positions with 32 channels
    for change in (
        {"num_queries": few.num_queries + 1},
        {"num_points": 5},
        *LARGE.values(),
        {"batch": 2**31 // (8 * 174) + 1},
    ):
        assert not plans.is_tiled(few._replace(**change))


@pytest.mark.parametrize(
    ("changed", "binned"),
    [({}, True), ({"num_levels": 8}, True), ({"num_levels": 9, "num_points": 3}, False), ({"num_points": 9}, False)],
)  # fmt: skip
def test_binned_points_have_room_for_few_levels_and_points(changed, binned):
    plan = plan_backward(ENCODER._replace(**changed), NO_TABLE, H100)
    assert ("msda_backward_value_binned" in steps(plan)) == binned
    # The gradients of points then come from the same kernel.
    assert ("msda_backward_persistent" in steps(plan)) == binned


def test_rows_are_split_only_while_the_device_is_not_full():
    problem = Problem(2, 64, 8, 32, 300, 4, 4, *["float32"] * 3)
    splits = [split_k(forward_of(problem, count)) for count in (1, 132, 10**6)]
    assert splits[0] == 1
    assert splits == sorted(splits)
    assert splits[-1] == 4  # the most that four groups of eight lanes allow
    assert split_k(points_of(problem, 1)) == 1
    assert split_k(points_of(problem, 10**6)) == 2  # 16 points for the eight lanes of each group
    assert split_k(forward_of(problem._replace(num_levels=1, num_points=3), 10**6)) == 1


def test_a_split_row_takes_more_lanes():
    problem = Problem(1, 64, 8, 32, 320, 4, 4, *["float32"] * 3)
    assert forward_of(problem, 1).grid == (320 * 8 // 256, 8, 1)
    assert forward_of(problem, 10**6).grid == (320 * 32 // 64, 8, 1)


def test_rows_of_less_than_a_wave_go_into_small_blocks():
    """Four blocks of 256 threads fit on a multiprocessor; here 300 queries of 8 heads make 80 blocks."""
    problem = Problem(1, 64, 8, 32, 300, 4, 4, *["float32"] * 3)
    for multiprocessors, threads in ((18, 256), (19, 64), (132, 64)):
        launch = forward_of(problem, multiprocessors)
        queries = threads // (8 * split_k(launch))
        assert launch.block == (threads, 1, 1)
        assert launch.grid == (-(-300 // queries), 8, 1)


def test_both_block_sizes_are_candidates_where_rows_are_few():
    names = list(map(str, plans.forward_candidates(FEW, H100, None)))
    assert names == ["plain, split-K 4, blocks of 64", "plain, split-K 4"]
    names = list(map(str, plans.backward_candidates(FEW, H100, None, False, True, False)))
    small = [f"plain, split-K {k}, blocks of 64" for k in (2, 1)]
    assert names == [*small, "plain, split-K 2"]


def test_few_points_need_neither_fill_nor_atomics():
    """Output-stationary tiles are a candidate, though not the model's: they have not been measured."""
    candidates = plans.backward_candidates(FEW, H100, None, True, True, False)
    assert [candidate.value for candidate in candidates] == ["", "", "", "tiled"]
    choice = plans.Choice(str(candidates[-1]), "test")
    plan = plan_backward(FEW, NO_TABLE, H100, choice=choice)
    assert steps(plan) == ["msda_backward_value_tiled", "msda_backward"]
    many = plans.backward_candidates(MANY_QUERIES, H100, None, True, True, False)
    assert "tiled" not in {candidate.value for candidate in many}


def test_as_many_parts_as_a_row_has_stages():
    """12 points are a stage of 8 and one of 4, or two parts of 6; 6 points are one stage."""
    for points, parts in ((4, 2), (2, 1)):
        assert split_k(points_of(FEW._replace(num_levels=3, num_points=points))) == parts


# --- how points are sampled -----------------------------------------------------------------------------

UNEVEN = ENCODER._replace(num_points=(3, 6, 0, 3))
SAMPLING = {
    "even": (ENCODER, "Sampling<false, false, 4, 4, 4, 4>"),
    "uneven": (UNEVEN, "Sampling<false, false, 3, 6, 0, 3>"),
    "nearest": (
        ENCODER._replace(interpolation="nearest"),
        "Sampling<true, false, 4, 4, 4, 4>",
    ),
    "masked": (ENCODER._replace(has_mask=True), "Sampling<false, true, 4, 4, 4, 4>"),
    "all": (
        UNEVEN._replace(interpolation="nearest", has_mask=True),
        "Sampling<true, true, 3, 6, 0, 3>",
    ),
}


@pytest.mark.parametrize(("problem", "sampling"), SAMPLING.values(), ids=SAMPLING.keys())
def test_every_kernel_of_points_knows_how_they_are_sampled(problem, sampling):
    def planned(problem, grids=None):
        yield from plan_forward(problem, NO_TABLE, H100, grids).launches
        for deterministic in (False, True):
            yield from plan_backward(
                problem, NO_TABLE, H100, grids, deterministic=deterministic
            ).launches

    few = problem._replace(num_queries=900)
    kernels = [
        launch.kernel.name
        for case in (planned(problem), planned(problem, ()), planned(few), planned(few, ()))
        for launch in case
        if isinstance(launch, Launch) and "weights" in launch.arguments
    ]
    without_levels = f"{sampling.split(', ')[0]}, {sampling.split(', ')[1]}>"
    names = {name.partition("<")[0] for name in kernels}
    assert names == {
        *("msda_forward", "msda_forward_persistent", "msda_backward", "msda_backward_persistent"),
        *("msda_backward_value_binned", "msda_backward_value_tiled", "msda_fixed_point_scale"),
    }
    for name in kernels:
        assert (without_levels if "fixed_point" in name else sampling) in name


def test_generic_kernels_take_the_points_of_the_levels_at_run_time():
    for problem in (UNEVEN, UNEVEN._replace(num_points=4)):
        name = forward_of(problem._replace(head_dim=30)).kernel.name
        assert name == "msda_forward_generic<float, float, float, Sampling<false, false>>"


def test_parts_of_uneven_points_are_equal():
    few = DECODER._replace(batch=1, num_queries=10, num_levels=3)
    for points, most in (((3, 6, 3), 4), ((3, 6, 4), 1), ((2, 3, 5), 2)):
        assert split_k(forward_of(few._replace(num_points=points), 10**6)) == most


def test_tiles_take_few_points_of_the_level_that_has_most():
    uneven = DECODER._replace(num_points=(3, 6, 0, 3))
    most = plans.MAX_POINTS_TILED // 6
    assert plans.is_tiled(uneven._replace(num_queries=most))
    assert not plans.is_tiled(uneven._replace(num_queries=most + 1))


# --- persistent kernels -------------------------------------------------------------------------------


def is_persistent(problem, multiprocessors, grids):
    """Whether the forward is persistent; the gradients of value and points then are binned and persistent."""
    device = Device(multiprocessors, "90")
    launch = forward_of(problem, multiprocessors, grids)
    names = steps(plan_backward(problem, NO_TABLE, device, grids))[1:]
    persistent = launch.kernel.name.startswith("msda_forward_persistent<")
    binned = ["msda_backward_value_binned", "msda_backward_persistent"]
    assert (names == binned) == persistent
    return persistent


def test_given_grids_are_followed_for_half_as_many_queries():
    """With fewer, the plain forward splits the points of a row, so that the bits would differ."""
    small = Problem(2, 16, 8, 32, 16, 1, 4, *["float32"] * 3)
    full = 2 * 16 * 8 * 8 // 1024  # multiprocessors, each with a full block
    assert [is_persistent(small, n, None) for n in (full, full + 1)] == [True, False]
    given = [is_persistent(small, n, ((2, 8),)) for n in (1, 2 * full, 2 * full + 1, 10**6)]
    assert given == [True, True, False, False]
    plain = [split_k(forward_of(small, n, ())) for n in (2 * full, 2 * full + 1)]
    assert plain[0] == 1 < plain[1]


def test_only_known_grids_are_followed():
    assert is_persistent(ENCODER, 132, None)
    assert not is_persistent(ENCODER, 132, ())
    assert not is_persistent(MANY_QUERIES, 132, None)
    assert not is_persistent(MANY_QUERIES, 132, ())
    assert is_persistent(MANY_QUERIES, 132, ((90, 100),))


def test_persistent_kernels_number_rows_in_32_bits():
    few, many = 2**26, 2**27
    problem = Problem(2, 16, 8, 32, few, 1, 4, *["float32"] * 3)
    assert is_persistent(problem, 1, ((1, few),))
    assert not is_persistent(problem._replace(num_queries=many), 1, ((1, many),))


def test_a_persistent_grid_is_a_block_for_each_multiprocessor():
    for launch in (forward_of(ENCODER), points_of(ENCODER)):
        assert (launch.grid, launch.block) == ((132, 1, 1), (1024, 1, 1))


def test_a_persistent_backward_leaves_room_for_registers():
    """One row per warp exceeds the limit; such rows go to the plain kernel."""
    wide = ENCODER._replace(head_dim=128, num_heads=2)
    assert points_of(wide).kernel.name.startswith("msda_backward<")
    assert forward_of(wide).kernel.name.startswith("msda_forward_persistent<")


# --- launches and their arguments ---------------------------------------------------------------------

INPUTS = ("value", "locations", "weights")
GRADIENTS = ("grad_value", "grad_locations", "grad_weights")
TABLE = ("sizes", "starts")


def arguments(plan):
    """The arrays of each launch, by kernel."""
    launches = [step for step in plan.launches if isinstance(step, Launch)]
    return {step.kernel.name.partition("<")[0]: step.arguments for step in launches}


def test_arguments_of_the_forward():
    """Without a mask and, in the specialised kernels, without reference points."""
    for problem, nothing in ((DECODER, [None] * 2), (ENCODER, [None] * 2), (GENERIC, [None])):
        assert forward_of(problem).arguments == (*INPUTS, *nothing, "output", *TABLE)


def test_arguments_of_the_backward():
    names = ("grad_output", *INPUTS, None)
    for problem, references, by_location in ((DECODER, [None], [None]), (GENERIC, [], [])):
        (found,) = arguments(plan_backward(problem, NO_TABLE, H100)).values()
        assert found == (*names, *references, *GRADIENTS, *by_location, *TABLE)
        (found,) = arguments(plan_backward(problem, NO_TABLE, H100, **VALUE)).values()
        assert found == (*names, *references, "grad_value", None, None, *by_location, *TABLE)
    assert points_of(GENERIC).arguments == (*names, None, *GRADIENTS[1:], *TABLE)
    of_points = (*names, None, None, *GRADIENTS[1:], None, *TABLE)
    for problem in (DECODER, ENCODER):
        assert points_of(problem).arguments == of_points
    read = ("grad_output", "locations", "weights", None)
    found = arguments(plan_backward(ENCODER, NO_TABLE, H100))
    assert found["msda_backward_value_binned"] == (*read, None, "grad_value", *TABLE)
    assert found["msda_backward_persistent"] == of_points


def test_arguments_around_an_accumulator():
    names = ("grad_output", *INPUTS, None)
    read = ("grad_output", "locations", "weights", None)
    finish = ("accumulator", "grad_value")
    found = arguments(plan_backward(DECODER._replace(**HALF), NO_TABLE, H100))
    assert found["msda_backward"] == (*names, None, "accumulator", *GRADIENTS[1:], None, *TABLE)
    assert found["msda_round"] == finish
    found = arguments(plan_backward(ENCODER, NO_TABLE, H100, deterministic=True))
    assert found["msda_fixed_point_scale"] == (*read, "accumulator", *TABLE)
    assert found["msda_backward_value_binned"] == (*read, None, "accumulator", *TABLE)
    assert found["msda_fixed_point_finish"] == finish
    found = arguments(plan_backward(DECODER, NO_TABLE, H100, deterministic=True))
    assert found["msda_backward_value_tiled"] == (*read, "grad_value", *TABLE)


@pytest.mark.parametrize(
    ("table", "expected"),
    [("host", (None, None)), ("sizes", (None, "starts")), ("starts", ("sizes", None)), ("device", TABLE)],
)  # fmt: skip
def test_a_null_pointer_stands_for_what_the_host_knows_of_the_table(table, expected):
    for problem in (DECODER, ENCODER, GENERIC):
        assert forward_of(problem, table=TABLES[table]).arguments[-2:] == expected
        for deterministic in (False, True):
            plan = plan_backward(problem, TABLES[table], H100, deterministic=deterministic)
            for kernel, names in arguments(plan).items():
                assert kernel == "msda_fixed_point_finish" or names[-2:] == expected


def test_a_mask_comes_after_the_weights():
    for problem in (DECODER, ENCODER, GENERIC, MANY_QUERIES):
        masked = problem._replace(has_mask=True)
        launches = [forward_of(masked)]
        for deterministic in (False, True):
            plan = plan_backward(masked, NO_TABLE, H100, deterministic=deterministic)
            launches += [step for step in plan.launches if isinstance(step, Launch)]
        for launch in launches:
            if launch.kernel.file == "generic.cu" or "weights" in launch.arguments:
                at = launch.arguments.index("weights") + 1
                assert launch.arguments[at] == "mask"
                assert "Sampling<false, true" in launch.kernel.name


SHAPE = (*Problem._fields[:6], "row_points")
POINTS_OF_ANY = ("level_points", "ends")


def test_params_hold_the_shape_and_the_levels():
    for problem, further, room in (
        (DECODER, (), 4),
        (ENCODER, ("num_grids", "grids"), 4),
        (GENERIC, POINTS_OF_ANY, MAX_HOST_LEVELS),
    ):
        params = forward_of(problem, table=TABLES["host"]).params
        assert params.dtype.names == (*SHAPE, "levels", *further)
        assert {field[0].base.name for field in params.dtype.fields.values()} == {"int32"}
        assert tuple(params[name] for name in SHAPE) == (*problem[:6], 16)
        levels = [[*size, start] for size, start in zip(SIZES, STARTS, strict=True)]
        assert params["levels"].shape == (room, 3)
        assert params["levels"][:4].tolist() == levels
        # What a launch takes by value, twelve pointers among it.
        assert params.nbytes <= 4096 - 12 * 8


def test_params_of_generic_kernels_hold_the_points_of_the_levels():
    def points(problem):
        params = forward_of(problem).params
        return params["level_points"].item(), params["ends"].tolist()

    nothing = [0] * MAX_UNEVEN_LEVELS
    assert points(GENERIC) == (4, nothing)
    assert points(GENERIC._replace(num_points=(3, 0, 6, 3))) == (0, [3, 3, 9, 12, *nothing[4:]])
    most = GENERIC._replace(
        num_levels=MAX_UNEVEN_LEVELS, num_points=tuple(range(MAX_UNEVEN_LEVELS))
    )
    assert points(most)[1][-1] == most.row_points


@pytest.mark.parametrize("problem", [DECODER, ENCODER, GENERIC], ids=["rows", "persistent", "any"])
def test_params_say_which_starts_are_derived(problem):
    def levels(table):
        return forward_of(problem, table=TABLES[table]).params["levels"][:4].tolist()

    assert levels("sizes") == [[*size, -1] for size in SIZES]
    assert levels("starts") == [[0, 0, start] for start in STARTS]
    assert levels("device") == [[0, 0, -1]] * 4


@pytest.mark.parametrize("kernel", ["forward", "points", "binned"])
def test_params_of_persistent_and_binned_kernels_hold_given_grids(kernel):
    def params(grids):
        if kernel != "binned":
            return (forward_of if kernel == "forward" else points_of)(ENCODER, grids=grids).params
        return plan_backward(ENCODER, NO_TABLE, H100, grids).launches[1].params

    assert params(None)["num_grids"] == 0
    assert not params(None)["grids"].any()
    grids = ((100, 222), (1, 23))
    assert params(grids)["num_grids"] == 2
    assert params(grids)["grids"].tolist() == [[100, 222], [1, 23]] + [[0, 0]] * (MAX_GRIDS - 2)


def test_passes_over_memory_take_the_shape_alone():
    plan = plan_backward(DECODER._replace(**HALF), NO_TABLE, H100)
    finish = plan_backward(GENERIC, TABLES["host"], H100, deterministic=True)
    for launch in (plan.launches[-1], finish.launches[-1]):
        assert launch.params.nbytes == 4 * len(SHAPE)


def test_grids_of_the_passes_over_memory_fill_the_device_or_cover_the_rows():
    problem = Problem(2, 1600, 4, 8, 9000, 1, 3, *["float32"] * 3)
    for multiprocessors, of_queries, of_positions in (
        (0, 1, 1),
        (50, 50, 50),
        (10**6, 1125, 200),  # eight warps of a block, each on a row or position
    ):
        device = Device(multiprocessors, "90")
        plan = plan_backward(problem, NO_TABLE, device, deterministic=True)
        _, scale, _, finish = plan.launches
        assert scale.grid == (of_queries, 8, 1)
        assert finish.grid == (of_positions, 8, 1)


def test_grid_of_the_rounding_fills_the_device_or_covers_the_gradient():
    small = Problem(2, 1600, 4, 8, 5, 1, 3, "float16", "float16", "float16")
    for multiprocessors, blocks in ((0, 1), (1, 8), (132, 2 * 1600 * 4 * 8 // (8 * 256))):
        plan = plan_backward(small, NO_TABLE, Device(multiprocessors, "90"))
        assert plan.launches[-1].grid == (blocks, 1, 1)


@pytest.mark.parametrize("batch", [1, 65535, 65536, 200001])
def test_y_and_z_cover_all_images_and_heads(batch):
    problem = Problem(batch, 4, 1, 8, 1, 1, 1, *["float32"] * 3)
    plan = plan_backward(problem._replace(head_dim=4), NO_TABLE, H100, deterministic=True)
    for launch in (forward_of(problem), points_of(problem), *plan.launches[1:]):
        _, y, z = launch.grid
        assert max(y, z) <= plans.MAX_GRID_YZ
        assert batch <= y * z < batch + z


def test_kernels_find_their_image_and_head_on_a_grid_of_three_dimensions(monkeypatch):
    inputs = random_inputs(n=5, m=3, d=8)
    plain = launches.forward(inputs)
    monkeypatch.setattr(plans, "MAX_GRID_YZ", 4)
    plan_forward.cache_clear()
    try:
        output = launches.forward(inputs)
        problem, table = launches.checked(inputs)
        assert forward_of(problem, 1, table).grid[1:] == (4, 4)
    finally:
        plan_forward.cache_clear()
    assert torch.equal(output, plain)


# --- fused calls --------------------------------------------------------------------------------------

BOXES = References(2, 1, 4, "float16")
CENTERS = References(1, 4, 2, "float32")


def fused_backward(problem, **options):
    """A backward of all gradients, by kernel."""
    needs = {"needs_references": True, "offset_scale": 0.25}
    plan = plan_backward(problem, TABLES["host"], H100, **needs | options)
    return {
        step.kernel.name.partition("<")[0]: step
        for step in plan.launches
        if isinstance(step, Launch)
    }


@pytest.mark.parametrize("problem", [DECODER, ENCODER], ids=["decoder", "encoder"])
def test_a_fused_forward(problem):
    plain, fused = forward_of(problem), forward_of(problem._replace(references=BOXES))
    sampling = "Sampling<false, false, 4, 4, 4, 4>"
    by_boxes = plain.kernel.name.replace(sampling, f"Fused<{sampling}, half_t, 4, false>")
    assert fused.kernel == plain.kernel._replace(name=by_boxes)
    assert fused.arguments == (*INPUTS, None, "references", "output", *TABLE)
    assert fused[1:3] == plain[1:3]


def test_a_fused_backward():
    names = ("grad_output", *INPUTS, None, "references")
    found = fused_backward(DECODER._replace(references=CENTERS))
    assert list(found) == ["msda_backward", "msda_reference_gradient"]
    assert found["msda_backward"].arguments == (*names, *GRADIENTS, "by_location", *(None,) * 2)
    launch = found["msda_reference_gradient"]
    assert launch.arguments == ("by_location", "locations", "grad_references")
    sampling = "Fused<Sampling<false, false, 4, 4, 4, 4>, float, 2, true>"
    assert launch.kernel.name == f"msda_reference_gradient<float, 8, {sampling}>"
    found = fused_backward(ENCODER._replace(references=CENTERS))
    kinds = "msda_backward_value_binned", "msda_backward_persistent", "msda_reference_gradient"
    assert tuple(found) == kinds
    read = ("grad_output", "locations", "weights", None, "references")
    assert found[kinds[0]].arguments == (*read, "grad_value", None, None)
    of_points = None, *GRADIENTS[1:], "by_location", None, None
    assert found[kinds[1]].arguments == (*names, *of_points)
    assert found[kinds[2]].grid == (-(-22223 // 8), 1, 1)
    without = fused_backward(ENCODER._replace(references=CENTERS), needs_references=False)
    assert tuple(without) == kinds[:2]
    assert "by_location" not in without[kinds[1]].arguments


def test_params_of_fused_kernels_hold_the_scale_and_who_has_reference_points():
    for references, rows in ((CENTERS, 22223), (BOXES, 2 * 22223)):
        fused = ENCODER._replace(references=references)
        launches = [
            *fused_backward(fused).values(),
            *fused_backward(fused._replace(**HALF)).values(),
        ]
        plan = plan_forward(fused, TABLES["host"], H100, offset_scale=0.25)
        for launch in [*plan.launches, *launches]:
            if launch.kernel.file != "round.cu":
                assert launch.params.dtype.names[-2:] == ("offset_scale", "reference_rows")
                assert launch.params["offset_scale"] == 0.25
                assert launch.params["reference_rows"] == rows


def test_candidates_of_a_fused_problem_are_bitwise_identical():
    """A logit's gradient has a part that is summed over the row, in another order for every split-K."""
    few = DECODER._replace(batch=1, num_queries=300, references=CENTERS)
    request = False, True, False
    plain = plans.backward_candidates(few._replace(references=None), H100, None, *request)
    fused = plans.backward_candidates(few, H100, None, *request)
    assert len({candidate.number for candidate in plain}) > 1
    assert len({candidate.number for candidate in fused}) == 1
    grids = ((10, 30),)
    assert {c.kernel for c in plans.backward_candidates(few, H100, grids, *request)} == {"plain"}


FUSED_LIMITS = {
    "": {},
    "float64": DOUBLE,
    "D = 30": {"head_dim": 30},
    "D = 256": {"head_dim": 256, **HALF},
    "L = 17": {"num_levels": 17},
    "K = 68": {"num_points": 17},
    "N * Lq * M * K = 2147483648": {"batch": 2**16, "num_queries": 2**8},
}


@pytest.mark.parametrize(("limit", "change"), FUSED_LIMITS.items(), ids=map(str, FUSED_LIMITS))
def test_what_is_composed(limit, change):
    problem = DECODER._replace(references=CENTERS, **change)
    assert plans.fused_limit(problem, deterministic=False) == limit
    assert plans.fused_limit(problem, deterministic=True) == "deterministic"


def test_gradients_of_reference_points_without_points_are_zero():
    problem = DECODER._replace(references=BOXES, num_points=0)
    plan = plan_backward(problem, NO_TABLE, H100, needs_references=True)
    assert Fill("grad_references", 2 * 2 * 900 * 4) in plan.launches
    assert plans.fused_limit(problem, deterministic=False) == ""


# --- all plans ------------------------------------------------------------------------------------------


def all_plans():
    """Plans of every kind, with the problem and the arrays that each must write."""
    problems = [
        problem._replace(**changed)
        for problem in (DECODER, MANY_QUERIES, ENCODER, GENERIC)
        for changed in ({}, HALF, DOUBLE)
    ]
    grids = (None, ((1, 22223),))
    problems += [
        problem._replace(references=references)
        for problem in (DECODER, ENCODER)
        for references in (CENTERS, BOXES)
    ]
    for problem, table, order in product(problems, TABLES.values(), grids):
        yield problem, {"output"}, plan_forward(problem, table, H100, order)
        for needs_value, needs_points, deterministic in product((True, False), repeat=3):
            needs = {"needs_value": needs_value, "needs_points": needs_points}
            written = GRADIENTS[: int(needs_value)] + GRADIENTS[1:] * needs_points
            if problem.references:
                needs["needs_references"] = needs_points
                written += ("grad_references",) * needs_points
                if deterministic:  # composed
                    continue
            plan = plan_backward(problem, table, H100, order, **needs, deterministic=deterministic)
            yield problem, set(written), plan


def test_every_plan_writes_what_is_needed_and_has_a_reason_of_one_line():
    for problem, written, plan in all_plans():
        launches = [step for step in plan.launches if isinstance(step, Launch)]
        named = {name for step in launches for name in step.arguments if name is not None}
        assert named <= set(ARRAYS)
        assert named & {"output", *GRADIENTS, "grad_references"} == written
        assert ("accumulator" in named) == (plan.workspace > 0)
        assert plan.reason
        assert "\n" not in plan.reason
        if "grad_value" in written and not any("tiled" in s.kernel.file for s in launches):
            # The array that is added to is filled before the first launch.
            size = 8 if problem.value_dtype == "float64" else 4
            fill = Fill("grad_value", size * problem.value_elements)
            if plan.workspace:
                fill = Fill("accumulator", plan.workspace)
            assert plan.launches[0] == fill


def test_a_plan_is_told_to_the_log_once(caplog):
    caplog.set_level(logging.DEBUG, "cupy_msda")
    problem = DECODER._replace(num_queries=777)  # which no other test plans
    for _ in range(2):
        plan = plan_backward(problem, NO_TABLE, H100)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("cupy_msda.cuda.plans", "DEBUG")
    message = record.getMessage()
    for part in ("backward", "num_queries=777", "fill grad_value", "msda_backward<", plan.reason):
        assert part in message
