# SPDX-License-Identifier: Apache-2.0
"""Code in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
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
