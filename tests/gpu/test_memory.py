# SPDX-License-Identifier: Apache-2.0
"""Device memory: given back after calls, no more than the formula says, and more of it than 32 bits index."""

from __future__ import annotations

import gc

import pytest
import torch

from cupy_msda import contract, ms_deform_attn
from cupy_msda.cuda import plans
from tests import memory
from tests.emulated_device import forget
from tests.gpu.common import DEVICE, HALF, NAN, in_float_and_half, leaves
from tests.problems import check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


def used():
    """Bytes that torch and CuPy hold on the device for living arrays."""
    import cupy

    gc.collect()  # other tests' tensors, too
    return torch.cuda.memory_allocated(DEVICE) + cupy.get_default_memory_pool().used_bytes()


def both_directions(inputs, shapes):
    """The output and the gradients."""
    tensors = leaves(inputs)
    output = ms_deform_attn(tensors[0], shapes, None, *tensors[1:])
    return output, torch.autograd.grad(output, tensors, inputs.grad_output)


def test_ten_thousand_calls_give_all_memory_back():
    inputs = random_inputs(d=16, device=DEVICE)
    shapes = inputs.shapes(torch.int32)
    for _ in range(3):  # the first compiles and fills caches
        both_directions(inputs, shapes)
    before = used()
    for _ in range(10_000):
        both_directions(inputs, shapes)
    # Less is no leak: what other tests left may go in between.
    assert used() <= before


def peak(function):
    """The most bytes that torch was asked for at once while a function ran, and what it returns."""
    before = torch.cuda.memory_stats(DEVICE)["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats(DEVICE)
    result = function()
    return torch.cuda.memory_stats(DEVICE)["requested_bytes.all.peak"] - before, result


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["", "deterministic"])
@in_float_and_half
def test_the_peak_is_what_the_formula_says(dtypes, is_deterministic, monkeypatch):
    """No copy of value is hidden in a call; deterministic gradients of value in fixed point."""
    monkeypatch.setattr(plans, "MAX_POINTS_TILED", 0)
    plans.plan_backward.cache_clear()
    forget()
    inputs = random_inputs(((128, 128),), m=8, d=32, lq=300, dtypes=dtypes, device=DEVICE)
    tensors = leaves(inputs)
    expected = memory.on_device(
        contract.check(tensors[0], inputs.sizes, None, *tensors[1:])[0], is_deterministic
    )
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        both_directions(inputs, inputs.sizes)  # compiles
        forward, output = peak(lambda: ms_deform_attn(tensors[0], inputs.sizes, None, *tensors[1:]))
        backward, _ = peak(lambda: torch.autograd.grad(output, tensors, inputs.grad_output))
    finally:
        torch.use_deterministic_algorithms(False)
        plans.plan_backward.cache_clear()
        forget()
    assert (forward, backward) == expected


GIB = 2**30


HUGE = {"in 20 images": (20, 2**20, 16), "in one image": (1, 2**23 + 2**12, 32)}


@pytest.mark.parametrize("name", HUGE)
def test_more_than_2_31_elements(name):
    n, s, d = HUGE[name]
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0]
    if free < 40 * GIB:
        pytest.skip(f"needs 40 GiB of device memory, {free / GIB:.0f} are free")
    # One small level at the far end of a value that is NaN everywhere else.
    small = random_inputs([(4, 50)], n=n, m=8, d=d, lq=9, dtypes=HALF, device=DEVICE)
    value = torch.full((n, s, 8, d), NAN, dtype=torch.float16, device=DEVICE)
    assert value.numel() > 2**31
    value[:, -200:] = small.value
    tensors = leaves(small._replace(value=value))
    output = ms_deform_attn(tensors[0], small.sizes, [s - 200], *tensors[1:])
    by_value, *by_points = torch.autograd.grad(output, tensors, small.grad_output)
    check_against_reference(small, output, (by_value[:, -200:], *by_points))
    assert not by_value[:, :-200].any()
    del value, tensors, by_value
    torch.cuda.empty_cache()
