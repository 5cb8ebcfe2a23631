// SPDX-License-Identifier: Apache-2.0
// Fused: the gradient of the reference points, from that of the locations of all points that start from each.
//
// Layout   by_location (N, Lq, M, K, 2) float32, as backward.cu writes it, and offsets of the same shape, which only boxes
//          read; grad_references like references, written whole.
// Threads  A warp takes a query, of one image or, where all share its reference points, of all. Its lanes share the points
//          of a (query, level), each adding up its own in float32, and shuffles add their sums: always in the same order.
// Grid     x: blocks of queries.
#include "point.cuh"

template <typename Location, int M, typename S>
__global__ void __launch_bounds__(BLOCK)
    msda_reference_gradient(const float* __restrict__ by_location, const Location* __restrict__ offsets,
                            typename S::Reference* __restrict__ grad_references,
                            const __grid_constant__ ParamsOf<Params<S::L>, S> p) {
  constexpr unsigned POINTS = M * S::K;  // of a query
  const unsigned query = blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const unsigned rows = p.reference_rows, all = static_cast<unsigned>(p.batch) * p.num_queries;
  if (query >= rows) return;
#pragma unroll 1
  for (int own = 0; own < (S::BY_LEVEL ? S::L : 1); ++own) {
    float sum[S::COORDINATES] = {};
#pragma unroll 1
    for (unsigned row = query; row < all; row += rows) {
      const size_t first = static_cast<size_t>(row) * POINTS;
#pragma unroll 1
      for (unsigned i = lane; i < POINTS; i += WARP) {
        const int level = S::level_of(i % S::K);
        if (S::BY_LEVEL && level != own) continue;
        float gradient[2];
        load(gradient, by_location + 2 * (first + i));
        sum[0] += gradient[0];
        sum[1] += gradient[1];
        if constexpr (S::BOXES) {
          float offset[2];
          load(offset, offsets + 2 * (first + i));
          const float scale = p.offset_scale * S::inverse_points(level);
          sum[2] += gradient[0] * (offset[0] * scale);
          sum[3] += gradient[1] * (offset[1] * scale);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < S::COORDINATES; ++c) {
#pragma unroll
      for (int offset = 1; offset < WARP; offset *= 2) sum[c] += __shfl_xor_sync(ALL_LANES, sum[c], offset);
    }
    if (lane == 0) store(grad_references + static_cast<size_t>(query) * S::QUERY + own * S::COORDINATES, sum);
  }
}
