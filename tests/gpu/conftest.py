# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[False, True], ids=["error", "warn"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's switch, in both its modes."""
    torch.use_deterministic_algorithms(True, warn_only=request.param)
    yield
    torch.use_deterministic_algorithms(False)
