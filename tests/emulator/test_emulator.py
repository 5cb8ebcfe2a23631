# SPDX-License-Identifier: Apache-2.0
"""The emulator does what CUDA specifies."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from .emulator import Emulated, EmulatorError, build

ONE = (1, 1, 1)


WARP = (32, 1, 1)


SEEDS = range(8)


KERNELS = r"""
#line 1 "kernels/good.cu"
#ifndef MSDA_EMULATED
#error "the kernels must be able to tell"
#endif
#define FULL 0xffffffffu

__global__ void __launch_bounds__(256) where(int4* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      make_int4(threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x + 10 * blockIdx.y);
}

template <class T>
__global__ void shuffles(const T* in, const int* operand, int width, T* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(FULL, in[lane], operand[lane], width);
  out[32 + lane] = __shfl_up_sync(FULL, in[lane], operand[lane], width);
  out[64 + lane] = __shfl_down_sync(FULL, in[lane], operand[lane], width);
  out[96 + lane] = __shfl_xor_sync(FULL, in[lane], operand[lane], width);
}

__global__ void votes(const int* in, unsigned* out) {
  const unsigned lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  out[lane] = __ballot_sync(FULL, in[lane]);
  out[32 + lane] = __all_sync(half, in[lane]);
  out[64 + lane] = __any_sync(half, in[lane]);
  out[96 + lane] = __match_any_sync(half, in[lane]);
}

__global__ void block_votes(const int* in, int* out) {
  const int value = in[threadIdx.x];
  const int count = __syncthreads_count(value), all = __syncthreads_and(value);
  const int any = __syncthreads_or(value);
  out[threadIdx.x] = count + 1000 * all + 10000 * any;
}

// Groups of a warp that loop for different numbers of rounds, each with its own mask.
__global__ void ragged(int* out) {
  const int lane = threadIdx.x, group = lane / 8;
  int sum = 0;
  for (int round = 0; round <= group; ++round) {
    sum += __shfl_xor_sync(0xffu << 8 * group, lane, round + 1);
  }
  out[lane] = sum;
}

template <class T, int N>
__global__ void sum_of_block(const T* in, T* out) {
  // Not a declaration: __shared__ T here[N];
  __shared__ T part[N];
  const int t = threadIdx.x;
  part[t] = in[blockIdx.x * N + t];
  for (int half = N / 2; half > 0; half /= 2) {
    __syncthreads();
    if (t < half) part[t] += part[t + half];
  }
  if (t == 0) out[blockIdx.x] = part[0];
}

// Each block uses what the block before left behind, and several kinds of declarations.
struct __align__(8) Pair { int a; float b; };
template <int N>
__global__ void poison(unsigned* ints, float* floats, double* doubles) {
  __shared__ __align__(16) unsigned
      words[N][(N > 2) ? 2 : 1];
  __shared__ Pair pairs[N]; __shared__ double scalar;
  ints[blockIdx.x] = words[1][1]; floats[blockIdx.x] = pairs[N - 1].b;
  doubles[blockIdx.x] = scalar;
  words[1][1] = 1; pairs[N - 1] = {2, 3}; scalar = 4;
}

__device__ __forceinline__ int slot_of_thread() {
  __shared__ int slots[64];
  slots[threadIdx.x] = threadIdx.x * 3;
  __syncthreads();
  return slots[63 - threadIdx.x];
}
__global__ void shared_in_function(int* out) { out[threadIdx.x] = slot_of_thread(); }

__global__ void atomics(float* f, double* d, int* i, unsigned* u, unsigned long long* l) {
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicAdd(i, -1);
  atomicMax(i + 1, int(threadIdx.x) - 40);
  atomicMin(i + 2, int(threadIdx.x) - 40);
  atomicOr(u, 1u << (threadIdx.x % 32));
  const unsigned ticket = atomicAdd(u + 1, 1u);
  atomicAdd(l, 1ull << 40);
  u[8 + ticket] = threadIdx.x;  // the tickets are the old values: all different
  atomicCAS(u + 2, 7u, threadIdx.x);
}

__global__ void add_down(const float* a, const float* b, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = __fadd_rd(a[i], b[i]);
}

__global__ void arithmetic(float* f, int* i) {
  const float nan = __int_as_float(0x7fc00000);
  f[0] = fmaxf(nan, 1.0f); f[1] = fminf(2.0f, nan); f[2] = max(nan, 3.0f); f[3] = min(5.0, 4.0f);
  f[4] = __fmaf_rn(1.0f + 0x1p-12f, 1.0f + 0x1p-12f, -1.0f);
  i[0] = __popc(0xf0f0u); i[1] = __clz(1); i[2] = __ffs(8); i[3] = __clz(0);
  i[4] = __float_as_int(1.0f); i[5] = isfinite(nan) + 2 * isnan(nan);
  i[6] = __float2int_rd(-1.5f); i[7] = __float2int_rn(2.5f); i[8] = __float2int_rz(1e20f);
  i[9] = __float2int_rn(nan); i[10] = max(3, 4); i[11] = min(3u, 4u);
  i[12] = sizeof(float4) + 100 * alignof(float4) + 10000 * alignof(float2);
}

