// SPDX-License-Identifier: Apache-2.0
// Forward: out[n, q, m, :] = sum over l, p of weight * bilinear(value level l, location).
//
// Layout   value (N, S, M, D), locations (N, Lq, M, L, P, 2), weights (N, Lq, M, L, P), output (N, Lq, M, D), contiguous.
// Threads  G = D / VEC lanes own a row (n, q, m); VEC channels are 16 bytes of value, so every gather is one 128-bit
//          load. SPLIT groups share a row when there are too few rows to fill the device; shuffles join their sums.
// Grid     x: blocks of queries, y and z: (image, head).
// Limits   M, D, L, P are template arguments; D / VEC a power of two up to 32; L at most 16; fewer than 2^22 positions and
//          2^31 bytes per image. Everything else is generic.cu.
#include "records.cuh"

// Add one record's four corners to the lane's channels. INTERIOR: all four lie inside the level.
template <bool INTERIOR, int PIXEL, typename Value, int VEC>
__device__ __forceinline__ void add_corners(float (&sum)[VEC], const char* base, const float4& share,
                                            const int2& place) {
  const float shares[4] = {share.x, share.y, share.z, share.w};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    float pixel[VEC] = {};  // outside the level reads exact zero
    if (INTERIOR || (place.x >> corner & 1))
      load(pixel, reinterpret_cast<const Value*>(corner_pointer<INTERIOR, PIXEL, 1>(base, place, corner)));
#pragma unroll
    for (int c = 0; c < VEC; ++c) sum[c] += shares[corner] * pixel[c];
  }
}

// One stage: COUNT points of every group of the warp.
template <int COUNT, int PIXEL, int P, typename Value, int VEC, typename Location, typename Weight>
__device__ __forceinline__ void add_stage(float (&sum)[VEC], const char* base, Slots& slots, const Level* levels,
                                          int member, int first, const Location* locations, const Weight* weights) {
  unsigned corners = ALL_CORNERS;
  const int point = first + member;
  if (member < COUNT)
    corners = make_record<PIXEL>(slots, locations + 2 * point, weights + point, levels[point / P]).cell.corners;
  const bool interior = __all_sync(ALL_LANES, corners == ALL_CORNERS);
  __syncwarp();
  const int slot = threadIdx.x - member;
  // Two points at a time, and four blocks to a multiprocessor below: unrolled further, the loads spill registers.
  if (interior) {
#pragma unroll 2
    for (int j = 0; j < COUNT; ++j)
      add_corners<true, PIXEL, Value>(sum, base, slots.shares[slot + j], slots.places[slot + j]);
  } else {
#pragma unroll 2
    for (int j = 0; j < COUNT; ++j)
      add_corners<false, PIXEL, Value>(sum, base, slots.shares[slot + j], slots.places[slot + j]);
  }
  __syncwarp();
}

template <typename Value, typename Location, typename Weight, int M, int D, int L, int P, int SPLIT>
__global__ void __launch_bounds__(BLOCK, 4)
    msda_forward(const Value* __restrict__ value, const Location* __restrict__ locations,
                 const Weight* __restrict__ weights, Value* __restrict__ output, const long long* __restrict__ sizes,
                 const long long* __restrict__ starts, const __grid_constant__ Params<L> p) {
  constexpr int VEC = 16 / sizeof(Value), G = D / VEC, K = L * P, PART = K / SPLIT;
  constexpr int PIXEL = M * D * sizeof(Value), TAIL = PART % G;
  static_assert(D % VEC == 0 && G <= WARP && (G & (G - 1)) == 0, "D / VEC must be a power of two");
  static_assert(K % SPLIT == 0 && G * SPLIT <= WARP, "SPLIT parts must be equal and share a warp");

  __shared__ Level levels[L];
  __shared__ Slots slots;
  load_levels(levels, sizes, starts, p);

  Row<M, G, SPLIT> row(p, threadIdx.x);
  if (!__any_sync(ALL_LANES, row.active)) return;
  if (!row.active) row.image = row.query = 0;  // computes along with its warp, and stores nothing
  const long long index = row.index(p);
  locations += index * K * 2;
  weights += index * K;
  const char* base = reinterpret_cast<const char*>(value + row.template base<D>(p) + row.member * VEC);

  float sum[VEC] = {};
  const int begin = row.part * PART, end = begin + PART;
#pragma unroll 1
  for (int first = begin; first + G <= end; first += G)
    add_stage<G, PIXEL, P, Value>(sum, base, slots, levels, row.member, first, locations, weights);
  if constexpr (TAIL != 0)
    add_stage<TAIL, PIXEL, P, Value>(sum, base, slots, levels, row.member, end - TAIL, locations, weights);

#pragma unroll
  for (int offset = G; offset < G * SPLIT; offset *= 2)
#pragma unroll
    for (int c = 0; c < VEC; ++c) sum[c] += __shfl_xor_sync(ALL_LANES, sum[c], offset);
  const Row<M, G, SPLIT> done(p, reread_thread());
  if (done.active && done.part == 0) store(output + done.index(p) * D + done.member * VEC, sum);
}
