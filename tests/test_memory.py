# SPDX-License-Identifier: Apache-2.0
"""Memory: none is lost in 10,000 calls, and a call takes at most what docs/support.md says."""

from __future__ import annotations

import sys

import pytest
import torch

from cupy_msda import contract, ms_deform_attn
from cupy_msda.cuda import plans
from tests import memory
from tests.calls import with_grad
from tests.emulated_device import EmulatedDevice
from tests.problems import random_inputs
from tests.processes import run

on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="reads /proc and tunes glibc's malloc"
)

# Large blocks come from the system and go back to it, so that what a process holds is what lives.
NO_POOL = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
MIB = 2**20

STATUS = """
import gc, sys
import pytest, torch
from cupy_msda import contract, ms_deform_attn
from tests import memory
from tests.calls import with_grad
from tests.problems import random_inputs
def status(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))
def call(inputs):
    output = ms_deform_attn(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights)
    return output, torch.autograd.grad(output, inputs.tensors, inputs.grad_output)
"""

# --- leaks -----------------------------------------------------------------------------------------

LEAKS = """
from contextlib import nullcontext
from tests.emulated_device import emulated_device
def in_numpy(inputs):
    value, *points = (tensor.detach().numpy() for tensor in inputs.tensors)
    ms_deform_attn(value, inputs.sizes, None, *points)
def grown(function, device, count=10_000):
    inputs = with_grad(random_inputs(((2, 3),), n=1, m=1, lq=2, p=2))
    for _ in range(500):
        function(inputs)
    gc.collect()
    before = sys.getallocatedblocks(), len(gc.get_objects()), status("VmRSS")
    for _ in range(count):
        function(inputs)
        if device is not None:
            device.launched.clear()  # its log
    gc.collect()
    after = sys.getallocatedblocks(), len(gc.get_objects()), status("VmRSS")
    return [end - begin for begin, end in zip(before, after)]
torch.set_num_threads(1)
where = emulated_device(pytest.MonkeyPatch(), runs=False) if sys.argv[1] == "device" else nullcontext()
with where as device:
    for function in (call, in_numpy):
        print(*grown(function, device))
"""


@on_linux
@pytest.mark.parametrize("where", ["host", "device"])
def test_ten_thousand_calls_leave_nothing_behind(where: str) -> None:
    """Python's blocks, such as DLPack's capsules; objects, such as tensors; and memory that libraries hold for both."""
    finished = run(STATUS + LEAKS, arguments=[where])
    assert finished.returncode == 0, finished.stderr
    for line in finished.stdout.splitlines():
        blocks, objects, resident = map(int, line.split())
        # One lost object a call would be 10,000; a DLTensor has 120 bytes.
        assert blocks < 1000, line
        assert objects < 100, line
        assert resident < MIB, line


# --- the peak --------------------------------------------------------------------------------------

DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float16": (torch.float16, torch.float16),
    "float16, points float32": (torch.float16, torch.float32),
}
# More positions than points, so that value decides; and an encoder, whose levels are packed.
CASES = {"decoder": (((128, 128),), 300, 0), "encoder": (((64, 64),), 4096, 4096)}

PEAKS = """
def peak(function):
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    result = function()
    return status("VmHWM") - before, result
def peaks(inputs):
    forward, output = peak(
        lambda: ms_deform_attn(inputs.value, inputs.sizes, None, inputs.locations, inputs.weights))
    gradient = lambda: torch.autograd.grad(output, inputs.tensors, inputs.grad_output)
    return forward, peak(gradient)[0]
torch.set_num_threads(2)
from tests.test_memory import CASES, DTYPES
for dtypes in DTYPES.values():
    small = with_grad(random_inputs(((4, 4),), n=1, m=8, d=32, lq=4, p=4, dtypes=dtypes))
    call(small), call(small)
    for sizes, lq, packed in CASES.values():
        inputs = with_grad(random_inputs(sizes, n=1, m=8, d=32, lq=lq, p=4, dtypes=dtypes))
        given = inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
        print(*peaks(inputs), *memory.on_host(contract.check(*given)[0], 2, packed))
"""


@on_linux
def test_a_call_on_the_host_takes_what_the_formula_says() -> None:
    pytest.importorskip("numba", reason="of the Numba kernels")
    finished = run(STATUS + PEAKS, **NO_POOL)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert len(lines) == len(DTYPES) * len(CASES)
    for line in lines:
        forward, backward, *expected = map(int, line.split())
        assert [forward, backward] == pytest.approx(expected, rel=0.05, abs=0.75 * MIB), line


@pytest.mark.parametrize("is_deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_a_call_on_a_device_allocates_what_the_formula_says(
    dtypes: tuple[torch.dtype, torch.dtype],
    is_deterministic: bool,
    idle_device: EmulatedDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is freed within a direction, so the peak is the sum."""
    monkeypatch.setattr(plans, "MAX_POINTS_TILED", 0)
    plans.plan_backward.cache_clear()
    inputs = with_grad(random_inputs(((40, 40),), n=2, m=2, d=16, lq=50, dtypes=dtypes))
    given = inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
    expected = memory.on_device(contract.check(*given)[0], is_deterministic)
    allocated: list[int] = []
    for holder, name in (
        (torch.Tensor, "new_empty"),
        (torch, "empty_like"),
        (torch.Tensor, "clone"),
    ):
        function = getattr(holder, name)

        def counted(*arguments: object, function=function, **options: object) -> torch.Tensor:
            result: torch.Tensor = function(*arguments, **options)
            allocated.append(result.nbytes)
            return result

        monkeypatch.setattr(holder, name, counted)
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        output = ms_deform_attn(*given)
        forward = sum(allocated)
        torch.autograd.grad(output, inputs.tensors, inputs.grad_output)
    finally:
        torch.use_deterministic_algorithms(False)
        plans.plan_backward.cache_clear()
    assert (forward, sum(allocated) - forward) == expected
