# SPDX-License-Identifier: Apache-2.0
"""How many times faster the CPU kernels are than their peers, in float32, measured side by side.

    python benchmarks/cpu_ratios.py [--shapes NAME ...] [--repeats N] [--threads N] [--output FILE]

Peers are the formulation by torch's `grid_sample` and, where it is installed, the C++ kernel of
torch-ms-deform-attn. Ours is timed bare, on NumPy arrays, and as users call it, on torch tensors
with autograd. In every repeat all of them run, in random order, so that what disturbs the machine
disturbs all: once untimed, since the one before left its own data and code in the caches, and once
timed. Before that their results are compared with `grid_sample` in float64.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Also in torch, whose errors are those of float32 sums: of the largest magnitude.
TOLERANCE = 1e-4
DETR = ((100, 167), (50, 84), (25, 42), (13, 21))
RTDETR = ((80, 80), (40, 40), (20, 20))
MASK2FORMER = ((16, 16), (32, 32), (64, 64))
# Name: (N, levels, Lq); Lq = 0: queries are the pixels, and points lie about them.
SHAPES: dict[str, tuple[int, tuple[tuple[int, int], ...], int]] = {
    "detr-decoder": (1, DETR, 300),
    "rtdetr-decoder": (1, RTDETR, 300),
    "mask2former-512": (2, MASK2FORMER, 0),
    "mask2former-512-random": (2, MASK2FORMER, 5376),
    "dino-decoder": (1, DETR, 900),
    "detr-encoder": (1, DETR, 0),
    "detr-encoder-random": (1, DETR, 22223),
}
DEFAULT_SHAPES = list(SHAPES)[:4]
OURS = ("cupy_msda.cpu", "cupy_msda")


class Case(NamedTuple):
    """The tensors of one problem, M = 8, D = 32, P = 4."""

    sizes: tuple[tuple[int, int], ...]
    value: Tensor
    locations: Tensor
    weights: Tensor
    grad_output: Tensor

    @property
    def levels(self) -> tuple[tuple[int, int, int], ...]:
        """(H, W, start) of every level."""
        starts = accumulate((h * w for h, w in self.sizes), initial=0)
        return tuple((h, w, start) for (h, w), start in zip(self.sizes, starts, strict=False))


class Implementation(NamedTuple):
    """Calls that make the output, and the output with the three gradients."""

    forward: Callable[[], Any]
    both: Callable[[], tuple[Any, ...]]


def make_case(name: str) -> Case:
    """Random tensors; encoders' points are pixel centres plus offsets with a sigma of 2 pixels."""
    n, sizes, lq = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    s, levels, m, d, p = sum(h * w for h, w in sizes), len(sizes), 8, 32, 4
    wh = torch.tensor(sizes, dtype=torch.float64).flip(-1)[:, None]
    shape = (n, lq or s, m, levels, p, 2)
    if lq:
        locations = torch.rand(shape, generator=generator, dtype=torch.float64)
    else:
        centres = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
            for h, w in sizes
        ]
        offsets = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        locations = torch.cat(centres)[None, :, None, None, None] + offsets / wh
    # Off the grid lines, where the gradient jumps and implementations round to either side.
    pixels = locations * wh - 0.5
    locations = (pixels.floor() + 0.01 + 0.98 * (pixels - pixels.floor()) + 0.5) / wh
    weights = torch.rand(shape[:-1], generator=generator).flatten(3).softmax(-1).view(shape[:-1])
    return Case(
        sizes,
        torch.randn(n, s, m, d, generator=generator),
        locations.float(),
        weights,
        torch.randn(n, lq or s, m * d, generator=generator),
    )


def grid_sample_msda(value: Tensor, sizes: Any, locations: Tensor, weights: Tensor) -> Tensor:
    """The operator by one `grid_sample` per level: what models fall back to without a kernel."""
    n, _, m, d = value.shape
    lq = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # N*M, Lq, L, P, 2
    parts = value.split([h * w for h, w in sizes], dim=1)
    sampled = []
    for level, (part, (h, w)) in enumerate(zip(parts, sizes, strict=True)):
        image = part.flatten(2).transpose(1, 2).reshape(n * m, d, h, w)
        sampled.append(F.grid_sample(image, grids[:, :, level], align_corners=False))
    by_head = weights.transpose(1, 2).reshape(n * m, 1, lq, -1)
    output = (torch.stack(sampled, dim=-2).flatten(-2) * by_head).sum(-1)  # N*M, D, Lq
    return output.view(n, m * d, lq).transpose(1, 2).contiguous()


