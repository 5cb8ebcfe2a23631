# SPDX-License-Identifier: Apache-2.0
"""Seeing that the host waits for the device.

CuPy's own detector, `cupyx.allow_synchronize`, is deprecated, and its functions are compiled, so that
no test can put another in their place. But a wait shows in what it does, whoever waits and by
whatever function: when it ends, the device has finished what was queued before. torch's sync debug
mode comes on top and names the caller; it sees waits of torch alone, for idle streams too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

SLEEP = 1_000_000_000  # clock cycles, some 600 ms: a hundred times what the host takes for a call


def assert_no_wait(work: Callable[[], object]) -> None:
    """Assert that the host does not wait for the device; the first call, which compiles, may."""
    work()
    torch.cuda.synchronize()
    with torch_refuses_to_wait():
        assert returns_while_busy(work), "the host waited for the device"


def returns_while_busy(work: Callable[[], object], cuda: Any = torch.cuda) -> bool:
    """Whether `work` returns before the device has finished a sleep on the current stream.

    The event comes before the work: one after it would still be pending if the work waited first
    and launched then.
    """
    cuda._sleep(SLEEP)
    slept = cuda.Event()
    slept.record()
    work()
    return not slept.query()


@contextmanager
def torch_refuses_to_wait() -> Iterator[None]:
    """Make torch raise where it would wait, in every thread."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
