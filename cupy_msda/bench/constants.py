# SPDX-License-Identifier: Apache-2.0
"""The rates of the roofline model, measured on the same device in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

_REPEATS = 20
_ROW = 128  # bytes, of 32 float32 channels


class Constants(NamedTuple):
    """Rates per second; those that default to None are measured on a GPU alone."""

    # (bytes in reach, bytes read and written per second), by growing reach
    copy: tuple[tuple[int, float], ...]
    multiply_adds: float
    gather: float | None = None  # bytes of whole rows, from the L1 cache
    gather_l2: float | None = None  # the same from the L2 cache
    scatter: float | None = None  # bytes of float32 rows added to memory
    launch: float | None = None  # seconds between the events around an empty kernel


def measure(device: str) -> Constants:
    """The best of a few repeats of each, so that other load on the device matters least."""
    return _of_cpu(torch.get_num_threads()) if device == "cpu" else _of_gpu()


def l2_bytes() -> int:
    """The size of the current GPU's L2 cache."""
    import cupy

    return int(cupy.cuda.Device().attributes["L2CacheSize"])


def _best(call: Callable[[], object]) -> float:
    """The fewest seconds of a call on the host."""
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _of_cpu(threads: int) -> Constants:
    """Copies by NumPy in as many threads as torch uses, at sizes for every cache; multiply-adds by a matrix product."""
    reaches = [1 << shift for shift in (18, 20, 22, 24, 26, 28)]
    with ThreadPoolExecutor(threads) as pool:
        copy = tuple((reach, _copy_rate(pool, threads, reach)) for reach in reaches)
    size = 512
    matrix = torch.rand(size, size)
    return Constants(copy, size**3 / _best(lambda: matrix @ matrix))


def _copy_rate(pool: ThreadPoolExecutor, threads: int, reach: int) -> float:
    """Bytes read and written per second by threads that each copy their part of `reach` bytes repeatedly."""
    arrays = [np.ones((2, reach // (2 * threads)), np.uint8) for _ in range(threads)]
    times = max(1, (1 << 27) // reach)

    def copy(pair: Any) -> None:
        for _ in range(times):
            np.copyto(pair[0], pair[1])

    return times * reach / _best(lambda: list(pool.map(copy, arrays)))


# Rows of 128 bytes, by eight lanes of 16 bytes each, as the kernels read and add them.
_SOURCE = r"""
__device__ unsigned next_random(unsigned state) { return state * 747796405u + 2891336453u; }

extern "C" __global__ void empty() {}

extern "C" __global__ void gather(const float4* table, float4* never, unsigned mask, int steps) {
  unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, lane = thread % 8, state = thread / 8 * 2654435769u;
  float4 sum = {0, 0, 0, 0};
#pragma unroll 8
  for (int step = 0; step < steps; ++step) {
    state = next_random(state);
    float4 row = __ldg(table + (size_t)(state >> 8 & mask) * 8 + lane);
    sum.x += row.x, sum.y += row.y, sum.z += row.z, sum.w += row.w;
  }
  if (sum.x + sum.y + sum.z + sum.w == 1) never[0] = sum;
}

extern "C" __global__ void scatter(float4* table, unsigned mask, int steps) {
  unsigned thread = blockIdx.x * blockDim.x + threadIdx.x, lane = thread % 8, state = thread / 8 * 2654435769u;
  for (int step = 0; step < steps; ++step) {
    state = next_random(state);
    float4* row = table + (size_t)(state >> 8 & mask) * 8 + lane;
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(row), "f"(1.f) : "memory");
#else
    float* part = (float*)row;
    for (int i = 0; i < 4; ++i) atomicAdd(part + i, 1.f);
#endif
  }
}

extern "C" __global__ void multiply_add(float* never, float factor, int steps) {
  float sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = threadIdx.x + i;
  for (int step = 0; step < steps; ++step)
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = sums[i] * factor + 1;
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += sums[i];
  if (sum == 1) never[0] = sum;
}
"""
_BLOCK = 256


def _of_gpu() -> Constants:
    """One small kernel for each rate, and a copy far larger than the L2 cache."""
    import cupy

    device = cupy.cuda.Device().attributes
    per_multiprocessor = int(device["MaxThreadsPerMultiProcessor"]) // _BLOCK
    blocks = int(device["MultiProcessorCount"]) * per_multiprocessor
    l2 = l2_bytes()
    module = cupy.RawModule(code=_SOURCE, options=("-std=c++17",))
    source, target = (cupy.zeros(8 * l2, cupy.uint8) for _ in range(2))
    # Powers of two: 64 KB fit every multiprocessor's L1 cache; a quarter of the L2 cache fits only the L2 cache.
    in_l1, in_l2 = (64 << 10) // _ROW, 1 << ((l2 // 4 // _ROW).bit_length() - 1)
    steps = 512

    def seconds(name: str, *arguments: Any) -> float:
        kernel = module.get_function(name)
        return _best_on_gpu(lambda: kernel((blocks,), (_BLOCK,), arguments))

    moved = blocks * _BLOCK * 16 * steps  # bytes, by every gather and scatter

    def gathered(rows: int) -> float:
        arguments = (source, target, np.uint32(rows - 1), np.int32(steps))
        return moved / seconds("gather", *arguments)

    scattered = seconds("scatter", target, np.uint32(in_l2 - 1), np.int32(steps))
    multiplied = seconds("multiply_add", target, np.float32(0.5), np.int32(8 * steps))
    copied = _best_on_gpu(lambda: cupy.copyto(target, source))
    return Constants(
        copy=((16 * l2, 16 * l2 / copied),),
        multiply_adds=blocks * _BLOCK * 8 * (8 * steps) / multiplied,
        gather=gathered(in_l1),
        gather_l2=gathered(in_l2),
        scatter=moved / scattered,
        launch=seconds("empty"),
    )


def _best_on_gpu(call: Callable[[], object]) -> float:
    """The fewest seconds of a call on the device."""
    import cupy

    def once() -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return 1e-3 * float(cupy.cuda.get_elapsed_time(begin, end))

    once()
    return min(once() for _ in range(_REPEATS))
