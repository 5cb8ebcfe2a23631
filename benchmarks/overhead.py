# SPDX-License-Identifier: Apache-2.0
"""What one eager call costs the host, on a problem so small that nothing else is left.

    python benchmarks/overhead.py [--device cpu|cuda] [--rounds N] [--output FILE]

A call is split into
    contract   finding that the inputs are like those of an earlier call, which were checked
    exchange   torch tensors to what the kernels take, and back
    launch     what is below: on a CPU the Numba kernels themselves, on a GPU CuPy's launch of ours
    dispatch   the rest: torch's dispatcher, autograd, and our own functions between them
and stands beside peers, which are not split: the formulation by grid_sample and, where it is
installed, torch-ms-deform-attn. Times are of this thread's processor, so that other processes
hardly disturb them: the mean of many calls, and of all rounds, in which all take turns, the least.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cupy_msda import ms_deform_attn, ms_deform_attn_core_pytorch
from cupy_msda.cpu import backend as host
from cupy_msda.torch import operators

SIZES = [(2, 2)] * 4
CALLS = 200
TARGET = 15  # microseconds above the fastest peer for contract and dispatch

Calls = dict[str, Callable[[], Any]]


class Problem:
    """One query, head and point on four levels of four pixels."""

    def __init__(self, device: str) -> None:
        """Make the tensors."""
        self.value = torch.rand(1, 16, 1, 8, device=device)
        self.locations = torch.rand(1, 1, 1, 4, 1, 2, device=device)
        self.weights = torch.rand(1, 1, 1, 4, 1, device=device)
        self.grad_output = torch.rand(1, 1, 8, device=device)
        self.sizes = torch.tensor(SIZES, device=device)
        starts = list(accumulate((h * w for h, w in SIZES), initial=0))[:-1]
        self.starts = torch.tensor(starts, device=device)
        self.inputs = (self.value, self.locations, self.weights)

    def checked(self, grad_output: Tensor | None) -> Any:
        """What the operators do before anything else."""
        table = (self.sizes, self.starts, None, None)
        return operators._checked(grad_output, None, self.value, *table, *self.inputs[1:])[:2]


def whole_calls(problem: Problem) -> Calls:
    """The forward and the forward+backward of ours and of the peers."""
    table = (problem.sizes, problem.starts)
    found: dict[str, Callable[..., Tensor]] = {
        "cupy_msda": lambda v, x, a: ms_deform_attn(v, *table, x, a),
        "grid_sample": lambda v, x, a: ms_deform_attn_core_pytorch(v, SIZES, x, a),
    }
    try:
        theirs = importlib.import_module("torch_ms_deform_attn").ms_deform_attn
    except ImportError as error:
        print(f"without torch-ms-deform-attn: {error}")
    else:
        found["torch-ms-deform-attn"] = lambda v, x, a: theirs(v, *table, x, a)
    leaves = [tensor.clone().requires_grad_() for tensor in problem.inputs]

    def forward(call: Callable[..., Tensor]) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return call(*problem.inputs)

        return run

    def both(call: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(*leaves), leaves, problem.grad_output)

    return {
        f"{way} {name}": make(call)
        for way, make in (("forward", forward), ("forward+backward", both))
        for name, call in found.items()
    }


def stages_on_host(problem: Problem) -> Calls:
    """Exchange and launch of one forward and of one backward on a CPU."""
    checked = problem.checked(None)
    threads = torch.get_num_threads()
    arrays = [operators._numpy(tensor) for tensor in problem.inputs]
    gradients = [operators._numpy(problem.grad_output), *arrays]

    def exchanged(tensors: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
        made = [operators._numpy(tensor) for tensor in tensors]
        for array, result in zip(made, results, strict=False):
            operators._tensor(array, result.dtype)

    backward = (problem.grad_output, *problem.inputs)
    return {
        "exchange forward": lambda: exchanged(problem.inputs, problem.inputs[:1]),
        "exchange backward": lambda: exchanged(backward, problem.inputs),
        "launch forward": lambda: host.forward(*checked, *arrays, threads=threads),
        "launch backward": lambda: host.backward(*checked, *gradients, threads=threads),
    }


def stages_on_device(problem: Problem) -> Calls:
    """The same on a GPU."""
    from cupy_msda.cuda import launch

    place = operators._place(problem.value)
    known, table = problem.checked(None)
    results = [torch.empty_like(problem.grad_output)]
    gradients = [torch.zeros_like(tensor) for tensor in problem.inputs]

    def exchanged(*tensors: Tensor) -> Any:
        with launch.on_stream(*place):
            return [launch._as_cupy(operators._Exporter(tensor)) for tensor in tensors]

    of_table = exchanged(problem.sizes, problem.starts)
    table = table._replace(device_sizes=of_table[0], device_starts=of_table[1])
    tables = problem.sizes, problem.starts
    of_forward = (*problem.inputs, *results)
    of_backward = (problem.grad_output, *problem.inputs, *gradients)
    arrays, more = exchanged(*of_forward), exchanged(*of_backward)

    def forward() -> None:
        with launch.on_stream(*place):
            launch.forward(known, table, *arrays)

    def backward() -> None:
        with launch.on_stream(*place):
            launch.backward(known, table, more[:4], more[4:])

    return {
        "exchange forward": lambda: exchanged(*of_forward, *tables),
        "exchange backward": lambda: exchanged(*of_backward, *tables),
        "launch forward": forward,
        "launch backward": backward,
    }


def microseconds(calls: Calls, rounds: int) -> dict[str, float]:
    """The least of all rounds, for each call."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            begin = time.thread_time()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], 1e6 * (time.thread_time() - begin) / CALLS)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return best


def split(times: dict[str, float]) -> dict[str, dict[str, float]]:
    """Contract, exchange, launch and dispatch of each way, and how far the first and last are above a peer's whole."""
    found = {}
    for way, parts in {
        "forward": ("forward",),
        "forward+backward": ("forward", "backward"),
    }.items():
        stages = {
            stage: sum(times[f"{stage} {part}"] for part in parts)
            for stage in ("contract", "exchange", "launch")
        }
        whole = times[f"{way} cupy_msda"]
        stages["dispatch"] = whole - sum(stages.values())
        peers = {
            name.removeprefix(f"{way} "): time
            for name, time in times.items()
            if name.startswith(f"{way} ") and not name.endswith("cupy_msda")
        }
        above = stages["contract"] + stages["dispatch"] - min(peers.values())
        found[way] = {"whole": whole, **stages, **peers, "above fastest peer": above}
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the same as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problem = Problem(arguments.device)
    stages = stages_on_device if problem.value.is_cuda else stages_on_host
    calls = whole_calls(problem) | stages(problem)
    calls["contract forward"] = lambda: problem.checked(None)
    calls["contract backward"] = lambda: problem.checked(problem.grad_output)
    results = split(microseconds(calls, arguments.rounds))
    for way, times in results.items():
        print(f"{way}, microseconds")
        for name, each in times.items():
            print(f"    {name:22}{each:8.1f}")
        verdict = "met" if times["above fastest peer"] <= TARGET else "missed"
        print(f"    contract and dispatch at most {TARGET} above the fastest peer: {verdict}")
    machine = {
        "device": arguments.device,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if arguments.output:
        text = json.dumps({"machine": machine, "microseconds": results}, indent=1)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
