# SPDX-License-Identifier: Apache-2.0
"""A fork while another thread is in its first call: the child finds nothing locked or half imported."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import ExitStack, suppress
from functools import cache
from importlib import import_module

_forking = threading.local()  # .held: what this thread holds while it forks


def _finish_first_calls() -> None:
    """Wait until no other thread imports or compiles, and hold Numba's locks.

    In a child those threads are gone: what they had locked or half imported would stay so.
    """
    _forking.held = ExitStack()
    ours = [name for name in list(sys.modules) if name.startswith("cupy_msda.")]
    for name in (*ours, "numba"):  # Numba last: ours import it
        if sys.modules.get(name) is not None:
            with suppress(Exception):  # whoever imports it gets its error
                import_module(name)
    if sys.modules.get("numba") is not None:
        with suppress(Exception):
            from llvmlite.binding import ffi  # type: ignore[import-untyped]
            from numba.core.compiler_lock import global_compiler_lock

            _forking.held.enter_context(global_compiler_lock)  # before LLVM's, as when compiling
            _forking.held.enter_context(ffi.lib._lock)


def _let_go() -> None:
    """Release what the fork held, in the parent and in the child."""
    _forking.held.close()


@cache
def register() -> None:
    """Do so at every fork from now on."""
    if hasattr(os, "register_at_fork"):
        # The hook that is registered last runs first: Numba's import waits for the lock that logging's hook takes.
        import_module("logging")
        os.register_at_fork(
            before=_finish_first_calls, after_in_parent=_let_go, after_in_child=_let_go
        )
