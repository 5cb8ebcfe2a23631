# SPDX-License-Identifier: Apache-2.0
"""Uneven points, nearest pixels and masks, in every kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import assemble
from cupy_msda.cuda.plans import Candidate, Choice
from tests.emulator.cases import (
    F32,
    F64,
    MANY,
    SEEDS,
    UNKNOWN,
    check_backward,
    check_forward,
    check_value,
    copied,
    same_bits,
)
from tests.emulator.launches import (
    Rules,
    backward,
    backward_binned,
    backward_fixed_point,
    backward_tiled,
    checked,
    device,
    forward,
)
from tests.emulator.sampling import CASES, POSITIONS, Case, case, mask_of, on_cases, some
from tests.non_finite import non_finite_inputs
from tests.problems import Inputs, random_inputs

ON_THE_LEVELS: dict[str, Any] = {"grids": None}


def chosen(candidate: Candidate) -> Choice:
    """The choice of a candidate."""
    return Choice(str(candidate), "test")


@on_cases
def test_output(inputs: Inputs, rules: Rules) -> None:
    """Of plain and persistent kernels, which are bitwise identical."""
    problem, _ = checked(inputs, rules)
    candidates = plans.forward_candidates(problem, device(1), None)
    assert {candidate.kernel for candidate in candidates} == {"plain", "query tiles", "persistent"}
    first, *others = (
        forward(inputs, rules=rules, choice=chosen(candidate), **ON_THE_LEVELS)
        for candidate in candidates
    )
    check_forward(inputs, first, rules)
    assert all(same_bits(other, first) for other in others)


@on_cases
def test_gradients(inputs: Inputs, rules: Rules) -> None:
    """All at once, or that of value binned and those of points, bitwise identical, by the persistent kernel."""
    problem, _ = checked(inputs, rules)
    candidates = plans.backward_candidates(problem, device(1), None, True, True, False)
    binned = next(c for c in candidates if (c.value, c.kernel) == ("binned", "persistent"))
    plain = next(c for c in candidates if (c.value, c.kernel) == ("", "plain"))
    by_binned, by_plain = (
        backward(inputs, rules=rules, choice=chosen(candidate), **ON_THE_LEVELS)
        for candidate in (binned, plain)
    )
    check_backward(inputs, by_plain, rules=rules)
    check_value(inputs, by_binned[0], rules)
    assert all(map(same_bits, by_binned[1:], by_plain[1:]))


SPLIT_K = {
    "dfine": case((3, 6, 3), d=32, lq=13),
    "rtdetr": case((4, 4, 4), nearest=True, d=32, lq=13),
    "uneven-masked": case((1, 5, 2), masked=True, lq=13),
}


@pytest.mark.parametrize(("inputs", "rules"), SPLIT_K.values(), ids=SPLIT_K.keys())
def test_split_k(inputs: Inputs, rules: Rules) -> None:
    """A part of the points may begin amid a level."""
    problem, _ = checked(inputs, rules)
    candidate, *_ = plans.forward_candidates(problem, device(MANY), ())
    assert candidate.number > 1
    check_forward(inputs, forward(inputs, MANY, rules=rules), rules)
    check_backward(inputs, backward(inputs, MANY, rules=rules), rules=rules)


@some("uneven-masked", "all")
def test_gradients_of_value_or_of_points_alone(inputs: Inputs, rules: Rules) -> None:
    for needs in ((True, False), (False, True)):
        gradients = backward(inputs, needs=needs, rules=rules)
        check_backward(inputs, gradients, (needs[0], needs[1], needs[1]), rules)


@some("level-without-points", "uneven-masked", "all")
def test_deterministic_gradients_of_value(inputs: Inputs, rules: Rules) -> None:
    """By tiles, by bins and in fixed point: bitwise identical in every order of blocks and lanes."""
    options: dict[str, Any] = {"deterministic": True, "rules": rules}
    runs = {
        "tiled": lambda seed: backward_tiled(inputs, rules=rules, seed=seed),
        "binned": lambda seed: backward_binned(inputs, seed=seed, **options),
        "fixed": lambda seed: backward(inputs, needs=(True, False), seed=seed, **options)[0],
    }
    for run in runs.values():
        grad_value = run(0)
        check_value(inputs, grad_value, rules)
        assert same_bits(run(SEEDS[0]), grad_value)


GENERIC = {
    "uneven": case((3, 6, 3), d=6, lq=11),
    "most-points": case((40, 0, 1), d=3, lq=5),
    "most-levels": case((*range(1, 16), 0), d=2, lq=3, sizes=((2, 3),) * 16),
    "nearest-f64": case((4, 4, 4), nearest=True, d=8, lq=11, dtypes=(F64, F64)),
    "masked": case((3, 6, 3), masked=True, d=30, lq=11),
    "masked-f64": case((4, 4, 4), masked=True, d=8, lq=11, dtypes=(F64, F64)),
    "all": case((3, 6, 3), nearest=True, masked=True, d=6, lq=11),
}


@pytest.mark.parametrize(("inputs", "rules"), GENERIC.values(), ids=GENERIC.keys())
def test_generic(inputs: Inputs, rules: Rules) -> None:
    problem, _ = checked(inputs, rules)
    (candidate,) = plans.forward_candidates(problem, device(1), ())
    assert candidate.kernel == "generic"
    check_forward(inputs, forward(inputs, rules=rules), rules)
    check_backward(inputs, backward(inputs, rules=rules), rules=rules)
    gradients = backward_fixed_point(inputs, rules=rules)
    check_backward(inputs, gradients, rules=rules)
    assert same_bits(backward_fixed_point(inputs, rules=rules, seed=1)[0], gradients[0])


@pytest.mark.parametrize("d", [16, 6], ids=["specialised", "generic"])
def test_equal_numbers_of_points_take_the_kernels_of_one_number(d: int) -> None:
    inputs, rules = case((4, 4, 4), d=d)
    even = random_inputs(inputs.sizes, n=2, m=2, d=d, lq=POSITIONS, p=4)
    problems = checked(inputs, rules)[0], checked(even)[0]
    assert problems[0] == problems[1]
    assert same_bits(forward(inputs, rules=rules), forward(even))


@pytest.mark.parametrize("d", [16, 6], ids=["specialised", "generic"])
def test_a_level_table_on_the_device(d: int) -> None:
    """A level that does not fit gives NaN to every output that it touches, and to the gradients of its points."""
    inputs, rules = case((3, 0, 5), nearest=True, masked=True, d=d)
    on_device: dict[str, Any] = {"table": UNKNOWN, "rules": rules}
    fits = inputs.shapes(), None
    assert same_bits(forward(inputs, tables=fits, **on_device), forward(inputs, rules=rules))
    by_points = backward(inputs, rules=rules)[1:]
    assert all(map(same_bits, backward(inputs, tables=fits, **on_device)[1:], by_points))
    for level, points in ((1, []), (2, [3, 4, 5, 6, 7])):
        sizes = inputs.shapes()
        sizes[level, 0] = 10**6
        tables = sizes, inputs.starts()
        assert forward(inputs, tables=tables, **on_device).isnan().all() == bool(points)
        for actual, expected in zip(
            backward(inputs, tables=tables, **on_device)[1:], by_points, strict=True
        ):
            assert actual[:, :, :, points].isnan().all()
            assert same_bits(actual[:, :, :, :3], expected[:, :, :, :3])


# --- what nearest pixels and masks promise ---------------------------------------------------------


def placed(at: Sequence[tuple[float, float]], d: int, dtype: torch.dtype = F32) -> Inputs:
    """One point at each of these fractions of a level of 4 x 5 pixels, whose value is their number, from 1 on."""
    inputs = random_inputs(((4, 5),), n=1, m=1, d=d, lq=len(at), p=1, dtypes=(dtype, dtype))
    inputs.value[:] = torch.arange(1, 21, dtype=dtype)[:, None, None]
    inputs.locations[:] = torch.tensor(at, dtype=dtype)[:, None, None, None]
    inputs.weights[:] = 1
    return inputs


inf, nan = torch.inf, torch.nan
# Locations by the pixel (column, row) that is nearest by the rule of RT-DETRv2.
NEAREST = {
    (0.0, 0.0): (0, 0),
    (0.0999, 0.0): (0, 0),  # u * W = 0.4995
    (0.1, 0.0): (1, 0),  # exactly half: up
    (0.3, 0.625): (2, 3),
    (0.7, 0.0): (4, 0),
    (0.9, 0.99): (4, 3),  # u * W + 0.5 = 5: back to the last
    (1.0, 1.0): (4, 3),
    (-0.25, -0.1): (0, 0),  # truncated, not rounded down
    (-7.0, 0.5): (0, 2),
    (1e30, -1e30): (4, 0),
    (inf, -inf): (4, 0),
    (-inf, inf): (0, 3),
}


@pytest.mark.parametrize(("d", "dtype"), [(8, F32), (3, F32), (3, F64)], ids=str)
def test_the_nearest_pixel(d: int, dtype: torch.dtype) -> None:
    inputs = placed(list(NEAREST), d, dtype)
    output = forward(inputs, rules={"interpolation": "nearest"}, sanitize=True)
    expected = [1 + 5 * row + column for column, row in NEAREST.values()]
    assert output[0, :, 0].tolist() == expected


@pytest.mark.parametrize("d", [16, 6], ids=["specialised", "generic"])
def test_locations_that_are_nan_contribute_nothing(d: int) -> None:
    """Whatever their weights; gradients of locations are zero everywhere."""
    inputs, rules = case((3, 6, 3), nearest=True, masked=True, d=d)
    inputs = copied(inputs)
    inputs.locations[:, ::3, 0, 4, 0] = nan
    inputs.locations[:, 1::3, 1, 1, 1] = nan
    lost = inputs.locations.isnan().any(-1)
    inputs.weights[lost] = nan
    check_forward(inputs, forward(inputs, rules=rules), rules)
    gradients = backward(inputs, rules=rules)
    check_backward(inputs, gradients, rules=rules)
    assert (gradients[1] == 0).all()
    assert (gradients[2][lost] == 0).all()


@pytest.mark.parametrize("d", [16, 6], ids=["specialised", "generic"])
def test_what_is_masked_decides_nothing(d: int) -> None:
    """Neither its value nor the weights of points that touch nothing else; its gradient is exact zero."""
    inputs, rules = case((3, 6, 3), masked=True, d=d)
    mask = rules["value_mask"]
    ones = torch.ones_like(inputs.weights)
    unit = inputs._replace(value=torch.ones_like(inputs.value), weights=ones)
    lost = (
        backward(unit._replace(grad_output=torch.ones_like(unit.grad_output)), rules=rules)[2] == 0
    )
    assert lost.any()
    other = copied(inputs)
    other.value[~mask] = 3.0
    other.weights[lost] = nan
    assert same_bits(forward(other, rules=rules), forward(inputs, rules=rules))
    for run in (backward, backward_fixed_point):
        actual, expected = run(other, rules=rules), run(inputs, rules=rules)
        assert same_bits(actual[1], expected[1])
        assert same_bits(actual[2], expected[2])
        assert not actual[0][~mask].any()
        check_value(inputs, actual[0], rules)


RULES: dict[str, Rules] = {
    "nearest": {"interpolation": "nearest"},
    "masked": {"value_mask": mask_of(non_finite_inputs())},
    "all": {"interpolation": "nearest", "value_mask": mask_of(non_finite_inputs())},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("d", [32, 6], ids=["specialised", "generic"])
def test_non_finite_inputs(d: int, rules: Rules) -> None:
    """Infinities and NaN come out where they come out of the equations."""
    inputs = non_finite_inputs(d)
    check_forward(inputs, forward(inputs, rules=rules), rules)
    gradients = backward(inputs, rules=rules)
    check_backward(inputs, gradients, rules=rules)
    not_finite = ~gradients[0].isfinite()
    assert torch.equal(backward_fixed_point(inputs, rules=rules)[0].isnan(), not_finite)
    if d == 32 and len(rules) == 2:
        check_value(inputs, backward_tiled(inputs, rules=rules), rules)
        check_value(inputs, backward_binned(inputs, rules=rules), rules)


def at_the_worst_locations(case: Case) -> Inputs:
    """Inputs of a case, many of whose points lie far outside or nowhere."""
    inputs = copied(case.inputs)
    inputs.locations.view(-1)[::17] = nan
    inputs.locations.view(-1)[::19] = torch.finfo(inputs.locations.dtype).max
    inputs.locations.view(-1)[::23] = -inf
    return inputs


SANITIZED = {"uneven-masked": CASES["uneven-masked"], "generic": GENERIC["all"]}


@pytest.mark.parametrize("case", SANITIZED.values(), ids=SANITIZED.keys())
def test_under_the_sanitizers(case: Case) -> None:
    """No access outside an array, the mask's too."""
    inputs, rules = at_the_worst_locations(case), case.rules
    check_forward(inputs, forward(inputs, rules=rules, sanitize=True), rules)
    check_backward(inputs, backward(inputs, rules=rules, sanitize=True), rules=rules)


