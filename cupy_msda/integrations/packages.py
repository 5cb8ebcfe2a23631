# SPDX-License-Identifier: Apache-2.0
"""Find the functions of installed packages, of one module or of one model, and replace them by ours.

An integration is a list of `Target` and a `patch` that passes it to `patch_targets`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from cupy_msda.integrations.patching import Patch, Replacement, apply, is_ours, standing_for

_Function = Callable[..., Any]


class Target(NamedTuple):
    """A function of another package, and what makes ours of it.

    Attributes
    ----------
    module : str
        The module that defines it.
    name : str
        The name of a function, or of a class and its method with a dot between.
    adapt : function
        Takes their function and returns ours, which may call theirs where a call is not ours to compute.
    """

    module: str
    name: str
    adapt: Callable[[_Function], _Function]

    @property
    def package(self) -> str:
        """The package, as one imports it."""
        return self.module.partition(".")[0]


def patch_targets(targets: Sequence[Target], target: Any = None, *, strict: bool = True) -> Patch:
    """Replace what is found of the targets.

    A module that does not import, for want of what the package needs there, is passed over: no model uses it.
    Code that has imported a function's name before is served as well; what kept the function in another
    way, such as a model that bound it when it was built, only where the integration says so.

    Parameters
    ----------
    target : module, torch module or None
        None: in every package of the targets that is installed; it is imported. A package or a module
        of one: there alone. A model: its attention modules alone, other models stay as they are.
    strict : bool
        Whether it is an error if nothing is found.

    Returns
    -------
    Patch
        What was replaced. `undo()`, or the end of a ``with`` block, puts it back.

    Raises
    ------
    ModuleNotFoundError
        `strict`, no `target`, and none of the packages is installed.
    ImportError, or what else the import of a package raises
        `strict`, and nothing is found since it does not import.
    LookupError
        `strict`, and nothing is found.
    TypeError
        `target` is something else.
    """
    if isinstance(target, nn.Module):
        return apply(of_model(targets, target), f"the model {type(target).__name__}", strict)
    if isinstance(target, ModuleType):
        subject = target.__name__
        chosen = [each for each in targets if f"{each.module}.".startswith(f"{subject}.")]
    elif target is None:
        subject = ", ".join(dict.fromkeys(each.package for each in targets))
        chosen = [each for each in targets if is_installed(each.package)]
        if strict and not chosen:
            raise ModuleNotFoundError(f"one of {subject} must be installed, found none")
    else:
        raise TypeError(
            f"target must be None, a module or a torch module, got {type(target).__name__}"
        )
    failures: list[Exception] = []
    modules = [(_imported(each.module, failures), each) for each in chosen]
    found = list(_replacements(modules))
    if strict and failures and not found:
        raise failures[0]
    return apply(found, subject, strict)


def is_installed(package: str) -> bool:
    """Whether a package has been imported or can be found; it is not imported. A mere folder of that name is none."""
    if sys.modules.get(package) is not None:
        return True
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _imported(name: str, failures: list[Exception]) -> ModuleType | None:
    """A module; None if it does not import, a failure unless the installed version has none of that name."""
    try:
        return import_module(name)
    except Exception as error:  # a package may raise anything
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is None or not f"{name}.".startswith(f"{absent}."):
            failures.append(error)
        return None


def _replacements(found: Sequence[tuple[ModuleType | None, Target]]) -> Iterator[Replacement]:
    """A replacement of each target; of a function, also where other modules hold it, which have imported its name."""
    ours_of: dict[int, tuple[_Function, _Function]] = {}  # by the identity of theirs
    for module, target in found:
        *classes, name = target.name.split(".")
        holder: Any = module
        for each in classes:
            holder = getattr(holder, each, None)
        original = getattr(holder, name, None)
        if original is None:  # another version
            continue
        ours = ours_for(original, target.adapt)
        yield Replacement(holder, name, ours)
        if not classes:
            ours_of[id(original)] = original, ours
    places = {(target.module, target.name) for _, target in found}
    loaded = {id(each): each for each in list(sys.modules.values()) if isinstance(each, ModuleType)}
    for module in loaded.values():
        for name, thing in list(vars(module).items()):
            if id(thing) in ours_of and (module.__name__, name) not in places:
                yield Replacement(module, name, ours_of[id(thing)][1])


def of_model(targets: Sequence[Target], model: nn.Module) -> Iterator[Replacement]:
    """A replacement of `forward` in each submodule whose class is a target."""
    known = {f"{each.module}.{each.name}": each for each in targets}
    for module in model.modules():
        kind: Any = type(module)
        for base in kind.__mro__:  # the class that defines it, which may be a base of the module's
            target = known.get(f"{base.__module__}.{base.__qualname__}.forward")
            if target is not None and vars(base).get("forward") is kind.forward:
                ours = MethodType(ours_for(kind.forward, target.adapt), module)
                yield Replacement(module, "forward", ours)


def ours_for(original: _Function, adapt: Callable[[_Function], _Function]) -> _Function:
    """Our function in the place of theirs; theirs if it is ours already."""
    return original if is_ours(original) else standing_for(original, adapt(original))
