# SPDX-License-Identifier: Apache-2.0
"""The integrations by name, for the command line and the report."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from cupy_msda import integrations
from cupy_msda.integrations import deformable_detr
from cupy_msda.integrations.packages import is_installed
from cupy_msda.integrations.patching import Patch

_EXTENSION = "deformable_detr"


def integration_of() -> dict[str, ModuleType]:
    """The module with a `patch` for each name: its own, and those of the packages that it serves. None imports any."""
    found = {}
    for each in pkgutil.iter_modules(integrations.__path__):
        if each.name != __name__.rpartition(".")[2]:
            module = import_module(f"{integrations.__name__}.{each.name}")
            if hasattr(module, "patch"):
                found[each.name] = module
                for target in getattr(module, "TARGETS", ()):
                    found.setdefault(target.package, module)
    return found


def check(names: Sequence[str]) -> None:
    """Raise ValueError if one of these is not what `patch` takes."""
    known = sorted([_EXTENSION, f"{_EXTENSION}=EXTENSION", *integration_of()])
    for name in names:
        if name not in known and not name.startswith(f"{_EXTENSION}="):
            raise ValueError(f"--patch must name some of {', '.join(known)}, got {name!r}")


def patch(name: str) -> Patch | str:
    """Patch all that an integration serves, or one package; return what was done.

    "deformable_detr" installs the extension module under its own name, "deformable_detr=pkg._C" under that one.
    """
    integration, _, extension = name.partition("=")
    if integration == _EXTENSION:
        extension = extension or deformable_detr.MODULE_NAME
        deformable_detr.install(extension)
        return f"stands for the extension {extension}"
    module: Any = integration_of()[name]
    target = None if module.__name__.endswith(f".{name}") else import_module(name)
    done: Patch = module.patch(target)
    return done


def installed() -> list[str]:
    """The names that `patch` can take here."""
    return [_EXTENSION, *filter(is_installed, integration_of())]
