# SPDX-License-Identifier: Apache-2.0
"""The emulator detects faults of synchronisation planted in small kernels."""

from __future__ import annotations

import re

import numpy as np
import pytest

from .emulator import Emulated, EmulatorError, build
from .test_emulator import ONE, SEEDS, WARP

FAULTS = r"""
#line 1 "kernels/faults.cu"
#define FULL 0xffffffffu
template <bool fixed>
__global__ void rotate_in_warp(int* out) {
  __shared__ int slot[32];
  const int lane = threadIdx.x;
  int value = lane;
  for (int round = 0; round < 3; ++round) {
    slot[lane] = value;
    __syncwarp();
    value = slot[(lane + 1) % 32];
    if (fixed) __syncwarp();
  }
  out[lane] = value;
}
template <bool fixed>
__global__ void rotate_in_block(int* out) {
  __shared__ int slot[128];
  const int t = threadIdx.x;
  slot[t] = t;
  __syncwarp();
  if (fixed) __syncthreads();
  out[t] = slot[(t + 32) % 128];
}
__global__ void unfinished_barrier(int limit) {
  if (int(threadIdx.x) < limit) __syncthreads();
}
#line 100
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void barrier_against_warp() {
  if (threadIdx.x == 3) __syncthreads(); else __syncwarp();
  __syncthreads();
}
__global__ void circle() {
  const unsigned lane = threadIdx.x;
  if (lane == 0) { __syncwarp(0b011); __syncwarp(0b101); }
  if (lane == 1) { __syncwarp(0b110); __syncwarp(0b011); }
  if (lane == 2) { __syncwarp(0b101); __syncwarp(0b110); }
}
__global__ void chain() {
  const unsigned lane = threadIdx.x;
  if (lane <= 1) __syncwarp(0b011);
  if (lane == 1 || lane == 2) __syncwarp(0b110);
}
#line 200
__global__ void not_in_mask(int* out) {
  if (threadIdx.x == 5) *out = __shfl_sync(0xfu, 1, 0);
}
__global__ void from_outside_mask(int* out) {
  if (threadIdx.x < 4) out[threadIdx.x] = __shfl_down_sync(0xfu, 1, 2);
}
__global__ void exited_lane(int* out) {
  if (threadIdx.x == 7) return;
  *out = __all_sync(FULL, 1);
}
__global__ void missing_lanes() { __syncwarp(); }
__global__ void mixed_kinds(int* out) {
  if (threadIdx.x % 2) *out = __any_sync(FULL, 1); else __syncwarp();
}
__global__ void mixed_types(float* out) {
  if (threadIdx.x < 16) *out = __shfl_xor_sync(FULL, 1.0f, 1);
  else *out = float(__shfl_xor_sync(FULL, 1.0, 1));
}
__global__ void bad_width(int* out) { *out = __shfl_sync(FULL, 1, 0, 12); }
__global__ void much_shared() {
  __shared__ float a[48 * 256 - 8]; __shared__ float b[9];
  a[0] = b[0] = 1;
}
__device__ float deep(int n) {
  volatile float room[1000];
  room[n % 1000] = n;
  return n > 0 ? deep(n - 1) + room[n % 1000] : 0;
}
__global__ void overflow_stack(float* out) { *out = deep(*out); }
__global__ void wild_pointer(float* out, long long offset) { out[offset + threadIdx.x] = 1; }
__global__ void divide(int* a) { a[0] /= a[1]; }
template <bool fixed>
__global__ void rotate_in_groups(int* out) {
  __shared__ int slot[32];
  const int lane = threadIdx.x;
  int value = lane;
  for (int round = 0; round < 3; ++round) {
    slot[lane] = value;
    __syncwarp();
    value = slot[(lane + 8) % 32];
    for (int i = 0; i < 3; ++i) __syncwarp(0xffu << lane / 8 * 8);
    if (fixed) __syncwarp();
  }
  out[lane] = value;
}
"""


BAD = [
    *("rotate_in_warp<true>", "rotate_in_warp<false>", "rotate_in_block<true>"),
    *("rotate_in_block<false>", "rotate_in_groups<true>", "rotate_in_groups<false>"),
    *("unfinished_barrier", "two_barriers", "barrier_against_warp", "circle", "chain"),
    *("not_in_mask", "from_outside_mask", "exited_lane", "missing_lanes"),
    *("mixed_kinds", "mixed_types", "bad_width", "much_shared", "overflow_stack"),
    *("wild_pointer", "divide"),
]


@pytest.fixture(scope="module")
def bad() -> dict[str, Emulated]:
    """The kernels above."""
    return build(FAULTS, BAD)


