# SPDX-License-Identifier: Apache-2.0
"""Streams, a second device, and threads."""

from __future__ import annotations

import threading

import pytest
import torch

from cupy_msda import ms_deform_attn
from tests.gpu.common import DELAY, DEVICE, NAN, check, leaves, run, same
from tests.problems import check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
@pytest.mark.parametrize("d", [16, 30])
def test_work_follows_torchs_current_stream_not_cupys(side, d):
    import cupy

    inputs = random_inputs(d=d, device=DEVICE)
    expected = run(inputs, inputs.shapes())
    late = inputs._replace(
        value=torch.full_like(inputs.value, NAN),
        grad_output=torch.full_like(inputs.grad_output, NAN),
    )
    shapes = torch.zeros_like(inputs.shapes())
    tensors = leaves(late)
    torch.cuda.synchronize(DEVICE)
    stream = torch.cuda.Stream(DEVICE) if side else torch.cuda.default_stream(DEVICE)
    of_cupy = cupy.cuda.Stream(non_blocking=True)
    with torch.cuda.stream(stream), of_cupy:
        torch.cuda._sleep(DELAY)
        late.value.copy_(inputs.value)
        shapes.copy_(inputs.shapes())
        output = ms_deform_attn(tensors[0], shapes, None, *tensors[1:])
        torch.cuda._sleep(DELAY)
        late.grad_output.copy_(inputs.grad_output)
        gradients = torch.autograd.grad(output, tensors, late.grad_output)
        assert cupy.cuda.get_current_stream() == of_cupy
    stream.synchronize()
    same((output, gradients), expected)


def test_a_second_device():
    import cupy

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = random_inputs(d=16, device="cuda:1")
    other = torch.cuda.Stream("cuda:1")
    assert torch.cuda.current_device() == 0
    for shapes in (inputs.sizes, inputs.shapes()):
        check(inputs, shapes)
        with torch.cuda.stream(other):
            results = run(inputs, shapes)
        other.synchronize()
        check_against_reference(inputs, *results)
    assert torch.cuda.current_device() == 0
    assert cupy.cuda.runtime.getDevice() == 0
    arrays = [cupy.from_dlpack(tensor) for tensor in inputs.tensors]
    output = ms_deform_attn(arrays[0], inputs.sizes, None, *arrays[1:])
    assert output.device.id == 1
    assert cupy.cuda.runtime.getDevice() == 0


def test_threads_that_compile_and_run_at_once():
    # A shape of its own, so that all of them find its kernel not compiled.
    inputs = [random_inputs(d=32, p=6, seed=seed, device=DEVICE) for seed in range(8)]
    results = [None] * len(inputs)
    torch.cuda.synchronize(DEVICE)

    def work(i):
        stream = torch.cuda.Stream(DEVICE)
        with torch.cuda.stream(stream):
            results[i] = run(inputs[i])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, result in zip(inputs, results, strict=True):
        check_against_reference(one, *result)
