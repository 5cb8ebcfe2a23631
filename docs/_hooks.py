# SPDX-License-Identifier: Apache-2.0
"""What the site takes from outside of docs/: other documents of the repository, and the notebook as a page.

Links in these documents are those of the repository, so that they also work where its files are read; here they become
links of the site.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = "examples/quickstart.ipynb"
# Path in the repository -> path in the site.
TAKEN = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "kernels/README.md": "kernels/README.md",
    "kernels/BUDGET.md": "kernels/BUDGET.md",
    "kernels/COVERAGE.md": "kernels/COVERAGE.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/results/cpu.png": "benchmarks/results/cpu.png",
}
_ORIGINS = {site: origin for origin, site in TAKEN.items()} | {"tutorial.md": NOTEBOOK}
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add what lies elsewhere."""
    for origin, site in TAKEN.items():
        files.append(File.generated(config, site, abs_src_path=str(ROOT / origin)))
    notebook = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))
    files.append(File.generated(config, "tutorial.md", content=_as_markdown(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files of the repository into links to pages of the site."""
    site = page.file.src_uri
    origin = posixpath.dirname(_ORIGINS.get(site, f"docs/{site}"))

    def linked(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(origin, match[1]))
        found = TAKEN.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(found, posixpath.dirname(site) or '.')}"

    return _LINK.sub(linked, markdown)


def _as_markdown(notebook: dict[str, Any]) -> str:
    """The cells of a notebook one after another; its outputs are not kept in it."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts)
