# SPDX-License-Identifier: Apache-2.0
"""A short run of the fuzzer; and that it finds, and tells how to repeat, what goes wrong."""

from __future__ import annotations

import re
import time

import pytest

from tests.emulator import launches
from tests.fuzz import checks
from tests.fuzz.checks import check

# Few templates: their compilation under the sanitizers takes most of the time.


def test_random_cases() -> None:
    for number in range(25):
        check("generic-d5", 0, number)


def test_random_outputs() -> None:
    for number in range(10):
        check("d8-one-point", 0, number, with_backward=False)


def test_a_failure_tells_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = launches.forward
    monkeypatch.setattr(launches, "forward", lambda *given, **options: run(*given, **options) + 1)
    again = "python -m tests.fuzz --family generic-d5 --seed 0 --case 0"
    with pytest.raises(AssertionError, match=re.escape(again)):
        check("generic-d5", 0, 0)


def test_a_hang_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SECONDS", 0.1)
    monkeypatch.setattr(launches, "forward", lambda *_, **__: time.sleep(60))
    with pytest.raises(AssertionError, match=r"TimeoutError: a case must end within 0\.1 s"):
        check("generic-d5", 0, 0)
