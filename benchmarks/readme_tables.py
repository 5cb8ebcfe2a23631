# SPDX-License-Identifier: Apache-2.0
"""Rewrite the README's tables and their captions from the result files that its markers name.

python benchmarks/readme_tables.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from cupy_msda.bench import tables

ROOT = Path(__file__).resolve().parents[1]
# <!-- table: FILE --> ... <!-- end of table -->
_BETWEEN_MARKERS = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def updated(text: str) -> str:
    """The text with every table as its result file says."""

    def written(match: re.Match[str]) -> str:
        before, file, after = match.groups()
        results = json.loads((ROOT / file).read_text())
        return f"{before}{tables.caption(results)}\n\n{tables.table(results)}\n{after}"

    return _BETWEEN_MARKERS.sub(written, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
