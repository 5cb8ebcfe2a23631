# SPDX-License-Identifier: Apache-2.0
"""Sanitized launches find faults of memory and arithmetic; compilation, its errors and its cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from .emulator import Emulated, EmulatorError, build
from .test_emulator import ONE, WARP

if TYPE_CHECKING:
    from pathlib import Path


SANITIZED = r"""
#line 1 "kernels/sanitized.cu"
__global__ void write(float* a, int n, int* order) {
  a[int(threadIdx.x) + n] = threadIdx.x;
  atomicAdd(order, 1);
}
__global__ void read(const float* a, float* out, int n) {
  out[threadIdx.x] = a[int(threadIdx.x) + n] + 1;
}
template <int N>
__global__ void overflow_shared(float* out, int n) {
  __shared__ float slot[N];
  float* p = slot;
  p[int(threadIdx.x) + n] = 1;
  __syncthreads();
  out[threadIdx.x] = slot[threadIdx.x];
}
__global__ void vector(const float* a, float4* out, int n) {
  *out = *reinterpret_cast<const float4*>(a + n);
}
__global__ void vector_ldg(const float* a, float4* out, int n) {
  *out = __ldg(reinterpret_cast<const float4*>(a + n));
}
__global__ void vector_shared(float4* out) {
  __shared__ float slot[4];
  slot[0] = slot[1] = slot[2] = slot[3] = 1;
  *out = *reinterpret_cast<const float4*>(slot);
}
__global__ void vector_shared_aligned(float4* out) {
  __shared__ __align__(16) float slot[4];
  slot[0] = slot[1] = slot[2] = slot[3] = 1;
  *out = *reinterpret_cast<const float4*>(slot);
}
__global__ void out_of_bounds_index(float* out, int n) {
  float local[4] = {1, 2, 3, 4};
  out[0] = local[n];
}
__global__ void convert(const float* a, int* out) { *out = int(*a); }
struct Scale { float by; int n; };
__global__ void scale(Scale s, const float* none, const float* a, float* b, float* c) {
  if (!none && int(threadIdx.x) < s.n) b[threadIdx.x] = c[threadIdx.x] = a[threadIdx.x] * s.by;
}
__global__ void diverge() { if (threadIdx.x) __syncthreads(); }
"""


CHECKED = [
    *("write", "read", "overflow_shared<32>", "vector", "vector_ldg", "vector_shared"),
    *("vector_shared_aligned", "out_of_bounds_index", "convert", "scale", "diverge"),
]


@pytest.fixture(scope="module")
def checked() -> dict[str, Emulated]:
    """The kernels above under the sanitizers."""
    return build(SANITIZED, CHECKED, sanitize=True)


def test_sanitized_launch_computes_the_same(checked: dict[str, Emulated]) -> None:
    a, b = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    a.flags.writeable = False
    scale = np.array((0.5, 8), [("by", np.float32), ("n", np.int32)])
    empty = np.zeros(0, np.float32)
    checked["scale"](ONE, WARP, [scale, None, a, b, b], seed=2)
    np.testing.assert_array_equal(b, a / 2)
    scale["n"] = 0
    checked["scale"](ONE, WARP, [scale, None, empty, empty, empty.copy()])
    with pytest.raises(ValueError, match="overlap in part"):
        checked["scale"](ONE, WARP, [scale, None, a, b, b[:4]])
    with pytest.raises(EmulatorError, match="barrier divergence"):
        checked["diverge"](ONE, WARP, [])
    quad = np.zeros(4, np.float32)
    checked["vector_shared_aligned"](ONE, ONE, [quad])
    np.testing.assert_array_equal(quad, 1)


F32, I32 = np.float32, np.int32


@pytest.mark.parametrize(
    ("kernel", "threads", "args", "report", "line"),
    [
        ("write", 32, [np.zeros(32, F32), I32(1), np.zeros(1, I32)], "WRITE of size 4", 2),
        ("write", 32, [np.zeros(32, F32), I32(-1), np.zeros(1, I32)], "WRITE of size 4", 2),
        ("read", 32, [np.zeros(32, F32), np.zeros(32, F32), I32(1)], "READ of size 4", 6),
        ("read", 32, [np.zeros(32, F32), np.zeros(32, F32), I32(-1)], "READ of size 4", 6),
        ("read", 32, [np.zeros(32, F32), np.zeros(31, F32), I32(0)], "WRITE of size 4", 6),
        ("overflow_shared<32>", 32, [np.zeros(32, F32), I32(1)], "WRITE of size 4", 12),
        ("overflow_shared<32>", 32, [np.zeros(32, F32), I32(-1)], "WRITE of size 4", 12),
        ("vector", 1, [np.zeros(8, F32), np.zeros(4, F32), I32(1)], "misaligned address", 17),
        ("vector_ldg", 1, [np.zeros(8, F32), np.zeros(4, F32), I32(1)], "misaligned address", 20),
        ("vector_shared", 1, [np.zeros(4, F32)], "misaligned address", 25),
        ("out_of_bounds_index", 1, [np.zeros(1, F32), I32(4)], "index 4 out of bounds", 34),
        ("convert", 1, [np.full(1, 1e20, F32), np.zeros(1, I32)], "outside the range", 36),
    ],
)
def test_sanitizers_name_the_line(
    checked: dict[str, Emulated],
    kernel: str,
    threads: int,
    args: list[object],
    report: str,
    line: int,
) -> None:
    with pytest.raises(EmulatorError) as caught:
        checked[kernel](ONE, (threads, 1, 1), args, seed=3)
    text = str(caught.value)
    assert report in text, text
    assert f"kernels/sanitized.cu:{line}" in text, text


def test_compile_errors_name_the_source(tmp_path: Path) -> None:
    source = (
        '\n#line 7 "kernels/x.cuh"\n__global__ void f(int* a) {\n__shared__\nint b[2];\n c(b);}'
    )
    with pytest.raises(EmulatorError, match=r"f does not compile:(.|\n)*kernels/x\.cuh:10:"):
        Emulated(source, "f", build_dir=tmp_path)
    with pytest.raises(EmulatorError, match="__activemask"):
        Emulated("__global__ void f(unsigned* a) { *a = __activemask(); }", "f")


@pytest.mark.parametrize(
    "declaration",
    ["extern __shared__ float a[]", "__shared__ float a[2], b[2]", "__shared__ float a = 1"],
)
def test_shared_declarations_it_does_not_know(declaration: str) -> None:
    with pytest.raises(EmulatorError, match="must declare one variable"):
        Emulated("__global__ void f() { " + declaration + "; }", "f")


def test_compiles_once(tmp_path: Path) -> None:
    source = "__global__ void f(int* a) { int unused; *a = 1; }"
    first = Emulated(source, "f", build_dir=tmp_path)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(made) == 2
    assert "unused" in first.warnings
    second = Emulated(source, "f", build_dir=tmp_path)
    assert second.warnings == first.warnings
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == made
    out = np.zeros(1, np.int32)
    second(ONE, ONE, [out])
    assert out[0] == 1
