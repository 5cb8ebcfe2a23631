# SPDX-License-Identifier: Apache-2.0
"""The .cu sources themselves, every template path, executed on the CPU against the float64 oracle."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from cupy_msda.bench.correctness import by_reference
from cupy_msda.cuda import plans
from cupy_msda.cuda.compile import CONSTANTS, Kernel, assemble, kernel_dir
from tests.emulator.cases import (
    BAD_TABLES,
    BF16,
    BY_STARTS,
    F16,
    F32,
    GENERIC,
    HUGE,
    MANY,
    MODELS,
    SEEDS,
    SPECIALISED,
    SPLIT_K,
    TABLES,
    THREE,
    UNKNOWN,
    assert_fence_is_needed,
    bits,
    check_backward,
    check_forward,
    copied,
    on,
    problem,
    without,
)
from tests.emulator.emulator import Emulated
from tests.emulator.launches import (
    backward,
    backward_fixed_point,
    checked,
    device,
    forward,
)
from tests.problems import Inputs


def forward_kernel(inputs: Inputs, multiprocessors: int = 0) -> Kernel:
    """The kernel that the forward is planned to run."""
    (launch,) = plans.plan_forward(*checked(inputs), device(multiprocessors), ()).launches
    return launch.kernel


def backward_kernel(inputs: Inputs, multiprocessors: int = 0) -> Kernel:
    """The kernel that the backward is planned to run."""
    plan = plans.plan_backward(*checked(inputs), device(multiprocessors), ())
    return plan.launches[1].kernel  # after the fill


@on(MODELS | SPECIALISED)
def test_specialised_forward(inputs: Inputs) -> None:
    assert forward_kernel(inputs).file == "forward.cu"
    check_forward(inputs, forward(inputs, 0))


@on(SPLIT_K)
def test_split_k_forward(inputs: Inputs) -> None:
    file, name = forward_kernel(inputs, MANY)
    assert file == "forward.cu"
    assert not name.endswith(", 1>")
    check_forward(inputs, forward(inputs, MANY))


@on({name: case for name, case in (MODELS | SPECIALISED).items() if name != "d256-f16"})
def test_specialised_backward(inputs: Inputs) -> None:
    assert backward_kernel(inputs).file == "backward.cu"
    check_backward(inputs, backward(inputs, 0))


@on(SPLIT_K)
def test_split_k_backward(inputs: Inputs) -> None:
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


@on(TABLES)
@BY_STARTS
def test_level_table_on_the_device(inputs: Inputs, derived: bool) -> None:
    options = {"table": UNKNOWN, "tables": (inputs.shapes(), None if derived else inputs.starts())}
    assert torch.equal(forward(inputs, **options), forward(inputs))
    for run in (backward, backward_fixed_point):
        for actual, expected in zip(run(inputs, **options), run(inputs), strict=True):
            assert torch.equal(actual, expected)


@on(TABLES)
def test_sizes_on_the_host_and_starts_on_the_device(inputs: Inputs) -> None:
    table = checked(inputs)[1]._replace(starts=None)
    assert torch.equal(
        forward(inputs, table=table, tables=(None, inputs.starts())), forward(inputs)
    )


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


def on_pixels(d: int, dtype: torch.dtype) -> Inputs:
    """Points on pixels, between them and on the edges of a level, the last column and row among them.

    Small integers and binary fractions: no sum in float32 rounds.
    """
    inputs = problem(1, ((4, 8), (2, 2)), 2, d, 28, 4, (dtype, dtype))
    x = torch.tensor([-1, -0.75, -0.5, 0, 0.5, 6, 6.5, 7, 7.25, 7.5, 8])
    y = torch.tensor([-1, -0.75, -0.5, 0, 0.5, 2, 2.5, 3, 3.25, 4])
    at = (torch.cartesian_prod(x, y) + 0.5) / torch.tensor([8, 4])
    at = at.repeat(2, 1)[: 28 * 4].view(1, 28, 1, 1, 4, 2).expand_as(inputs.locations)
    generator = torch.Generator().manual_seed(0)
    value, weights, grad_output = (
        torch.randint(-4, 5, tensor.shape, generator=generator).to(dtype)
        for tensor in (inputs.value, inputs.weights, inputs.grad_output)
    )
    return Inputs(inputs.sizes, value, at.to(dtype).contiguous(), weights / 4, grad_output)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize(
    ("d", "multiprocessors"), [(32, 0), (32, MANY), (30, 0)], ids=["row", "split-k", "generic"]
)
def test_points_on_pixels_and_edges_are_exact(d: int, multiprocessors: int, dtype) -> None:
    inputs = on_pixels(d, dtype)
    results = forward(inputs, multiprocessors), *backward(inputs, multiprocessors)
    for result, exact in zip(results, by_reference(inputs.to(torch.float64)), strict=True):
        assert torch.equal(result, exact.to(dtype))


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


def test_shared_constants_are_those_of_the_host() -> None:
    """The generated constants reach a kernel, under a name of their own, and no source defines one again."""
    stores = "".join(f"to[{i}] = {name};" for i, name in enumerate(CONSTANTS))
    source = assemble("levels.cuh") + f"\n__global__ void constants(int* to) {{ {stores} }}"
    seen = np.zeros(len(CONSTANTS), np.int32)
    Emulated(source, "constants")((1, 1, 1), (1, 1, 1), [seen])
    assert dict(zip(CONSTANTS, seen.tolist(), strict=True)) == CONSTANTS
    assert source.startswith('#line 1 "kernels/constants (generated)"')
    for file in kernel_dir().glob("*.cu*"):
        for name in CONSTANTS:
            assert not re.search(rf"\b{name}\s*=[^=]", file.read_text()), f"{file.name}: {name}"


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_halves_widen_exactly(dtype: torch.dtype) -> None:
    """The portable conversion, which a device replaces by one instruction; test_round.py has the way back."""
    name = "half_t" if dtype is F16 else "bfloat16_t"
    kernel = f"""