struct Table { long long start[2]; int height; float scale; };
__global__ void kinds(const __grid_constant__ Table table, const float* array, const float* none, float f, double d,
                      short s, unsigned long long l, double* out) {
  out[0] = table.start[1]; out[1] = table.height; out[2] = table.scale;
  out[3] = array[1]; out[4] = none == nullptr; out[5] = f; out[6] = d; out[7] = s; out[8] = l;
}
__global__ void views(const float4* quads, const void* raw, const unsigned short* halves,
                      float* out) {
  out[0] = quads[1].z; out[1] = static_cast<const unsigned char*>(raw)[3]; out[2] = halves[0];
}

// Keeps values of every kind in registers over many switches.
__global__ void registers(double* out) {
  const int t = threadIdx.x;
  long long a = t, b = t + 1, c = t * 2, d = t ^ 5, e = -t, f = t * t, g = 7 - t;
  double x = t * 0.5, y = t * 0.25, z = 1.0 / (t + 1);
  for (int i = 0; i < 50; ++i) {
    a += b; b ^= c; c += d; d ^= e; e += f; f ^= g; g += a; x += y; y += z; z *= 0.5;
    if (i % 2) __syncthreads(); else __syncwarp();
  }
  out[t] = double(a ^ b ^ c ^ d ^ e ^ f ^ g) + x + y + z;
}
"""


GOOD = [
    *("where", "shuffles<int>", "shuffles<unsigned>", "shuffles<float>"),
    *("shuffles<double>", "shuffles<long long>", "votes", "block_votes", "ragged"),
    *("sum_of_block<float, 256>", "sum_of_block<long long, 64>", "poison<4>"),
    *("shared_in_function", "atomics", "add_down", "arithmetic", "kinds", "views"),
    *("registers",),
]


@pytest.fixture(scope="module")
def good() -> dict[str, Emulated]:
    """The kernels above."""
    return build(KERNELS, GOOD)


def test_compiles_without_warnings(good: dict[str, Emulated]) -> None:
    assert good["where"].warnings == ""


def test_indices_cover_the_grid(good: dict[str, Emulated]) -> None:
    out = np.full((3, 2, 2, 5, 2, 4, 4), -1, np.int32)  # grid z, y, x, block z, y, x
    good["where"]((2, 2, 3), (4, 2, 5), [out], seed=5)
    bz, by, bx, z, y, x = np.indices(out.shape[:-1])
    np.testing.assert_array_equal(out, np.stack([x, y, z, bx + 10 * by], -1))
    assert bz.max() == 2


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(
    ("ctype", "dtype"),
    [
        ("int", np.int32),
        ("unsigned", np.uint32),
        ("float", np.float32),
        ("double", np.float64),
        ("long long", np.int64),
    ],
)
def test_shuffles(good: dict[str, Emulated], ctype: str, dtype: type, width: int) -> None:
    rng = np.random.default_rng(width)
    values: npt.NDArray[Any] = rng.integers(1 << 31, size=32).astype(dtype)
    operand = rng.integers(32, size=32).astype(np.int32)
    out: npt.NDArray[Any] = np.zeros((4, 32), dtype)
    good[f"shuffles<{ctype}>"](ONE, WARP, [values, operand, np.int32(width), out], seed=width)

    lane = np.arange(32)
    first = lane - lane % width
    last = first + width - 1
    up, down, across = lane - operand, lane + operand, lane ^ operand
    sources = [
        first + operand % width,
        np.where(up >= first, up, lane),
        np.where(down <= last, down, lane),
        np.where(across <= last, across, lane),
    ]
    np.testing.assert_array_equal(out, values[np.array(sources)])


@pytest.mark.parametrize("seed", SEEDS)
def test_votes(good: dict[str, Emulated], seed: int) -> None:
    values = np.random.default_rng(seed).integers(3, size=32).astype(np.int32)
    values[:16] += seed % 2
    out = np.zeros((4, 32), np.uint32)
    good["votes"](ONE, WARP, [values, out], seed=seed)
    lane = np.arange(32)
    halves = [values[:16], values[16:]]
    assert set(out[0]) == {sum(1 << i for i in lane if values[i])}
    np.testing.assert_array_equal(out[1], np.repeat([h.all() for h in halves], 16))
    np.testing.assert_array_equal(out[2], np.repeat([h.any() for h in halves], 16))
    for i in lane:
        same = [j for j in lane if j // 16 == i // 16 and values[j] == values[i]]
        assert out[3, i] == sum(1 << j for j in same)


@pytest.mark.parametrize("ones", [0, 1, 70])
def test_block_votes(good: dict[str, Emulated], ones: int) -> None:
    values = np.zeros(70, np.int32)
    values[:ones] = 1
    out = np.zeros(70, np.int32)
    good["block_votes"](ONE, (70, 1, 1), [values, out])
    assert set(out) == {ones + 1000 * (ones == 70) + 10000 * (ones > 0)}


@pytest.mark.parametrize("seed", SEEDS)
def test_groups_with_their_own_masks_diverge(good: dict[str, Emulated], seed: int) -> None:
    out = np.zeros(32, np.int32)
    good["ragged"](ONE, WARP, [out], seed=seed)
    expected = [sum(lane ^ (r + 1) for r in range(lane // 8 + 1)) for lane in range(32)]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_and_barriers(good: dict[str, Emulated], seed: int) -> None:
    values = np.arange(5 * 256, dtype=np.float32)
    out = np.zeros(5, np.float32)
    good["sum_of_block<float, 256>"]((5, 1, 1), (256, 1, 1), [values, out], seed=seed)
    np.testing.assert_array_equal(out, values.reshape(5, 256).sum(1))
    longs = np.arange(20 * 64, dtype=np.int64) << 32
    out = np.zeros(20, np.int64)
    good["sum_of_block<long long, 64>"]((20, 1, 1), (64, 1, 1), [longs, out], seed=seed)
    np.testing.assert_array_equal(out, longs.reshape(20, 64).sum(1))


def test_every_block_finds_shared_memory_poisoned(good: dict[str, Emulated]) -> None:
    ints, floats, doubles = np.zeros(3, np.uint32), np.zeros(3, np.float32), np.zeros(3)
    for _ in range(2):
        good["poison<4>"]((3, 1, 1), ONE, [ints, floats, doubles])
        assert set(ints) == {0xFFFBFFFB}
        assert np.isnan(floats).all()
        assert np.isnan(doubles).all()


def test_shared_memory_of_a_device_function(good: dict[str, Emulated]) -> None:
    out = np.zeros(64, np.int32)
    good["shared_in_function"](ONE, (64, 1, 1), [out], seed=1)
    np.testing.assert_array_equal(out, 3 * np.arange(64)[::-1])


def test_atomics(good: dict[str, Emulated]) -> None:
    f, d = np.zeros(1, np.float32), np.zeros(1)
    i = np.array([0, -100, 100], np.int32)
    u = np.array([0, 0, 7, *[0] * 5, *[99] * 64], np.uint32)
    wide = np.zeros(1, np.uint64)
    orders = set()
    for seed in (1, 2):
        u[1] = 0
        good["atomics"](ONE, (64, 1, 1), [f, d, i, u, wide], seed=seed)
        assert sorted(u[8:]) == list(range(64))
        orders.add(tuple(u[8:]))
    assert len(orders) == 2
    assert (f[0], d[0], wide[0]) == (64, 32, 128 << 40)
    assert list(i) == [-128, 23, -40]
    assert u[0] == 0xFFFFFFFF
    assert u[2] != 7 or u[8] == 7


def test_add_rounding_down(good: dict[str, Emulated]) -> None:
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, 1.0, -1.0, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 1.17549435e-38]
    grid = np.array(np.meshgrid(special, special), np.float32).reshape(2, -1)
    bits = rng.integers(0, 1 << 32, (2, 2000), np.uint32).view(np.float32)
    scale = 2.0 ** rng.integers(-30, 30, (2, 2000))
    close = (rng.standard_normal((2, 2000)) * scale).astype(np.float32)
    a, b = np.concatenate([grid, bits[:, np.isfinite(bits).all(0)], close], axis=1)
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    out = np.zeros_like(a)
    blocks = -(-a.size // 128)
    good["add_down"]((blocks, 1, 1), (128, 1, 1), [a, b, out, np.int32(a.size)])
    largest = np.finfo(np.float32).max
    for x, y, down in zip(a, b, out, strict=True):
        exact = Fraction(float(x)) + Fraction(float(y))
        assert down == -np.inf or Fraction(float(down)) <= exact
        with np.errstate(over="ignore"):
            above = np.nextafter(down, np.float32(np.inf))
        assert down == largest or np.isinf(above) or Fraction(float(above)) > exact
        if exact == 0:
            assert np.signbit(down) == (np.signbit(x) or np.signbit(y))


def test_arithmetic(good: dict[str, Emulated]) -> None:
    f, i = np.zeros(5, np.float32), np.zeros(13, np.int32)
    good["arithmetic"](ONE, ONE, [f, i])
    assert list(f) == [1, 2, 3, 4, 2.0**-11 + 2.0**-24]
    int_max = 2**31 - 1
    assert list(i) == [8, 31, 4, 32, 0x3F800000, 2, -2, 2, int_max, 0, 4, 3, 16 + 1600 + 80000]


TABLE = np.dtype([("start", np.int64, 2), ("height", np.int32), ("scale", np.float32)], align=True)


@pytest.mark.parametrize("form", ["0-d", "1-element", "void"])
def test_kinds_of_arguments(good: dict[str, Emulated], form: str) -> None:
    table = np.zeros((1,) if form == "1-element" else (), TABLE)
    table["start"], table["height"], table["scale"] = (5, 6), 7, 0.5
    passed = table[()] if form == "void" else table
    array, out = np.array([1, 2], np.float32), np.zeros(9)
    scalars = [np.float32(1.5), np.float64(0.1), np.int16(-3), np.uint64(2**40)]
    good["kinds"](ONE, ONE, [passed, array, None, *scalars, out])
    assert list(out) == [6, 7, 0.5, 2, 1, 1.5, 0.1, -3, 2**40]


def test_arrays_of_vectors_bytes_and_halves(good: dict[str, Emulated]) -> None:
    out = np.zeros(3, np.float32)
    raw = np.array([1, 2, 3, 4], np.uint8)
    good["views"](ONE, ONE, [np.arange(8, dtype=np.float32), raw, np.ones(1, np.float16), out])
    assert list(out) == [6, 4, 0x3C00]


def test_wrong_arguments(good: dict[str, Emulated]) -> None:
    table, f = np.zeros((), TABLE), np.zeros(2, np.float32)
    scalars = [np.float32(1), np.float64(2), np.int16(3), np.uint64(4)]
    right = [table, f, None, *scalars, np.zeros(9)]

    def message(position: int, arg: object) -> str:
        with pytest.raises(EmulatorError) as caught:
            good["kinds"](ONE, ONE, [*right[:position], arg, *right[position + 1 :]])
        return str(caught.value)

    short = message(0, np.zeros((), [("start", np.int64, 2)]))
    assert "kinds: argument 0: the parameter is Table of 24 bytes, got a value" in short
    assert "16-byte items" in short
    assert "argument 1: the parameter is const float*, got an array" in message(1, np.zeros(2))
    assert "argument 1" in message(1, np.zeros(2, np.int32))
    assert "argument 1" in message(1, np.float32(1))
    assert "argument 3: the parameter is float of 4 bytes" in message(3, np.float64(1))
    assert "got an array" in message(3, f)
    assert "got None" in message(3, None)
    assert "argument 3" in message(3, np.int32(1))
    with pytest.raises(EmulatorError, match="takes 8 arguments, got 2"):
        good["kinds"](ONE, ONE, right[:2])
    with pytest.raises(TypeError, match="argument 3 must be a NumPy array"):
        good["kinds"](ONE, ONE, [*right[:3], 1.0, *right[4:]])
    with pytest.raises(ValueError, match="argument 0 must be contiguous"):
        good["where"](ONE, ONE, [np.zeros((4, 8), np.int32)[:, ::2]])


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [((0, 1, 1), ONE, "no such grid"), (ONE, (1025, 1, 1), "block"), (ONE, (16, 0, 1), "block")],
)
def test_launch_outside_the_limits(
    good: dict[str, Emulated],
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    message: str,
) -> None:
    with pytest.raises(EmulatorError, match=message):
        good["where"](grid, block, [np.zeros((1, 4), np.int32)])


def _registers(threads: int) -> list[float]:
    """Compute what the kernel of that name stores."""
    out = []
    for t in range(threads):
        v = [t, t + 1, t * 2, t ^ 5, -t, t * t, 7 - t]
        x, y, z = t * 0.5, t * 0.25, 1.0 / (t + 1)
        for _ in range(50):
            for i in range(7):
                other = v[(i + 1) % 7]
                v[i] = v[i] ^ other if i % 2 else v[i] + other
            x, y, z = x + y, y + z, z * 0.5
        bits = 0
        for value in v:
            bits ^= value
        out.append(float(bits) + x + y + z)
    return out


def test_registers_survive_switches(good: dict[str, Emulated]) -> None:
    out = np.zeros(64)
    good["registers"](ONE, (64, 1, 1), [out], seed=9)
    np.testing.assert_array_equal(out, _registers(64))


def test_fallback_without_assembly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -DMSDA_EMULATED_UCONTEXT")
    registers = Emulated(KERNELS, "registers")
    out = np.zeros(64)
    registers(ONE, (64, 1, 1), [out], seed=9)
    np.testing.assert_array_equal(out, _registers(64))
