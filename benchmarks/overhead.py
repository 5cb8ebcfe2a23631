# SPDX-License-Identifier: Apache-2.0
"""What one eager call costs the host, on a problem so small that nothing else is left.

    python benchmarks/overhead.py [--device none|cpu|cuda] [--rounds N] [--output FILE]

    none   the whole way of a CUDA call on host memory: only the driver's launch and fill are replaced by nothing
    cpu    the Numba kernels run
    cuda   the CUDA kernels run; times are of the wall, of calls that follow one another

Calls take turns in every round, so that noise affects all equally; a figure is the least of all rounds of the mean of
many calls. Without a GPU, times are of this thread's processor. Beside ours stand
    operator   a registered operator of the same schema that only allocates the output: the least that dispatch costs
    Function   a bare autograd Function that saves the same tensors and allocates the same outputs
and the baselines: the formulation by grid_sample and, where it is installed, torch-ms-deform-attn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cupy_msda import contract, ms_deform_attn, ms_deform_attn_core_pytorch
from cupy_msda.cuda import launch
from cupy_msda.cuda.plans import Device
from cupy_msda.torch import exchange, operands, operators

SIZES = [(2, 2)] * 4
CALLS = 200
# At most this many times what the bare operator and the bare Function cost.
TARGETS = {"forward": 2.0, "forward+backward": 1.3}

Calls = dict[str, Callable[[], Any]]


class Inputs:
    """One query, head and point on four levels of four pixels; the level table as tensors and as integers."""

    def __init__(self, device: str) -> None:
        """Make the tensors."""
        value = torch.rand(1, 16, 1, 8, device=device)
        locations = torch.rand(1, 1, 1, 4, 1, 2, device=device)
        self.tensors = value, locations, torch.rand(1, 1, 1, 4, 1, device=device)
        self.leaves = [tensor.clone().requires_grad_() for tensor in self.tensors]
        self.grad_output = torch.rand(1, 1, 8, device=device)
        starts = list(accumulate((h * w for h, w in SIZES), initial=0))[:-1]
        self.tables: dict[str, tuple[Any, Any]] = {
            "tensors": (
                torch.tensor(SIZES, device=device),
                torch.tensor(starts, device=device),
            ),
            "integers": (SIZES, starts),
        }


def without_a_driver() -> None:
    """Let the code of CUDA tensors run on host memory, up to the driver's launch and fill, which do nothing."""

    def nothing(*_: Any) -> None:
        pass

    runtime = SimpleNamespace(getDevice=lambda: 0, setDevice=nothing, memsetAsync=nothing)
    driver = SimpleNamespace(launchKernel=nothing)
    cuda = SimpleNamespace(runtime=runtime, driver=driver, Device=lambda _: nullcontext())
    function = SimpleNamespace(kernel=SimpleNamespace(ptr=1))
    launch.require_cupy = lambda *_: SimpleNamespace(cuda=cuda)
    launch.describe = lambda _: Device(132, "90")  # type: ignore[assignment]
    launch.load = lambda *_: function
    operators.is_on_device = lambda _: True
    contract.place = lambda _: "cuda:0"


def bare_operator() -> Callable[..., Tensor]:
    """A registered operator with the schema of our forward, which allocates the output."""

    def allocate(value: Tensor, *_: Any) -> Tensor:
        return value.new_empty((1, 1, 8))

    torch.library.define("cupy_msda_overhead::allocate", operands.FORWARD_SCHEMA)
    torch.library.impl("cupy_msda_overhead::allocate", ("cpu", "cuda"), allocate)
    operator: Callable[..., Tensor] = torch.ops.cupy_msda_overhead.allocate.default
    return operator


class BareFunction(torch.autograd.Function):
    """Save what our Function saves and allocate what it returns; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Allocate the output."""
        ctx.save_for_backward(*(part if isinstance(part, Tensor) else None for part in inputs))
        return inputs[0].new_empty((1, 1, 8))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        """Allocate the gradients."""
        value, _, _, locations, weights = ctx.saved_tensors
        gradients = map(torch.empty_like, (locations, weights))
        return (torch.empty_like(value), None, None, *gradients)


