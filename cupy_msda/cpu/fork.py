# SPDX-License-Identifier: Apache-2.0
"""A fork while another thread is in its first call: the child finds nothing locked or half imported."""

from __future__ import annotations

import os
import sys
import threading
from contextlib import ExitStack, suppress
from functools import cache
from importlib import import_module
from types import ModuleType

_forking = threading.local()  # .held: what this thread holds while it forks
_gate = threading.RLock()  # held while forking: no import of `import_during_call` begins
_begun: set[str] = set()  # the imports that have begun and are not done


def import_during_call(name: str) -> ModuleType:
    """Import a module of ours that only a call needs; a fork waits until that is done."""
    with _gate:
        _begun.add(name)
    try:
        return import_module(name)
    finally:
        _begun.discard(name)


def _finish_first_calls() -> None:
    """Wait until no other thread imports or compiles, and hold the gate and Numba's locks.

    In a child those threads are gone: what they had locked or half imported would stay so.
    """
    _forking.held = ExitStack()
    _finish_imports(_forking.held)
    if sys.modules.get("numba") is not None:
        with suppress(Exception):
            import_module("numba")
            from llvmlite.binding import ffi  # type: ignore[import-untyped]
            from numba.core.compiler_lock import global_compiler_lock

            _forking.held.enter_context(global_compiler_lock)  # before LLVM's, as when compiling
            _forking.held.enter_context(ffi.lib._lock)


def _finish_imports(held: ExitStack) -> None:
    """Wait for the imports of our modules until none is left, and hold the gate then."""
    finished: set[str] = set()
    while True:
        held.enter_context(_gate)
        names = {name for name in list(sys.modules) if name.startswith("cupy_msda.")} | _begun
        if names <= finished:
            return
        held.close()  # what is awaited may itself begin an import
        for name in names - finished:
            with suppress(Exception):  # whoever imports it gets its error
                import_module(name)
        finished |= names


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
