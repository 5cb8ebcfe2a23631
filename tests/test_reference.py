# SPDX-License-Identifier: Apache-2.0
"""The reference, which every backend is measured by: against grid_sample, by hand and by finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_msda import reference
from cupy_msda.problem import Level

torch = pytest.importorskip("torch", reason="torch is not installed")

from cupy_msda.torch import ms_deform_attn_core_pytorch  # noqa: E402
from tests.non_finite import non_finite_inputs  # noqa: E402

LIBRARIES = {"numpy": np.asarray, "torch": torch.from_numpy}


@pytest.fixture(params=LIBRARIES)
def to_array(request):
    """From NumPy to the library under test."""
    return LIBRARIES[request.param]


def consecutive(sizes):
    """Levels one after another."""
    starts = np.cumsum([0, *(h * w for h, w in sizes)])
    return [Level(h, w, int(start)) for (h, w), start in zip(sizes, starts, strict=False)]


def random_problem(seed):
    """Sizes, value, locations (a third of them outside or on the border), weights and grad_output."""
    rng = np.random.default_rng(seed)
    n, m, lq, p = rng.integers(1, 4, 4)
    d = rng.choice([1, 3, 8, 30])
    sizes = [tuple(map(int, pair)) for pair in rng.integers(1, 9, (rng.integers(1, 5), 2))]
    s = sum(h * w for h, w in sizes)
    value = rng.standard_normal((n, s, m, d))
    locations = rng.uniform(-0.25, 1.25, (n, lq, m, len(sizes), p, 2))
    weights = rng.standard_normal((n, lq, m, len(sizes), p))
    return sizes, value, locations, weights, rng.standard_normal((n, lq, m * d))


def inside_cells(rng, shape, sizes):
    """Locations between 0.2 and 0.8 of a random cell, border cells included: away from every edge."""
    hw = np.array(sizes)[:, None, ::-1]
    cells = np.floor(rng.uniform(-1, hw, (*shape, len(sizes), 2, 2)))
    return (cells + rng.uniform(0.2, 0.8, cells.shape) + 0.5) / hw


def leaves(*arrays):
    """float64 tensors that require gradients."""
    return [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]


def close(actual, expected):
    """Equal but for the rounding of float64."""
    return np.allclose(np.asarray(actual), np.asarray(expected), rtol=1e-12, atol=1e-12)


# --- against grid_sample ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_forward_is_what_grid_sample_computes(seed, to_array):
    sizes, value, locations, weights, _ = random_problem(seed)
    expected = ms_deform_attn_core_pytorch(
        torch.from_numpy(value), sizes, torch.from_numpy(locations), torch.from_numpy(weights)
    )
    arrays = map(to_array, (value, locations, weights))
    output = reference.forward(next(arrays), consecutive(sizes), *arrays)
    assert type(output) is type(to_array(value))
    assert close(output, expected)


@pytest.mark.parametrize("seed", range(12))
def test_backward_is_what_autograd_makes_of_grid_sample_and_of_the_reference(seed, to_array):
    sizes, value, locations, weights, grad = random_problem(seed)
    gradients = reference.backward(
        to_array(grad), to_array(value), consecutive(sizes), to_array(locations), to_array(weights)
    )
    inputs = leaves(value, locations, weights)
    outputs = (
        ms_deform_attn_core_pytorch(inputs[0], sizes, *inputs[1:]),
        reference.forward(inputs[0], consecutive(sizes), *inputs[1:]),
    )
    for output in outputs:
        expected = torch.autograd.grad(output, inputs, torch.from_numpy(grad))
        for gradient, one_expected in zip(gradients, expected, strict=True):
            assert close(gradient, one_expected)


# --- by hand ---------------------------------------------------------------------------------------

# One head of one channel on a level of H = 2, W = 4:
#     1 2 3 4
#     5 6 7 8
# The centre of the pixel in row r and column c is at ((c + 0.5) / 4, (r + 0.5) / 2), and a pixel is
# 0.25 wide and 0.5 high. Every number here is exact in binary.
H, W = 2, 4
GRID = np.arange(1.0, 9.0).reshape(1, 8, 1, 1)
GRID_LEVELS = [Level(H, W, 0)]


def sample(to_array, points, weights=None):
    """The output at each of a list of (x, y), with one point on one level per query."""
    locations = np.array(points, float).reshape(1, -1, 1, 1, 1, 2)
    weights = np.ones(len(points)) if weights is None else np.array(weights, float)
    arrays = map(to_array, (GRID, locations, weights.reshape(1, -1, 1, 1, 1)))
    return np.asarray(reference.forward(next(arrays), GRID_LEVELS, *arrays))[0, :, 0].tolist()


def gradients(to_array, point, weight=1.0, grad=1.0):
    """The gradients at one point by the reference, checked against autograd: value, (x, y), weight."""
    locations = np.array(point, float).reshape(1, 1, 1, 1, 1, 2)
    weights = np.full((1, 1, 1, 1, 1), weight)
    grads = np.full((1, 1, 1), grad)
    arrays = map(to_array, (grads, GRID, locations, weights))
    got = reference.backward(next(arrays), next(arrays), GRID_LEVELS, *arrays)
    inputs = leaves(GRID, locations, weights)
    output = reference.forward(inputs[0], GRID_LEVELS, *inputs[1:])
    for gradient, expected in zip(
        got, torch.autograd.grad(output, inputs, torch.from_numpy(grads)), strict=True
    ):
        assert np.asarray(gradient).tolist() == expected.tolist()
    by_value, by_location, by_weight = (np.asarray(gradient).ravel().tolist() for gradient in got)
    return by_value, by_location, by_weight[0]


def test_hand_worked_samples(to_array):
    expected = {
        # Pixel centres: the pixel itself.
        (0.125, 0.25): 1,
        (0.875, 0.25): 4,
        (0.375, 0.75): 6,
        (0.875, 0.75): 8,
        # Mid-points: (2 + 3) / 2 along the first row, (3 + 7) / 2 along the third column.
        (0.5, 0.25): 2.5,
        (0.625, 0.5): 5,
        # The middle of the level: (2 + 3 + 6 + 7) / 4.
        (0.5, 0.5): 4.5,
        # A quarter of a pixel right of the centre of 5: 5 + 0.25 * (6 - 5).
        (0.1875, 0.75): 5.25,
        # The corners of the level: one pixel counts, a quarter of it.
        (0, 0): 0.25 * 1,
        (1, 0): 0.25 * 4,
        (0, 1): 0.25 * 5,
        (1, 1): 0.25 * 8,
        # On the edges of the level, at the height or column of a pixel centre: half of it.
        (0, 0.25): 0.5 * 1,
        (1, 0.75): 0.5 * 8,
        (0.625, 0): 0.5 * 3,
        (0.375, 1): 0.5 * 6,
        # A quarter of a pixel outside the right edge (x = 3.75, y = 0): 0.25 * 4.
        (1.0625, 0.25): 1,
        # More than half a pixel outside: nothing.
        (-0.2, 0.25): 0,
        (1.2, 0.25): 0,
        (0.5, -0.3): 0,
        (0.5, 1.3): 0,
    }
    assert sample(to_array, list(expected)) == list(expected.values())


def test_weights_are_used_as_given(to_array):
    # Not normalised, negative and zero ones included: 2.5 at each of these points.
    points = [(0.5, 0.25)] * 4
    assert sample(to_array, points, [1, 2, -0.5, 0]) == [2.5, 5, -1.25, 0]


def test_points_and_levels_add_up_and_outside_points_keep_their_weight(to_array):
    # Two points: 6 at weight 0.5, nothing at weight 0.5. Renormalised it would be 6.
    locations = to_array(np.array([0.375, 0.75, 2, 2]).reshape(1, 1, 1, 1, 2, 2))
    weights = to_array(np.full((1, 1, 1, 1, 2), 0.5))
    output = reference.forward(to_array(GRID), GRID_LEVELS, locations, weights)
    assert np.asarray(output).tolist() == [[[3]]]


def test_hand_worked_gradients(to_array):
    # x = 1.25, y = 0.5: between 2, 3, 6 and 7, with lx = 0.25 and ly = 0.5; weight 3, gradient 2.
    by_value, by_location, by_weight = gradients(to_array, (0.4375, 0.5), weight=3.0, grad=2.0)
    # 3 * 2 * (0.75 and 0.25 across, 0.5 and 0.5 down)
    assert by_value == [0, 2.25, 0.75, 0, 0, 2.25, 0.75, 0]
    # The grid rises by 1 to the right and by 4 downwards: W * 3 * 2 * 1 and H * 3 * 2 * 4.
    assert by_location == [24, 48]
    # 2 * (0.75 * 4 + 0.25 * 5), the means of the two columns being 4 and 5.
    assert by_weight == 8.5


def test_hand_worked_gradients_half_outside(to_array):
    # x = 3.5, y = 0.25: half over the right edge, between 4 and 8 with ly = 0.25.
    by_value, by_location, by_weight = gradients(to_array, (1.0, 0.375))
    assert by_value == [0, 0, 0, 0.375, 0, 0, 0, 0.125]
    # Across it falls from 0.75 * 4 + 0.25 * 8 = 5 to 0; down, half of 8 - 4.
    assert by_location == [W * -5, H * 2]
    assert by_weight == 2.5


def test_levels_with_gaps_overlaps_and_in_any_order(to_array):
    # value[s] = s for the first head and 100 + s for the second. Sampled at the centre of a 2x2 level
    # is the mean of four positions that follow one another, start + 1.5; of a 1x3 level start + 1.
    value = np.stack([np.arange(12.0), 100 + np.arange(12.0)], axis=-1).reshape(1, 12, 2, 1)
    levels = [Level(2, 2, 7), Level(1, 3, 1), Level(2, 2, 0), Level(1, 3, 9)]
    locations = np.full((1, 1, 2, 4, 1, 2), 0.5)
    weights = np.array([1.0, 10, 100, 1000] * 2).reshape(1, 1, 2, 4, 1)
    output = reference.forward(to_array(value), levels, to_array(locations), to_array(weights))
    first = 8.5 + 20 + 150 + 10_000
    assert np.asarray(output).tolist() == [[[first, first + 1111 * 100]]]
    by_value, _, _ = reference.backward(
        to_array(np.ones((1, 1, 2))),
        to_array(value),
        levels,
        to_array(locations),
        to_array(weights),
    )
    # Positions 1 to 3 belong to two levels and get from both (of the 1x3 level only its middle, 2);
    # 4, 5, 6 and 11 to none; of the last level only 10 is sampled, which the first holds as well.
    column = [25, 25, 35, 25, 0, 0, 0, 0.25, 0.25, 0.25, 1000.25, 0]
    assert np.asarray(by_value)[0, :, :, 0].tolist() == [[g, g] for g in column]


def test_heads_and_images_do_not_mix(to_array):
    # value = 10 * image + head on every position, so that each output names where it came from.
    value = np.broadcast_to(
        10.0 * np.arange(3)[:, None, None, None] + np.arange(4)[:, None], (3, 6, 4, 2)
    ).copy()
    locations = np.full((3, 5, 4, 1, 1, 2), 0.5)
    output = reference.forward(
        to_array(value), [Level(2, 3, 0)], to_array(locations), to_array(np.ones((3, 5, 4, 1, 1)))
    )
    expected = [[[10.0 * n + m for m in range(4) for _ in range(2)]] * 5 for n in range(3)]
    assert np.asarray(output).tolist() == expected


# --- the edge convention ---------------------------------------------------------------------------

TINY = 2.0**-40  # a fraction that survives x = loc * W - 0.5 in float64


@pytest.mark.parametrize(
    "point",
    [
        pytest.param((-0.125, 0.25), id="x is exactly -1"),
        pytest.param((1.125, 0.25), id="x is exactly W"),
        pytest.param((0.125, -0.25), id="y is exactly -1"),
        pytest.param((0.125, 1.25), id="y is exactly H"),
        pytest.param((-0.125, -0.25), id="both are exactly -1"),
        pytest.param((-0.2, 0.25), id="beyond the left edge"),
        pytest.param((0.125, 1e30), id="far below"),
    ],
)
def test_a_point_on_the_outer_edge_counts_for_nothing(point, to_array):
    assert sample(to_array, [point]) == [0]
    assert gradients(to_array, point) == ([0] * 8, [0, 0], 0)


@pytest.mark.parametrize(
    ("point", "slope"),
    [
        # Just inside the outer edge the level rises from zero to its first column or row ...
        pytest.param((-0.125 + TINY, 0.25), (W * 1, 0), id="x just above -1"),
        pytest.param((0.125, -0.25 + TINY), (0, H * 1), id="y just above -1"),
        # ... and falls to zero behind its last.
        pytest.param((1.125 - TINY, 0.75), (W * -8, 0), id="x just below W"),
        pytest.param((0.875, 1.25 - TINY), (0, H * -8), id="y just below H"),
    ],
)
def test_a_point_just_inside_the_outer_edge_has_a_slope(point, slope, to_array):
    _, by_location, _ = gradients(to_array, point)
    assert np.allclose(by_location, slope, atol=1e-9)
    (value,) = sample(to_array, [point])
    assert 0 < value < 1e-10


@pytest.mark.parametrize(
    ("point", "value", "slope"),
    [
        # At a pixel centre floor(x) = x: the cell is the one to the right and below.
        pytest.param((0.125, 0.25), 1, (W * (2 - 1), H * (5 - 1)), id="first pixel"),
        pytest.param((0.625, 0.25), 3, (W * (4 - 3), H * (7 - 3)), id="a pixel in the first row"),
        # Right of the last column and below the last row lie zeros.
        pytest.param((0.875, 0.25), 4, (W * (0 - 4), H * (8 - 4)), id="last column"),
        pytest.param((0.375, 0.75), 6, (W * (7 - 6), H * (0 - 6)), id="last row"),
        pytest.param((0.875, 0.75), 8, (W * (0 - 8), H * (0 - 8)), id="last pixel"),
    ],
)
def test_the_slope_at_a_pixel_is_that_of_the_cell_to_its_right_and_below(
    point, value, slope, to_array
):
    assert sample(to_array, [point]) == [value]
    by_value, by_location, by_weight = gradients(to_array, point)
    assert by_location == list(slope)
    assert by_weight == value
    assert by_value == [float(pixel == value) for pixel in range(1, 9)]


# --- what is not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300, -1e300])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_location_that_is_no_number_contributes_nothing(bad, axis, to_array):
    point = [0.5, 0.5]
    point[axis] = bad
    assert sample(to_array, [point, (0.5, 0.5)]) == [0, 4.5]
    assert gradients(to_array, point) == ([0] * 8, [0, 0], 0)


@pytest.mark.parametrize("point", [(2, 2), (-0.125, 0.25), (1.125, 0.25), (0.125, 1.25)])
def test_nothing_is_multiplied_at_an_outside_point(point, to_array):
    assert sample(to_array, [point, point], [np.nan, np.inf]) == [0, 0]
    assert gradients(to_array, point, weight=np.nan) == ([0] * 8, [0, 0], 0)
    locations = to_array(np.reshape(point, (1, 1, 1, 1, 1, 2)))
    grad, weight = to_array(np.full((1, 1, 1), np.nan)), to_array(np.ones((1, 1, 1, 1, 1)))
    for gradient in reference.backward(grad, to_array(GRID), GRID_LEVELS, locations, weight):
        assert not np.asarray(gradient).any()


def test_a_weight_that_is_no_number_shows_where_its_point_counts(to_array):
    assert np.isnan(sample(to_array, [(0.5, 0.5)], [np.nan])).all()


@pytest.mark.parametrize(("weight", "expected"), [(np.inf, np.inf), (-np.inf, -np.inf)])
def test_an_infinite_weight_gives_infinity(weight, expected, to_array):
    ones = np.ones((1, 4, 1, 1))
    for point in ((0.4, 0.4), (-0.125, 0.4), (1.125, 1.125)):
        arrays = map(
            to_array, (ones, np.reshape(point, (1,) * 5 + (2,)), np.full((1,) * 5, weight))
        )
        output = reference.forward(next(arrays), [Level(2, 2, 0)], *arrays)
        assert np.asarray(output).tolist() == [[[expected]]]


def by_the_equations(inputs, image, query):
    """Output and gradients of one query of one head, number by number, as kernels/README.md has them."""
    value, locations, weights, grad = (
        array.numpy() for array in (inputs.value[image, :, 0], inputs.locations[image, query, 0],
        inputs.weights[image, query, 0], inputs.grad_output[image, query])
    )  # fmt: skip
    output, by_value = np.zeros_like(grad), np.zeros_like(value)
    by_locations, by_weights = np.zeros_like(locations), np.zeros_like(weights)
    for level, point in np.ndindex(weights.shape):
        height, width, start = inputs.levels[level]
        x, y = locations[level, point] * (width, height) - 0.5
        if not (-1 < x < width and -1 < y < height):
            continue
        a, column, row = weights[level, point], int(np.floor(x)), int(np.floor(y))
        r, d, dots = x - column, y - row, []
        sides = [(1 - d) * (1 - r), (1 - d) * r, d * (1 - r), d * r]
        for corner, b in enumerate(sides):
            at_column, at_row = column + corner % 2, row + corner // 2
            if not (0 <= at_column < width and 0 <= at_row < height):
                dots.append(0.0)
                continue
            at = start + at_row * width + at_column
            output += a * b * value[at]
            by_value[at] += a * b * grad
            dots.append((grad * value[at]).sum())
        by_weights[level, point] = sum(b * dot for b, dot in zip(sides, dots, strict=True))
        by_locations[level, point] = (
            width * a * ((1 - d) * (dots[1] - dots[0]) + d * (dots[3] - dots[2])),
            height * a * ((1 - r) * (dots[2] - dots[0]) + r * (dots[3] - dots[1])),
        )
    return output, by_value, by_locations, by_weights


@np.errstate(invalid="ignore")
def test_non_finite_inputs_by_the_equations(to_array):
    inputs = non_finite_inputs(3, (torch.float64, torch.float64))
    grad, value, *points = (
        to_array(tensor.numpy()) for tensor in (inputs.grad_output, *inputs.tensors)
    )
    output = np.asarray(reference.forward(value, inputs.levels, *points))
    gradients = reference.backward(grad, value, inputs.levels, *points)
    by_value, *by_points = (np.asarray(gradient)[:, :, 0] for gradient in gradients)
    for image in range(len(value)):
        total = 0
        for query in range(output.shape[1]):
            same_output, same_value, *same_points = by_the_equations(inputs, image, query)
            total = total + same_value
            got = [array[image, query] for array in (output, *by_points)]
            for array, same in zip(got, (same_output, *same_points), strict=True):
                np.testing.assert_allclose(array, same, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(by_value[image], total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_zero_padding_reads_nothing_beside_the_level(bad, to_array):
    # The level of the hand-worked grid, in two images with two heads, is all that is finite.
    value = np.full((2, 12, 2, 1), bad)
    value[:, 2:10] = GRID.reshape(8, 1, 1)
    levels = [Level(H, W, 2)]
    corners = [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, -0.2), (-0.1, 0.5), (1.1, 0.9)]
    locations = np.broadcast_to(np.reshape(corners, (1, -1, 1, 1, 1, 2)), (2, 7, 2, 1, 1, 2)).copy()
    weights = np.ones((2, 7, 2, 1, 1))
    output = np.asarray(
        reference.forward(to_array(value), levels, to_array(locations), to_array(weights))
    )
    assert (output == output[0, :, :1]).all()
    assert output[0, :4, 0].tolist() == [0.25, 1, 1.25, 2]
    inputs = leaves(value, locations, weights)
    by_autograd = torch.autograd.grad(
        reference.forward(inputs[0], levels, *inputs[1:]).sum(), inputs
    )
    arrays = map(to_array, (np.ones((2, 7, 2)), value, locations, weights))
    by_hand = reference.backward(next(arrays), next(arrays), levels, *arrays)
    for one, other in zip(by_hand, by_autograd, strict=True):
        assert np.isfinite(np.asarray(one)).all()
        assert close(one, other)


# --- derivatives by finite differences -------------------------------------------------------------


@pytest.fixture(scope="module")
def smooth_problem():
    """Points inside their cells, in a function of three float64 leaves and in the leaves."""
    rng = np.random.default_rng(7)
    sizes = [(2, 3), (1, 2)]
    inputs = leaves(
        rng.standard_normal((2, 8, 1, 2)),
        inside_cells(rng, (2, 2, 1), sizes),
        rng.standard_normal((2, 2, 1, 2, 2)),
    )
    return lambda v, x, a: reference.forward(v, consecutive(sizes), x, a), inputs


# torch's own formulas for forward mode are still scripted.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@forward_mode
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`")  # torch 2.4's gradcheck does not
def test_first_derivatives_in_both_modes(smooth_problem):
    assert torch.autograd.gradcheck(*smooth_problem, check_forward_ad=True, check_batched_grad=True)


@forward_mode
def test_second_derivatives(smooth_problem):
    assert torch.autograd.gradgradcheck(*smooth_problem, check_fwd_over_rev=True)


def test_the_written_gradients_by_finite_differences(smooth_problem, to_array):
    function, inputs = smooth_problem
    arrays = [tensor.detach().numpy() for tensor in inputs]
    rng = np.random.default_rng(1)
    grad = rng.standard_normal(tuple(function(*inputs).shape))
    levels = consecutive([(2, 3), (1, 2)])
    written = reference.backward(
        to_array(grad), to_array(arrays[0]), levels, *map(to_array, arrays[1:])
    )
    for index, gradient in enumerate(written):
        direction = rng.standard_normal(arrays[index].shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = list(arrays)
            moved[index] = arrays[index] + step * direction
            ends.append((reference.forward(moved[0], levels, *moved[1:]) * grad).sum())
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx((np.asarray(gradient) * direction).sum(), rel=1e-6)


# --- levels and sizes at their limits --------------------------------------------------------------


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_a_level_without_pixels_contributes_nothing(size, to_array):
    rng = np.random.default_rng(3)
    value = rng.standard_normal((2, 6, 2, 3))
    locations = rng.uniform(-0.2, 1.2, (2, 4, 2, 2, 3, 2))
    locations[0, 0, 0, 0, 0] = np.nan
    weights = rng.standard_normal((2, 4, 2, 2, 3))
    grad = rng.standard_normal((2, 4, 6))
    empty, full = Level(*size, 6), Level(2, 3, 0)
    args = [to_array(array) for array in (value, locations, weights)]
    output = reference.forward(args[0], [empty, full], *args[1:])
    alone = reference.forward(args[0], [full], args[1][:, :, :, 1:], args[2][:, :, :, 1:])
    assert close(output, alone)
    by_value, by_location, by_weight = reference.backward(
        to_array(grad), args[0], [empty, full], *args[1:]
    )
    expected = reference.backward(
        to_array(grad), args[0], [full], args[1][:, :, :, 1:], args[2][:, :, :, 1:]
    )
    assert close(by_value, expected[0])
    assert close(by_location[:, :, :, 1:], expected[1])
    assert close(by_weight[:, :, :, 1:], expected[2])
    assert not np.asarray(by_location[:, :, :, 0]).any()
    assert not np.asarray(by_weight[:, :, :, 0]).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_a_level_one_pixel_high_or_wide(size, to_array):
    rng = np.random.default_rng(4)
    s = size[0] * size[1]
    value = rng.standard_normal((1, s, 2, 3))
    locations = rng.uniform(-1, 2, (1, 50, 2, 1, 2, 2))
    weights = rng.standard_normal((1, 50, 2, 1, 2))
    expected = ms_deform_attn_core_pytorch(
        torch.from_numpy(value), [size], torch.from_numpy(locations), torch.from_numpy(weights)
    )
    arrays = map(to_array, (value, locations, weights))
    assert close(reference.forward(next(arrays), [Level(*size, 0)], *arrays), expected)


@pytest.mark.parametrize("zero", ["n", "s", "m", "d", "lq", "levels", "p"])
def test_empty_dimensions_give_empty_or_zero_results(zero, to_array):
    sizes = {"n": 2, "s": 4, "m": 3, "d": 5, "lq": 6, "levels": 1, "p": 2} | {zero: 0}
    n, s, m, d, lq, count, p = sizes.values()
    levels = [Level(2, 2, 0) if s else Level(0, 0, 0)] * count
    value = to_array(np.ones((n, s, m, d), np.float32))
    locations = to_array(np.full((n, lq, m, count, p, 2), 0.5, np.float32))
    weights = to_array(np.ones((n, lq, m, count, p), np.float32))
    output = reference.forward(value, levels, locations, weights)
    assert tuple(output.shape) == (n, lq, m * d)
    assert output.dtype == value.dtype
    assert not np.asarray(output).any()
    by_inputs = reference.backward(output, value, levels, locations, weights)
    for gradient, array in zip(by_inputs, (value, locations, weights), strict=True):
        assert tuple(gradient.shape) == tuple(array.shape)
        assert gradient.dtype == array.dtype
        assert not np.asarray(gradient).any()


def test_levels_may_be_tensors():
    # 0-dim tensors in place of ints, for second derivatives with levels that only a device knows.
    sizes, value, locations, weights, grad = random_problem(5)
    levels = consecutive(sizes)
    on_device = [Level(*map(torch.tensor, level)) for level in levels]
    value, locations, weights, grad = map(torch.from_numpy, (value, locations, weights, grad))
    expected = reference.forward(value, levels, locations, weights)
    assert torch.equal(reference.forward(value, on_device, locations, weights), expected)
    for one, other in zip(
        reference.backward(grad, value, on_device, locations, weights),
        reference.backward(grad, value, levels, locations, weights),
        strict=True,
    ):
        assert torch.equal(one, other)


# --- dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("points_dtype", ["same", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_inputs_are_computed_in_float32_and_rounded_once(dtype, points_dtype):
    half = getattr(torch, dtype)
    other = half if points_dtype == "same" else torch.float32
    sizes, value, locations, weights, grad = random_problem(6)
    levels = consecutive(sizes)
    value, grad = (torch.from_numpy(array).to(half) for array in (value, grad))
    locations, weights = (torch.from_numpy(array).to(other) for array in (locations, weights))
    output = reference.forward(value, levels, locations, weights)
    wide = reference.forward(value.float(), levels, locations.float(), weights.float())
    assert output.dtype == half
    assert torch.equal(output, wide.to(half))
    by_inputs = reference.backward(grad, value, levels, locations, weights)
    wide = reference.backward(
        grad.float(), value.float(), levels, locations.float(), weights.float()
    )
    for gradient, wide_gradient, array in zip(
        by_inputs, wide, (value, locations, weights), strict=True
    ):
        assert gradient.dtype == array.dtype
        assert torch.equal(gradient, wide_gradient.to(array.dtype))


def test_float32_locations_with_float16_values_keep_their_precision():
    # At W = 167 a float16 location is up to 0.08 pixels off. On a ramp the output is the coordinate:
    # x = 0.8123456 * 167 - 0.5 = 135.1617..., which float16 rounds to 135.125.
    ramp = torch.arange(167, dtype=torch.float16).reshape(1, 167, 1, 1)
    locations = torch.tensor([0.8123456, 0.5]).reshape(1, 1, 1, 1, 1, 2)
    one = torch.ones(1, 1, 1, 1, 1)
    levels = [Level(1, 167, 0)]
    assert reference.forward(ramp, levels, locations, one).item() == 135.125
    by_half_location = reference.forward(ramp, levels, locations.half(), one.half()).item()
    assert abs(by_half_location - 135.1617) > 0.03


def test_float64_values_take_float32_locations_and_compute_in_float64():
    sizes, value, locations, weights, _ = random_problem(8)
    levels = consecutive(sizes)
    locations, weights = (array.astype(np.float32) for array in (locations, weights))
    output = reference.forward(value, levels, locations, weights)
    expected = reference.forward(
        value, levels, locations.astype(np.float64), weights.astype(np.float64)
    )
    assert output.dtype == np.float64
    assert np.array_equal(output, expected)


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_an_empty_level_contributes_nothing_whatever_its_weights(size):
    """-0.5, where all its points lie, would pass the comparisons with a size of 0."""
    value = torch.randn(1, 6, 1, 2, dtype=torch.float64)
    locations = torch.rand(1, 3, 1, 2, 2, 2, dtype=torch.float64)
    weights = torch.rand(1, 3, 1, 2, 2, dtype=torch.float64)
    weights[:, :, :, 1] = torch.nan
    levels = [Level(2, 3, 0), Level(*size, 6)]
    output = reference.forward(value, levels, locations, weights)
    alone = reference.forward(value, levels[:1], locations[:, :, :, :1], weights[:, :, :, :1])
    assert torch.equal(output, alone)
    gradients = reference.backward(torch.ones_like(output), value, levels, locations, weights)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][:, :, :, 1] == 0).all()