@pytest.mark.parametrize(
    ("kernel", "step", "size"), [("warp", 3, 32), ("block", 32, 128), ("groups", 24, 32)]
)
def test_missing_synchronisation_changes_the_result(
    bad: dict[str, Emulated], kernel: str, step: int, size: int
) -> None:
    expected = (np.arange(size, dtype=np.int32) + step) % size
    wrong = 0
    for seed in range(16):
        for fixed in ("true", "false"):
            out = np.zeros(size, np.int32)
            bad[f"rotate_in_{kernel}<{fixed}>"](ONE, (size, 1, 1), [out], seed=seed)
            equal = np.array_equal(out, expected)
            assert equal or fixed == "false"
            wrong += not equal
    assert wrong > (3 if kernel == "groups" else 8)


def test_same_seed_same_order(bad: dict[str, Emulated]) -> None:
    results = np.zeros((2, 4, 32), np.int32)
    for again in results:
        for seed, out in enumerate(again):
            bad["rotate_in_warp<false>"](ONE, WARP, [out], seed=seed)
    np.testing.assert_array_equal(results[0], results[1])
    assert len({tuple(out) for out in results[0]}) > 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "threads", "args", "patterns"),
    [
        (
            "unfinished_barrier",
            64,
            [np.int32(40)],
            [
                "barrier divergence: some threads wait at a barrier, others have exited",
                r"block \(0, 0, 0\)",
                "warp 1, lanes 0xffffff00: exited",
                r"warp 0, lanes 0xffffffff: wait in __syncthreads, at kernels/faults.cu:25",
            ],
        ),
        (
            "two_barriers",
            64,
            [],
            ["barrier divergence: __syncthreads meets", "faults.cu:102", "faults.cu:104"],
        ),
        (
            "barrier_against_warp",
            32,
            [],
            [
                "barrier divergence: some lanes wait at a barrier",
                "lanes 0xfffffff7: wait in __syncwarp with mask 0xffffffff, at .*:108",
                "lanes 0x00000008: wait in __syncthreads, at .*:108",
            ],
        ),
        (
            "circle",
            32,
            [],
            [
                "deadlock: lanes wait for each other with different masks",
                "lanes 0x00000002: wait in __syncwarp with mask 0x00000006, at .*:114",
            ],
        ),
        (
            "not_in_mask",
            32,
            [np.zeros(1, np.int32)],
            [
                "__shfl_sync by a lane outside its own mask 0x0000000f",
                r"thread \(5, 0, 0\), warp 0, lane 5, at kernels/faults.cu:201",
            ],
        ),
        (
            "from_outside_mask",
            32,
            [np.zeros(4, np.int32)],
            ["__shfl_down_sync from lane [45], which is not in the mask", "faults.cu:204"],
        ),
        (
            "exited_lane",
            32,
            [np.zeros(1, np.int32)],
            ["mask names lanes that have exited", "lanes 0x00000080: exited", "__all_sync .*:208"],
        ),
        ("missing_lanes", 48, [], ["mask names lanes that do not exist", "warp 1, lanes 0x0000ff"]),
        (
            "mixed_kinds",
            32,
            [np.zeros(1, np.int32)],
            ["lanes of one mask are at different warp op", "0xaaaaaaaa: wait in __any_sync"],
        ),
        (
            "mixed_types",
            32,
            [np.zeros(1, np.float32)],
            ["lanes of one mask are at different warp operations", "lanes 0x0000ffff"],
        ),
        ("bad_width", 32, [np.zeros(1, np.int32)], ["shuffle width is no power of two"]),
        ("much_shared", 1, [], ["more than 48 KiB of __shared__ variables", "faults.cu:220"]),
    ],
)
def test_faults_of_synchronisation(
    bad: dict[str, Emulated],
    kernel: str,
    threads: int,
    args: list[object],
    patterns: list[str],
    seed: int,
) -> None:
    with pytest.raises(EmulatorError) as caught:
        bad[kernel]((2, 1, 1) if kernel == "bad_width" else ONE, (threads, 1, 1), args, seed=seed)
    text = str(caught.value)
    assert text.startswith(f"{kernel}: ")
    for pattern in patterns:
        assert re.search(pattern, text), text
    # The next launch is not affected.
    bad["chain"](ONE, WARP, [], seed=seed)


def test_wild_accesses_do_not_end_the_process(bad: dict[str, Emulated]) -> None:
    with pytest.raises(EmulatorError, match="memory fault; a sanitized run may"):
        bad["wild_pointer"](ONE, WARP, [np.zeros(1, np.float32), np.int64(1 << 44)])
    with pytest.raises(EmulatorError, match=r"memory fault;.*\n.*thread \(0, 0, 0\)"):
        bad["overflow_stack"](ONE, ONE, [np.full(1, 1000, np.float32)])
    with pytest.raises(EmulatorError, match="integer division by zero"):
        bad["divide"](ONE, ONE, [np.array([1, 0], np.int32)])
