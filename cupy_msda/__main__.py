# SPDX-License-Identifier: Apache-2.0
"""``python -m cupy_msda`` reports the environment and checks it; its commands are ``demo`` and ``bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_NEEDS = {
    "demo": {"torch": "torch", "matplotlib": "matplotlib", "pillow": "PIL"},
    "bench": {"torch": "torch"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status of the process: 0, or 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m cupy_msda",
        description="Without a command: report the environment and the backend of each kind of array, and check "
        "each backend.",
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
    _add_bench(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        return _report()
    needs = _NEEDS[options.command]
    missing = [name for name, module in needs.items() if find_spec(module) is None]
    if missing:
        mend = 'pip install "cupy-msda[torch,cpu,plot]"'
        what = " and ".join(missing)
        parser.exit(1, f"{parser.prog} {options.command}: {what} must be installed: {mend}\n")
    if options.command == "bench":
        from cupy_msda.bench import runner

        return runner.run(options.device, options.quick, options.output)
    from cupy_msda import demo

    return demo.run(options.image, options.output)


def _add_bench(commands: Any) -> None:
    """The options of the benchmark."""
    of_bench = commands.add_parser(
        "bench",
        help="times against grid_sample, every other installed baseline and the roofline bound",
        description="Check and time this library and the baselines, forward and backward, on shapes of "
        "published models; print a Markdown table and write all figures, and a plot beside them.",
    )
    of_bench.add_argument("--quick", action="store_true", help="a few cases, in about a minute")
    of_bench.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda where its kernels can run",
    )
    of_bench.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        default=Path("msda_bench.json"),
        help="default: %(default)s",
    )


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
