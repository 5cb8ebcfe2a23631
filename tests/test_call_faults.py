# SPDX-License-Identifier: Apache-2.0
"""A call that fails midway, on an emulated device: its own error at the call, and the next call is right."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from cupy_msda import KernelCompileError, ms_deform_attn
from cupy_msda.cuda import launch
from tests.calls import strided, with_grad
from tests.emulated_device import EmulatedDevice, forget
from tests.problems import check_against_reference, random_inputs

# Strided locations are copied in both directions; the backward has a workspace, a fill and two kernels.
INPUTS = random_inputs(d=16, dtypes=(torch.float16, torch.float32))


class Fault:
    """An error that one of several calls of functions raises: that of number `at`."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.plant(-1)

    def plant(self, at: int) -> None:
        """Let the call of this number from now on raise; none if it is negative."""
        self._at, self._calls = at, count()

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count."""

        def counted(*arguments: Any, **options: Any) -> Any:
            if next(self._calls) == self._at:
                raise self.error
            return function(*arguments, **options)

        return counted


def holders(what: str, device: EmulatedDevice) -> list[tuple[Any, str]]:
    """The functions that allocate, launch or compile."""
    cuda = device.cupy.cuda
    return {
        "allocation": [(torch.Tensor, "new_empty"), (torch, "empty_like")],
        "launch": [(cuda.driver, "launchKernel"), (cuda.runtime, "memsetAsync")],
        "compilation": [(launch, "load")],
    }[what]


# What fails, how, and how many of it a forward and a backward have.
FAULTS: dict[str, tuple[str, BaseException, int]] = {
    "out of memory": ("allocation", torch.cuda.OutOfMemoryError("CUDA out of memory."), 7),
    "launch": ("launch", RuntimeError("CUDA_ERROR_INVALID_VALUE"), 4),
    "compiler": ("compilation", KernelCompileError("planted"), 3),
    "interrupt": ("compilation", KeyboardInterrupt(), 3),
}


def results(inputs: Any) -> tuple[Any, ...]:
    """The output and the gradients by autograd."""
    output = ms_deform_attn(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    return output, torch.autograd.grad(output, inputs.tensors, inputs.grad_output)


def same(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Bitwise: the emulator runs threads in one order."""
    for one, other in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", FAULTS)
def test_a_call_that_fails_raises_and_the_next_is_right(
    name: str, driver_device: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, error, number = FAULTS[name]
    inputs = with_grad(INPUTS)
    inputs = inputs._replace(locations=strided(inputs.locations))
    expected = results(inputs)
    check_against_reference(inputs, *expected)
    fault = Fault(error)
    for holder, function in holders(what, driver_device):
        monkeypatch.setattr(holder, function, fault.of(getattr(holder, function)))
    for at in range(number):
        forget()  # what was compiled
        fault.plant(at)
        with pytest.raises(type(error)) as caught:
            results(inputs)
        assert caught.value is error
        fault.plant(-1)
        same(results(inputs), expected)
    fault.plant(number)
    results(inputs)  # all that could fail did
