# SPDX-License-Identifier: Apache-2.0
"""Replace functions of other people's modules, classes and objects by ours, and put them back.

Every integration finds what its package has, makes a `Replacement` of each, and returns a `Patch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import update_wrapper
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

_MARK = "_cupy_msda_replaces"


class Replacement(NamedTuple):
    """An attribute of a module, a class or an object, and the function that takes its place."""

    holder: Any
    name: str
    ours: Callable[..., Any]

    def __str__(self) -> str:
        """Its name, as `package.module.Class.forward`; an object is named by its class."""
        if isinstance(self.holder, ModuleType):
            return f"{self.holder.__name__}.{self.name}"
        if isinstance(self.holder, type):
            return f"{self.holder.__module__}.{self.holder.__qualname__}.{self.name}"
        kind = type(self.holder)
        return f"{kind.__module__}.{kind.__qualname__}.{self.name} of an object"


def standing_for(original: Any, ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` with name, documentation and signature of what it replaces."""
    update_wrapper(ours, original)
    setattr(ours, _MARK, original)
    return ours


def is_ours(function: Any) -> bool:
    """Whether it has been put in the place of another."""
    return hasattr(function, _MARK)


class Patch:
    """What a `patch` has replaced. As a context manager it is undone at the end of the block.

    Attributes
    ----------
    replaced : tuple of Replacement
        Empty where everything had been replaced before: that stays as it is, also after `undo`.
    """

    def __init__(self, replacements: Iterable[Replacement]) -> None:
        """Replace them all."""
        self.replaced = tuple(
            one for one in replacements if not is_ours(getattr(one.holder, one.name))
        )
        # An attribute that the holder has inherited is deleted again, not set.
        self._before = [vars(one.holder).get(one.name) for one in self.replaced]
        for one in self.replaced:
            setattr(one.holder, one.name, one.ours)

    def undo(self) -> None:
        """Put everything back; what another has replaced since keeps that. A second call does nothing."""
        for one, before in zip(self.replaced, self._before, strict=True):
            if vars(one.holder).get(one.name) is not one.ours:
                continue
            if before is None:
                delattr(one.holder, one.name)
            else:
                setattr(one.holder, one.name, before)

    def __enter__(self) -> Patch:
        """Return the patch, which is in place already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Undo it."""
        self.undo()

    def __repr__(self) -> str:
        """Name what was replaced, and how often."""
        counts = Counter(map(str, self.replaced))
        names = [f"{name} ({count}x)" if count > 1 else name for name, count in counts.items()]
        return f"<Patch of {', '.join(names) or 'nothing that was not ours already'}>"


def apply(replacements: Iterable[Replacement], subject: str, strict: bool) -> Patch:
    """Replace them; if there are none and `strict`, raise LookupError that nothing was found in `subject`."""
    found = list(replacements)
    if strict and not found:
        raise LookupError(
            f"{subject} must hold multi-scale deformable attention that can be replaced, found none"
        )
    return Patch(found)
