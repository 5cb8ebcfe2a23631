# SPDX-License-Identifier: Apache-2.0
"""What the tests on a GPU share: inputs, calls into poisoned memory, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cupy_msda import MSDeformAttn, contract, ms_deform_attn
from cupy_msda.cuda import plans
from cupy_msda.problem import Grids
from tests.problems import Inputs, check_against_reference

DEVICE = torch.device("cuda", 0)
DELAY = 100_000_000  # clock cycles, some 60 ms
NAN = float("nan")
FLOAT = (torch.float32, torch.float32)
HALF = (torch.float16, torch.float32)
DOUBLE = (torch.float64, torch.float64)

Results = tuple[Tensor, Sequence[Tensor]]  # the output and the three gradients

in_float_and_half = pytest.mark.parametrize("dtypes", [FLOAT, HALF], ids=str)

# Deprecations inside torch.compile and forward-mode AD of torch, which nothing of ours causes: Dynamo
# makes an instance of an autograd Function; torch.utils.mkldnn, which Inductor imports, and
# torch.func.jvp still use TorchScript (deprecated in 2.11, "not supported" on Python 3.14).
torch_deprecations = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    r"ignore:.*`torch\.jit\.script(_method)?` is (deprecated|not supported)",
)

MODELS: dict[str, tuple[list[tuple[int, int]], dict[str, int]]] = {
    "detr-encoder": ([(100, 167), (50, 84), (25, 42), (13, 21)], {"n": 1, "p": 4, "lq": 22223}),
    "detr-decoder": ([(100, 167), (50, 84), (25, 42), (13, 21)], {"n": 2, "p": 4, "lq": 300}),
    "mask2former-512": ([(16, 16), (32, 32), (64, 64)], {"n": 2, "p": 4, "lq": 5376}),
    "rtdetr-decoder": ([(80, 80), (40, 40), (20, 20)], {"n": 16, "p": 4, "lq": 300}),
    "bevformer-sca": ([(116, 200), (58, 100), (29, 50), (15, 25)], {"n": 2, "p": 8, "lq": 10000}),
    "bevformer-tsa": ([(200, 200)], {"n": 2, "p": 4, "lq": 40000}),
    "rfdetr": ([(44, 44)], {"n": 4, "p": 2, "lq": 3900, "m": 16, "d": 16}),
}

LEVEL_TABLES: dict[str, Callable[[Inputs], tuple[Any, Any]]] = {
    "host": lambda i: (i.sizes, None),
    "host tensors": lambda i: (i.shapes().cpu(), i.starts().cpu()),
    "device": lambda i: (i.shapes(), i.starts()),
    "device int32": lambda i: (i.shapes(torch.int32), None),
    "mixed": lambda i: (i.sizes, i.starts()),
}


def leaves(inputs: Inputs) -> list[Tensor]:
    """The three differentiable inputs as leaves on the same memory."""
    return [tensor.detach().requires_grad_() for tensor in inputs.tensors]


def poison(inputs: Inputs) -> None:
    """Leave NaN in the memory that torch will hand out for results of these sizes."""
    wide = torch.promote_types(inputs.value.dtype, torch.float32)
    results = [*inputs[1:], inputs.value.to(wide), inputs.grad_output.to(wide)]
    blocks = [torch.full_like(tensor, NAN) for tensor in results for _ in range(2)]
    del blocks


def run(inputs: Inputs, shapes: Any = None, starts: Any = None, **options: Any) -> Results:
    """The output and the three gradients through autograd, into poisoned memory."""
    tensors = leaves(inputs)
    poison(inputs)
    shapes = inputs.sizes if shapes is None else shapes
    output = ms_deform_attn(tensors[0], shapes, starts, *tensors[1:], **options)
    return output.detach(), torch.autograd.grad(output, tensors, inputs.grad_output)


def check(inputs: Inputs, *table: Any) -> None:
    """Run and compare."""
    check_against_reference(inputs, *run(inputs, *table))


def same(results: Results, expected: Results) -> None:
    """Equal outputs; gradients equal but for the order of atomic additions."""
    assert torch.equal(results[0], expected[0])
    for got, wanted in zip(results[1], expected[1], strict=True):
        torch.testing.assert_close(got, wanted)


def as_cupy(argument: Any) -> Any:
    """A tensor as a CuPy array on the same memory; anything else as it is."""
    import cupy

    return cupy.from_dlpack(argument.detach()) if isinstance(argument, torch.Tensor) else argument


def on_device(rules: dict[str, Any]) -> dict[str, Any]:
    """The same rules of sampling with the mask on the GPU."""
    return {
        name: rule.to(DEVICE) if isinstance(rule, torch.Tensor) else rule
        for name, rule in rules.items()
    }


def forward_kernels(inputs: Inputs, grids: Grids) -> list[str]:
    """The names of the kernels that a forward launches on this GPU."""
    problem, table = contract.check(
        inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
    )
    properties = torch.cuda.get_device_properties(DEVICE)
    capability = f"{properties.major}{properties.minor}"
    device = plans.Device(properties.multi_processor_count, capability)
    plan = plans.plan_forward(problem, table, device, grids)
    return [launch.kernel.name for launch in plan.launches if isinstance(launch, plans.Launch)]


def module_example(
    coordinates: int = 2, on_device: bool = True, device: Any = DEVICE
) -> tuple[MSDeformAttn, tuple[Any, ...]]:
    """A module whose parameters are not their initial values, and arguments for it."""
    torch.manual_seed(0)
    module = MSDeformAttn(64, 2, 4, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    query, flat = torch.rand(2, 30, 64), torch.rand(2, 47, 64)
    points = torch.rand(2, 30, 2, coordinates)
    mask = torch.rand(2, 47) < 0.2
    sizes = [(5, 7), (3, 4)]
    shapes = torch.tensor(sizes, device=device) if on_device else sizes
    inputs = (query, points, flat)
    return module.to(device), (*(t.to(device) for t in inputs), shapes, None, mask.to(device))
