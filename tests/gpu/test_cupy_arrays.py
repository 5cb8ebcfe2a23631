# SPDX-License-Identifier: Apache-2.0
"""CuPy arrays in, CuPy arrays out, on CuPy's current stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cupy_msda import ms_deform_attn, ms_deform_attn_backward
from tests.gpu.common import DELAY, DEVICE, NAN, as_cupy, run, same
from tests.problems import DTYPES, check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


CUPY_DTYPES = [pair for pair in DTYPES if torch.bfloat16 not in pair]


@pytest.mark.parametrize("dtypes", CUPY_DTYPES, ids=str)
@pytest.mark.parametrize("table", ["host", "numpy", "cupy"])
@pytest.mark.parametrize("d", [16, 30])
def test_cupy_arrays(dtypes, table, d):
    import cupy

    inputs = random_inputs(d=d, dtypes=dtypes, device=DEVICE)
    shapes = {
        "host": inputs.sizes,
        "numpy": np.array(inputs.sizes),
        "cupy": as_cupy(inputs.shapes(torch.int32)),
    }[table]
    arguments = [as_cupy(tensor) for tensor in inputs.tensors]
    arguments = (arguments[0], shapes, None, *arguments[1:])
    output = ms_deform_attn(*arguments)
    gradients = ms_deform_attn_backward(as_cupy(inputs.grad_output), *arguments)
    for result in (output, *gradients):
        assert type(result) is cupy.ndarray
    output, *gradients = map(torch.from_dlpack, (output, *gradients))
    check_against_reference(inputs, output, gradients)


def test_cupy_arrays_of_any_layout():
    inputs = random_inputs(d=16, device=DEVICE)
    output, gradients = run(inputs)
    arrays = [as_cupy(torch.stack([tensor, tensor], dim=-1))[..., 0] for tensor in inputs[1:]]
    value, locations, weights, grad_output = arrays
    arguments = (value, inputs.sizes, None, locations, weights)
    results = (ms_deform_attn(*arguments), *ms_deform_attn_backward(grad_output, *arguments))
    output_of_cupy, *gradients_of_cupy = map(torch.from_dlpack, results)
    same((output_of_cupy, gradients_of_cupy), (output, gradients))


def test_empty_cupy_arrays():
    inputs = random_inputs(lq=0, device=DEVICE)
    value, locations, weights, grad_output = map(as_cupy, inputs[1:])
    arguments = (value, inputs.sizes, None, locations, weights)
    assert ms_deform_attn(*arguments).shape == (2, 0, 16)
    gradients = ms_deform_attn_backward(grad_output, *arguments)
    assert not gradients.value.any()
    assert gradients.sampling_locations.shape == locations.shape


def test_cupy_arrays_follow_cupys_current_stream():
    import cupy

    inputs = random_inputs(d=16, device=DEVICE)
    expected = run(inputs)
    late = inputs._replace(
        value=torch.full_like(inputs.value, NAN),
        grad_output=torch.full_like(inputs.grad_output, NAN),
    )
    value, locations, weights, grad_output = map(as_cupy, late[1:])
    source, source_grad = as_cupy(inputs.value), as_cupy(inputs.grad_output)
    arguments = (value, inputs.sizes, None, locations, weights)
    torch.cuda.synchronize(DEVICE)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr, DEVICE)):
        torch.cuda._sleep(DELAY)
        cupy.copyto(value, source)
        cupy.copyto(grad_output, source_grad)
        torch_stream = torch.cuda.Stream(DEVICE)
        with torch.cuda.stream(torch_stream):
            output = ms_deform_attn(*arguments)
            gradients = ms_deform_attn_backward(grad_output, *arguments)
    stream.synchronize()
    output, *gradients = map(torch.from_dlpack, (output, *gradients))
    same((output, gradients), expected)
