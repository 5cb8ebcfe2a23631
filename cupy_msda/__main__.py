# SPDX-License-Identifier: Apache-2.0
"""``python -m cupy_msda`` reports the environment and checks it; ``python -m cupy_msda demo`` shows what it does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_DEMO_NEEDS = {"torch": "torch", "matplotlib": "matplotlib", "pillow": "PIL"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status of the process: 0 if all was well, 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m cupy_msda",
        description="Without a command: report the environment, say which backend runs what, and check each backend.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    of_demo = commands.add_parser(
        "demo",
        help="MSDeformAttn on a picture: compared with grid_sample, timed and drawn",
        description="Run MSDeformAttn, forward and backward, on a feature pyramid of a picture; compare it with "
        "grid_sample; draw where a few queries look.",
    )
    of_demo.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="a picture (default: one that ships with the package)",
    )
    of_demo.add_argument(
        "--output",
        type=Path,
        metavar="FILE.png",
        default=Path("msda_demo.png"),
        help="default: %(default)s",
    )
    options = parser.parse_args(arguments)
    if options.command is None:
        return _report()
    missing = [name for name, module in _DEMO_NEEDS.items() if find_spec(module) is None]
    if missing:
        mend = 'pip install "cupy-msda[torch,cpu,plot]"'
        parser.exit(1, f"{parser.prog} demo: {' and '.join(missing)} must be installed: {mend}\n")
    from cupy_msda import demo

    return demo.run(options.image, options.output)


def _report() -> int:
    """Print the report and the self-check."""
    from cupy_msda import report

    for label, text in report.environment():
        print(f"{label:17}{text}".rstrip())
    print()
    failed = False
    for backend, passed, figures in report.self_check():
        verdict = "ok" if passed else "FAILED"
        print(f"{'self-check':17}{backend}: {verdict}\n{'':17}{figures}")
        failed |= not passed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
