# SPDX-License-Identifier: Apache-2.0
"""What CI cannot run, on a machine with a GPU: the tests marked `gpu`, and compute-sanitizer over every kernel."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

from cupy_msda import report
from tests.conftest import why_no_gpu

ROOT = Path(__file__).parents[2]
TOOLS = "memcheck", "racecheck", "initcheck", "synccheck"
# Each allocation of its own, so that the sanitizer sees where each ends and what of it was written.
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
WORKERS = 12  # test processes on one GPU, which share its memory
KEPT_LINES = 30  # of what a step prints, in the report


class Step(NamedTuple):
    """A command with environment variables; no command: why it cannot run."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = {}  # noqa: RUF012 - never changed
    obstacle: str = ""


class Outcome(NamedTuple):
    """How a step ended: its exit status, or None if it was not run."""

    step: Step
    status: int | None
    seconds: float
    last_lines: Sequence[str]

    @property
    def verdict(self) -> str:
        """One word for the report."""
        if self.status is None:
            return "NOT RUN"
        return "passed" if self.status == 0 else f"FAILED, exit status {self.status}"


def steps(pytest_arguments: Sequence[str]) -> Iterator[Step]:
    """The tests, then the tools."""
    workers = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:benchmark", *workers]
    yield Step("tests marked gpu", [*pytest, *pytest_arguments])
    sanitizer = find_sanitizer()
    for tool in TOOLS:
        if sanitizer is None:
            obstacle = (
                "compute-sanitizer must be on PATH or in CUDA_HOME/bin: the CUDA toolkit has it"
            )
            yield Step(tool, [], obstacle=obstacle)
        else:
            run = [sys.executable, "-m", "tests.gpu.every_kernel"]
            check = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
            yield Step(tool, [*check, *run], UNPOOLED)


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def perform(step: Step) -> Outcome:
    """Run a step; what it prints is shown as it comes."""
    if step.obstacle:
        print(f"{step.name}: {step.obstacle}", file=sys.stderr)
        return Outcome(step, None, 0, [step.obstacle])
    print(f"\n== {step.name}: {' '.join(step.command)}", flush=True)
    begin, last_lines = time.monotonic(), deque[str](maxlen=KEPT_LINES)
    with subprocess.Popen(
        step.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
        env={**os.environ, **step.environment},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last_lines.append(line.rstrip())
    return Outcome(step, process.returncode, time.monotonic() - begin, last_lines)


def commit() -> str:
    """The checkout's commit, and whether files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    return found.stdout.strip()


def write(file: IO[str], outcomes: Sequence[Outcome]) -> None:
    """The report: device, driver and versions, a line for each step, then the end of what each printed."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    file.write(f"cupy_msda on a GPU, {now}, commit {commit()}\n\n")
    file.writelines(f"{label:16} {text}\n" for label, text in report.environment())
    file.write("\n")
    for outcome in outcomes:
        file.write(f"{outcome.step.name:16} {outcome.verdict} ({outcome.seconds:.0f} s)\n")
    for outcome in outcomes:
        command = " ".join(outcome.step.command)
        file.write(f"\n== {outcome.step.name}: {command}\n" + "\n".join(outcome.last_lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every step passed."""
    parser = argparse.ArgumentParser("scripts/test-gpu", description=__doc__)
    parser.add_argument("--report", default="gpu_report.txt", help="the file to write")
    options, pytest_arguments = parser.parse_known_args(arguments)
    obstacle = why_no_gpu()
    if obstacle is not None:
        parser.exit(2, f"scripts/test-gpu: no GPU that torch and CuPy can use: {obstacle}\n")
    outcomes = []
    # Written after each step, so that an interrupted session leaves what it found.
    for step in steps(pytest_arguments):
        outcomes.append(perform(step))
        with open(options.report, "w", encoding="utf-8") as file:
            write(file, outcomes)
    print(f"\nreport: {options.report}")
    return int(any(outcome.status != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