def with_autograd(
    case: Case, function: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Implementation:
    """An implementation on torch tensors."""
    tensors = case.value, case.locations, case.weights

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    def both() -> tuple[Any, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*leaves)
        output.backward(case.grad_output)
        return (output.detach(), *(leaf.grad for leaf in leaves))

    return Implementation(forward, both)


def implementations(case: Case, threads: int) -> dict[str, Implementation]:
    """All that are installed, by name."""
    from cupy_msda import cpu

    grad, *inputs = (
        tensor.numpy() for tensor in (case.grad_output, case.value, case.locations, case.weights)
    )
    arrays = inputs[0], case.levels, *inputs[1:]

    def bare() -> tuple[Any, ...]:
        output = cpu.forward(*arrays, threads=threads)
        return (output, *cpu.backward(grad, *arrays, threads=threads))

    found = {OURS[0]: Implementation(lambda: cpu.forward(*arrays, threads=threads), bare)}
    try:
        ours = importlib.import_module("cupy_msda").ms_deform_attn
    except (ImportError, AttributeError) as error:
        print(f"without {OURS[1]}.ms_deform_attn: {error}")
    else:
        found[OURS[1]] = with_autograd(case, lambda v, x, a: ours(v, case.sizes, None, x, a))
    found["grid_sample"] = with_autograd(
        case, lambda v, x, a: grid_sample_msda(v, case.sizes, x, a)
    )
    try:
        theirs = importlib.import_module("torch_ms_deform_attn").ms_deform_attn
    except ImportError as error:
        print(f"without torch-ms-deform-attn: {error}")
    else:
        sizes = torch.tensor(case.sizes)
        starts = torch.tensor([start for _, _, start in case.levels])
        found["torch-ms-deform-attn"] = with_autograd(
            case, lambda v, x, a: theirs(v, sizes, starts, x, a)
        )
    return found


def check(case: Case, found: dict[str, Implementation]) -> None:
    """Compare output and gradients of all with grid_sample in float64."""
    wide = Case(case.sizes, *(tensor.double() for tensor in case[1:]))
    exact = with_autograd(wide, lambda v, x, a: grid_sample_msda(v, case.sizes, x, a)).both()
    for name, implementation in found.items():
        for result, truth in zip(implementation.both(), exact, strict=True):
            error = (torch.as_tensor(result) - truth).abs().max() / truth.abs().max()
            if not error < TOLERANCE:
                raise SystemExit(f"{name} is wrong: relative error {error:.1e}")


def measure(found: dict[str, Implementation], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every repeat, by what was run and by implementation."""
    order = random.Random(0)
    times: dict[str, dict[str, list[float]]] = {
        "forward": {name: [] for name in found},
        "forward+backward": {name: [] for name in found},
    }
    for _ in range(repeats):
        names = list(found)
        order.shuffle(names)
        for what, by_name in times.items():
            for name in names:
                call = found[name].forward if what == "forward" else found[name].both
                call()
                begin = time.perf_counter()
                call()
                elapsed = 1e3 * (time.perf_counter() - begin)
                by_name[name].append(elapsed)
    return times


def report(shape: str, times: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Print and return medians, quartiles and, for ours, how many times longer each peer takes."""
    rows = []
    for what, by_name in times.items():
        median = {name: float(np.median(each)) for name, each in by_name.items()}
        for name, each in by_name.items():
            low, high = (float(np.quantile(each, q)) for q in (0.25, 0.75))
            ratios = {peer: median[peer] / median[name] for peer in median if peer not in OURS}
            ratios = ratios if name in OURS else {}
            rows.append(
                {"shape": shape, "what": what, "implementation": name, "median_ms": median[name]}
                | {"quartiles_ms": [low, high], "faster_than": ratios}
            )
            said = "   ".join(f"{ratio:5.2f}x {peer}" for peer, ratio in ratios.items())
            times_said = f"{median[name]:9.2f}  [{low:8.2f}, {high:8.2f}]"
            print(f"{shape:23} {what:17} {name:21} {times_said}   {said}".rstrip(), flush=True)
    return rows


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="write the same as JSON")
    arguments = parser.parse_args()
    os.environ["NUMBA_NUM_THREADS"] = str(arguments.threads)  # read when numba is imported
    torch.set_num_threads(arguments.threads)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": importlib.import_module("numba").__version__,
    }
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    print(
        f"{'shape':23} {'what':17} {'implementation':21} {'median ms':>9}  [quartiles]   faster than"
    )
    rows = []
    for shape in arguments.shapes:
        case = make_case(shape)
        found = implementations(case, arguments.threads)
        check(case, found)
        rows += report(shape, measure(found, arguments.repeats))
    if hasattr(os, "getloadavg"):
        # OpenMP's threads wait busily for one another: what else runs slows the peers most.
        machine["load"] = round(os.getloadavg()[0], 1)
        print(f"load average {machine['load']}: above {arguments.threads}, ratios flatter us")
    if arguments.output:
        arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
