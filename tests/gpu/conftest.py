# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from cupy_msda.cuda import tuned
from cupy_msda.cuda.plans import Choice
from tests.emulated_device import forget


@pytest.fixture(params=[False, True], ids=["error", "warn"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch's switch, in both its modes."""
    torch.use_deterministic_algorithms(True, warn_only=request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str | None], None]]:
    """Let calls take a candidate by name, whatever the tables say; None, and where it is none: the model's."""

    def choose(name: str | None) -> None:
        choice = None if name is None else Choice(name, "test")
        monkeypatch.setattr(tuned, "choice", lambda *_: choice)
        forget()

    yield choose
    forget()
