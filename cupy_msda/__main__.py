# SPDX-License-Identifier: Apache-2.0
"""``python -m cupy_msda`` reports the environment and checks it; its commands are ``run``, ``demo``, ``bench`` and
``tune``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from cupy_msda.faults import reason

_NEEDS = {
    "run": {"torch": "torch"},
    "demo": {"torch": "torch", "matplotlib": "matplotlib", "pillow": "PIL"},
    "bench": {"torch": "torch"},
    "tune": {"torch": "torch"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status of the process: 0, or 1 if a check failed."""
    parser = argparse.ArgumentParser(
        prog="python -m cupy_msda",
        description="Without a command: report the environment and the backend of each kind of array, and check "
        "each backend.",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON, for bug reports")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_run(commands)
    _add_demo(commands)
    _add_bench(commands)
    _add_tune(commands)
    options = parser.parse_args(arguments)
    if options.command != "run":  # whose program finds the process as without it
        _prepare()
    if options.command is None:
        return _report_as_json() if options.json else _report()
    if options.json:
        parser.error(f"--json must stand without a command, got {options.command}")
    needs = _NEEDS[options.command]
    missing = [name for name, module in needs.items() if find_spec(module) is None]
    if missing:
        remedy = 'pip install "cupy-msda[torch,cpu,plot]"'
        what = " and ".join(missing)
        parser.exit(1, f"{parser.prog} {options.command}: {what} must be installed: {remedy}\n")
    try:
        if options.command == "bench":
            from cupy_msda.bench import runner
        elif options.command == "tune":
            from cupy_msda.bench import tune
        elif options.command == "run":
            from cupy_msda import run
        else:
            from cupy_msda import demo
    except Exception as error:
        parser.exit(1, f"{parser.prog} {options.command}: cannot start: {reason(error)}\n")
    if options.command == "bench":
        return runner.run(options.device, options.quick, options.output)
    if options.command == "tune":
        return tune.run(options.shapes, options.output)
    if options.command == "run":  # past what follows the other commands
        given = options.program, options.arguments, options.is_module, options.patch
        raise SystemExit(run.run(*given))
    return demo.run(options.image, options.output)


def _prepare() -> None:
    """What all our own output needs."""
    # Pictures go to files. In a notebook a command inherits the notebook's backend, which need not be installed here.
    os.environ["MPLBACKEND"] = "agg"
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # paths that its encoding lacks


def _add_run(commands: Any) -> None:
    """The options of a program to patch."""
    run = commands.add_parser(
        "run",
        help="a program that cannot be edited, on the kernels of this package",
        description="Replace the attention of other packages, then run a script or module as Python itself would: "
        "with its arguments, as __main__, with its exit status. Processes that it starts anew are not patched.",
    )
    names = "integrations or packages (default: whatever is installed; it is imported, which takes time)"
    run.add_argument("--patch", metavar="NAME,...", help=names)
    run.add_argument("-m", dest="is_module", action="store_true", help="PROGRAM is a module")
    run.add_argument("program", metavar="PROGRAM", help="a script, or with -m the name of a module")
    run.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")


def _add_demo(commands: Any) -> None:
    """The options of the demo."""
    demo = _add_command(
        commands,
        "demo",
        "MSDeformAttn on a picture: compared with grid_sample, timed and drawn",
        "Run MSDeformAttn, forward and backward, on a feature pyramid of a picture; compare it with grid_sample; "
        "draw the sampling points of a few queries.",
        "msda_demo.png",
    )
    picture = "a picture (default: one that ships with the package)"
    demo.add_argument("--image", type=Path, metavar="FILE", help=picture)


def _add_bench(commands: Any) -> None:
    """The options of the benchmark."""
    bench = _add_command(
        commands,
        "bench",
        "times against grid_sample, every other installed baseline and the roofline bound",
        "Check and time this library and the baselines, forward and backward, on shapes of published models; print "
        "a Markdown table and write all figures, and a plot beside them.",
        "msda_bench.json",
    )
    bench.add_argument("--quick", action="store_true", help="a few cases, in about a minute")
    where = "default: cuda where its kernels can run"
    bench.add_argument("--device", choices=("cpu", "cuda"), help=where)


def _add_tune(commands: Any) -> None:
    """The options of the tuning."""
    tune = _add_command(
        commands,
        "tune",
        "which kernels are the fastest on this GPU, as a table that later calls use",
        "Check and time the candidates of every kernel on this GPU, on shapes of published models or your own, and "
        "write a table of the fastest. CUPY_MSDA_TUNED=FILE.json lets later processes use it.",
        "msda_tuned.json",
    )
    names = "names of the benchmark's shapes, between commas, or a JSON file of shapes (default: all names)"
    tune.add_argument("--shapes", metavar="FILE.json|NAMES", help=names)


def _add_command(commands: Any, name: str, summary: str, description: str, output: str) -> Any:
    """A command that writes a file, `output` by default."""
    parser = commands.add_parser(name, help=summary, description=description)
    parser.add_argument(
        "--output",
        type=Path,
        metavar=f"FILE{Path(output).suffix}",
        default=Path(output),
        help="default: %(default)s",
    )
    return parser


def _report() -> int:
    """Print the environment, the plans of typical problems and the self-check."""
    from cupy_msda import report

    for lines in (report.environment(), report.integrations(), report.plans()):
        for label, text in lines:
            print(f"{label:17}{text}".rstrip())
    print()
    failed = False
    for backend, passed, figures in report.self_check():
        verdict = "ok" if passed else "FAILED"
        print(f"{'self-check':17}{backend}: {verdict}\n{'':17}{figures}")
        failed |= not passed
    return int(failed)


def _report_as_json() -> int:
    """Print the same as JSON."""
    from cupy_msda import report

    data = report.as_data()
    print(json.dumps(data, indent=2))
    return int(not all(row["passed"] for row in data["self_check"]))


if __name__ == "__main__":
    try:
        status = main()
        print(end="", flush=True)
    except BrokenPipeError:  # the reader has left, as `head` does
        if vars(sys.modules["__main__"]) is not globals():  # an error of the program of `run`
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
