# SPDX-License-Identifier: Apache-2.0
"""No network: a process that may make no socket compiles and runs the operator."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from tests.processes import run

# Python reports each socket, name look-up and download to this hook, and stops what it raises in.
PROGRAM = """
import sys
def refuse(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        raise RuntimeError(f"network: {event} {arguments}")
sys.addaudithook(refuse)
import numpy as np
from cupy_msda import ms_deform_attn, ms_deform_attn_backward
"""
HOST = """
value, points = np.ones((1, 6, 1, 4), np.float32), np.full((1, 1, 1, 1, 1, 2), 0.5, np.float32)
weights = np.ones((1, 1, 1, 1, 1), np.float32)
output = ms_deform_attn(value, [(2, 3)], None, points, weights)
ms_deform_attn_backward(output, value, [(2, 3)], None, points, weights)
"""
TORCH = """
import torch
leaves = [torch.from_numpy(array).requires_grad_() for array in (value, points, weights)]
ms_deform_attn(leaves[0], [(2, 3)], None, *leaves[1:]).sum().backward()
"""
CUDA = """
from cupy_msda.cuda import compile as compiler
from tests.compiling import ROUND, without_device
compiled = without_device()
compiler.load(ROUND, 0)
assert compiled
"""


def test_the_operator_compiles_and_runs_without_a_socket(tmp_path: Path) -> None:
    program = PROGRAM + HOST
    program += TORCH if find_spec("torch") else ""
    program += CUDA if find_spec("cupy") else ""
    caches = {"NUMBA_CACHE_DIR": str(tmp_path), "CUPY_CACHE_DIR": str(tmp_path)}
    finished = run(program, **caches)
    assert finished.returncode == 0, finished.stderr


def test_a_socket_would_be_seen() -> None:
    finished = run(PROGRAM + "import socket; socket.create_connection(('localhost', 9))")
    assert finished.returncode == 1
    assert "network: socket." in finished.stderr
