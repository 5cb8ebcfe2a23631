# SPDX-License-Identifier: Apache-2.0
"""Runs the project's `.cu` sources on a CPU; see `emulator.py`."""

from .emulator import Emulated, EmulatorError, build

__all__ = ["Emulated", "EmulatorError", "build"]
