# SPDX-License-Identifier: Apache-2.0
"""The race detector: no kernel has a race, and without any one of their barriers and atomics it finds one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from cupy_msda.cuda.compile import assemble, kernel_dir
from cupy_msda.cuda.plans import Choice
from tests.emulator import fused, launches
from tests.emulator.cases import copied
from tests.emulator.emulator import Emulated, EmulatorError
from tests.problems import Inputs, random_inputs

# --- small kernels ---------------------------------------------------------------------------------

SMALL = r"""
#line 1 "kernels/small.cu"
template <int KIND>
__global__ void rotate(int* out) {
  __shared__ int slot[64];
  const int t = threadIdx.x;
  slot[t] = t;
  if (KIND == 32) __syncwarp(); else __syncthreads();
  out[t] = slot[(t + 1) % KIND];
  if (KIND == 32) __syncwarp(); else __syncthreads();
  slot[t] = 0;
}
__global__ void by_votes(int* out) {
  __shared__ int slot[32];
  slot[threadIdx.x] = 1;
  __ballot_sync(0xffffffffu, __shfl_sync(0xffffffffu, 1, 0));
  out[threadIdx.x] = slot[31 - threadIdx.x];
}
__global__ void in_halves(int* out, int step) {
  __shared__ int slot[32];
  const int t = threadIdx.x;
  slot[t] = t;
  __syncwarp(t < 16 ? 0xffffu : 0xffff0000u);
  out[t] = slot[t ^ step];
}
__global__ void count(int* out) { atomicAdd(out, 1); }
__global__ void count_plainly(int* out) { *out += 1; }
__global__ void count_and_read(int* out) { if (atomicAdd(out, 1) == 5) out[1] = *out; }
__global__ void write(short* out, int step) { out[threadIdx.x + step * blockIdx.x] = 1; }
__global__ void write_what_another_read(int* out) {
  if (blockIdx.x == 0) out[1] = out[0]; else out[0] = 1;
}
"""
NAMES = [
    *("rotate<32>", "rotate<64>", "by_votes", "in_halves", "count", "count_plainly"),
    *("count_and_read", "write", "write_what_another_read"),
]


def launch(name: str, blocks: int, threads: int, *step: int, blind: str | None = None) -> None:
    """Launch one of the kernels above, watched, with an array of zeros and a number."""
    kernel = Emulated(SMALL, name, races=True, blind=blind, together=NAMES)
    array = np.zeros(64, np.int16 if name == "write" else np.int32)
    kernel((blocks, 1, 1), (threads, 1, 1), [array, *map(np.int32, step)])


@pytest.mark.parametrize(
    "given",
    [
        *(("rotate<32>", 1, 32), ("rotate<64>", 1, 64), ("in_halves", 1, 32, 8)),
        *(("count", 3, 64), ("write", 2, 32, 32)),
    ],
    ids=str,
)
def test_what_is_ordered_or_atomic_or_apart_is_no_race(given) -> None:
    launch(*given)


@pytest.mark.parametrize(
    ("given", "blind", "report"),
    [
        (("rotate<32>", 1, 32), 6, "slot, byte .*\n  (write|read) by .* at small.cu:[57]\n"),
        (("rotate<32>", 1, 32), 8, "slot, byte .*\n  (write|read) by .* at small.cu:[79]\n"),
        (("rotate<64>", 1, 64), 6, "slot, byte .*\n  (write|read) by .* at small.cu:[57]\n"),
        (("rotate<64>", 1, 64), 8, "slot, byte .*\n  (write|read) by .* at small.cu:[79]\n"),
        (("by_votes", 1, 32), None, "slot, byte .* at small.cu:1[35]"),
        (("in_halves", 1, 32, 16), None, "slot, byte .* at small.cu:2[02]"),
        (("count_plainly", 1, 2), None, "argument 0, byte 0.*:25"),
        (("count_plainly", 2, 1), None, "argument 0, byte 0.*:25"),
        (("count", 1, 64), 24, "argument 0, byte 0.* at small.cu:24"),
        (("count_and_read", 1, 32), None, "atomic by .* at small.cu:26"),
        (("write", 2, 32, 0), None, r"block \(0, 0, 0\)(.|\n)*block \(1, 0, 0\)|\(1,(.|\n)*\(0,"),
        (("write_what_another_read", 2, 1), None, "argument 0, byte 0"),
    ],
    ids=str,
)
def test_races_of_small_kernels(given, blind, report) -> None:
    with pytest.raises(EmulatorError, match=f"(?s)race on .*{report}"):
        launch(*given, blind=blind and f"kernels/small.cu:{blind}")
    launch("count", 1, 32)  # the next launch is not affected


# --- the kernels -----------------------------------------------------------------------------------

SIZES = ((9, 13), (3, 3))
PIXELS = 9 * 13 + 3 * 3
# Queries are the pixels; a stage of points to a row and a second that is not full.
ENCODER = random_inputs(SIZES, n=1, m=2, d=16, lq=PIXELS, p=3)
HALF = random_inputs(SIZES, n=1, m=1, d=16, lq=PIXELS, p=2, dtypes=(torch.float16, torch.float32))
DECODER = random_inputs(SIZES, n=1, m=1, d=16, lq=100, p=4)
WIDE = random_inputs(SIZES, n=1, m=2, d=34, lq=11, p=20)
FUSED = fused.fused((2, 2, 2), d=16, images=1)


def not_finite(inputs: Inputs) -> Inputs:
    """The same with two numbers that are not."""
    inputs = copied(inputs)
    inputs.grad_output[0, 1, 2] = torch.nan
    inputs.weights[0, 2, 0, 0, 1] = torch.inf
    return inputs


def chosen(candidate: str) -> dict[str, Any]:
    """Options that run this candidate, with the pixels as queries."""
    return {"grids": None, "choice": Choice(candidate, "test")}


RUNS: dict[str, Callable[[], object]] = {
    "plain": lambda: launches.forward(ENCODER),
    "query-tiles": lambda: launches.forward(ENCODER, **chosen("query tiles")),
    "persistent": lambda: launches.forward(ENCODER, **chosen("persistent, 1 per multiprocessor")),
    "gradients-rounded": lambda: launches.backward(HALF),
    "binned-and-persistent": lambda: launches.backward(
        ENCODER, **chosen("binned; points persistent, 1 per multiprocessor")
    ),
    "fixed-point": lambda: launches.backward_fixed_point(not_finite(ENCODER)),
    "binned-fixed-point": lambda: launches.backward_binned(not_finite(ENCODER), deterministic=True),
    "tiled": lambda: launches.backward_tiled(DECODER),
    "generic": lambda: launches.forward(WIDE),
    "generic-gradients": lambda: launches.backward(WIDE),
    "generic-fixed-point": lambda: launches.backward_fixed_point(not_finite(WIDE)),
    "generic-float64": lambda: launches.backward_fixed_point(
        not_finite(WIDE.to(torch.float64)), needs_points=False
    ),
    "fused-gradients": lambda: fused.backward(FUSED, needs=(False, True, True)),
    "fused-binned": lambda: fused.backward(FUSED, needs=(True, False, False), **chosen("binned")),
}


def emulated(source: str, name: str, blind: str | None = None, **_: Any) -> Emulated:
    """`Emulated` with the race detector."""
    return Emulated(source, name, races=True, blind=blind)


def watched(name: str, blind: str | None = None) -> set[tuple[str, str]]:
    """Run with the race detector; the kernels and the sources that it launched."""
    seen = set()

    def noted(source: str, kernel: str, **_: Any) -> Emulated:
        seen.add((kernel.partition("<")[0], source))
        return emulated(source, kernel, blind)

    with patch.object(launches, "Emulated", noted):
        RUNS[name]()
    return seen


watched_once = cache(watched)


@pytest.mark.parametrize("name", RUNS)
def test_a_kernel_has_no_race(name: str) -> None:
    watched_once(name)


def test_every_kernel_is_watched() -> None:
    names = set()
    for file in kernel_dir().glob("*.cu"):
        code = re.sub("//.*", "", file.read_text())
        names |= set(re.findall(r"__global__[^{;]*?\b(msda_\w+)\s*\(", code))
    assert names == {kernel for name in RUNS for kernel, _ in watched_once(name)}


def places(source: str) -> Iterator[str]:
    """Where a source has a barrier or an atomic, by its `#line` markers."""
    file, number = "", 0
    for line in source.splitlines():
        marker = re.match(r'#line (\d+) "(.*)"', line)
        file, number = (marker[2], int(marker[1])) if marker else (file, number + 1)
        if marker:
            number -= 1
        elif re.search(r"\b(__sync\w+|atomic\w+)\(", line.partition("//")[0]):
            yield f"{file}:{number}"


def has_race(name: str, blind: str) -> bool:
    """Whether the detector finds a race if it does not see what is at this place."""
    try:
        watched(name, blind)
    except EmulatorError as error:
        return "race on" in str(error)
    return False


PLACES = sorted(
    {place for file in kernel_dir().glob("*.cu") for place in places(assemble(file.name))}
)


@pytest.mark.parametrize("place", PLACES)
def test_without_a_barrier_or_an_atomic_there_is_a_race(place: str) -> None:
    """Planted faults: the detector sees no barrier at this place, or a plain write for the atomic."""
    assert any(
        has_race(name, place)
        for name in RUNS
        if any(place in places(source) for _, source in watched_once(name))
    )


def test_two_blocks_that_write_one_output_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "Emulated", emulated)
    source, right = assemble("forward.cu"), "output + done.index(p) * D"
    assert source.count(right) == 1
    with pytest.raises(EmulatorError, match="race on argument 5"):
        launches.forward(ENCODER, source=source.replace(right, "output + done.query * D"))
