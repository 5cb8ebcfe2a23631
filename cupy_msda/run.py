# SPDX-License-Identifier: Apache-2.0
"""Run a program that cannot be edited, with the attention of the packages that it uses replaced."""

from __future__ import annotations

import builtins
import io
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

from cupy_msda.faults import reason
from cupy_msda.integrations import names

_PREFIX = "python -m cupy_msda run"


def run(program: str, arguments: Sequence[str], is_module: bool, patches: str | None) -> int:
    """Patch, then run a script or module as Python itself would; return 0 if it ends without an exit of its own.

    Parameters
    ----------
    program : str
        The path of a script, or the name of a module.
    arguments : sequence of str
        What the program finds in ``sys.argv[1:]``.
    patches : str or None
        Names as `integrations.names.patch` takes them, between commas. None: whatever is installed.
    """
    if not is_module and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.path.dirname(os.path.realpath(program))
    try:
        chosen = names.everything() if patches is None else patches.split(",")
        names.check(chosen)
        code, attributes = _script(program) if not is_module else (None, {})
    except (OSError, ValueError) as error:
        return _failed(str(error), 2)
    for name in chosen:
        try:
            done = names.patch(name)
        except Exception as error:
            if patches is not None:
                return _failed(f"cannot patch {name}: {reason(error)}", 1)
            done = f"not patched: {reason(error)}"
        print(f"{_PREFIX}: {name}: {done}", file=sys.stderr)
    if code is None:
        try:
            code, attributes = _module(program)
        except ImportError as error:
            return _failed(str(error), 1)
    sys.argv[:] = [attributes["__file__"] if is_module else program, *arguments]
    _execute(code, attributes)
    return 0


def _failed(message: str, status: int) -> int:
    """Say it, and return the exit status."""
    print(f"{_PREFIX}: {message}", file=sys.stderr)
    return status


def _script(path: str) -> tuple[CodeType, dict[str, Any]]:
    """The code of a script and what its module knows of itself."""
    full = os.path.abspath(path)
    with io.open_code(full) as file:
        code = compile(file.read(), full, "exec", dont_inherit=True)
    return code, {"__file__": full, "__spec__": None}


def _module(name: str) -> tuple[CodeType, dict[str, Any]]:
    """The same of a module, or of the `__main__` of a package."""
    spec = find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{name}.__main__")
    get_code = getattr(spec and spec.loader, "get_code", None)
    if spec is None or get_code is None:
        raise ImportError(f"-m must name a module or a package with a __main__, got {name}")
    code = get_code(spec.name)
    known = {"__file__": spec.origin, "__cached__": spec.cached, "__loader__": spec.loader}
    return code, known | {"__package__": spec.parent, "__spec__": spec}


def _execute(code: CodeType, attributes: dict[str, Any]) -> None:
    """Run code as `__main__`, which it stays: exit handlers and threads of the program may look there."""
    main = ModuleType("__main__")
    vars(main).update(attributes, __builtins__=builtins)
    sys.modules["__main__"] = main
    exec(code, vars(main))
