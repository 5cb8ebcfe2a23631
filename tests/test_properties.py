# SPDX-License-Identifier: Apache-2.0
"""Properties of the operator on problems that hypothesis makes up; MSDA_EXAMPLES: how many, all tests together.

Most problems are dyadic: small integers and fractions by powers of two, of which no sum in float32 rounds. Their
results must be equal, not close, so that problems of one pixel or one point say as much as large ones. Random numbers,
extreme and non-finite ones among them, are held to the error budget.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cupy_msda import ms_deform_attn, ms_deform_attn_backward, reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.problem import Level
from tests import exact

Array = np.ndarray[Any, Any]
Size = tuple[int, int]
inf, nan = np.inf, np.nan

EXAMPLES = int(os.environ.get("MSDA_EXAMPLES", "2000"))
# (D, bytes of what is computed in, nearest, masked): each is a CPU kernel for either direction.
KERNELS = [
    (1, 4, False, False),
    (20, 4, False, False),
    (32, 4, False, True),
    (32, 4, True, True),
    (32, 8, False, False),
    (32, 8, False, True),
]
DTYPES = {4: ("float32", "float16", "bfloat16"), 8: ("float64",)}


def share(part: float) -> Callable[[Any], Any]:
    """Settings of a test that takes this part of all examples; the same ones in every run."""
    return settings(
        max_examples=max(1, round(EXAMPLES * part)),
        derandomize=True,
        database=None,
        deadline=None,  # on a busy machine an example may take any time
        suppress_health_check=[HealthCheck.too_slow],
    )


class Call(NamedTuple):
    """The arguments of the operator: NumPy arrays or torch tensors."""

    sizes: list[Size]
    starts: list[int] | None
    value: Any
    locations: Any
    weights: Any
    grad_output: Any
    rules: dict[str, Any]

    def __repr__(self) -> str:
        """What decides, in a few lines: arrays by shape and dtype."""
        arrays = ((tuple(array.shape), str(array.dtype)) for array in self[2:6])
        return f"Call({self.sizes}, {self.starts}, {', '.join(map(str, arrays))}, {self.rules})"

    @property
    def levels(self) -> list[Level]:
        """The level table as the reference takes it."""
        ends = np.cumsum([h * w for h, w in self.sizes]).tolist()
        starts = [0, *ends][: len(self.sizes)] if self.starts is None else self.starts
        return [Level(*size, start) for size, start in zip(self.sizes, starts, strict=True)]

    def map(self, change: Callable[[Any], Any]) -> Call:
        """The same with every array of floats changed."""
        arrays = self.value, self.locations, self.weights, self.grad_output
        value, locations, weights, grad_output = map(change, arrays)
        return self._replace(
            value=value, locations=locations, weights=weights, grad_output=grad_output
        )


class Results(NamedTuple):
    """What both directions give."""

    output: Any
    value: Any
    locations: Any
    weights: Any


def run(call: Call) -> Results:
    """By the operator."""
    inputs = call.value, call.sizes, call.starts, call.locations, call.weights
    output = ms_deform_attn(*inputs, **call.rules)
    return Results(output, *ms_deform_attn_backward(call.grad_output, *inputs, **call.rules))


def by_reference(call: Call) -> Results:
    """By the reference."""
    inputs = call.value, call.levels, call.locations, call.weights
    with np.errstate(all="ignore"):
        output = reference.forward(*inputs, **call.rules)
        return Results(output, *reference.backward(call.grad_output, *inputs, **call.rules))


# --- problems --------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Sizes and rules of a problem."""

    n: int
    m: int
    d: int
    lq: int
    points: list[int]  # of each level
    sizes: list[Size]
    starts: list[int] | None
    s: int
    itemsize: int
    nearest: bool
    masked: bool
    flat: bool  # whether num_points is given


