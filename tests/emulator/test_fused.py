# SPDX-License-Identifier: Apache-2.0
"""The fused kernels: locations and weights from reference points, offsets and logits, and the way back."""

from __future__ import annotations

import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.plans import Choice
from tests.emulator.cases import F32, MANY, SEEDS, UNKNOWN, same_bits
from tests.emulator.fused import (
    CASES,
    Fused,
    backward,
    check_backward,
    check_forward,
    composed,
    forward,
    fused,
)
from tests.emulator.launches import device

inf, nan = torch.inf, torch.nan
on_cases = pytest.mark.parametrize("inputs", CASES.values(), ids=CASES.keys())


@on_cases
def test_output(inputs: Fused) -> None:
    """Of plain and persistent kernels, which are bitwise identical."""
    problem, _ = inputs.problem
    candidates = plans.forward_candidates(problem, device(1), None)
    assert {candidate.kernel for candidate in candidates} == {"plain", "query tiles", "persistent"}
    names = [Choice(str(candidate), "test") for candidate in candidates]
    first, *others = (forward(inputs, grids=None, choice=name) for name in names)
    check_forward(inputs, first)
    assert all(same_bits(other, first) for other in others)


@on_cases
def test_gradients(inputs: Fused) -> None:
    """All at once, or that of value binned and the others, bitwise identical, by the persistent kernel."""
    problem, _ = inputs.problem
    candidates = plans.backward_candidates(problem, device(1), None, True, True, False)
    kinds = ("binned", "persistent"), ("", "plain")
    binned, plain = (next(c for c in candidates if (c.value, c.kernel) == kind) for kind in kinds)
    by_binned, by_plain = (
        backward(inputs, grids=None, choice=Choice(str(candidate), "test"))
        for candidate in (binned, plain)
    )
    check_backward(inputs, by_plain)
    check_backward(inputs, (by_binned[0], None, None, None))
    assert all(map(same_bits, by_binned[1:], by_plain[1:]))


SPLIT_K = {
    "points": fused((2, 6, 8), d=32, lq=13, by_level=False),
    "boxes": fused((3, 6, 3), 4, lq=13),
}


@pytest.mark.parametrize("inputs", SPLIT_K.values(), ids=SPLIT_K.keys())
def test_split_k(inputs: Fused) -> None:
    """A part of the points may begin amid a level; the softmax is that of all."""
    problem, _ = inputs.problem
    of_output, *_ = plans.forward_candidates(problem, device(MANY), ())
    of_points, *_ = plans.backward_candidates(problem, device(MANY), (), False, True, False)
    assert min(of_output.number, of_points.number) > 1
    check_forward(inputs, forward(inputs, MANY))
    check_backward(inputs, backward(inputs, MANY))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, True, True)], ids=str
)
def test_gradients_that_are_needed(needs: tuple[bool, bool, bool]) -> None:
    inputs = CASES["points"]
    results = backward(inputs, needs=needs)
    assert [result is not None for result in results] == [needs[0], needs[2], needs[1], needs[1]]
    check_backward(inputs, results)


def test_any_order_of_the_lanes() -> None:
    """All but the gradient of value are bitwise identical."""
    inputs = CASES["uneven-boxes"]
    output, results = forward(inputs), backward(inputs)
    for seed in SEEDS:
        assert same_bits(forward(inputs, seed=seed), output)
        assert all(map(same_bits, backward(inputs, seed=seed)[1:], results[1:]))


