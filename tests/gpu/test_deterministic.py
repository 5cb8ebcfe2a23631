# SPDX-License-Identifier: Apache-2.0
"""torch.use_deterministic_algorithms: bitwise identical gradients, their cost, graphs, non-finite values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cupy_msda import ms_deform_attn_backward
from tests.gpu.common import DEVICE, DOUBLE, FLOAT, HALF, MODELS, NAN, in_float_and_half, run
from tests.problems import DTYPES, check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


PROBLEMS = {
    "tiled": ((25, 42), {"n": 1, "m": 8, "d": 32, "lq": 300, "p": 4}),
    "tiled-crowded": ((3, 2), {"n": 2, "m": 8, "d": 32, "lq": 2000, "p": 4}),
    "tiled-wide": ((12, 9), {"n": 2, "m": 2, "d": 128, "lq": 700, "p": 6}),
    "split-k": ((25, 42), {"n": 1, "m": 1, "d": 32, "lq": 1100, "p": 8}),
    "crowded": ((3, 2), {"n": 2, "m": 8, "d": 32, "lq": 5000, "p": 4}),
    "tiled-narrow": ((44, 44), {"n": 2, "m": 16, "d": 16, "lq": 1900, "p": 2}),
    "narrow": ((44, 44), {"n": 2, "m": 16, "d": 16, "lq": 4100, "p": 2}),
    "generic": ((9, 7), {"n": 2, "m": 3, "d": 30, "lq": 2000, "p": 5}),
    "encoder": ((90, 110), {"n": 1, "m": 8, "d": 32, "lq": 9920, "p": 4}),
}


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_are_bitwise_identical(name, dtypes, deterministic):
    size, numbers = PROBLEMS[name]
    inputs = random_inputs([size, (5, 4)], dtypes=dtypes, device=DEVICE, **numbers)
    first = run(inputs)
    for _ in range(10):
        output, gradients = run(inputs)
        assert torch.equal(output, first[0])
        assert all(map(torch.equal, gradients, first[1]))
    torch.use_deterministic_algorithms(False)  # the reference need not be
    check_against_reference(inputs, *first)


def test_atomic_additions_are_not_bitwise_identical():
    """Else the test above would show nothing."""
    size, numbers = PROBLEMS["crowded"]
    inputs = random_inputs([size, (5, 4)], device=DEVICE, **numbers)
    first = run(inputs)[1][0]
    assert not all(torch.equal(run(inputs)[1][0], first) for _ in range(10))


def captured(step):
    """The step as a CUDA graph."""
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def milliseconds(graph):
    """The time of one replay between events on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@pytest.mark.parametrize("name", ["detr-encoder", "detr-decoder", "rtdetr-decoder"])
def test_deterministic_gradients_take_at_most_three_times_as_long(name, monkeypatch):
    sizes, others = MODELS[name]
    inputs = random_inputs(sizes, **{"m": 8, "d": 32, **others}, device=DEVICE)
    arguments = inputs.grad_output, inputs.value, inputs.sizes, None, *inputs.tensors[1:]
    # NaN in new memory is torch's own cost, not ours.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    default = captured(lambda: ms_deform_attn_backward(*arguments))
    torch.use_deterministic_algorithms(True)
    try:
        deterministic = captured(lambda: ms_deform_attn_backward(*arguments))
    finally:
        torch.use_deterministic_algorithms(False)
    # Interleaved, so that noise affects both equally.
    times = [(milliseconds(default), milliseconds(deterministic)) for _ in range(25)][5:]
    of_default, of_deterministic = np.median(times, axis=0)
    assert of_deterministic <= 3 * of_default


@in_float_and_half
@pytest.mark.parametrize(("lq", "d"), [(300, 16), (3000, 16), (300, 30)])
def test_a_graph_replays_on_other_magnitudes(dtypes, lq, d, deterministic):
    """Each replay finds its fixed-point unit and sums anew."""
    inputs = random_inputs(lq=lq, d=d, dtypes=dtypes, device=DEVICE)
    arguments = (inputs.grad_output, inputs.value, inputs.sizes, None, *inputs.tensors[1:])
    run(inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ms_deform_attn_backward(*arguments)
    for factor in (1.0, 64.0, 2.0**-6):
        inputs.grad_output.mul_(factor)
        graph.replay()
        expected = ms_deform_attn_backward(*arguments)
        assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("dtypes", [FLOAT, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize(("lq", "d"), [(300, 16), (3000, 16), (300, 30)])
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_non_finite_gradients_show_where_they_belong(dtypes, lq, d, bad, deterministic):
    inputs = random_inputs(lq=lq, d=d, dtypes=dtypes, device=DEVICE)
    inputs.grad_output[0, 0, 1] = 0
    expected = run(inputs)[1][0]
    inputs.grad_output[0, 0, 1] = bad
    actual = run(inputs)[1][0]
    touched = ~actual.isfinite()
    assert touched[0, :, 0, 1].any()
    touched[0, :, 0, 1] = False
    assert not touched.any()
    finite = actual.isfinite()
    assert torch.equal(actual[finite], expected[finite])
