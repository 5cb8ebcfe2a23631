# SPDX-License-Identifier: Apache-2.0
"""Code in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(
    code: str, *options: str, arguments: Sequence[Any] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in the root of the project, with options of Python, arguments and environment variables."""
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=180,
    )


def in_processes(function: Callable[[], object], count: int = 8) -> None:
    """Run a function in forked processes at once; an error in any is one here."""
    reading, writing = os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(writing)
                os.read(reading, 1)  # until the parent closes its end: all begin together
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    os.close(reading)
    os.close(writing)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    assert not failed, f"{len(failed)} of {count} processes failed"