@pytest.mark.parametrize("run", [backward_tiled, backward_binned])
def test_gradients_of_value_under_the_sanitizers(run: Callable[..., torch.Tensor]) -> None:
    inputs, rules = at_the_worst_locations(CASES["all"]), CASES["all"].rules
    check_value(inputs, run(inputs, rules=rules, sanitize=True), rules)


# --- planted faults --------------------------------------------------------------------------------

FORWARD, TILED, GENERIC_FORWARD = "forward.cu", "backward_value_tiled.cu", "generic.cu"
FAULTS = {
    "level-of-a-point": ("uneven", FORWARD, "k >= end", "k > end"),
    "level-of-a-point-at-run-time": ("uneven", GENERIC_FORWARD, "k >= p.ends", "k > p.ends"),
    "first-point-of-a-level": ("uneven", TILED, "sum += i++ < level", "sum += i++ <= level"),
    "row-of-a-point": ("uneven", TILED, "inverse >> 31", "inverse >> 30"),
    "another-image's-mask": ("masked", FORWARD, "S::MASKED ? mask + position", "S::MASKED ? mask"),
    "mask-of-the-left-corners": ("masked", FORWARD, ")[i & 1] == 0", ")[0] == 0"),
    "order-of-the-corner-bits": (
        "masked",
        FORWARD,
        "corners &= ~(1u << i)",
        "corners &= ~(8u >> i)",
    ),
    "inverted-mask": ("masked", FORWARD, ")[i & 1] == 0", ")[i & 1] != 0"),
    "rounded-twice": ("nearest", FORWARD, "size), 0.5f)", "size), 1.0f)"),
    "rounded-down": ("nearest", FORWARD, "size), 0.5f)", "size), 0.0f)"),
    "beyond-the-last-pixel": (
        "nearest",
        FORWARD,
        "static_cast<Real>(size - 1)",
        "static_cast<Real>(size)",
    ),
    "before-the-first-pixel": (
        "nearest",
        FORWARD,
        "min(max(x, static_cast<Real>(0)), static_cast<Real>(size - 1))",
        "min(x, static_cast<Real>(size - 1))",
    ),
}


@pytest.mark.parametrize(("name", "file", "right", "wrong"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_shows(name: str, file: str, right: str, wrong: str) -> None:
    inputs, rules = GENERIC[name] if file == GENERIC_FORWARD else CASES[name]
    source = assemble(file)
    assert source.count(right) == 1
    run, check = (backward_tiled, check_value) if file == TILED else (forward, check_forward)
    check(inputs, run(inputs, rules=rules), rules)
    damaged = source.replace(right, wrong)
    with pytest.raises(AssertionError):
        check(inputs, run(inputs, rules=rules, source=damaged), rules)
