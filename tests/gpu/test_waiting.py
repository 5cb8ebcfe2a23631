# SPDX-License-Identifier: Apache-2.0
"""The host never waits for the device, and a wait would be seen."""

from __future__ import annotations

import pytest
import torch

from cupy_msda import ms_deform_attn, ms_deform_attn_backward
from tests.gpu.common import DEVICE, LEVEL_TABLES, leaves, module_example
from tests.gpu.waiting import assert_no_wait, returns_while_busy, torch_refuses_to_wait
from tests.problems import random_inputs


class FakeDevice:
    """A device that finishes what is queued only when the host waits for it; stands for torch.cuda."""

    def __init__(self):
        self.queued = self.finished = 0

    def _sleep(self, cycles):
        self.launch()

    def launch(self):
        self.queued += 1

    def synchronize(self):
        self.finished = self.queued

    def Event(self):  # noqa: N802  # torch's name
        return FakeEvent(self)


class FakeEvent:
    """What torch.cuda.Event is on that device."""

    def __init__(self, device):
        self.device = device

    def record(self):
        self.place = self.device.queued

    def query(self):
        return self.device.finished >= self.place


def test_work_that_only_launches_returns_while_the_device_is_busy():
    device = FakeDevice()
    assert returns_while_busy(device.launch, device)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("after", [0, 1])
def test_a_wait_between_launches_is_seen(before, after):
    device = FakeDevice()

    def work():
        for _ in range(before):
            device.launch()
        device.synchronize()
        for _ in range(after):
            device.launch()

    assert not returns_while_busy(work, device)


def waits():
    """Ways to wait for the device, by name."""
    import cupy

    tensor, array = torch.zeros(3, device=DEVICE), cupy.zeros(3)
    torch.cuda.synchronize(DEVICE)
    return {
        "Tensor.item": lambda: tensor.sum().item(),
        "Tensor.cpu": tensor.cpu,
        "torch.cuda.synchronize": torch.cuda.synchronize,
        "cupy.ndarray.get": array.get,
        "cupy.cuda.Stream.synchronize": cupy.cuda.Stream.null.synchronize,
        "cupy.cuda.Device.synchronize": cupy.cuda.Device(0).synchronize,
        "cupy.cuda.runtime.deviceSynchronize": cupy.cuda.runtime.deviceSynchronize,
    }


@pytest.mark.gpu
def test_waits_of_torch_and_cupy_are_seen():
    for name, wait in waits().items():
        assert not returns_while_busy(wait), name
    tensor = torch.zeros(3, device=DEVICE)
    assert returns_while_busy(lambda: tensor.add_(1))


@pytest.mark.gpu
def test_torch_refuses_to_wait():
    tensor = torch.zeros(3, device=DEVICE)
    with torch_refuses_to_wait(), pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        tensor.sum().item()
    assert tensor.sum().item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("table", LEVEL_TABLES)
@pytest.mark.parametrize("num_levels", [2, 17])
def test_calls_do_not_wait(table, num_levels):
    inputs = random_inputs([(5, 7), (3, 4)] + [(1, 1)] * (num_levels - 2), d=16, device=DEVICE)
    table = LEVEL_TABLES[table](inputs)
    tensors = leaves(inputs)

    def work():
        output = ms_deform_attn(tensors[0], *table, *tensors[1:])
        torch.autograd.grad(output, tensors, inputs.grad_output)
        arguments = (inputs.value, *table, inputs.locations, inputs.weights)
        ms_deform_attn_backward(inputs.grad_output, *arguments)

    assert_no_wait(work)


@pytest.mark.gpu
def test_deterministic_algorithms_do_not_wait(deterministic):
    inputs = random_inputs(lq=300, d=16, device=DEVICE)
    arguments = (inputs.grad_output, inputs.value, inputs.sizes, None, *inputs.tensors[1:])
    assert_no_wait(lambda: ms_deform_attn_backward(*arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_module_does_not_wait(coordinates, on_device):
    module, arguments = module_example(coordinates, on_device)
    assert_no_wait(lambda: module(*arguments).sum().backward())
