# SPDX-License-Identifier: Apache-2.0
"""A small run of every kernel, for compute-sanitizer: python -m tests.gpu.every_kernel."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from cupy_msda import contract, ms_deform_attn, ms_deform_attn_fused
from cupy_msda.bench.cases import Inputs
from cupy_msda.cuda import launch, plans, tuned
from cupy_msda.cuda.compile import Kernel, kernel_dir
from tests.emulated_device import forget
from tests.emulator.fused import CASES as FUSED_CASES
from tests.emulator.fused import Fused, check_backward, check_forward
from tests.problems import check_against_reference, random_inputs

LEVELS = ((7, 9), (3, 5))
ENCODER = {"m": 2, "d": 16, "lq": 78, "p": 4}
F16, F32, F64 = torch.float16, torch.float32, torch.float64


class Case(NamedTuple):
    """Inputs, all of whose candidates run; deterministic gradients of value may be computed in tiles."""

    inputs: Inputs
    deterministic: bool = False
    tiled: bool = True


CASES = {
    "encoder": Case(random_inputs(LEVELS, **ENCODER, dtypes=(F32, F32))),
    "encoder, 16 bits": Case(random_inputs(LEVELS, **ENCODER, dtypes=(F16, F32))),
    "deterministic, tiled": Case(random_inputs(LEVELS, **ENCODER), True),
    "deterministic, fixed point": Case(random_inputs(LEVELS, **ENCODER), True, tiled=False),
    "decoder": Case(random_inputs(LEVELS, d=32)),
    "generic": Case(random_inputs(LEVELS, d=5)),
    "float64": Case(random_inputs(LEVELS, d=8, dtypes=(F64, F64))),
}
FUSED = "points", "nearest-boxes"


def in_sources() -> set[str]:
    """The names of all kernels."""
    texts = [path.read_text() for path in kernel_dir().iterdir() if path.name.endswith(".cu")]
    launched = re.compile(r"__global__ void (?:__launch_bounds__\([^)]*\))?\s*(\w+)\(")
    return {name for text in texts for name in launched.findall(text)}


def run_every_kernel(device: torch.device) -> set[str]:
    """Run every candidate of every case, and fused calls, and compare them with the reference; what was launched."""
    with recorded() as launched:
        for name, case in CASES.items():
            for candidate in candidates(case, device):
                print(f"{name}: {candidate}", flush=True)
                check(case, candidate, device)
        for name in FUSED:
            print(f"fused: {name}", flush=True)
            check_fused_call(FUSED_CASES[name], device)
    return launched


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The names of the kernels that are made ready for launches."""
    names: set[str] = set()
    plain_load = launch.load

    def recording_load(kernel: Kernel, device: int) -> Any:
        names.add(kernel.name.partition("<")[0])
        return plain_load(kernel, device)

    with patch.object(launch, "load", recording_load):
        forget()
        yield names


def candidates(case: Case, device: torch.device) -> list[str]:
    """The names of the case's candidates on a device, in both directions."""
    inputs = case.inputs
    given = inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
    on = contract.check(*given)[0], launch.describe(device.index or 0), None
    with patch.object(plans, "MAX_POINTS_TILED", plans.MAX_POINTS_TILED if case.tiled else 0):
        backward = plans.backward_candidates(*on, True, True, case.deterministic)
        alone = plans.backward_candidates(*on, False, True, case.deterministic)
        return sorted({*map(str, (*plans.forward_candidates(*on), *backward, *alone))})


def check(case: Case, candidate: str, device: torch.device) -> None:
    """Both directions, where the candidate is one, with all gradients, that of value and those of points."""
    choice = plans.Choice(candidate, "test")
    on_device = case.inputs.to(device)
    with (
        patch.object(tuned, "choice", lambda *_: choice),
        patch.object(plans, "MAX_POINTS_TILED", plans.MAX_POINTS_TILED if case.tiled else 0),
        deterministic(case.deterministic),
    ):
        forget()
        plans.plan_backward.cache_clear()
        leaves = [tensor.detach().requires_grad_() for tensor in on_device.tensors]
        output = ms_deform_attn(leaves[0], on_device.sizes, None, *leaves[1:])
        by_value = torch.autograd.grad(output, leaves[:1], on_device.grad_output, retain_graph=True)
        by_points = torch.autograd.grad(
            output, leaves[1:], on_device.grad_output, retain_graph=True
        )
        every = torch.autograd.grad(output, leaves, on_device.grad_output)
    for gradients in (every, (*by_value, *by_points)):
        check_against_reference(case.inputs, output.cpu(), [tensor.cpu() for tensor in gradients])
    plans.plan_backward.cache_clear()


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch's switch."""
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_fused_call(inputs: Fused, device: torch.device) -> None:
    """A fused call and the gradients of all its inputs, which kernels of its own compute."""
    forget()
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs.tensors]
    rules = {
        name: rule.to(device) if isinstance(rule, torch.Tensor) else rule
        for name, rule in inputs.rules.items()
    }
    starts = [level.start for level in inputs.levels]
    scale = inputs.offset_scale
    output = ms_deform_attn_fused(
        leaves[0], inputs.sizes, starts, *leaves[1:], offset_scale=scale, **rules
    )
    gradients = torch.autograd.grad(output, leaves, inputs.grad_output.to(device))
    check_forward(inputs, output.detach().cpu())
    check_backward(inputs, [gradient.cpu() for gradient in gradients])


def main() -> str | None:
    """Run; None, or what no case launched."""
    missing = in_sources() - run_every_kernel(torch.device("cuda", 0))
    if missing:
        return f"tests/gpu/every_kernel.py must launch every kernel, and lacks {sorted(missing)}"
    print(f"launched {len(in_sources())} kernels")
    return None


if __name__ == "__main__":
    sys.exit(main())
