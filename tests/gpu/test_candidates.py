# SPDX-License-Identifier: Apache-2.0
"""The results of all candidates of a plan are bitwise identical, as this GPU's compiler makes them."""

from __future__ import annotations

import pytest
import torch

from cupy_msda import contract
from cupy_msda.cuda import launch, plans
from tests.gpu.common import DEVICE, MODELS, in_float_and_half, run
from tests.problems import check_against_reference, random_inputs

pytestmark = pytest.mark.gpu


@in_float_and_half
@pytest.mark.parametrize("name", ["mask2former-512", "detr-decoder"])
def test_candidates_are_bitwise_identical(name, dtypes, choose):
    """But for the gradient of value, which is within the error budget."""
    sizes, rest = MODELS[name]
    inputs = random_inputs(sizes, **{"m": 8, "d": 32, **rest}, dtypes=dtypes, device=DEVICE)
    given = inputs.value, inputs.sizes, None, inputs.locations, inputs.weights
    case = contract.check(*given)[0], launch.describe(torch.cuda.current_device()), None
    candidates = {
        *map(str, plans.forward_candidates(*case)),
        *map(str, plans.backward_candidates(*case, True, True, False)),
    }
    assert len(candidates) > 1
    first = None
    for candidate in sorted(candidates):
        choose(candidate)
        output, gradients = run(inputs)
        check_against_reference(inputs, output, gradients)
        results = output, *gradients[1:]
        first = first or results
        assert all(map(torch.equal, results, first)), candidate
