# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs, captured by hand and by torch.compile."""

from __future__ import annotations

import warnings

import pytest
import torch

from cupy_msda import ms_deform_attn, ms_deform_attn_backward, warmup
from cupy_msda.cuda import compile as compile_module
from tests.gpu.common import (
    DEVICE,
    LEVEL_TABLES,
    NAN,
    in_float_and_half,
    leaves,
    torch_deprecations,
)
from tests.problems import check_against_reference, random_inputs

pytestmark = pytest.mark.gpu

OPERATORS = {"cupy_msda::ms_deform_attn_forward", "cupy_msda::ms_deform_attn_backward"}


@in_float_and_half
@pytest.mark.parametrize("table", ["host", "device", "device int32"])
@pytest.mark.parametrize("d", [16, 30])
def test_capture_and_replay_with_other_inputs(dtypes, table, d):
    sizes = [(5, 7), (3, 4)]
    fixed = random_inputs(sizes, d=d, dtypes=dtypes, device=DEVICE)
    table = LEVEL_TABLES[table](fixed)
    tensors = leaves(fixed)

    def step():
        output = ms_deform_attn(tensors[0], *table, *tensors[1:])
        return output, torch.autograd.grad(output, tensors, fixed.grad_output)

    side = torch.cuda.Stream(DEVICE)
    side.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream(DEVICE).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradients = step()
    for seed in (1, 2):
        # Where the table is on the device, its contents may change as well.
        order = sizes[::-1] if seed == 2 and torch.is_tensor(table[0]) else sizes
        new = random_inputs(order, d=d, dtypes=dtypes, seed=seed, device=DEVICE)
        for target, source in zip(fixed[1:], new[1:], strict=True):
            target.copy_(source)
        if torch.is_tensor(table[0]):
            table[0].copy_(new.shapes())
        if table[1] is not None:
            table[1].copy_(new.starts())
        for result in (output, *gradients):
            result.fill_(NAN)
        graph.replay()
        check_against_reference(new, output, gradients)


@in_float_and_half
@pytest.mark.parametrize("lq", [3, 300])
def test_capture_at_once_after_warmup(dtypes, lq, monkeypatch):
    # A P of its own, so that nothing else has compiled its kernels.
    fixed = random_inputs(d=16, p=7, lq=lq, dtypes=dtypes, device=DEVICE)
    warmup(fixed.value.shape, fixed.locations.shape, dtype=dtypes[0], device=str(DEVICE))
    monkeypatch.setattr(compile_module, "_compile", lambda kernel: pytest.fail("compiled"))
    table = fixed.sizes, None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ms_deform_attn(fixed.value, *table, *fixed.tensors[1:])
        gradients = ms_deform_attn_backward(
            fixed.grad_output, fixed.value, *table, *fixed.tensors[1:]
        )
    new = random_inputs(d=16, p=7, lq=lq, dtypes=dtypes, seed=1, device=DEVICE)
    for target, source in zip(fixed[1:], new[1:], strict=True):
        target.copy_(source)
    graph.replay()
    check_against_reference(new, output, gradients)


@pytest.fixture
def replays(monkeypatch):
    """A list that grows with every replay of a CUDA graph."""
    found = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        found.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return found


def operators_run(work):
    """The result of `work`, and which of our operators the host ran for it, in any thread."""
    with torch.autograd.profiler.profile() as profile:
        result = work()
    names = {event.name for event in profile.function_events}
    return result, {name for name in names if name.startswith("cupy_msda::")}


@torch_deprecations
def test_compiled_into_graphs(replays):
    """A replay computes from new inputs while the host runs no operator: the kernels are in the graphs.

    torch keeps its memory pool alive by a graph that is empty on purpose, and discards the warning
    that "The CUDA Graph is empty" (`CUDAGraphTreeManager.__init__`), but a filter of "error" makes it
    an exception before that. With "always" torch can discard it, and one for any other graph is seen.
    """

    def step(value, locations, weights):
        return ms_deform_attn(value * 2, [(5, 7), (3, 4)], None, locations, weights).tanh()

    def results(function, inputs):
        tensors = leaves(inputs)
        output = function(*tensors)
        gradients = torch.autograd.grad(output, tensors, inputs.grad_output)
        # Compiled results live until the next replay.
        return [tensor.clone() for tensor in (output.detach(), *gradients)]

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "The CUDA Graph is empty", UserWarning)
        for call in range(4):  # compiles and runs, records, replays, replays
            inputs = random_inputs(d=16, lq=64, seed=call, device=DEVICE)
            replays.clear()
            got, operators = operators_run(lambda inputs=inputs: results(compiled, inputs))
            torch.testing.assert_close(got, results(step, inputs))
            if call == 0:
                assert operators == OPERATORS
    assert len(replays) >= 2  # forward and backward
    assert not operators
    assert not caught
