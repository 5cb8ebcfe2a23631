# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of implementations, in interleaved runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cupy_msda.bench.cases import Inputs
from cupy_msda.bench.constants import l2_bytes
from cupy_msda.bench.implementations import Function

WAYS = ("forward", "backward")
# Writing this many times the L2 cache clears it, and takes long enough for the host to get ahead of the device.
_FLUSH = 16
_LEAST = 3  # repeats, even beyond the time limit

Call = Callable[[], object]
Timer = Callable[[Call], float]  # milliseconds of one call
Times = dict[str, dict[str, list[float]]]  # by way and implementation


class Limits(NamedTuple):
    """When to stop repeating a case: at the first limit that is reached."""

    repeats: int
    seconds: float


def timer(device: str) -> Timer:
    """On a CPU the clock; on a GPU events around the call, with the L2 cache cleared before it."""
    return _by_clock if device == "cpu" else _by_events()


def _by_clock(call: Call) -> float:
    """Milliseconds of wall time."""
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def _by_events() -> Timer:
    """Milliseconds of device time, from the end of the clearing to the end of the call."""
    buffer = torch.empty(_FLUSH * l2_bytes(), dtype=torch.uint8, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def milliseconds(call: Call) -> float:
        buffer.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    return milliseconds


def forward(function: Function, inputs: Inputs) -> Tensor:
    """The output alone, as in inference."""
    with torch.no_grad():
        return function(*inputs.tensors)


def backward_of(function: Function, inputs: Inputs) -> Call:
    """Run the forward and return a call that runs its backward, once."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.tensors]
    output = function(*leaves)
    return lambda: torch.autograd.grad(output, leaves, inputs.grad_output)


def measure(
    functions: Mapping[str, Function], inputs: Inputs, watch: Timer, limits: Limits
) -> Times:
    """The times of every repeat.

    In each repeat all take turns in random order, so that noise affects all equally; each runs once
    untimed first, so that none starts with another's data in the caches.
    """
    order, turns = random.Random(0), list(functions)
    times: Times = {way: {name: [] for name in turns} for way in WAYS}
    begin = time.perf_counter()
    for repeat in range(limits.repeats):
        if repeat >= _LEAST and time.perf_counter() - begin > limits.seconds:
            break
        order.shuffle(turns)
        for name in turns:
            function = functions[name]
            backward_of(function, inputs)()
            times["forward"][name].append(watch(lambda: forward(function, inputs)))  # noqa: B023
            times["backward"][name].append(watch(backward_of(function, inputs)))
    return times


def peak_memory(function: Function, inputs: Inputs) -> dict[str, int] | None:
    """Peak bytes of torch's allocator beyond the inputs: forward; forward and backward. None on a CPU."""
    if not inputs.value.is_cuda:
        return None

    def peak(call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated()) - before

    def both() -> object:
        return backward_of(function, inputs)()

    return dict(zip(WAYS, map(peak, (lambda: forward(function, inputs), both)), strict=True))
