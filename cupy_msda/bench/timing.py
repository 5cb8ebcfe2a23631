# SPDX-License-Identifier: Apache-2.0
"""Time and peak memory of implementations, in interleaved runs."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cupy_msda.bench.cases import Inputs
from cupy_msda.bench.implementations import Function

WAYS = ("forward", "backward")
_LEAST = 3  # repeats, even beyond the time limit
_CLEARED_BYTES = 2**27  # more than the caches hold that one core of a CPU reaches

Call = Callable[[], object]


class Limits(NamedTuple):
    """When to stop repeating a case: at the first limit that is reached."""

    repeats: int
    seconds: float


class Stopwatch(NamedTuple):
    """One way of one implementation: each call of a clock runs and times it, in microseconds."""

    wall: Callable[[], float]
    device: Callable[[], float] | None = None  # None: there is no device beside the host
    device_by: str | None = None  # how the device is timed
    cold: Callable[[], float] | None = None  # wall time with nothing in the caches of the CPU


class Times(NamedTuple):
    """Microseconds of every repeat."""

    wall: list[float]
    device: list[float]
    device_by: str | None
    cold: list[float]


# An implementation and its inputs to a stopwatch for each way.
Watch = Callable[[Function, Inputs], dict[str, Stopwatch]]


def on_cpu(function: Function, inputs: Inputs) -> dict[str, Stopwatch]:
    """By the clock, one call at a time."""
    return {
        "forward": _stopwatch(lambda: lambda: forward(function, inputs)),
        "backward": _stopwatch(lambda: backward_of(function, inputs)),
    }


def _stopwatch(prepare: Callable[[], Call]) -> Stopwatch:
    """Times each call that `prepare` returns, with the caches as it left them and with cleared ones."""

    def cold() -> float:
        call = prepare()
        _clear_caches()
        return _clock_us(call)

    return Stopwatch(lambda: _clock_us(prepare()), cold=cold)


def _clear_caches() -> None:
    """Write over more memory than the caches hold, on every core that torch uses.

    Not by torch: OpenMP's threads wait busily afterwards, and so would disturb what is timed next.
    """
    pool, buffers = _buffers()
    together = threading.Barrier(len(buffers))  # so that no thread takes two buffers

    def write(buffer: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
        together.wait()
        np.add(buffer, 1, out=buffer)  # reads, too: writes alone may go past the caches

    list(pool.map(write, buffers))


@cache
def _buffers() -> tuple[ThreadPoolExecutor, list[np.ndarray[tuple[int], np.dtype[np.uint8]]]]:
    """A thread for each of torch's, and a buffer for each."""
    threads = torch.get_num_threads()
    buffers = [np.zeros(_CLEARED_BYTES // threads, np.uint8) for _ in range(threads)]
    return ThreadPoolExecutor(threads), buffers


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
        way: {name: Times([], [], watches[name][way].device_by, []) for name in functions}
        for way in WAYS
    }
    for name in in_turns(functions, limits, _LEAST):
        backward_of(functions[name], inputs)()
        for way in WAYS:
            stopwatch = watches[name][way]
            times[way][name].wall.append(stopwatch.wall())
            if stopwatch.device:
                times[way][name].device.append(stopwatch.device())
        for way in WAYS:  # last, since the others find their data in the caches
            stopwatch = watches[name][way]
            if stopwatch.cold:
                times[way][name].cold.append(stopwatch.cold())
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