@st.composite
def shapes(
    draw: Any, sides: Sequence[int], queries: Sequence[int], kernels: Any = tuple(KERNELS)
) -> Shape:
    """Any sizes, one of which may be 0; levels one after another, or anywhere: with gaps, overlapping or both."""
    d, itemsize, nearest, masked = draw(st.sampled_from(kernels))
    side = st.sampled_from(sides)
    sizes = draw(st.lists(st.tuples(side, side), min_size=1, max_size=3))
    points = draw(st.lists(st.integers(0, 4), min_size=len(sizes), max_size=len(sizes)))
    flat = draw(st.booleans())
    n, m = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3]))
    lq = draw(st.sampled_from(queries))
    empty = draw(st.sampled_from([""] * 19 + list("nmdqpl")))
    n, m, d, lq = (0 if empty == name else x for name, x in zip("nmdq", (n, m, d, lq), strict=True))
    sizes = [] if empty == "l" else sizes
    points = [0 if empty == "p" else p for p in points[: len(sizes)]]
    points = points if flat else points[:1] * len(sizes)
    areas = [h * w for h, w in sizes]
    if draw(st.booleans()):
        return Shape(
            *(n, m, d, lq, points, sizes, None, sum(areas), itemsize, nearest, masked, flat)
        )
    s = max(areas, default=0) + draw(st.integers(0, 9))
    starts = [draw(st.integers(0, s - area)) for area in areas]
    return Shape(*(n, m, d, lq, points, sizes, starts, s, itemsize, nearest, masked, flat))


def filled(
    shape: Shape,
    rng: np.random.Generator,
    numbers: Callable[[str, tuple[int, ...]], Array],
    pixels: Callable[[Size, tuple[int, ...]], Array],
) -> Call:
    """A problem: `numbers` makes value, weights and grad_output, `pixels` pixel coordinates (..., (x, y))."""
    n, m, d, lq, points = shape[:5]
    parts = []
    for size, p in zip(shape.sizes, shape.points, strict=True):
        scale = np.maximum(size[::-1], 1)  # (W, H)
        parts.append((pixels(size, (n, lq, m, p, 2)) + 0.5) / scale)
    join = np.concatenate if shape.flat else np.stack
    none = np.zeros((n, lq, m, 0, 2) if shape.flat else (n, lq, m, 0, 3, 2))
    locations = join(parts, axis=3) if parts else none
    rules: dict[str, Any] = {"num_points": points if shape.flat else None}
    rules["interpolation"] = "nearest" if shape.nearest else "bilinear"
    rules["value_mask"] = rng.random((n, shape.s)) < 0.7 if shape.masked else None
    call = Call(
        shape.sizes,
        shape.starts,
        numbers("value", (n, shape.s, m, d)),
        locations,
        numbers("weights", locations.shape[:-1]),
        numbers("grad_output", (n, lq, m * d)),
        rules,
    )
    return call.map(np.float64 if shape.itemsize == 8 else np.float32)


@st.composite
def dyadic(draw: Any, inside: bool = False, kernels: Any = tuple(KERNELS)) -> Call:
    """Coordinates in sixteenths of a pixel, up to three pixels outside; a quarter of them on pixels.

    Value and grad_output are small integers, weights quarters: sums have less than 24 bits.
    """
    shape = draw(shapes([1, 2, 4, 8, 0] if not inside else [1, 2, 4, 8], [1, 2, 5, 17], kernels))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def numbers(name: str, size: tuple[int, ...]) -> Array:
        return rng.integers(-4, 5, size) / (4 if name == "weights" else 1)

    def pixels(size: Size, of: tuple[int, ...]) -> Array:
        beyond, upper = (0 if inside else 48), 16 * (np.array(size[::-1]) - 1)
        at = rng.integers(-beyond, upper + beyond + 1, of) / 16
        return np.where(rng.random(of) < 0.25, np.floor(at), at)

    return filled(shape, rng, numbers, pixels)


SPECIAL = {
    "value": [nan, inf, -inf, 0.0, 1e12, 1e-12],
    "weights": [nan, inf, -inf, 0.0, 1e6, 1e-12],
    "grad_output": [nan, inf, -inf, 0.0, 1e6, 1e-12],
    "locations": [nan, inf, -inf, 1e30, -1e30, 3e38, -3e38, 65504.0],
}


