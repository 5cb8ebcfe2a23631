# SPDX-License-Identifier: Apache-2.0
"""The stopwatches of a GPU: device time and wall time apart."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cupy_msda.bench.cases import Inputs
from cupy_msda.bench.constants import l2_bytes
from cupy_msda.bench.implementations import Function
from cupy_msda.bench.timing import Call, Stopwatch, backward_of, forward
from cupy_msda.faults import reason

_FLUSH = 16  # times the L2 cache: writing so much clears it
_SPIN_CYCLES = 2000  # a microsecond of a GPU at 2 GHz; a slower one spins longer
# An eager loop ends after so many calls or microseconds.
_LOOP_CALLS, _LOOP_US = 20, 10_000


class Gpu:
    """Times implementations on the current GPU.

    Device time lies between events around a replay of a CUDA graph. The L2 cache is cleared before; meanwhile the host
    queues the rest, so the device never waits for the host. What cannot be captured is called eagerly, and before the
    clearing the device spins for twice as long as such a call takes. Wall time is that of a call in an eager loop: the
    larger of host and device.
    """

    def __init__(self, buffer: Tensor) -> None:
        """`buffer`: a tensor; writing it clears the L2 cache."""
        self._buffer = buffer
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def watch(self, function: Function, inputs: Inputs) -> dict[str, Stopwatch]:
        """The stopwatches of both ways."""
        eager: dict[str, Callable[[], Call]] = {
            "forward": lambda: partial(forward, function, inputs),
            "backward": partial(backward_of, function, inputs),
        }
        graphs, device_by = None, "graph"
        try:
            graphs = capture(function, inputs)
        except Exception as error:  # whatever a baseline does that a capture does not allow
            torch.cuda.synchronize()
            device_by = f"spin: {reason(error)}"
        stopwatches = {}
        for way, prepare in eager.items():
            once = loop_us(prepare, 1)
            wall = partial(loop_us, prepare, max(1, min(_LOOP_CALLS, int(_LOOP_US / once))))
            ready, spin_us = (graphs[way], 0.0) if graphs else (prepare, 2 * once)
            device = partial(self.device_us, ready, spin_us)
            stopwatches[way] = Stopwatch(wall, device, device_by)
        return stopwatches

    def device_us(self, prepare: Callable[[], Call], spin_us: float = 0.0) -> float:
        """Microseconds of the device, from the end of the clearing to the end of the call."""
        call = prepare()
        if spin_us:
            torch.cuda._sleep(int(spin_us * _SPIN_CYCLES))  # type: ignore[no-untyped-call]
        self._buffer.zero_()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return 1e3 * float(self._begin.elapsed_time(self._end))


def current_gpu() -> Gpu:
    """The stopwatches of the current GPU."""
    return Gpu(torch.empty(_FLUSH * l2_bytes(), dtype=torch.uint8, device="cuda"))


def loop_us(prepare: Callable[[], Call], count: int) -> float:
    """Microseconds of wall time of each of `count` calls in a row; `prepare` makes each ready, untimed."""
    calls = [prepare() for _ in range(count)]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - begin) / count


def capture(function: Function, inputs: Inputs) -> dict[str, Callable[[], Call]]:
    """CUDA graphs of both ways, each to be prepared like an eager call.

    The graph of the backward reads what that of its forward saved, and may overwrite it: the forward is replayed before
    each backward. Both take their memory from one pool, which keeps it for them.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = call()
        return graph, result

    torch.cuda.synchronize()
    # A capture that fails leaves its stream the current one; this goes back to the stream before.
    with torch.cuda.stream(stream):
        backward_of(function, inputs)()  # sets up what belongs to a stream
        inference, _ = record(lambda: forward(function, inputs))
        training, output = record(lambda: function(*leaves))
        gradients, _ = record(lambda: torch.autograd.grad(output, leaves, inputs.grad_output))

    def prepare_backward() -> Call:
        training.replay()
        return gradients.replay

    return {"forward": lambda: inference.replay, "backward": prepare_backward}