__global__ void convert(const {name}* from, float* to) {{
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  to[i] = widen(from[i]);
}}
"""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    actual = np.zeros(2**16, np.float32)
    Emulated(assemble("scalar.cuh") + kernel, "convert")(
        (256, 1, 1), (256, 1, 1), [every.numpy(), actual]
    )
    expected = every.view(dtype).float()
    same = bits(torch.from_numpy(actual)) == bits(expected)
    assert (same | (torch.from_numpy(actual).isnan() & expected.isnan())).all()


@on(
    {
        "specialised": MODELS["mask2former-1024"],
        "split-k": SPLIT_K["detr-decoder"],
        "generic": GENERIC["d30"],
    }
)
def test_any_order_of_the_lanes(inputs: Inputs) -> None:
    """Forward and point gradients are bitwise identical; grad_value may differ in the last bits."""
    for seed in SEEDS:
        assert torch.equal(forward(inputs, MANY, seed=seed), forward(inputs, MANY))
        gradients = backward(inputs, MANY, seed=seed)
        check_backward(inputs, gradients)
        for actual, expected in zip(gradients[1:], backward(inputs, MANY)[1:], strict=True):
            assert torch.equal(actual, expected)


FENCED = {
    "forward.cu": problem(2, THREE, 8, 32, 33, 8),
    "generic.cu": problem(2, THREE, 3, 30, 11, 24),
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
    """The second __syncwarp of forward.cu is not among them: the lanes also meet at the vote after it.

    What that __syncwarp adds is the order of memory, which only a device can get wrong.
    """
    inputs, damaged = FENCED[file], without(assemble(file), fence, number)
    assert_fence_is_needed(
        lambda seed: forward(inputs, 0, source=damaged, seed=seed), forward(inputs, 0)
    )


SANITIZED = {
    "specialised": (MODELS["msda-triton"], 0),
    "half": (MODELS["rfdetr-f16"], 0),
    "split-k": (SPLIT_K["rtdetr-decoder"], MANY),
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
