# SPDX-License-Identifier: Apache-2.0
"""`cupy_msda.plot`: points over a picture, and the heat map beside it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from cupy_msda import ms_deform_attn, record
from tests.problems import flat_points, random_inputs

pytest.importorskip("matplotlib", reason="needs matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from cupy_msda import plot

SIZES = [(6, 9), (3, 4)]
IMAGE = np.zeros((60, 90, 3), np.uint8)


def inputs_of(sizes=SIZES, **options):
    inputs = random_inputs(sizes, n=1, reach=0, **options)
    return inputs.locations, inputs.weights


def drawn(figure):
    """The two panels and the legend as arrays (H, W, 3) in 0 to 255."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    panels, legend = np.split(pixels, [-round(plot.FOOTER * figure.dpi)])
    return *np.split(panels, 2, axis=1), legend


def pixels_of(colour, panel):
    """Where a panel has this colour, and how often."""
    near = np.abs(panel - 255 * np.array(to_rgb(colour))).max(-1) < 40
    return np.argwhere(near)


def test_the_points_of_each_level_lie_where_they_should():
    locations = torch.tensor([[0.25, 0.5], [0.75, 0.25]]).reshape(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([0.5, 0.5]).reshape(1, 1, 1, 2, 1)
    points, _, legend = drawn(plot.sampling_points(IMAGE, locations, weights, [0], SIZES))
    height, width, _ = points.shape
    assert (height, width) == (512, 768)
    for colour, (x, y) in zip(plot.COLOURS, locations.reshape(2, 2).tolist(), strict=False):
        found = pixels_of(colour, points)
        assert len(found) > 50
        np.testing.assert_allclose(found.mean(0), [y * height, x * width], atol=1.5)
        assert len(pixels_of(colour, legend)) > 20
    for colour in plot.COLOURS[2:]:
        assert len(pixels_of(colour, points)) == len(pixels_of(colour, legend)) == 0


def test_the_area_of_a_point_is_its_share_of_the_weight():
    locations = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).reshape(1, 1, 1, 2, 1, 2)
    weights = torch.tensor([6.0, 2.0]).reshape(
        1, 1, 1, 2, 1
    )  # not normalised: shares of 3/4 and 1/4
    points, _, _ = drawn(plot.sampling_points(IMAGE, locations, weights, [0], SIZES))
    areas = [len(pixels_of(colour, points)) for colour in plot.COLOURS[:2]]
    assert 2.5 < areas[0] / areas[1] < 3.5


def test_only_the_queries_that_are_asked_for_are_drawn():
    locations = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).reshape(1, 2, 1, 1, 1, 2)
    weights = torch.ones(1, 2, 1, 1, 1)
    points, heat, _ = drawn(plot.sampling_points(IMAGE, locations, weights, [1], [(6, 9)]))
    found = pixels_of(plot.COLOURS[0], points)
    assert found[:, 1].min() > points.shape[1] / 2
    assert heat[:, : heat.shape[1] // 2].max() == 0
    assert heat[:, heat.shape[1] // 2 :].max() > 200


def test_crosses_and_rays_from_reference_points():
    locations = torch.tensor([0.75, 0.5]).reshape(1, 1, 1, 1, 1, 2)
    weights = torch.ones(1, 1, 1, 1, 1)
    references = torch.tensor([0.25, 0.5, 0.1, 0.1]).reshape(1, 1, 1, 4)
    given = IMAGE, locations, weights, [0], [(6, 9)]
    points, _, legend = drawn(plot.sampling_points(*given, reference_points=references))
    cross = pixels_of("white", points)
    np.testing.assert_allclose(cross.mean(0), [256, 192], atol=1.5)
    assert points[254:259, 384].max() > 80  # the ray, half-way
    without, _, other_legend = drawn(plot.sampling_points(*given))
    assert len(pixels_of("white", without)) == 0
    assert without[254:259, 384].max() == 0
    assert len(pixels_of("white", legend)) > len(pixels_of("white", other_legend))


def heat_of(locations, weights, sizes, shape=(60, 90), **rules):
    points = plot._points(locations, weights, sizes, rules.get("num_points"))
    return plot._heat_map(points, shape)


def test_the_heat_is_the_gradient_of_the_output_by_value():
    """At the centres of cells; its mean is the share of the weights that lies inside."""
    locations, weights = inputs_of(sizes=[(6, 9)], lq=4)
    weights = weights / weights.sum((3, 4), keepdim=True)
    value = torch.zeros(1, 54, 2, 1, requires_grad=True)
    ms_deform_attn(value, [(6, 9)], None, locations, weights).sum().backward()
    expected = value.grad.sum((0, 2, 3)).reshape(6, 9) * 54 / 8  # 4 queries, 2 heads
    heat = heat_of(locations, weights, [(6, 9)], shape=(6, 9))
    np.testing.assert_allclose(heat, expected, rtol=1e-5)
    fine = heat_of(locations, weights, [(6, 9)], shape=(66, 99))
    np.testing.assert_allclose(fine[5::11, 5::11], heat)
    inside = torch.full_like(locations, 0.5)
    assert heat_of(inside, weights, [(6, 9)], shape=(6, 9)).mean() == pytest.approx(1)


def test_levels_spread_their_heat_over_their_cells():
    locations = torch.full((1, 1, 1, 2, 1, 2), 0.5)
    weights = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2, 1)
    coarse = heat_of(locations, weights, SIZES)
    fine = heat_of(locations, weights.flip(3), SIZES)
    assert (coarse > 0.01).sum() > 2 * (fine > 0.01).sum()


def test_points_of_levels():
    locations, weights = flat_points(random_inputs(SIZES, n=1, reach=0), [3, 1])[2:4]
    plain = torch.zeros(1, 5, 2, 2, 3)
    plain[:, :, :, 0], plain[:, :, :, 1, 0] = weights[..., :3], weights[..., 3]
    where = torch.full((1, 5, 2, 2, 3, 2), 0.5)
    where[:, :, :, 0], where[:, :, :, 1, 0] = locations[..., :3, :], locations[..., 3, :]
    ragged = plot.sampling_points(IMAGE, locations, weights, [0, 3], SIZES, num_points=[3, 1])
    padded = plot.sampling_points(IMAGE, where, plain, [0, 3], SIZES)
    for one, other in zip(drawn(ragged), drawn(padded), strict=True):
        np.testing.assert_allclose(one, other, atol=2)  # marks of no area leave no trace


@pytest.mark.parametrize("levels", [1, 4, 7])
def test_every_level_has_its_own_colour(levels):
    sizes = [(6, 9)] * levels
    figure = plot.sampling_points(IMAGE, *inputs_of(sizes), [0, 1], sizes)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:levels] == [f"level {level} (6 x 9)" for level in range(levels)]
    colours = plot._colours(levels)
    assert len(set(colours)) == levels
    points, _, _ = drawn(figure)
    for colour in colours:
        assert len(pixels_of(colour, points)) > 0


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (900, 30)])
@pytest.mark.parametrize("kind", ["grey", "floats", "tensor"])
def test_pictures_of_any_size_and_kind(shape, kind):
    image = np.full((*shape, 3), 200, np.uint8)
    if kind == "grey":
        image = image[..., 0]
    elif kind == "floats":
        image = image / np.float32(255)
    else:
        image = torch.from_numpy(image)
    figure = plot.sampling_points(image, *inputs_of(), [0], SIZES)
    _, heat, _ = drawn(figure)
    assert heat.shape[1] == 768
    assert heat.shape[0] == pytest.approx(768 * min(shape[0] / shape[1], plot.MAX_ASPECT), abs=1)


