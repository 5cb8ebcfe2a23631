# SPDX-License-Identifier: Apache-2.0
"""A kernel that does not compile."""

from __future__ import annotations

import pytest

from cupy_msda import KernelCompileError
from cupy_msda.cuda import compile as compile_module
from tests.gpu.common import DEVICE, run
from tests.problems import random_inputs

pytestmark = pytest.mark.gpu


def test_a_kernel_that_does_not_compile_is_an_error(monkeypatch):
    monkeypatch.setattr(compile_module, "assemble", lambda file: '#error "planted"\n')
    inputs = random_inputs(d=16, p=9, device=DEVICE)  # a shape that nothing else has compiled
    with pytest.raises(KernelCompileError, match="planted") as caught:
        run(inputs)
    for part in ("msda_forward<", "forward.cu", "-std=c++17"):
        assert part in str(caught.value)
