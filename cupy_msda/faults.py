# SPDX-License-Identifier: Apache-2.0
"""How the failures of other packages are told."""

from __future__ import annotations

import warnings


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


_told: set[str] = set()


def warn_once(subject: str, message: str) -> None:
    """Warn of a subject, once in a process."""
    if subject not in _told:
        _told.add(subject)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
