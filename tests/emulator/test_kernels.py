# SPDX-License-Identifier: Apache-2.0
"""The .cu sources themselves, every template path, executed on the CPU against the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cupy_msda import reference
from cupy_msda.budget import assert_within_budget
from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import Kernel, assemble
from cupy_msda.problem import Level, LevelTable
from tests.emulator.emulator import Emulated, EmulatorError
from tests.emulator.launches import backward, backward_fixed, backward_owner, checked, forward
from tests.problems import Inputs, ragged, random_inputs

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MANY = 10**6  # multiprocessors: so many that rows are split as far as they go
FOUR = ((9, 13), (6, 7), (3, 4), (2, 2))
THREE = ((8, 8), (4, 4), (2, 2))
FIVE = ((12, 14), *FOUR)


def problem(  # one line a case
    n: int,
    sizes: Sequence[tuple[int, int]],
    m: int,
    d: int,
    lq: int,
    p: int,
    dtypes: Sequence[torch.dtype] = (F32, F32),
    reach: float = 0.2,
) -> Inputs:
    """Random inputs of the given sizes."""
    return random_inputs(sizes, n=n, m=m, d=d, lq=lq, p=p, dtypes=dtypes, reach=reach)


# The shapes of real models that fill a GPU: levels and queries scaled down, N, M, D, L and P as they are.
MODELS = {
    "detr-encoder": problem(2, FOUR, 8, 32, 37, 4),
    "detr-encoder-f16": problem(1, FOUR, 8, 32, 70, 4, (F16, F32, F32)),
    "detr-encoder-bf16": problem(1, FOUR, 8, 32, 70, 4, (BF16, F32, F32)),
    "dino5-encoder": problem(1, FIVE, 8, 32, 35, 4),
    "mask2former-1024": problem(2, THREE[::-1], 8, 32, 33, 4),
    "mask2former-512": problem(4, THREE[::-1], 8, 32, 11, 4),
    "bevformer-sca": problem(6, FOUR, 8, 32, 9, 8),
    "bevformer-tsa": problem(2, ((11, 10),), 8, 32, 40, 4),
    "rfdetr": problem(2, ((9, 9),), 16, 16, 50, 2),
    "rfdetr-f16": problem(2, ((9, 9),), 16, 16, 50, 2, (F16, F16, F16)),
    "dfine-n-decoder": problem(1, THREE[:2], 8, 16, 21, 6),
    "msda-triton": problem(4, FOUR, 8, 32, 10, 4),
}
# The rest of what the specialised kernels are made for.
SPECIALISED = {
    "d8": problem(1, THREE, 3, 8, 75, 3),
    "d8-f16": problem(1, THREE, 3, 8, 75, 3, (F16, F32, F16)),
    "d64-bf16": problem(1, THREE, 2, 64, 19, 5, (BF16, BF16, BF16)),
    "d128": problem(1, THREE, 2, 128, 11, 4),
    "d256-f16": problem(1, ((5, 6),), 1, 256, 9, 4, (F16, F16, F32)),
    "one-point": problem(3, ((5, 6),), 1, 32, 5, 1),
    "one-pixel": problem(1, ((1, 1), (1, 7), (0, 4), (5, 1)), 2, 32, 12, 4, reach=1.0),
    "inside-only": problem(1, ((20, 20), (16, 18)), 2, 32, 24, 4, reach=-0.2),
    "inside-only-f16": problem(1, ((20, 20), (16, 18)), 2, 32, 24, 4, (F16, F32, F32), reach=-0.2),
}
# Those with few queries.
SPLIT = {
    "detr-decoder": problem(2, FOUR, 8, 32, 13, 4),
    "dino-decoder": problem(1, FOUR, 8, 32, 21, 4),
    "dino-decoder-f16": problem(1, FOUR, 8, 32, 13, 4, (F16, F32, F32)),
    "rtdetr-decoder": problem(2, THREE, 8, 32, 13, 4),
    "rtdetr-decoder-bf16": problem(1, THREE, 8, 32, 13, 4, (BF16, F32, BF16)),
    "dfine-decoder": ragged(problem(1, THREE, 8, 32, 13, 6), (3, 6, 3)),
    "d8-f16": problem(1, FOUR, 2, 8, 6, 8, (F16, F32, F32)),
}
GENERIC = {
    "d30": problem(2, THREE, 3, 30, 11, 3),
    "d71-f16": problem(1, THREE, 2, 71, 5, 4, (F16, F16, F32)),
    "d256": problem(1, THREE, 1, 256, 5, 4),
    "d1-bf16": problem(1, THREE, 2, 1, 9, 13, (BF16, F32, F32)),
    "float64": problem(2, FOUR, 4, 32, 9, 4, (F64, F64, F64)),
    "float64-mixed": problem(1, THREE, 2, 5, 9, 4, (F64, F32, F32)),
    "seventeen-levels": problem(1, ((3, 2),) * 17, 2, 8, 4, 3),
    "most-levels": problem(1, ((3, 2),) * 320, 2, 8, 1, 3),
}


def on(cases: dict[str, Inputs]) -> pytest.MarkDecorator:
    """Parametrise a test over named inputs."""
    return pytest.mark.parametrize("inputs", cases.values(), ids=cases.keys())


def copied(inputs: Inputs) -> Inputs:
    """A copy that a test may write into."""
    return Inputs(inputs.sizes, *(tensor.clone() for tensor in inputs[1:]))


def check_forward(inputs: Inputs, output: torch.Tensor) -> None:
    """The output must stay within the error budget."""
    same, exact = (
        reference.forward(case.value, case.levels, case.locations, case.weights)
        for case in (inputs, inputs.to(torch.float64))
    )
    assert_within_budget(output, same, exact)


def check_backward(
    inputs: Inputs, gradients: Sequence[torch.Tensor | None], needs: Sequence[bool] = (True,) * 3
) -> None:
    """Each gradient that is needed must stay within the error budget, and the others be absent."""
    same, exact = (
        reference.backward(case.grad_output, case.value, case.levels, case.locations, case.weights)
        for case in (inputs, inputs.to(torch.float64))
    )
    for needed, *three in zip(needs, gradients, same, exact, strict=True):
        if needed:
            assert_within_budget(*three)
        else:
            assert three[0] is None


def forward_kernel(inputs: Inputs, multiprocessors: int = 0) -> Kernel:
    """The kernel that the forward is planned to run."""
    return plans.plan_forward(*checked(inputs), multiprocessors).kernel


def backward_kernel(inputs: Inputs, multiprocessors: int = 0) -> Kernel:
    """The kernel that the backward is planned to run."""
    return plans.plan_backward(*checked(inputs), multiprocessors).kernel


@on(MODELS | SPECIALISED)
def test_specialised_forward(inputs: Inputs) -> None:
    assert forward_kernel(inputs).file == "forward.cu"
    check_forward(inputs, forward(inputs, 0))


@on(SPLIT)
def test_split_forward(inputs: Inputs) -> None:
    file, name = forward_kernel(inputs, MANY)
    assert file == "forward.cu"
    assert not name.endswith(", 1>")
    check_forward(inputs, forward(inputs, MANY))


@on({name: case for name, case in (MODELS | SPECIALISED).items() if name != "d256-f16"})
def test_specialised_backward(inputs: Inputs) -> None:
    assert backward_kernel(inputs).file == "backward.cu"
    check_backward(inputs, backward(inputs, 0))


@on(SPLIT)
def test_split_backward(inputs: Inputs) -> None:
    check_backward(inputs, backward(inputs, MANY))


@on(GENERIC)
def test_generic(inputs: Inputs) -> None:
    assert forward_kernel(inputs).file == backward_kernel(inputs).file == "generic.cu"
    check_forward(inputs, forward(inputs))
    check_backward(inputs, backward(inputs))


def test_generic_backward_takes_what_only_the_forward_specialises() -> None:
    """A float16 row of 256 channels fits 32 lanes of eight, but not of four."""
    inputs = SPECIALISED["d256-f16"]
    assert forward_kernel(inputs).file == "forward.cu"
    assert backward_kernel(inputs).file == "generic.cu"
    check_backward(inputs, backward(inputs))


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["value", "points"])
@on({"specialised": MODELS["mask2former-1024"], "generic": GENERIC["d30"]})
def test_backward_computes_what_is_needed(inputs: Inputs, needs: tuple[bool, bool]) -> None:
    check_backward(inputs, backward(inputs, needs=needs), (needs[0], needs[1], needs[1]))


UNKNOWN = LevelTable(None, None)
TABLES = {"specialised": MODELS["msda-triton"], "generic": GENERIC["d30"]}
BY_STARTS = pytest.mark.parametrize("derived", [False, True], ids=["starts", "derived-starts"])


@on(TABLES)
@BY_STARTS
def test_level_table_on_the_device(inputs: Inputs, derived: bool) -> None:
    options = {"table": UNKNOWN, "tables": (inputs.shapes(), None if derived else inputs.starts())}
    assert torch.equal(forward(inputs, **options), forward(inputs))
    for run in (backward, backward_fixed):
        for actual, expected in zip(run(inputs, **options), run(inputs), strict=True):
            assert torch.equal(actual, expected)


@on(TABLES)
def test_sizes_on_the_host_and_starts_on_the_device(inputs: Inputs) -> None:
    table = checked(inputs)[1]._replace(starts=None)
    assert torch.equal(
        forward(inputs, table=table, tables=(None, inputs.starts())), forward(inputs)
    )


HUGE = 2**62
BAD_TABLES = {
    "too-tall": ((0, 0), HUGE),
    "negative-width": ((1, 1), -3),
    "past-the-end": ((1, 0), 10**6),
    "wraps-to-small": ((0, 0), 2**32 + 1),
}


@on(TABLES)
@BY_STARTS
@pytest.mark.parametrize("bad", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_level_table_that_does_not_fit_gives_nan(inputs: Inputs, derived: bool, bad) -> None:
    """Nothing is read outside (see the sanitized run), and no output hides the mistake."""
    sizes = inputs.shapes()
    sizes[bad[0]] = bad[1]
    options = {"table": UNKNOWN, "tables": (sizes, None if derived else inputs.starts())}
    assert forward(inputs, **options).isnan().all()
    _, grad_locations, grad_weights = backward(inputs, **options)
    level = bad[0][0]
    assert grad_locations[:, :, :, level].isnan().all()
    assert grad_weights[:, :, :, level].isnan().all()


@on(TABLES)
@pytest.mark.parametrize("start", [-1, -(2**40), 2**40, 10**6])
def test_level_start_that_does_not_fit_gives_nan(inputs: Inputs, start: int) -> None:
    starts = inputs.starts()
    starts[1] = start
    assert forward(inputs, table=UNKNOWN, tables=(inputs.shapes(), starts)).isnan().all()


@on(TABLES)
def test_points_that_do_not_count(inputs: Inputs) -> None:
    """NaN, infinite and far locations contribute nothing, even with a NaN weight."""
    inputs = copied(inputs)
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 3e38, 2.0, -1.0)):
        inputs.locations[0, i % inputs.locations.shape[1], 0, i % 2, i % 3, i % 2] = bad
    outside = torch.zeros(inputs.weights.shape, dtype=torch.bool)
    for level, (height, width) in enumerate(inputs.sizes):
        x = inputs.locations[:, :, :, level, :, 0] * width - 0.5
        y = inputs.locations[:, :, :, level, :, 1] * height - 0.5
        outside[:, :, :, level] = ~((x > -1) & (x < width) & (y > -1) & (y < height))
    assert outside.sum() > 20
    inputs.weights[outside] = torch.nan
    check_forward(inputs, forward(inputs))
    gradients = backward(inputs)
    check_backward(inputs, gradients)
    assert (gradients[1][outside] == 0).all()
    assert (gradients[2][outside] == 0).all()


@pytest.mark.parametrize("d", [32, 30], ids=["specialised", "generic"])
def test_the_edge_is_excluded(d: int) -> None:
    """At exactly one pixel outside, x = -1 and x = W, a point has neither value nor gradient."""
    inputs = problem(3, ((4, 8),), 2, d, 5, 1)
    inputs.locations[..., 1] = 0.5
    edge = torch.tensor([-0.5 / 8, 8.5 / 8], dtype=torch.float32)
    inputs.locations[:, :2, :, 0, 0, 0] = edge[None, :, None]
    output = forward(inputs)
    assert (output[:, :2] == 0).all()
    assert (output[:, 2:] != 0).any()
    assert all((gradient[:, :2] == 0).all() for gradient in backward(inputs)[1:])
    just_inside = edge + torch.tensor([1e-4, -1e-4])
    inputs.locations[:, :2, :, 0, 0, 0] = just_inside[None, :, None]
    assert (backward(inputs)[1][:, :2, ..., 0] != 0).all()


@pytest.mark.parametrize(("d", "dtype"), [(32, F32), (16, F16), (30, F32)], ids=str)
def test_padding_is_exact_zero(d: int, dtype: torch.dtype) -> None:
    """Cells next to a corner that lies outside may hold infinity: it must not meet a zero weight."""
    inputs = problem(2, ((4, 5),), 3, d, 11, 4, (dtype, F32))
    inputs.value.view(2, 4, 5, 3, d)[:, :, 1:] = torch.inf
    inputs.locations[..., 0] = (
        0.05  # half a pixel left of column 0: column -1 would wrap to column 4
    )
    output = forward(inputs)
    assert output.isfinite().all()
    check_forward(inputs, output)
    assert all(gradient.isfinite().all() for gradient in backward(inputs))


def test_halves_round_to_nearest_even() -> None:
    """The portable conversions, which the device replaces by single instructions, against torch."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (F16, BF16):
        every = bits.view(dtype)
        wide = every.float()
        between = torch.nextafter(wide, torch.tensor(torch.inf))
        middle = ((wide.double() + wide.roll(-1).double()) / 2).float()
        for source in (wide, between, middle):
            expected = source.to(dtype)
            actual = _converted(source, dtype)
            same = expected.view(torch.int16) == actual.view(torch.int16)
            assert (same | (expected.isnan() & actual.isnan())).all()


