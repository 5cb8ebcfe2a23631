# SPDX-License-Identifier: Apache-2.0
"""A compiler for the emulator (`CXX="python tests/coverage_compiler.py FOLDER"`): g++ that counts branches into FOLDER.

Functions stay out of line, or each place that they are inlined in would count as branches of its own.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

FLAGS = ["--coverage", "-O0", "-w", "-Dalways_inline=noinline"]


def main(folder: str, arguments: list[str]) -> int:
    """Compile; what only says the version or runs under the sanitizers passes unchanged."""
    units = [argument for argument in arguments if argument.endswith(".cpp")]
    if units and not any(argument.startswith("-fsanitize") for argument in arguments):
        name = hashlib.sha256(Path(units[0]).read_bytes()).hexdigest()[:24]
        arguments = [*arguments, *FLAGS, "-dumpdir", f"{folder}/{name}-"]
    return subprocess.run(["g++", *arguments], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
