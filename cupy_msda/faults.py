# SPDX-License-Identifier: Apache-2.0
"""How the failures of other packages are told."""

from __future__ import annotations

import warnings


def reason(error: BaseException) -> str:
    """The type and the first line of the error that was the first cause of this one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


_told: set[str] = set()


def warn_once(subject: str, message: str) -> None:
    """Warn of a subject, once in a process."""
    if subject not in _told:
        _told.add(subject)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
