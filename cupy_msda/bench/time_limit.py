# SPDX-License-Identifier: Apache-2.0
"""A limit on how long something of another package may take, such as a compilation."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = 5.0  # seconds until the next alarm, if the body caught the first


class TookTooLongError(Exception):
    """The body of `time_limit` was interrupted."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Interrupt the body after so many seconds, and raise TookTooLongError whatever it makes of that.

    An alarm signal interrupts it, between two steps of Python or in a wait. So there is no limit on Windows, which has
    no such signal, nor outside the main thread, where Python handles none.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer"):
        yield
        return
    message = f"{what} takes longer than {seconds:g} s"
    expired = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise TookTooLongError(message)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    except Exception as error:
        if expired:
            raise TookTooLongError(message) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
