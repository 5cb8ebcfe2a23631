# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of implementations, in interleaved runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cupy_msda.bench.cases import Inputs
from cupy_msda.bench.implementations import Function

WAYS = ("forward", "backward")
_LEAST = 3  # repeats, even beyond the time limit

Call = Callable[[], object]


class Limits(NamedTuple):
    """When to stop repeating a case: at the first limit that is reached."""

    repeats: int
    seconds: float


class Stopwatch(NamedTuple):
    """One way of one implementation: each call of `wall` or `device` runs and times it, in microseconds."""

    wall: Callable[[], float]
    device: Callable[[], float] | None = None  # None: there is no device beside the host
    device_by: str | None = None  # how the device is timed


class Times(NamedTuple):
    """Microseconds of every repeat."""

    wall: list[float]
    device: list[float]
    device_by: str | None


# An implementation and its inputs to a stopwatch for each way.
Watch = Callable[[Function, Inputs], dict[str, Stopwatch]]


def on_cpu(function: Function, inputs: Inputs) -> dict[str, Stopwatch]:
    """By the clock, one call at a time."""
    return {
        "forward": Stopwatch(lambda: _clock_us(lambda: forward(function, inputs))),
        "backward": Stopwatch(lambda: _clock_us(backward_of(function, inputs))),
    }


def _clock_us(call: Call) -> float:
    """Microseconds of wall time."""
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


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
    functions: Mapping[str, Function], inputs: Inputs, watch: Watch, limits: Limits
) -> dict[str, dict[str, Times]]:
    """The times of every repeat, by way and implementation.

    In each repeat all take turns in random order, so that noise affects all equally; each runs once
    untimed first, so that none starts with another's data in the caches.
    """
    watches = {name: watch(function, inputs) for name, function in functions.items()}
    times = {
        way: {name: Times([], [], watches[name][way].device_by) for name in functions}
        for way in WAYS
    }
    for name in in_turns(functions, limits, _LEAST):
        backward_of(functions[name], inputs)()
        for way in WAYS:
            stopwatch = watches[name][way]
            times[way][name].wall.append(stopwatch.wall())
            if stopwatch.device:
                times[way][name].device.append(stopwatch.device())
    return times


def in_turns(names: Iterable[str], limits: Limits, least: int) -> Iterator[str]:
    """All names in random order, again and again up to the limits, but at least so many times."""
    order, turns = random.Random(0), list(names)
    begin = time.perf_counter()
    for repeat in range(limits.repeats):
        if repeat >= least and time.perf_counter() - begin > limits.seconds:
            return
        order.shuffle(turns)
        yield from turns


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