def test_the_nearest_pixel_is_that_of_torch() -> None:
    """A whole offset from a pixel's centre ends amid two pixels: the roundings of each operation decide."""
    inputs = CASES["nearest"].copied()
    inputs.logits[:] = 0
    inputs.offsets.round_()
    centers = [
        [(column + 0.5) / width, (row + 0.5) / height]
        for height, width in inputs.sizes
        for row in range(height)
        for column in range(width)
    ]
    inputs.references[:] = torch.tensor(centers)[None, :, None]
    expected = composed(inputs)[0]
    assert torch.allclose(forward(inputs), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(composed(inputs, torch.float64)[0].float(), expected, atol=0.1)


# --- the softmax ---------------------------------------------------------------------------------


def extreme() -> Fused:
    """Each of the first queries with other logits, the others random."""
    inputs = CASES["points"].copied()
    largest = torch.finfo(F32).max
    rows = (
        *([-inf, 1, 2], [-inf], [nan, 0, 1], [inf, 0, 1]),
        *([1e30, -1e30, 1e30], [largest, -largest, 0], [-1e30], [1e4, 1e4 - 1, 0]),
    )
    for query, row in enumerate(rows):
        repeated = row * 12
        inputs.logits[:, query] = torch.tensor(repeated[:12])
    return inputs


def test_extreme_logits() -> None:
    """Exact for finite ones, zero for -inf, and NaN where torch has it: of all -inf, of inf, and beside NaN."""
    inputs = extreme()
    output, results = forward(inputs), backward(inputs)
    lost = output.view(*output.shape[:2], 2, -1).isnan().all(-1).all(-1)
    assert lost[0].nonzero().flatten().tolist() == [1, 2, 3]
    check_forward(inputs, output)
    check_backward(inputs, results)
    problem, _ = inputs.problem
    candidates = plans.backward_candidates(problem, device(1), None, True, False, False)
    (binned,) = (candidate for candidate in candidates if candidate.value == "binned")
    choice = Choice(str(binned), "test")
    check_backward(inputs, backward(inputs, 1, None, choice, (True, False, False)))


def test_the_error_that_a_device_may_add_to_powers_of_two() -> None:
    """ex2.approx is off by up to 2^-22, here in any direction, and still all is within the error budget."""
    inputs = CASES["points"]
    inputs = inputs._replace(logits=3 * inputs.logits)
    sign = "((__float_as_uint(power) * 2654435761u) >> 31 ? 1 : -1)"
    fault = "return exp2f(power);", f"return exp2f(power) * (1.0f + {sign} * 2.384185791e-7f);"
    check_forward(inputs, forward(inputs, fault=fault))
    check_backward(inputs, backward(inputs, fault=fault))


# --- what is wrong shows -------------------------------------------------------------------------

FAULTS = {
    "no-maximum": ("exp_not_positive(logit - largest)", "exp_not_positive(logit)", "points"),
    "softmax-of-some-lanes": (
        "offset < G; offset *= 2) sum +=",
        "offset < G / 2; offset *= 2) sum +=",
        "points",
    ),
    "sum-of-one-part": ("G * (T::S::K / PART)", "G", "split-k"),
    "points-of-another-level": (
        "S::inverse_points(number)",
        "S::inverse_points(0)",
        "uneven-boxes",
    ),
    "points-of-another-level-in-boxes": (
        "S::inverse_points(level)",
        "S::inverse_points(0)",
        "uneven-boxes",
    ),
    "height-for-width": ("reference[2] * scale", "reference[3] * scale", "boxes"),
    "first-query-for-all": ("opaque(query % p.reference_rows)", "0", "boxes-of-one-image"),
    "first-image-for-all": ("row < all", "row < rows", "boxes-of-one-image"),
    "all-levels-for-each": ("S::BY_LEVEL && level != own", "false", "points"),
    "latest-first": ("gradient[COUNT - 1 - i] - sum", "gradient[i] - sum", "points"),
}


@pytest.mark.parametrize(("right", "wrong", "name"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_shows(right: str, wrong: str, name: str) -> None:
    inputs, multiprocessors = CASES.get(name, SPLIT_K["boxes"]), MANY if name == "split-k" else 1
    fault, needs = (right, wrong), (False, True, True)
    with pytest.raises(AssertionError, match="times its budget"):
        check_backward(inputs, backward(inputs, multiprocessors, needs=needs, fault=fault))


# --- levels --------------------------------------------------------------------------------------


def test_a_level_table_on_the_device() -> None:
    """A level that does not fit gives NaN to every output that it touches, and to all gradients by its points."""
    inputs = CASES["boxes"]
    fits = torch.tensor(inputs.sizes), None
    assert same_bits(forward(inputs, table=UNKNOWN, tables=fits), forward(inputs))
    by_points = backward(inputs)[1:]
    assert all(map(same_bits, backward(inputs, table=UNKNOWN, tables=fits)[1:], by_points))
    starts = torch.tensor([level.start for level in inputs.levels])
    sizes = torch.tensor(inputs.sizes)
    sizes[2, 0] = 10**6
    options = {"table": UNKNOWN, "tables": (sizes, starts)}
    assert forward(inputs, **options).isnan().all()
    _, references, offsets, logits = backward(inputs, **options)
    assert references[:, :, 2].isnan().all()
    assert offsets[:, :, :, 8:].isnan().all()
    assert logits.isnan().all()
    assert same_bits(references[:, :, :2], by_points[0][:, :, :2])
    assert same_bits(offsets[:, :, :, :8], by_points[1][:, :, :, :8])


@pytest.mark.parametrize("coordinates", [2, 4])
def test_an_empty_level(coordinates: int) -> None:
    """Its points lie nowhere; their gradients are zero, not 0 / 0."""
    inputs = fused((4, 4, 4), coordinates, d=32, lq=7, sizes=((5, 6), (0, 4), (3, 3)))
    check_forward(inputs, forward(inputs))
    results = backward(inputs)
    check_backward(inputs, results)
    assert (results[2][:, :, :, 4:8] == 0).all()
    assert (results[1][:, :, 1] == 0).all()


def test_under_the_sanitizers() -> None:
    """No access outside an array, at the worst offsets and references."""
    inputs = CASES["boxes-of-one-image"].copied()
    inputs.offsets.view(-1)[::17] = nan
    inputs.offsets.view(-1)[::19] = torch.finfo(F32).max
    inputs.references.view(-1)[::23] = -inf
    assert forward(inputs, sanitize=True).isfinite().all()
    backward(inputs, sanitize=True)