def test_what_was_recorded_is_drawn():
    """Tensors in bfloat16 that need gradients, and a level table in a tensor."""
    inputs = random_inputs(SIZES, n=1, dtypes=(torch.bfloat16, torch.bfloat16))
    value, *points = (tensor.requires_grad_() for tensor in inputs.tensors)
    with record() as calls:
        ms_deform_attn(value, torch.tensor(SIZES), None, *points)
    call = calls[0]
    where = call.sampling_locations, call.attention_weights
    figure = plot.sampling_points(IMAGE, *where, torch.tensor([0, 2]), call.spatial_shapes)
    assert len(pixels_of(plot.COLOURS[0], drawn(figure)[0])) > 0
    direct = plot.sampling_points(IMAGE, *points, [0, 2], np.array(SIZES))
    assert all(map(np.array_equal, drawn(figure), drawn(direct)))


LOCATIONS, WEIGHTS = inputs_of()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": np.zeros((3, 8, 8))}, ValueError, r"image must have shape \(H, W\) or"),
        ({"image": np.zeros((0, 8, 3))}, ValueError, r"image must have shape \(H, W\) or"),
        ({"image": np.full((8, 8), 2.5)}, ValueError, "image must hold uint8 or floats from 0 to 1"),
        ({"image": np.ones((8, 8), int)}, ValueError, "image must hold uint8 or .* got int64"),
        ({"queries": []}, ValueError, r"queries must be indices below Lq = 5, one or more, got \[\]"),
        ({"queries": [0, 5]}, ValueError, r"queries must be indices below Lq = 5, .* got \[0, 5\]"),
        ({"queries": [-1]}, ValueError, r"queries must be indices below Lq = 5"),
        ({"queries": [0.5]}, TypeError, r"queries must be a sequence of ints, got \[0.5\]"),
        ({"queries": 3}, TypeError, "queries must be a sequence of ints, got 3"),
        (
            {"sampling_locations": LOCATIONS.expand(2, -1, -1, -1, -1, -1)},
            ValueError,
            r"sampling_locations must be of one image, .* pass sampling_locations\[i : i \+ 1\]",
        ),
        ({"sampling_locations": LOCATIONS[0]}, ValueError, "must be of one image"),
        ({"attention_weights": WEIGHTS * torch.nan}, ValueError, "attention_weights must be finite"),
        ({"attention_weights": WEIGHTS[:, :4]}, ValueError, "attention_weights must have shape"),
        ({"spatial_shapes": SIZES[:1]}, ValueError, "spatial_shapes must have one entry for each"),
        ({"spatial_shapes": 3}, TypeError, "spatial_shapes must be a sequence of"),
        ({"num_points": [3, 3]}, ValueError, "sampling_locations must have shape"),
        ({"reference_points": torch.rand(2, 5, 1, 2)}, ValueError, "reference_points must be of one"),
        ({"reference_points": torch.rand(1, 4, 1, 2)}, ValueError, "reference_points must be of one"),
    ],
)  # fmt: skip
def test_what_is_no_contract_is_refused(changes, error, message):
    given = {
        "image": IMAGE,
        "sampling_locations": LOCATIONS,
        "attention_weights": WEIGHTS,
        "queries": [0],
        "spatial_shapes": SIZES,
    }
    with pytest.raises(error, match=message):
        plot.sampling_points(**given | changes)


def test_a_missing_matplotlib_is_named():
    code = "import sys; sys.modules['matplotlib'] = None; import cupy_msda; cupy_msda.plot"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    last = finished.stderr.splitlines()[-1]
    assert last == (
        'ModuleNotFoundError: cupy_msda.plot needs matplotlib: pip install "cupy-msda[plot]"'
    )