def _converted(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 numbers rounded by narrow() after a round trip of the rounded ones through widen()."""
    name = "half_t" if dtype is F16 else "bfloat16_t"
    source = (
        assemble("scalar.cuh")
        + f"""
__global__ void convert(const float* from, {name}* to, int count) {{
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const {name} once = narrow_to<{name}>(from[i]);
  to[i] = narrow_to<{name}>(widen(once));
}}
"""
    )
    result = torch.zeros(numbers.shape, dtype=dtype)
    Emulated(source, "convert")(
        (256, 1, 1),
        (256, 1, 1),
        [numbers.numpy(), result.view(torch.int16).numpy(), np.int32(numbers.numel())],
    )
    return result


@on(
    {
        "specialised": MODELS["mask2former-1024"],
        "split": SPLIT["detr-decoder"],
        "generic": GENERIC["d30"],
    }
)
def test_order_of_the_lanes_does_not_matter(inputs: Inputs) -> None:
    """Forward and point gradients are bitwise the same; grad_value may differ in the last bits."""
    for seed in (1, 2, 3):
        assert torch.equal(forward(inputs, MANY, seed=seed), forward(inputs, MANY))
        gradients = backward(inputs, MANY, seed=seed)
        check_backward(inputs, gradients)
        for actual, expected in zip(gradients[1:], backward(inputs, MANY)[1:], strict=True):
            assert torch.equal(actual, expected)


FIXED = {
    "specialised": (MODELS["msda-triton"], 0),
    "half": (MODELS["rfdetr-f16"], 0),
    "split": (SPLIT["rtdetr-decoder"], MANY),
    "one-pixel": (SPECIALISED["one-pixel"], 0),
    "generic": (GENERIC["d30"], 0),
    "generic-bf16": (GENERIC["d1-bf16"], 0),
    "float64": (GENERIC["float64"], 0),
    "float64-mixed": (GENERIC["float64-mixed"], 0),
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers, so that NaN equals NaN and 0 is not -0."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize(("inputs", "multiprocessors"), FIXED.values(), ids=FIXED.keys())
def test_sums_in_fixed_point(inputs: Inputs, multiprocessors: int) -> None:
    gradients = backward_fixed(inputs, multiprocessors)
    check_backward(inputs, gradients)
    plain = backward(inputs, multiprocessors)
    assert all(map(torch.equal, gradients[1:], plain[1:]))


@pytest.mark.parametrize("case", ["specialised", "half", "split", "generic", "float64"])
def test_sums_in_fixed_point_do_not_depend_on_the_order(case: str) -> None:
    """Bit for bit, in orders of blocks and lanes that do change the plain sums."""
    fixed, plain = (
        [run(*FIXED[case], seed=seed)[0] for seed in range(4)] for run in (backward_fixed, backward)
    )
    assert all(torch.equal(bits(other), bits(fixed[0])) for other in fixed[1:])
    assert not all(torch.equal(other, plain[0]) for other in plain[1:])


def crowd(lq: int, m: int, d: int, p: int, dtype: torch.dtype = F32) -> Inputs:
    """Every point of every query in one cell, three eighths from the top, and all addends positive."""
    inputs = problem(1, ((4, 4),), m, d, lq, p, (dtype,) * 3)
    inputs.locations[:] = torch.tensor([0.5, 0.4375])
    inputs.grad_output.abs_()
    return inputs


def cell_of_crowd(inputs: Inputs) -> torch.Tensor:
    """The sums at the cell's four corners, exact but for a rounding to float64."""
    grad = inputs.grad_output[0].numpy().astype(np.longdouble)  # Lq, M*D
    weights = inputs.weights[0].numpy().astype(np.longdouble).sum((-1, -2))  # Lq, M
    sums = (weights[..., None] * grad.reshape(*weights.shape, -1)).sum(0)  # M, D
    shares = np.array([0.375, 0.375, 0.125, 0.125])
    return torch.from_numpy(np.multiply.outer(shares, sums).astype(np.float64))


CORNERS = [5, 6, 9, 10]  # positions of the crowd's cell
CROWDS = {
    "specialised": (1600, 2, 8, 4),
    "generic": (1600, 2, 5, 4),
    "float64": (1600, 2, 5, 4, F64),
}
CROWDED = pytest.mark.parametrize("size", CROWDS.values(), ids=CROWDS.keys())


@CROWDED
def test_many_addends_of_one_sign(size: tuple[Any, ...]) -> None:
    """Thousands of addends to one cell: nearer to the exact sums than additions in floating point come."""
    inputs = crowd(*size)
    exact = cell_of_crowd(inputs)
    errors = [
        float((run(inputs)[0][0, CORNERS].double() - exact).abs().max() / exact.max())
        for run in (backward_fixed, backward)
    ]
    print("largest error, of the largest sum: {:.2g}, in floating point {:.2g}".format(*errors))
    assert errors[0] <= torch.finfo(inputs.value.dtype).eps
    assert errors[0] < errors[1]


def all_largest(lq: int, d: int, p: int, dtype: torch.dtype) -> Inputs:
    """Every addend as large as any may be for its quantum, and all to the same position."""
    inputs = problem(1, ((2, 2),), 1, d, lq, p, (dtype,) * 3)
    inputs.locations[:] = 0.25  # the middle of the top-left pixel
    below_two = 2 - torch.finfo(dtype).eps
    inputs.weights.fill_(below_two)
    inputs.grad_output.fill_(below_two)
    return inputs


@pytest.mark.parametrize(
    ("lq", "d", "dtype"), [(2**12 - 1, 8, F32), (2**8 - 1, 1, F32), (2**8 - 1, 1, F64)], ids=str
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_of_the_most_addends_does_not_wrap(
    lq: int, d: int, dtype: torch.dtype, sign: int
) -> None:
    """Just fewer addends than the next power of two, in the first case so many that they use up the headroom."""
    inputs = all_largest(lq, d, 2**8, dtype)
    inputs.grad_output.mul_(sign)
    total = backward_fixed(inputs)[0][0, :, 0]
    exact = sign * lq * 2**8 * inputs.weights[0, 0, 0, 0, 0].double() ** 2
    assert ((total[0].double() / exact - 1).abs() <= torch.finfo(dtype).eps).all()
    assert not total[1:].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_no_number_of_addends_hides_one_that_is_not_finite(sign: int) -> None:
    inputs = all_largest(2**12 - 1, 8, 2**8, F32)
    inputs.grad_output.mul_(sign)
    inputs.grad_output[0, 1000] = torch.inf
    for seed in range(3):
        assert backward_fixed(inputs, seed=seed)[0][0, 0].isnan().all()


def powers(inputs: Inputs) -> Inputs:
    """The same with gradients and weights between a half and two, so that they can be scaled far."""
    inputs = copied(inputs)
    inputs.grad_output.copy_(inputs.grad_output.sign() * (0.5 + inputs.grad_output.abs() % 1.5))
    inputs.weights.add_(0.5)
    return inputs


SMALL = {
    "specialised": powers(problem(2, THREE, 3, 8, 13, 3)),
    "generic": powers(problem(2, THREE, 3, 5, 13, 3)),
    "float64": powers(problem(2, THREE, 3, 5, 13, 3, (F64,) * 3)),
}
# Exponents for gradients and for weights, in eighths of the largest.
EXTREMES = [(8, 8), (8, -7), (-7, 8), (-7, -7), (4, 4), (-4, -4), (-3, -4), (7, -7), (0, 8), (8, 0)]


@on(SMALL)
@pytest.mark.parametrize("eighths", EXTREMES, ids=str)
def test_any_magnitude_of_gradients_and_weights(inputs: Inputs, eighths: tuple[int, int]) -> None:
    """Powers of two before the sums are powers of two after them, up to infinity and down to zero."""
    expected = backward_fixed(inputs)[0].double()
    largest = 127 if inputs.value.dtype is F32 else 1023
    by_grad, by_weights = (largest * n // 8 - (n == 8) for n in eighths)
    inputs = copied(inputs)
    inputs.grad_output.ldexp_(torch.tensor(by_grad))
    inputs.weights.ldexp_(torch.tensor(by_weights))
    actual = backward_fixed(inputs)[0]
    with np.errstate(over="ignore"):
        scaled = np.ldexp(expected.numpy(), by_grad + by_weights)
    assert torch.equal(actual, torch.from_numpy(scaled).to(actual.dtype))


@on(SMALL)
def test_sums_in_fixed_point_without_the_points(inputs: Inputs) -> None:
    by_value, *none = backward_fixed(inputs, needs_points=False)
    assert none == [None, None]
    assert torch.equal(by_value, backward_fixed(inputs)[0])


@on(SMALL)
def test_sums_of_zeros_are_zeros(inputs: Inputs) -> None:
    for name in ("grad_output", "weights"):
        zeros = copied(inputs)
        getattr(zeros, name).zero_()
        assert not backward_fixed(zeros)[0].any()


@on(SMALL)
def test_a_loud_head_costs_the_others_nothing(inputs: Inputs) -> None:
    n, _, m, d = inputs.value.shape
    loud = copied(inputs)
    loud.grad_output.view(n, -1, m, d)[1, :, 1] *= 2.0**100
    actual, expected = (backward_fixed(case)[0] for case in (loud, inputs))
    expected[1, :, 1] *= 2.0**100
    assert torch.equal(actual, expected)


@on(SMALL)
def test_points_outside_do_not_decide_the_quantum(inputs: Inputs) -> None:
    """Whatever their weights, which may be anything where a point does not exist."""
    zeros, huge = copied(inputs), copied(inputs)
    for case, weight in ((zeros, 0.0), (huge, 1e38)):
        case.locations[:, ::2, :, 1] = -2
        case.weights[:, ::2, :, 1] = weight
    huge.weights[:, ::4, :, 1] = torch.nan
    assert torch.equal(backward_fixed(huge)[0], backward_fixed(zeros)[0])


@on(SMALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["grad_output", "weights"])
def test_what_is_not_finite_shows(inputs: Inputs, bad: float, where: str) -> None:
    """NaN where an addend is not finite, which is where the plain sums are not; the rest as without it."""
    zero, inputs = copied(inputs), copied(inputs)
    for case, number in ((zero, 0.0), (inputs, bad)):
        getattr(case, where)[1, 3, 4 if where == "grad_output" else 1] = number
    plain, *of_points = backward(inputs)
    actual = backward_fixed(inputs)
    finite = plain.isfinite()
    assert finite.any()
    assert not finite.all()
    assert torch.equal(actual[0].isnan(), ~finite)
    assert torch.equal(actual[0][finite], backward_fixed(zero)[0][finite])
    for got, expected in zip(actual[1:], of_points, strict=True):
        assert torch.equal(bits(got), bits(expected))
    for seed in (1, 2):
        assert torch.equal(bits(backward_fixed(inputs, seed=seed)[0]), bits(actual[0]))


OWNED = {
    "detr-decoder": SPLIT["detr-decoder"],
    "dino-decoder-f16": SPLIT["dino-decoder-f16"],
    "rtdetr-decoder-bf16": SPLIT["rtdetr-decoder-bf16"],
    "dfine-decoder": SPLIT["dfine-decoder"],
    "rfdetr-f16": MODELS["rfdetr-f16"],
    "d8-f16": SPECIALISED["d8-f16"],
    "d64-bf16": SPECIALISED["d64-bf16"],
    "d128": SPECIALISED["d128"],
    "one-pixel": SPECIALISED["one-pixel"],
    "six-tiles": SPECIALISED["inside-only"],
    "rounds": problem(1, FOUR, 2, 8, 1100, 4),  # of 2048 points each
    "rounds-of-odd-points": problem(1, ((20, 40), (5, 3)), 1, 8, 450, 5, (F16, F32, F32)),
}
SEEDS = (1, 2, 3)


def check_value(inputs: Inputs, grad_value: torch.Tensor) -> None:
    """The gradient of value must stay within the error budget."""
    check_backward(inputs, (grad_value, None, None), (True, False, False))


def owned(inputs: Inputs, **options: Any) -> torch.Tensor:
    """The gradient of value by owners of tiles, which must be the same in every order of blocks and lanes."""
    result = backward_owner(inputs, **options)
    for seed in SEEDS:
        assert torch.equal(bits(backward_owner(inputs, seed=seed, **options)), bits(result))
    return result


@on(OWNED)
def test_owners_of_tiles(inputs: Inputs) -> None:
    check_value(inputs, owned(inputs))


@pytest.mark.parametrize("case", ["detr-decoder", "rounds", "six-tiles"])
def test_plain_sums_do_depend_on_the_order(case: str) -> None:
    """Else the test above would show nothing."""
    plain = [backward(OWNED[case], seed=seed)[0] for seed in (0, *SEEDS)]
    assert not all(torch.equal(other, plain[0]) for other in plain[1:])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_every_query_in_one_cell_of_a_tile(dtype: torch.dtype) -> None:
    inputs = crowd(1600, 2, 8, 4, dtype)
    grad_value = owned(inputs)
    check_value(inputs, grad_value)
    grad_value[0, CORNERS] = 0
    assert not bits(grad_value).any()  # of poisoned memory


# Levels of (2, THREE): (8, 8), (4, 4), (2, 2) in memory for 200 positions.
STARTS = {
    "gaps": (130, 20, 0),
    "overlap": (60, 70, 66),
    "same-start": (100, 100, 100),
    "across-tiles": (90, 120, 126),
}


@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("on_device", [False, True], ids=["", "on-device"])
def test_levels_anywhere_in_the_tiles(starts: tuple[int, ...], on_device: bool) -> None:
    inputs = random_inputs(THREE, n=2, m=3, d=32, lq=40, p=4, s=200)
    levels = [Level(*size, start) for size, start in zip(THREE, starts, strict=True)]
    options: dict[str, Any] = {"table": LevelTable(THREE, starts)}
    if on_device:
        options = {"table": UNKNOWN, "tables": (inputs.shapes(), torch.tensor(starts))}
    grad_value = owned(inputs, **options)
    same, exact = (
        reference.backward(case.grad_output, case.value, levels, case.locations, case.weights)[0]
        for case in (inputs, inputs.to(F64))
    )
    assert_within_budget(grad_value, same, exact)
    unused = torch.ones(200, dtype=torch.bool)
    for (h, w), start in zip(THREE, starts, strict=True):
        unused[start : start + h * w] = False
    assert unused.sum() > 60
    assert not bits(grad_value[:, unused]).any()


@BY_STARTS
def test_owners_derive_starts_on_the_device(derived: bool) -> None:
    inputs = OWNED["detr-decoder"]
    tables = (inputs.shapes(), None if derived else inputs.starts())
    actual = backward_owner(inputs, table=UNKNOWN, tables=tables)
    assert torch.equal(actual, backward_owner(inputs))


@BY_STARTS
@pytest.mark.parametrize("bad", BAD_TABLES.values(), ids=BAD_TABLES.keys())
def test_owners_add_nothing_of_levels_that_do_not_fit(derived: bool, bad) -> None:
    """As the plain kernel: grad_value is that of the levels which do fit."""
    inputs = OWNED["detr-decoder"]
    sizes = inputs.shapes()
    sizes[bad[0]] = bad[1]
    options: dict[str, Any] = {"tables": (sizes, None if derived else inputs.starts())}
    plain = backward(inputs, table=UNKNOWN, **options)[0]
    actual = backward_owner(inputs, table=UNKNOWN, sanitize=True, **options)
    assert torch.equal(actual == 0, plain == 0)
    torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-5)


def test_owners_skip_points_that_do_not_count() -> None:
    """Under the sanitizers: NaN, infinite and far locations add nothing, whatever their weight."""
    inputs = copied(OWNED["six-tiles"])
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf, 1e30, -3e38, 2.0, -1.0)):
        inputs.locations[0, i::9, 0, i % 2, i % 3, i % 2] = bad
        inputs.weights[0, i::9, 0, i % 2, i % 3] = torch.nan
    grad_value = backward_owner(inputs, sanitize=True)
    assert grad_value.isfinite().all()
    inputs.weights.nan_to_num_(1.0)
    check_value(inputs, grad_value)


