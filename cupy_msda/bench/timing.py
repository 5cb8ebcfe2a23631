# SPDX-License-Identifier: Apache-2.0
"""Times and peak memory of implementations that take turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cupy_msda.bench.cases import Problem
from cupy_msda.bench.constants import l2_bytes
from cupy_msda.bench.implementations import Function

WAYS = ("forward", "backward")
# Writing this many times the L2 cache clears it, and takes so long that the host gets ahead of the device.
_FLUSH = 16
_LEAST = 3  # repeats, however long they take

Call = Callable[[], object]
Timer = Callable[[Call], float]  # milliseconds of one call
Times = dict[str, dict[str, list[float]]]  # by way and implementation


class Limits(NamedTuple):
    """When a case has been repeated enough: whichever comes first."""

    repeats: int
    seconds: float


def timer(device: str) -> Timer:
    """By the clock on a CPU; by events around the call, with the L2 cache cleared before it, on a GPU."""
    return _by_clock if device == "cpu" else _by_events()


def _by_clock(call: Call) -> float:
    """Milliseconds that have passed."""
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def _by_events() -> Timer:
    """Milliseconds of the device, from the end of the clearing to the end of the call."""
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


def forward(function: Function, problem: Problem) -> Tensor:
    """The output alone, as in inference."""
    with torch.no_grad():
        return function(*problem.tensors)


def backward_of(function: Function, problem: Problem) -> Call:
    """Run the forward; what is returned runs the backward, once."""
    leaves = [tensor.detach().requires_grad_() for tensor in problem.tensors]
    output = function(*leaves)
    return lambda: torch.autograd.grad(output, leaves, problem.grad_output)


def measure(
    functions: Mapping[str, Function], problem: Problem, watch: Timer, limits: Limits
) -> Times:
    """The times of every repeat: in each, all take turns in random order, untimed first.

    What disturbs the machine so disturbs all, and none finds the caches full of another's data.
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
            backward_of(function, problem)()
            times["forward"][name].append(watch(lambda: forward(function, problem)))  # noqa: B023
            times["backward"][name].append(watch(backward_of(function, problem)))
    return times


def peak_memory(function: Function, problem: Problem) -> dict[str, int] | None:
    """Bytes of torch's allocator beyond the inputs: of the forward, and of forward and backward; None on a CPU."""
    if not problem.value.is_cuda:
        return None

    def peak(call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return int(torch.cuda.max_memory_allocated()) - before

    def both() -> object:
        return backward_of(function, problem)()

    return dict(zip(WAYS, map(peak, (lambda: forward(function, problem), both)), strict=True))
