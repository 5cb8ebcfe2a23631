# SPDX-License-Identifier: Apache-2.0
"""At the edges of levels, grids and formats: nothing beyond is read, written or left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from cupy_msda import reference
from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
from cupy_msda.cuda.plans import Choice, Plan
from tests.emulator import launches
from tests.emulator.cases import (
    BF16,
    F16,
    F32,
    GENERIC,
    SEEDS,
    TABLES,
    UNKNOWN,
    bits,
    check_backward,
    check_forward,
    check_value,
    copied,
    on,
    problem,
)
from tests.emulator.emulator import Emulated
from tests.emulator.launches import backward, backward_fixed_point, backward_tiled, forward
from tests.problems import Inputs

# --- levels --------------------------------------------------------------------------------------


@on(TABLES)
def test_a_level_that_ends_one_position_too_late_gives_nan(inputs: Inputs) -> None:
    starts = inputs.starts()
    starts[-1] += 1
    assert forward(inputs, table=UNKNOWN, tables=(inputs.shapes(), starts)).isnan().all()


@pytest.mark.parametrize(
    ("place", "bad"), [((1, 0), -1), ((1, 1), 2**31), ((1, 1), 2**62)], ids=str
)
@on(TABLES)
def test_a_height_or_width_that_no_level_has_gives_nan(
    inputs: Inputs, place: tuple[int, int], bad: int
) -> None:
    sizes = inputs.shapes()
    sizes[place] = bad
    assert forward(inputs, table=UNKNOWN, tables=(sizes, inputs.starts())).isnan().all()


def test_starts_of_more_levels_than_the_host_could_pass_are_derived() -> None:
    inputs = problem(1, ((2, 3), (1, 2)) * 170, 1, 30, 2, 1)
    options = {"table": UNKNOWN, "tables": (inputs.shapes(), None)}
    check_forward(inputs, forward(inputs, **options))
    check_backward(inputs, backward(inputs, **options))


# (x, y) of a row's points in a level of 4 x 8; none lies elsewhere, so that all of a warp are interior if one is.
LAST = {
    "row": [(2.25, 3.0), (5.5, 3.0), (1.75, 3.0), (3.0, 3.0)],
    "column": [(7.0, 0.25), (7.0, 1.5), (7.0, 2.0), (7.0, 1.75)],
}


def on_the_last(side: str, d: int, dtype: torch.dtype) -> Inputs:
    """Points on the last row or column, which NaN follows in memory: in the next row, and after the level."""
    inputs = problem(1, ((4, 8),), 2, d, 40, 4, (dtype, F32))
    value = torch.full((1, 48, 2, d), torch.nan, dtype=dtype)
    value[:, :32] = inputs.value
    value.view(1, 6, 8, 2, d)[:, 1:, 0] = torch.nan
    at = (torch.tensor(LAST[side]) + 0.5) / torch.tensor([8, 4])
    return inputs._replace(value=value, locations=at.expand_as(inputs.locations).contiguous())


@pytest.mark.parametrize(("d", "dtype"), [(32, F32), (16, F16), (30, F32)], ids=str)
@pytest.mark.parametrize("side", LAST)
def test_points_on_the_last_row_or_column_read_nothing_beyond(
    side: str, d: int, dtype: torch.dtype
) -> None:
    inputs = on_the_last(side, d, dtype)
    output = forward(inputs)
    assert output.isfinite().all()
    check_forward(inputs, output)
    check_backward(inputs, backward(inputs))


def test_cells_at_the_seam_of_two_tiles() -> None:
    """Every cell of a level of two tiles, which hold 128 positions each."""
    inputs = problem(1, ((12, 20),), 1, 32, 70, 4)
    x, y = torch.meshgrid(torch.arange(-1, 20), torch.arange(-1, 12), indexing="ij")
    cells = torch.stack([x, y], -1).reshape(-1, 2) + 0.25
    at = (cells + 0.5) / torch.tensor([20, 12])
    locations = at.repeat(2, 1)[: 70 * 4].view_as(inputs.locations)
    inputs = inputs._replace(locations=locations.contiguous())
    check_value(inputs, backward_tiled(inputs))


def test_the_nearest_pixel_is_rounded_twice() -> None:
    """Half a pixel from the left edge, where one rounding of u * W + 1/2 would give another pixel."""
    u = np.nextafter(np.float32(0.5 / 19), np.float32(0))
    twice, once = u * np.float32(19) + np.float32(0.5), np.float32(float(u) * 19 + 0.5)
    assert np.floor(twice) != np.floor(once)
    inputs = problem(1, ((2, 19),), 1, 8, 16, 2)
    inputs.locations[..., 0] = float(u)
    rules = {"interpolation": "nearest"}
    same = reference.forward(inputs.value, inputs.levels, inputs.locations, inputs.weights, **rules)
    torch.testing.assert_close(
        forward(inputs, rules=rules), same
    )  # in float64 it is the other pixel


# --- grids ---------------------------------------------------------------------------------------

# Two levels that are the queries' grids, so that every kernel of rows has a plan.
SPECIALISED = problem(6, ((5, 7), (2, 3)), 3, 8, 41, 2)
GENERIC_SHAPE = problem(6, ((5, 7), (2, 3)), 3, 5, 41, 2)
FORWARD, BACKWARD = plans.plan_forward.__wrapped__, plans.plan_backward.__wrapped__
DETERMINISTIC = partial(BACKWARD, deterministic=True)
ON_PADDED_GRIDS: dict[str, tuple[Inputs, Callable[..., Plan], str]] = {
    "msda_forward": (SPECIALISED, FORWARD, "plain, split-K 1"),
    "msda_forward_query_tiles": (SPECIALISED, FORWARD, "query tiles"),
    "msda_forward_generic": (GENERIC_SHAPE, FORWARD, "generic, D = 5"),
    "msda_backward": (SPECIALISED, BACKWARD, "plain, split-K 1"),
    "msda_backward_value_binned": (
        SPECIALISED,
        BACKWARD,
        "binned; points plain, split-K 1",
    ),
    "msda_backward_generic": (GENERIC_SHAPE, BACKWARD, "generic, D = 5"),
    "msda_fixed_point_finish": (GENERIC_SHAPE, DETERMINISTIC, "generic, D = 5"),
}


@pytest.mark.parametrize("kernel", ON_PADDED_GRIDS)
def test_a_padded_grid_writes_nothing_outside(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 pairs of image and head on a grid of 4 x 4; in memory a sixth image follows, which must not change."""
    inputs, plan_of, candidate = ON_PADDED_GRIDS[kernel]
    monkeypatch.setattr(plans, "MAX_GRID_YZ", 4)
    five = Inputs(inputs.sizes, *(tensor[:5] for tensor in inputs[1:]))
    case = *launches.checked(five), launches.device(1), None
    plan = plan_of(*case, choice=Choice(candidate, "test"))
    planned = {step.kernel.name.partition("<")[0]: step for step in launches_of(plan)}
    assert planned[kernel].grid[1:] == (4, 4)
    # No NaN, to which anything may be added unseen.
    arrays = {
        "output": torch.full_like(inputs.grad_output, 7.0),
        "grad_value": torch.full_like(inputs.value, 7.0),
        "grad_locations": torch.full_like(inputs.locations, 7.0),
        "grad_weights": torch.full_like(inputs.weights, 7.0),
    }
    given = {"sizes": None, "starts": None, "grad_output": five.grad_output}
    given |= {"value": five.value, "locations": five.locations, "weights": five.weights}
    launches.run(plan, given | {name: array[:5] for name, array in arrays.items()})
    if plan_of is FORWARD:
        check_forward(five, arrays["output"][:5])
    else:
        check_backward(five, tuple(array[:5] for name, array in arrays.items() if name != "output"))
    assert all((array[5] == 7).all() for array in arrays.values())