@pytest.mark.parametrize("case", ["dino-decoder-f16", "d128", "rounds-of-odd-points"])
def test_owners_under_the_sanitizers(case: str) -> None:
    check_value(OWNED[case], backward_owner(OWNED[case], sanitize=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["grad_output", "weights"])
def test_owners_show_what_is_not_finite(bad: float, where: str) -> None:
    """As the plain kernel, NaN for NaN and infinity for infinity; the rest as without it."""
    zero, inputs = copied(OWNED["detr-decoder"]), copied(OWNED["detr-decoder"])
    for case, number in ((zero, 0.0), (inputs, bad)):
        getattr(case, where)[1, 3, 4 if where == "grad_output" else 1] = number
    plain, actual = backward(inputs)[0], owned(inputs)
    finite = plain.isfinite()
    assert not finite.all()
    assert torch.equal(actual.isnan(), plain.isnan())
    assert torch.equal(actual[~finite].nan_to_num(), plain[~finite].nan_to_num())
    assert torch.equal(actual[finite], backward_owner(zero)[finite])


def _without(source: str, fence: str, number: int) -> str:
    """The source with one of its fences taken out."""
    parts = source.split(fence)
    return fence.join(parts[: number + 1]) + fence.join(parts[number + 1 :])


FENCED = {
    "forward.cu": problem(2, THREE, 8, 32, 33, 8),
    "generic.cu": problem(2, THREE, 3, 30, 11, 24),
    "backward_value_tiled.cu": problem(1, ((3, 5), (2, 2)), 1, 8, 600, 8),
}


@pytest.mark.parametrize(
    ("file", "fence", "number"),
    [
        ("forward.cu", "__syncthreads();", 0),
        ("forward.cu", "__syncwarp();", 0),
        ("generic.cu", "__syncwarp();", 0),
        ("generic.cu", "__syncwarp();", 1),
    ],
)
def test_a_missing_fence_shows(file: str, fence: str, number: int) -> None:
    """Without a fence some order of the lanes goes wrong.

    The second __syncwarp of forward.cu is not among them: the vote after it makes the lanes meet as well, and what it
    adds is the order of memory, which only a device can get wrong.
    """
    inputs, source = FENCED[file], assemble(file)
    assert source.count(fence) > number
    damaged = _without(source, fence, number)
    good = forward(inputs, 0)
    seen = []
    for seed in range(8):
        try:
            seen.append(torch.equal(forward(inputs, 0, source=damaged, seed=seed), good))
        except EmulatorError:
            seen.append(False)
    assert not all(seen)


OWNER_FENCES = {
    "table-and-zeros": ("threads", 0),
    "counts": ("threads", 1),
    "list": ("threads", 2),
    "queue": ("warp", 0),
}


@pytest.mark.parametrize(
    ("fence", "number"),
    [(f"__sync{what}();", n) for what, n in OWNER_FENCES.values()],
    ids=OWNER_FENCES,
)
def test_a_missing_fence_of_the_owners_shows(fence: str, number: int) -> None:
    """But for two: at the second __syncwarp the lanes have met for the vote before it, and at the last
    __syncthreads the emulator's warps have come equally far.
    """
    inputs, source = FENCED["backward_value_tiled.cu"], assemble("backward_value_tiled.cu")
    assert source.count(fence) > number
    options = {"source": _without(source, fence, number), "sanitize": True}  # it may read anywhere
    good = backward_owner(inputs)
    for seed in range(8):
        try:
            if not torch.equal(backward_owner(inputs, seed=seed, **options), good):
                return
        except EmulatorError:
            return
    pytest.fail("the fence is not needed")


SANITIZED = {
    "specialised": (MODELS["msda-triton"], 0),
    "half": (MODELS["rfdetr-f16"], 0),
    "split": (SPLIT["rtdetr-decoder"], MANY),
    "generic": (GENERIC["d30"], 0),
}


@pytest.mark.parametrize(("inputs", "multiprocessors"), SANITIZED.values(), ids=SANITIZED.keys())
def test_under_the_sanitizers(inputs: Inputs, multiprocessors: int) -> None:
    """No access outside an array, no misaligned one, no undefined arithmetic, at the worst locations."""
    inputs = copied(inputs)
    inputs.locations.view(-1)[::17] = torch.nan
    inputs.locations.view(-1)[::19] = torch.finfo(inputs.locations.dtype).max
    check_forward(inputs, forward(inputs, multiprocessors, sanitize=True))
    check_backward(inputs, backward(inputs, multiprocessors, sanitize=True))


@on(SMALL)
def test_sums_in_fixed_point_under_the_sanitizers(inputs: Inputs) -> None:
    """The array of sums is of exactly its size; numbers that are not finite are converted nowhere."""
    inputs = copied(inputs)
    inputs.locations.view(-1)[::17] = torch.nan
    check_backward(inputs, backward_fixed(inputs, sanitize=True))
    inputs.grad_output[0, 1, 2] = torch.nan
    inputs.weights[0, 2] = torch.inf
    assert backward_fixed(inputs, sanitize=True)[0].isnan().any()


@on({"specialised": MODELS["msda-triton"], "generic": GENERIC["d30"]})
def test_invalid_tables_under_the_sanitizers(inputs: Inputs) -> None:
    """A level table that only a device knows may hold anything."""
    sizes, starts = inputs.shapes(), inputs.starts()
    sizes[0, 0], sizes[1, 1], starts[0] = HUGE, -(2**63), 2**63 - 1
    for given in (starts, None):
        options = {"table": UNKNOWN, "tables": (sizes, given), "sanitize": True}
        assert forward(inputs, **options).isnan().all()
        backward(inputs, **options)


@on(TABLES)
def test_an_empty_level_may_have_any_width(inputs: Inputs) -> None:
    """Under the sanitizers: the width must not be computed with."""
    sizes = inputs.shapes()
    sizes[1] = torch.tensor([0, 2**31 - 1])
    options = {"table": UNKNOWN, "tables": (sizes, inputs.starts()), "sanitize": True}
    empty = copied(inputs)
    empty.weights[:, :, :, 1] = 0
    assert torch.equal(forward(inputs, **options), forward(empty))
    assert (backward(inputs, **options)[1][:, :, :, 1] == 0).all()
