# SPDX-License-Identifier: Apache-2.0
"""The integrations by name, for the command line and the report."""

from __future__ import annotations

import pkgutil
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from cupy_msda import integrations
from cupy_msda.integrations import deformable_detr
from cupy_msda.integrations.packages import Target, is_installed
from cupy_msda.integrations.patching import Patch

_EXTENSION = "deformable_detr"
_distributions = cache(packages_distributions)  # it reads the files of each


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
    """The packages among these names that are installed."""
    return [
        name
        for name, module in integration_of().items()
        if is_installed(name) and (_targets(name) or not hasattr(module, "TARGETS"))
    ]


def everything() -> list[str]:
    """What `patch` can take here: the extension module, and the packages that are installed."""
    return [_EXTENSION, *installed()]


def describe(package: str) -> str:
    """The distribution of an installed package, and what a patch would replace in it; it is not imported."""
    distributions = [
        f"{name} {version(name)}" for name in dict.fromkeys(_distributions().get(package, ()))
    ]
    text = f"{' and '.join(distributions) or 'installed'}, patch: "
    module = integration_of()[package]
    integration = module.__name__.rpartition(".")[2]
    if not hasattr(module, "TARGETS"):
        return f"{text}{integration}.patch()"
    counts = Counter(each.name for each in _targets(package) if _holds(package, each))
    functions = [f"{name} ({count}x)" if count > 1 else name for name, count in counts.items()]
    if not functions:
        return f"{text}none, since this version has nothing that is known"
    return f"{text}{integration}.patch() replaces {', '.join(functions)}"


def _targets(package: str) -> list[Target]:
    """What is known of a package."""
    targets: Sequence[Target] = getattr(integration_of()[package], "TARGETS", ())
    return [each for each in targets if each.package == package]


def _holds(package: str, target: Target) -> bool:
    """Whether the files of a package define a target."""
    spec = find_spec(package)
    inside = target.module.split(".")[1:]
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder, *inside[:-1], f"{inside[-1]}.py")
        if file.is_file():
            holder = target.name.partition(".")[0]
            text = file.read_text(encoding="utf-8", errors="replace")
            return re.search(rf"^(class|def) {holder}\b", text, re.MULTILINE) is not None
        if any(file.parent.glob(f"{file.stem}.*")):  # compiled
            return True
    return False
