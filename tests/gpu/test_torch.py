# SPDX-License-Identifier: Apache-2.0
"""torch's operator checks, torch.compile, transforms and autocast."""

from __future__ import annotations

import pytest
import torch

from cupy_msda import MSDeformAttn, ms_deform_attn, reference
from tests.gpu.common import DEVICE, leaves, same, torch_deprecations
from tests.problems import away_from_edges, random_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("needed", [(), (0, 1, 2)], ids=str)
def test_operators_pass_opcheck(needed):
    inputs = random_inputs(n=1, d=16, lq=2, p=1, device=DEVICE)
    value, *points = (t.requires_grad_(i in needed) for i, t in enumerate(leaves(inputs)))
    operators = torch.ops.cupy_msda
    for table in ((inputs.shapes(), None, None, None), (None, None, [5, 7, 3, 4], [0, 35])):
        torch.library.opcheck(operators.ms_deform_attn_forward.default, (value, *table, *points))
        # Without grad_value, whose sums vary in their last bits from run to run.
        torch.library.opcheck(
            operators.ms_deform_attn_backward.default,
            (inputs.grad_output, value, *table, *points, False, True),
        )
    operator = operators.ms_deform_attn_forward.default
    for order in ([], [2, 1]):
        torch.library.opcheck(operator, (value, *table, *points, order))


@torch_deprecations
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    inputs = random_inputs(d=16, device=DEVICE)
    shapes = inputs.shapes()

    def step(value, locations, weights):
        return ms_deform_attn(value * 2, shapes, None, locations, weights).tanh()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for function in (step, compiled):
        tensors = leaves(inputs)
        output = function(*tensors)
        results.append((output, torch.autograd.grad(output, tensors, inputs.grad_output)))
    same(*results)


@torch_deprecations
def test_transforms():
    inputs = away_from_edges(random_inputs(n=1, d=8, lq=3, p=2, device=DEVICE))

    def ours(value, *points):
        return ms_deform_attn(value, inputs.sizes, None, *points)

    def plain(value, *points):
        return reference.forward(value, inputs.levels, *points)

    along = tuple(torch.randn_like(tensor) for tensor in inputs.tensors)
    stacked = [torch.stack([tensor, 0.9 * tensor]) for tensor in inputs.tensors]

    def results(function):
        gradient = torch.func.grad(lambda *t: function(*t).square().sum(), (0, 1, 2))
        return (
            torch.func.jvp(function, inputs.tensors, along),
            torch.func.jvp(gradient, inputs.tensors, along),
            torch.func.vmap(gradient)(*stacked),
            torch.func.vmap(function, (None, 0, 0))(inputs.value, *stacked[1:]),
        )

    torch.testing.assert_close(results(ours), results(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_training_step_under_autocast(dtype):
    module = MSDeformAttn(64, 2, 4, 4).to(DEVICE)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype == torch.float16)
    query, flat = torch.rand(2, 5, 64, device=DEVICE), torch.rand(2, 47, 64, device=DEVICE)
    points = torch.rand(2, 5, 2, 2, device=DEVICE)
    for _ in range(2):  # all offsets are alike at first, and have no gradient in the first step
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            output = module(query, points, flat, [(5, 7), (3, 4)], None)
        assert output.dtype == dtype
        scaler.scale(output.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, old)