@st.composite
def random_calls(draw: Any) -> Call:
    """Normal values, positive weights and points anywhere near the levels; some numbers are extreme or non-finite.

    No point is so near the edge of a cell that rounding could move it into the next, whose gradient differs.
    """
    shape = draw(shapes([1, 2, 3, 5, 8, 13, 0], [17, 40]))
    if (
        shape.itemsize == 8
    ):  # tests.exact knows no num_points, and takes its time for each image and head
        same = shape.points[:1] * len(shape.points)
        shape = shape._replace(flat=False, points=same, n=min(shape.n, 1), m=min(shape.m, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    specials = {
        name: draw(st.lists(st.sampled_from(SPECIAL[name]), max_size=2)) for name in SPECIAL
    }

    def sprinkled(name: str, array: Array) -> Array:
        for number in specials[name]:
            array = np.where(rng.random(array.shape) < 0.02, number, array)
        return array

    def numbers(name: str, size: tuple[int, ...]) -> Array:
        return sprinkled(name, rng.random(size) if name == "weights" else rng.standard_normal(size))

    def pixels(size: Size, of: tuple[int, ...]) -> Array:
        at = rng.integers(-3, np.array(size[::-1]) + 2, of) + rng.uniform(0.05, 0.95, of)
        return sprinkled("locations", at)

    with np.errstate(over="ignore"):
        return filled(shape, rng, numbers, pixels)


# --- layouts ---------------------------------------------------------------------------------------


def memory(shape: tuple[int, ...], dtype: Any, offset: int = 0) -> Array:
    """An array of NaN (of any width: all bits set) that starts `offset` bytes after an aligned address."""
    count = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
    return np.full(count + offset, 255, np.uint8)[offset:].view(dtype).reshape(shape)


def copied(target: Array, source: Array) -> Array:
    """The target, with the numbers of the source."""
    target[...] = source
    return target


def strided(array: Array) -> Array:
    """Every second number of memory, after an odd one."""
    wide = memory((*array.shape[:-1], 2 * array.shape[-1] + 1), array.dtype)
    return copied(wide[..., 1::2][..., : array.shape[-1]], array)


def transposed(array: Array) -> Array:
    """The first two axes swapped in memory."""
    return np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1)


def broadcast(array: Array) -> Array:
    """The first image stands for all: a stride of 0."""
    return np.broadcast_to(array[:1], array.shape) if len(array) else array


def overlapping(array: Array) -> Array:
    """Each row of the second axis begins one number after the one before it."""
    if array.size == 0:
        return array
    strides = list(array.strides)
    strides[1] = array.itemsize
    return np.lib.stride_tricks.as_strided(array, array.shape, strides, writeable=False)


def reversed_in_memory(array: Array) -> Array:
    """Negative strides."""
    return np.ascontiguousarray(array[:, ::-1])[:, ::-1]


def misaligned(array: Array) -> Array:
    """One byte after an aligned address."""
    return copied(memory(array.shape, array.dtype, 1), array)


def read_only(array: Array) -> Array:
    """As memory-mapped files are."""
    array = array.copy()
    array.flags.writeable = False
    return array


LAYOUTS = [np.asarray, np.asfortranarray, strided, transposed, broadcast, overlapping]
# torch has neither negative strides nor read-only tensors, and takes no misaligned arrays.
NUMPY_LAYOUTS = [*LAYOUTS, reversed_in_memory, misaligned, read_only]


@st.composite
def laid_out(draw: Any, calls: Any) -> tuple[Call, Call]:
    """A problem in another dtype, whose arrays lie in memory in any way; and the same in plain arrays."""
    call = draw(calls)
    of_value = draw(st.sampled_from(DTYPES[call.value.itemsize]))
    of_points = draw(st.sampled_from(["float32", of_value]))
    use_torch = of_value == "bfloat16" or draw(st.booleans())
    layouts = st.sampled_from(LAYOUTS if use_torch else NUMPY_LAYOUTS)
    laid = []
    dtypes = of_value, of_points, of_points, of_value
    for dtype, array in zip(dtypes, call[2:6], strict=True):
        layout = draw(layouts)
        with np.errstate(over="ignore"):
            laid.append(in_library(array, dtype, layout, use_torch))
    rules, mask = dict(call.rules), call.rules["value_mask"]
    if use_torch and mask is not None:
        rules["value_mask"] = torch.from_numpy(np.asfortranarray(mask))
    changed = Call(*call[:2], *laid, rules)
    return changed, changed.map(lambda array: array.clone() if use_torch else array.copy("C"))


def in_library(array: Array, dtype: str, layout: Callable[[Array], Array], use_torch: bool) -> Any:
    """An array in a dtype and a layout, as a tensor or not; bfloat16 is laid out as its bits."""
    if not use_torch:
        return layout(array.astype(dtype))
    tensor = torch.from_numpy(array).to(getattr(torch, dtype))
    if dtype == "bfloat16":
        return from_numpy(layout(tensor.view(torch.int16).numpy())).view(torch.bfloat16)
    return from_numpy(layout(tensor.numpy()))


def from_numpy(array: Array) -> Any:
    """A tensor in the same memory, of an array that may say that it is read-only: nobody writes to it."""
    return torch.from_dlpack(array) if array.flags.writeable else expanded(array)


def expanded(array: Array) -> Any:
    """A tensor with strides that overlap."""
    strides = [stride // array.itemsize for stride in array.strides]
    reach = 1 + sum((n - 1) * k for n, k in zip(array.shape, strides, strict=True))
    flat = np.lib.stride_tricks.as_strided(array, (reach,), (array.itemsize,)).copy()
    return torch.as_strided(torch.from_numpy(flat), array.shape, strides)


def numpy64(array: Any) -> Array:
    """Any array in float64."""
    if isinstance(array, torch.Tensor):
        array = array.double().numpy()
    return np.asarray(array, np.float64)


def widened(call: Call) -> Call:
    """The same problem in NumPy's float64."""
    mask = call.rules["value_mask"]
    rules = call.rules | {"value_mask": None if mask is None else np.asarray(mask)}
    return call._replace(rules=rules).map(numpy64)


# --- against the reference -------------------------------------------------------------------------


@share(0.35)
@given(laid_out(dyadic()))
def test_exact_results_are_those_of_the_reference_in_any_dtype_and_layout(
    calls: tuple[Call, Call],
) -> None:
    call, _ = calls
    for actual, true in zip(run(call), by_reference(widened(call)), strict=True):
        rounded = torch.from_numpy(true).to(torch.as_tensor(actual).dtype)
        np.testing.assert_array_equal(numpy64(actual), numpy64(rounded))


@share(0.15)
@given(laid_out(random_calls()))
def test_random_results_are_within_the_error_budget(calls: tuple[Call, Call]) -> None:
    call, plain = calls
    results, same = run(call), by_reference(plain)
    for actual, one, true in zip(results, same, exactly(call), strict=True):
        assert_within_budget(actual, one, true)
    for actual, one in zip(results, run(plain), strict=True):
        np.testing.assert_array_equal(numpy64(actual), numpy64(one))


def exactly(call: Call) -> Results:
    """The reference in float64; of float64 problems what is finite by `tests.exact`."""
    wide = widened(call)
    results = by_reference(wide)
    if call.value.dtype not in (np.float64, torch.float64):
        return results
    mask = wide.rules["value_mask"]
    value = wide.value if mask is None else np.where(mask[..., None, None], wide.value, 0)
    inputs = value, wide.levels, wide.locations, wide.weights
    with np.errstate(all="ignore"):
        found = exact.forward(*inputs), *exact.backward(wide.grad_output, *inputs)
    if mask is not None:
        found[1][~mask] = 0
    # The reference multiplies nothing at points on masked pixels alone; there infinity times 0 is none of a zero value.
    pairs = zip(results, found, strict=True)
    return Results(*(np.where(np.isfinite(a) & np.isfinite(b), b, a) for a, b in pairs))


# --- invariants, by equality -----------------------------------------------------------------------


def assert_equal(actual: Sequence[Any], expected: Sequence[Any]) -> None:
    """Results are the same numbers."""
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@share(0.08)
@given(dyadic(), st.integers(0, 2**32 - 1))
def test_output_and_gradients_are_linear_in_value(call: Call, seed: int) -> None:
    other = np.random.default_rng(seed).integers(-4, 5, call.value.shape).astype(call.value.dtype)
    one, two = run(call), run(call._replace(value=other))
    both = run(call._replace(value=call.value - 2 * other))
    assert_equal(both[::3], [a - 2 * b for a, b in zip(one[::3], two[::3], strict=True)])
    np.testing.assert_array_equal(both.locations, one.locations - 2 * two.locations)
    np.testing.assert_array_equal(both.value, one.value)


@share(0.08)
@given(dyadic(), st.integers(0, 2**32 - 1))
def test_output_and_gradients_are_linear_in_weights(call: Call, seed: int) -> None:
    rng = np.random.default_rng(seed)
    other = (rng.integers(-4, 5, call.weights.shape) / 4).astype(call.weights.dtype)
    one, two = run(call), run(call._replace(weights=other))
    both = run(call._replace(weights=call.weights - 2 * other))
    assert_equal(both[:3], [a - 2 * b for a, b in zip(one[:3], two[:3], strict=True)])
    np.testing.assert_array_equal(both.weights, one.weights)


@share(0.08)
@given(dyadic(), st.sampled_from(["images", "queries", "heads"]), st.randoms(use_true_random=False))
def test_permuting_images_queries_or_heads_permutes_results(
    call: Call, which: str, random: Any
) -> None:
    n, lq, m = call.weights.shape[:3]
    axis = ["images", "queries", "heads"].index(which)
    order = list(range((n, lq, m)[axis]))
    random.shuffle(order)

    def points(array: Array) -> Array:
        return array.take(order, axis)

    def rows(array: Array) -> Array:  # (N, Lq, M*D)
        return points(array.reshape(n, lq, m, call.value.shape[3])).reshape(array.shape)

    def value(array: Array) -> Array:
        return array if which == "queries" else points(array)

    mask = call.rules["value_mask"]
    if which == "images" and mask is not None:
        mask = mask[order]
    moved = Call(
        *(call.sizes, call.starts, value(call.value), points(call.locations), points(call.weights)),
        *(rows(call.grad_output), call.rules | {"value_mask": mask}),
    )
    found = run(call)
    expected = (
        rows(found.output),
        value(found.value),
        points(found.locations),
        points(found.weights),
    )
    assert_equal(run(moved), expected)


@share(0.06)
@given(dyadic(), st.randoms(use_true_random=False))
def test_permuting_points_of_a_level_permutes_their_gradients_alone(
    call: Call, random: Any
) -> None:
    counts = call.rules["num_points"]
    if counts is None:
        order = list(range(call.weights.shape[4]))
        random.shuffle(order)
    else:
        order, first = [], 0
        for count in counts:
            part = list(range(first, first + count))
            random.shuffle(part)
            order, first = [*order, *part], first + count
    axis = 4 if counts is None else 3
    moved = call._replace(
        locations=call.locations.take(order, axis), weights=call.weights.take(order, axis)
    )
    output, by_value, *by_points = run(call)
    assert_equal(run(moved), (output, by_value, *(array.take(order, axis) for array in by_points)))


BILINEAR = [kernel for kernel in KERNELS if not kernel[2]]
SIDE = 16


def of_level(call: Call, points: Array, index: int) -> Array:
    """The part of an array of points that belongs to a level."""
    counts = call.rules["num_points"]
    if counts is None:
        return points[:, :, :, index]
    first = sum(counts[:index])
    return points[:, :, :, first : first + counts[index]]


def canvas(call: Call, place: Size) -> Call:
    """Every level in a frame of zeros of SIDE x SIDE pixels, its first pixel at `place`: (x, y)."""
    (n, _, m, d), (left, top) = call.value.shape, place
    value = np.zeros((n, len(call.sizes), SIDE, SIDE, m, d), call.value.dtype)
    mask, locations = np.ones(value.shape[:4], bool), call.locations.copy()
    for index, (h, w, start) in enumerate(call.levels):
        content = np.s_[:, index, top : top + h, left : left + w]
        value[content] = call.value[:, start : start + h * w].reshape(n, h, w, m, d)
        if call.rules["value_mask"] is not None:
            of_mask = call.rules["value_mask"][:, start : start + h * w]
            mask[content] = of_mask.reshape(n, h, w)
        points = of_level(call, locations, index)
        points[...] = (points * (max(w, 1), max(h, 1)) + place) / SIDE
    s, rules = SIDE * SIDE * len(call.sizes), call.rules
    if rules["value_mask"] is not None:
        rules = rules | {"value_mask": mask.reshape(n, s)}
    return call._replace(
        sizes=[(SIDE, SIDE)] * len(call.sizes),
        starts=None,
        value=value.reshape(n, s, m, d),
        locations=locations,
        rules=rules,
    )


def content_of(call: Call, by_value: Array, place: Size) -> Array:
    """A gradient of the value of `canvas(call, place)` as one of the value of `call`."""
    (n, _, m, d), (left, top) = call.value.shape, place
    framed, total = (
        by_value.reshape(n, len(call.sizes), SIDE, SIDE, m, d),
        np.zeros_like(call.value),
    )
    for index, (h, w, start) in enumerate(call.levels):
        part = framed[:, index, top : top + h, left : left + w]
        total[:, start : start + h * w] += part.reshape(n, h * w, m, d)
    return total


@share(0.06)
@given(dyadic(kernels=tuple(BILINEAR)), st.integers(1, 7), st.integers(1, 7))
def test_outside_of_a_level_is_a_frame_of_zeros(call: Call, left: int, top: int) -> None:
    plain, framed = run(call), run(canvas(call, (left, top)))
    expected = framed.output, content_of(call, framed.value, (left, top)), framed.weights
    assert_equal((plain.output, plain.value, plain.weights), expected)
    for index, (h, w, _) in enumerate(call.levels):
        at = of_level(call, call.locations, index) * (w, h) - 0.5
        # On the outer edge the slopes of both sides differ, and a point there counts as outside.
        inside = ((at > -1) & (at < (w, h))).all(-1)
        found, same = (of_level(call, result.locations, index) for result in (plain, framed))
        np.testing.assert_array_equal(found[inside], (same * (w, h) / SIDE)[inside])
        assert not found[~inside].any()


@share(0.06)
@given(dyadic(kernels=tuple(BILINEAR)), st.sampled_from([(3, 2), (2, 3), (1, 2), (2, 1)]))
def test_a_translation_by_a_pixel_changes_no_result(call: Call, place: Size) -> None:
    """Of value within its frame of zeros, and of the points with it."""
    one, two = run(canvas(call, place)), run(canvas(call, (2, 2)))
    assert_equal((one.output, *one[2:]), (two.output, *two[2:]))
    np.testing.assert_array_equal(
        content_of(call, one.value, place), content_of(call, two.value, (2, 2))
    )


@share(0.04)
@given(dyadic())
def test_gradients_are_the_adjoint_of_the_output(call: Call) -> None:
    """<grad_value, value> = <grad_output, output> = <grad_weights, weights>: it is linear in value and in weights."""
    found = run(call)
    pairs = (
        (found.output, call.grad_output),
        (found.value, call.value),
        (found.weights, call.weights),
    )
    sums = {float((numpy64(one) * numpy64(other)).sum()) for one, other in pairs}
    assert len(sums) == 1


UNMASKED = tuple(kernel for kernel in KERNELS if not kernel[3])


@share(0.04)
@given(dyadic(inside=True, kernels=UNMASKED))
def test_the_gradient_of_value_sums_to_grad_output_times_weights(call: Call) -> None:
    """Where every point lies between pixels of its level, whose coefficients sum to 1."""
    n, lq, m = call.weights.shape[:3]
    d = call.value.shape[3]
    totals = call.weights.reshape(n, lq, m, int(np.prod(call.weights.shape[3:])), 1).sum(3)
    expected = (call.grad_output.reshape(n, lq, m, d) * totals).sum(1)
    np.testing.assert_array_equal(run(call).value.sum(1), expected)
