# SPDX-License-Identifier: Apache-2.0
"""What torch's FlopCounterMode counts: two FLOPs for each channel of each corner, and twice that in the backward."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from cupy_msda import (
    MSDeformAttn,
    MSDeformAttnFunction,
    ms_deform_attn,
    ms_deform_attn_backward,
)
from cupy_msda.torch.operators import FUSED_BACKWARD, FUSED_FORWARD
from tests.calls import BACKWARD, FORWARD, call, with_grad
from tests.problems import random_inputs

INPUTS = random_inputs(n=2, m=3, d=8, lq=5, p=4)
SIZES = INPUTS.sizes
# Two FLOPs, four corners, then N, Lq, M, L, P and D.
ONCE = 2 * 4 * 2 * 5 * 3 * 2 * 4 * 8


def counted(run, operators=(FORWARD, BACKWARD)):
    """FLOPs of these operators: of the forward and the backward one."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts().get("Global", {})
    return tuple(counts.get(operator.overloadpacket, 0) for operator in operators)


@pytest.mark.parametrize(
    ("needed", "passes"),
    [((0, 1, 2), 2), ((0,), 1), ((1,), 1), ((2,), 1), ((1, 2), 1), ((0, 2), 2)],
    ids=str,
)
def test_each_gradient_that_is_needed_counts(needed, passes):
    inputs = with_grad(INPUTS, *needed)
    assert counted(lambda: call(inputs).sum().backward()) == (ONCE, passes * ONCE)


def apply():
    arguments = INPUTS.shapes(), None, INPUTS.locations, INPUTS.weights
    return MSDeformAttnFunction.apply(INPUTS.value, *arguments)


def on_meta_tensors():
    tensors = [tensor.to("meta") for tensor in INPUTS.tensors]
    return call(INPUTS._replace(value=tensors[0], locations=tensors[1], weights=tensors[2]))


def without_gradients():
    with torch.no_grad():
        return call(with_grad(INPUTS))


@pytest.mark.parametrize(
    "run",
    [lambda: call(INPUTS), without_gradients, apply, on_meta_tensors],
    ids=lambda run: run.__name__,
)
def test_every_way_to_call_the_forward_counts(run):
    assert counted(run) == (ONCE, 0)


def test_fake_tensors_count():
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(tensor) for tensor in INPUTS.tensors]
        fake = INPUTS._replace(value=tensors[0], locations=tensors[1], weights=tensors[2])
        assert counted(lambda: call(fake)) == (ONCE, 0)


def test_the_array_function_counts():
    arguments = INPUTS.grad_output, INPUTS.value, INPUTS.sizes, None, *INPUTS.tensors[1:]
    assert counted(lambda: ms_deform_attn_backward(*arguments)) == (0, 2 * ONCE)


def test_transforms_count():
    def scalar(value):
        return call(INPUTS._replace(value=value)).sum()

    assert counted(lambda: torch.func.grad(scalar)(INPUTS.value)) == (ONCE, ONCE)


def test_the_module_counts():
    module = MSDeformAttn(24, 2, 3, 4)
    query, points, features = torch.rand(2, 5, 24), torch.rand(2, 5, 1, 2), torch.rand(2, 47, 24)

    def step():
        module(query, points, features, INPUTS.sizes, None).sum().backward()

    fused = (FUSED_FORWARD, FUSED_BACKWARD)
    assert counted(step, fused) == (ONCE, 2 * ONCE)


# torch 2.13's own tracer makes a Function and warns about it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.skipif(
    torch.__version__.startswith("2.4."),
    reason="torch 2.4 itself compiles no autograd Function under a counter",
)
def test_compiled_calls_count():
    inputs = with_grad(INPUTS)
    torch.compiler.reset()

    def run(value, locations, weights):
        return ms_deform_attn(value * 1, SIZES, None, locations, weights)

    compiled = torch.compile(run, backend="aot_eager")

    def step():
        compiled(*inputs.tensors).sum().backward()

    for _ in range(2):
        assert counted(step) == (ONCE, 2 * ONCE)


def test_a_counter_that_is_loaded_later_counts():
    """Loading it imports Triton, so that the package leaves it to its user."""
    code = """
        import sys, torch, cupy_msda.torch
        assert "torch.utils.flop_counter" not in sys.modules
        from torch.utils.flop_counter import FlopCounterMode
        value = torch.ones(1, 6, 1, 4, requires_grad=True)
        locations, weights = torch.rand(1, 1, 1, 1, 2, 2), torch.rand(1, 1, 1, 1, 2)
        with FlopCounterMode(display=False) as counter:
            cupy_msda.ms_deform_attn(value, [(2, 3)], None, locations, weights).sum().backward()
        print(counter.get_total_flops())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    root = Path(__file__).parents[1]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert finished.stdout.strip() == str(2 * 2 * 4 * 2 * 4), finished.stderr