def launches_of(plan: Plan) -> list[plans.Launch]:
    """The kernel launches of a plan."""
    return [step for step in plan.launches if isinstance(step, plans.Launch)]


def test_idle_rows_read_nothing_outside() -> None:
    """Of a warp all of whose points are interior: a path of its own."""
    inputs = problem(1, ((9, 9),), 1, 8, 5, 2, reach=-0.2)
    check_backward(inputs, backward(inputs, sanitize=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stage_of_points_ends_before_the_next_begins(seed: int) -> None:
    """More points than a warp has lanes, by the kernels of any shape."""
    inputs = problem(1, ((8, 8), (4, 4), (2, 2)), 3, 30, 11, 24)
    check_forward(inputs, forward(inputs, seed=seed))
    check_backward(inputs, backward(inputs, seed=seed))


# --- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_vectors_of_halves_widen_exactly(dtype: torch.dtype) -> None:
    """By the instructions that take several at a time; one by one, test_kernels.py has them."""
    name = "half_t" if dtype is F16 else "bfloat16_t"
    kernel = f"""
template <int COUNT>
__device__ void convert(const {name}* from, float* to, int i) {{
  float wide[COUNT];
  load(wide, from + i);
  for (int c = 0; c < COUNT; ++c) to[i + c] = wide[c];
}}
__global__ void convert_all(const {name}* from, float* by_2, float* by_4, float* by_8) {{
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  for (int c = 0; c < 8; c += 2) convert<2>(from, by_2, i + c);
  for (int c = 0; c < 8; c += 4) convert<4>(from, by_4, i + c);
  convert<8>(from, by_8, i);
}}
"""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    # Each number meets others in its word.
    mixed = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    results = torch.zeros(3, 2**16)
    arrays = [mixed.numpy(), *(result.numpy() for result in results)]
    Emulated(assemble("scalar.cuh") + kernel, "convert_all")((32, 1, 1), (256, 1, 1), arrays)
    expected = mixed.view(dtype).float().expand(3, -1)
    assert ((bits(results) == bits(expected)) | (results.isnan() & expected.isnan())).all()


@pytest.mark.parametrize("loud", ["lane", "query"])
def test_the_unit_is_that_of_the_loudest(loud: str) -> None:
    """Fixed point: one gradient of the output is 2^40 times as large as the others, which must not overflow."""
    inputs = copied(GENERIC["d30"])
    if loud == "lane":
        inputs.grad_output.view(2, 11, 3, 30)[..., 20] *= 2**40
    else:
        inputs.grad_output[:, 2] *= 2**40
    check_value(inputs, backward_fixed_point(inputs)[0])
