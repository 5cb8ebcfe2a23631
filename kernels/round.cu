// SPDX-License-Identifier: Apache-2.0
// Round the float32 accumulator of a 16-bit gradient of value into the gradient itself, to nearest even.
//
// The backward accumulates in float32 whatever the dtype of value is. This kernel takes the place of a cast by the
// caller's library, so that a plan holds the whole call.
//
// Layout   accumulator and grad_value: N * S * M * D elements, contiguous, 16-byte aligned.
// Threads  Each thread rounds four neighbouring elements per step: one 128-bit load, one 64-bit store. The first threads
//          of the grid round the up to three elements left over.
// Grid     x only, grid-stride. All counts are 64-bit.
#include "levels.cuh"
#include "scalar.cuh"

template <typename Value>
__global__ void __launch_bounds__(BLOCK)
    msda_round(const float* __restrict__ accumulator, Value* __restrict__ grad_value, const __grid_constant__ Shape p) {
  static_assert(sizeof(Value) == 2, "wider gradients are accumulated in place");
  constexpr int VEC = 4;
  const long long count = value_elements(p), tail = count % VEC;
  const long long thread = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x;
  const long long step = static_cast<long long>(gridDim.x) * BLOCK;
#pragma unroll 4
  for (long long i = thread * VEC; i < count - tail; i += step * VEC) {
    float wide[VEC];
    load(wide, accumulator + i);
    store(grad_value + i, wide);
  }
  if (thread < tail) grad_value[count - tail + thread] = narrow_to<Value>(accumulator[count - tail + thread]);
}
