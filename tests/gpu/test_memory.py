# SPDX-License-Identifier: Apache-2.0
"""Device memory: given back after calls, and more of it than 32 bits index."""

from __future__ import annotations

import gc

import pytest
import torch

from cupy_msda import ms_deform_attn
from tests.gpu.common import DEVICE, HALF, NAN, leaves, run
from tests.problems import check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


def used():
    """Bytes that torch and CuPy hold on the device for living arrays."""
    import cupy

    gc.collect()  # other tests' tensors, too
    return torch.cuda.memory_allocated(DEVICE) + cupy.get_default_memory_pool().used_bytes()


def test_memory_is_given_back():
    inputs = random_inputs(d=16, device=DEVICE)
    shapes = inputs.shapes(torch.int32)
    for _ in range(3):  # the first compiles and fills caches
        run(inputs, shapes)
    before = used()
    for _ in range(20):
        run(inputs, shapes)
    # Less is no leak: what other tests left may go in between.
    assert used() <= before


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
