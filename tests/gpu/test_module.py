# SPDX-License-Identifier: Apache-2.0
"""The module MSDeformAttn."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.common import DEVICE, module_example

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_module_agrees_with_itself_on_a_cpu(coordinates, on_device):
    results = []
    for device in (DEVICE, "cpu"):
        module, arguments = module_example(coordinates, on_device, device)
        output = module(*arguments)
        output.square().sum().backward()
        gradients = [parameter.grad.cpu() for parameter in module.parameters()]
        results.append([output.detach().cpu(), *gradients])
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_module_under_autocast(dtype):
    module, arguments = module_example()
    expected = module(*arguments)
    with torch.autocast("cuda", dtype=dtype):
        output = module(*arguments)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