def compared(inputs: Inputs, with_baselines: bool) -> Calls:
    """All calls, by way, level table and implementation."""
    operator = bare_operator()
    calls: Calls = {}
    for form, table in inputs.tables.items():
        functions: dict[str, Callable[..., Tensor]] = {
            "cupy_msda": lambda v, x, a, t=table: ms_deform_attn(v, *t, x, a),
            "Function": lambda v, x, a, t=table: BareFunction.apply(v, *t, x, a),
        }
        if with_baselines:
            functions |= baselines(table if form == "tensors" else None)
        packed = operands.pack(inputs.tensors[0], *table, *inputs.tensors[1:], operands.AUTO)
        forward = {name: f for name, f in functions.items() if name != "Function"}
        forward["operator"] = lambda v, x, a, p=packed: operator(*operands.with_inputs(p, v, x, a))
        for name, function in forward.items():
            calls[f"forward, {form}, {name}"] = without_gradients(function, inputs)
        for name, function in functions.items():
            calls[f"forward+backward, {form}, {name}"] = with_gradients(function, inputs)
    return calls


def baselines(table: tuple[Any, Any] | None) -> dict[str, Callable[..., Tensor]]:
    """Other implementations, which take level tables as tensors or, for grid_sample, as integers."""
    if table is None:
        return {"grid_sample": lambda v, x, a: ms_deform_attn_core_pytorch(v, SIZES, x, a)}
    try:
        theirs = importlib.import_module("torch_ms_deform_attn").ms_deform_attn
    except ImportError as error:
        print(f"without torch-ms-deform-attn: {error}")
        return {}
    return {"torch-ms-deform-attn": lambda v, x, a: theirs(v, *table, x, a)}


def without_gradients(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    """A forward under `no_grad`."""

    def run() -> Any:
        with torch.no_grad():
            return function(*inputs.tensors)

    return run


def with_gradients(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    """A forward and its backward."""
    leaves, grad_output = inputs.leaves, inputs.grad_output
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad_output)


def pieces(inputs: Inputs) -> Calls:
    """What a forward of CUDA tensors consists of."""
    value, locations, weights = inputs.tensors
    table = inputs.tables["integers"]
    given = operands.pack(value, *table, locations, weights, operands.AUTO)
    call = operators.checked(given)
    return {
        "pack": lambda: operands.pack(value, *table, locations, weights, operands.AUTO),
        "check": lambda: operators.checked(given),
        "exchange and launch": lambda: exchange.forward(call, given),
        "  allocation": lambda: value.new_empty((1, 1, 8)),
    }


def microseconds(calls: Calls, rounds: int, wall: bool) -> dict[str, float]:
    """The least of all rounds, for each call."""
    clock = time.perf_counter if wall else time.thread_time
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            if wall:
                torch.cuda.synchronize()
            begin = clock()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], 1e6 * (clock() - begin) / CALLS)
    return best


def ratios(times: dict[str, float]) -> dict[str, float]:
    """Ours by the bare operator and the bare Function."""
    return {
        f"{way}, {form}": times[f"{way}, {form}, cupy_msda"] / times[f"{way}, {form}, {bare}"]
        for way, bare in (("forward", "operator"), ("forward+backward", "Function"))
        for form in ("tensors", "integers")
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "none"
    parser.add_argument("--device", choices=("none", "cpu", "cuda"), default=default)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, help="write the same as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device == "none":
        without_a_driver()
    inputs = Inputs("cuda" if options.device == "cuda" else "cpu")
    calls = compared(inputs, with_baselines=True)
    if options.device != "cpu":
        calls |= pieces(inputs)
    times = microseconds(calls, options.rounds, wall=options.device == "cuda")
    for name, each in times.items():
        print(f"{name:50}{each:8.1f} us")
    found = ratios(times)
    for name, ratio in found.items():
        target = TARGETS[name.partition(",")[0]]
        verdict = "met" if ratio <= target else "missed"
        print(f"{name:50}{ratio:8.2f} times the bare call, at most {target}: {verdict}")
    machine = {
        "device": options.device,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if options.output:
        results = {"machine": machine, "microseconds": times, "ratios": found}
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
