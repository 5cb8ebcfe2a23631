# SPDX-License-Identifier: Apache-2.0
"""What a fused call saves: beside it stand locations and softmax by torch with our operator, and with a baseline's.

    python benchmarks/fused.py [--device cpu|cuda] [--seconds S] [--output FILE]

Each case is timed forward, without gradients, and forward with backward, by the clock, in random turns; a figure is the
median. Peak memory is that of a process that runs one implementation forward and backward once: on a GPU by torch's
allocator, on a CPU what the resident size grows by, as Linux says. D-FINE's decoder is also timed with every level
padded to the same number of points.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cupy_msda import ms_deform_attn, ms_deform_attn_fused
from cupy_msda.bench import machine
from cupy_msda.bench.cases import SHAPES, consecutive
from cupy_msda.bench.timing import Limits, in_turns

CASES = ("mask2former-512", "rtdetr-decoder", "dfine-decoder", "rfdetr")
FUSED, UNFUSED, BASELINE = "fused", "torch, then cupy_msda", "torch, then torch-ms-deform-attn"
PADDED = "fused, padded"
WAYS = ("forward", "forward+backward")


class Inputs(NamedTuple):
    """Value, reference points, offsets and logits as leaves, and what belongs to them."""

    leaves: tuple[Tensor, Tensor, Tensor, Tensor]
    grad_output: Tensor
    sizes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]  # points of each level


Function = Callable[..., Tensor]


def build(case: str, device: str, padded: bool = False) -> Inputs:
    """Random inputs; padded: every level has as many points as the largest number."""
    shape = SHAPES[case]
    counts = (max(shape.counts),) * len(shape.levels) if padded else shape.counts
    generator = torch.Generator(device).manual_seed(0)
    n, m, d = shape.batch, shape.heads, shape.channels
    s = sum(h * w for h, w in shape.levels)
    lq = s if shape.queries is None else shape.queries

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    references = torch.rand(n, lq, 1, 2, generator=generator, device=device)
    rows = (n, lq, m, sum(counts))
    leaves = (normal(n, s, m, d), references, 2 * normal(*rows, 2), normal(*rows))
    for leaf in leaves:
        leaf.requires_grad_()
    return Inputs(leaves, normal(n, lq, m * d), shape.levels, counts)


def by_torch(inputs: Inputs, references: Tensor, offsets: Tensor, logits: Tensor) -> Any:
    """Locations and weights, level after level, as modules compute them."""
    sizes = offsets.new_tensor([(w, h) for h, w in inputs.sizes])
    repeats = torch.tensor(inputs.counts, device=sizes.device)
    sizes = sizes.repeat_interleave(repeats, dim=0, output_size=sum(inputs.counts))
    return references[:, :, None] + offsets / sizes, logits.softmax(-1)


def functions(inputs: Inputs) -> dict[str, Function]:
    """The implementations that take these inputs."""
    sizes, counts = inputs.sizes, inputs.counts

    def fused(value: Tensor, *points: Tensor) -> Tensor:
        return ms_deform_attn_fused(value, sizes, None, *points, num_points=counts)

    def unfused(value: Tensor, *points: Tensor) -> Tensor:
        located = by_torch(inputs, *points)
        return ms_deform_attn(value, sizes, None, *located, num_points=counts)

    found: dict[str, Function] = {FUSED: fused, UNFUSED: unfused}
    if len(set(counts)) == 1 and find_spec("torch_ms_deform_attn") is not None:
        theirs = import_module("torch_ms_deform_attn").ms_deform_attn
        device = inputs.grad_output.device
        table = torch.tensor(sizes, device=device)
        starts = torch.tensor([level.start for level in consecutive(sizes)], device=device)

        def baseline(value: Tensor, *points: Tensor) -> Tensor:
            locations, weights = by_torch(inputs, *points)
            by_level = (*locations.shape[:3], len(sizes), -1)
            located = locations.view(*by_level, 2), weights.view(by_level)
            output: Tensor = theirs(value, table, starts, *located)
            return output

        found[BASELINE] = baseline
    return found


def both(function: Function, inputs: Inputs) -> object:
    """Forward and backward."""
    output = function(*inputs.leaves)
    return torch.autograd.grad(output, inputs.leaves, inputs.grad_output)


def forward(function: Function, inputs: Inputs) -> object:
    """Forward alone."""
    with torch.no_grad():
        return function(*inputs.leaves)


def time_case(case: str, device: str, seconds: float) -> dict[str, dict[str, float]]:
    """Median microseconds by implementation and way."""
    inputs = build(case, device)
    calls = {name: (function, inputs) for name, function in functions(inputs).items()}
    if len(set(inputs.counts)) > 1:
        padded = build(case, device, padded=True)
        calls[PADDED] = functions(padded)[FUSED], padded
    times: dict[str, dict[str, float]] = {name: {} for name in calls}
    for way, run in zip(WAYS, (forward, both), strict=True):
        for call in calls.values():
            run(*call)  # compiles
        found: dict[str, list[float]] = {name: [] for name in calls}
        for name in in_turns(calls, Limits(1000, seconds), 3):
            _wait(device)
            begin = time.perf_counter()
            run(*calls[name])
            _wait(device)
            found[name].append(1e6 * (time.perf_counter() - begin))
        for name, samples in found.items():
            times[name][way] = round(median(samples), 1)
    return times


def _wait(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(case: str, device: str, name: str) -> int:
    """Bytes that one forward and backward of an implementation needs beyond its inputs, in this process."""
    inputs, small = build(case, device), build("rfdetr", device)
    both(functions(small)[name], small)  # loads and compiles what it needs
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both(functions(inputs)[name], inputs)
        return int(torch.cuda.max_memory_allocated()) - before
    # getrusage would also count what the process that started this one has used.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _peak_resident()
    both(functions(inputs)[name], inputs)
    return _peak_resident() - before


def _peak_resident() -> int:
    """The peak of this process's resident size in bytes, by Linux."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def peak_of_its_own(case: str, device: str, name: str) -> int:
    """The same in a process of its own, since a peak never falls."""
    command = [sys.executable, __file__, "--device", device, "--peak", case, name]
    finished = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return int(finished.stdout)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case and way")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_bytes(options.peak[0], options.device, options.peak[1]))
        return
    result: dict[str, Any] = {"date": date.today().isoformat()}
    result |= {"machine": machine.describe(options.device), "cases": {}}
    for case in options.cases:
        times = time_case(case, options.device, options.seconds)
        memory = {
            name: peak_of_its_own(case, options.device, name) for name in times if name != PADDED
        }
        result["cases"][case] = {"microseconds": times, "peak_bytes": memory}
        for name, of_ways in times.items():
            ratios = [of_ways[way] / times[FUSED][way] for way in WAYS]
            figures = "  ".join(
                f"{way} {of_ways[way]:9.0f} us = {ratio:.2f}"
                for way, ratio in zip(WAYS, ratios, strict=True)
            )
            peak = f"  {memory[name] / 2**20:6.1f} MiB" if name in memory else ""
            print(f"{case:16} {name:34} {figures}{peak}", flush=True)
    result["machine"]["load_average_after"] = machine.load()
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
