// SPDX-License-Identifier: Apache-2.0
// Forward: out[n, q, m, :] = sum over l, p of weight * bilinear(value level l, location).
//
// Layout   value (N, S, M, D), locations (N, Lq, M, L, P, 2), weights (N, Lq, M, L, P), output (N, Lq, M, D), contiguous.
// Threads  G = D / VEC lanes own a row (n, q, m); VEC channels are 16 bytes of value, so every gather is one 128-bit
//          load. SPLIT groups share a row when there are too few rows to fill the device; shuffles join their sums.
// Grid     x: blocks of queries, y and z: (image, head). msda_forward_persistent: persistent blocks, one to a multiprocessor.
// Limits   M, D, L, P are template arguments; D / VEC a power of two up to 32; L at most 16; fewer than 2^22 positions and
//          2^31 bytes per image. Everything else is generic.cu.
#include "tile_scheduler.cuh"
#include "records.cuh"

// In one struct, so that one address serves both.
template <int L, int THREADS>
struct Shared {
  Level levels[L];
  Slots<THREADS> slots;
};

// Records that are not interior are made for pixels of so many bytes, which leaves room for the corner bits.
constexpr int UNIT = 16;

// Where corner i of a record lies: one multiplication of a 32-bit number of pixels, to which the base is added, instead
// of two 64-bit additions.
template <bool INTERIOR, int PIXEL>
__device__ __forceinline__ const char* pixel_pointer(const char* base, const int2& place, int corner) {
  static_assert(PIXEL % UNIT == 0, "a pixel must be whole units");
  const char* left;
  if constexpr (INTERIOR) {
    left = base + static_cast<long long>(corner & 2 ? place.y : place.x) * PIXEL;
  } else {
    const int top = place.x & ~static_cast<int>(ALL_CORNERS);
    left = base + static_cast<long long>(corner & 2 ? top + place.y : top) * (PIXEL / UNIT);
  }
  return corner & 1 ? left + PIXEL : left;
}

// Add one record's four corners to the lane's channels. INTERIOR: all four lie inside the level.
template <bool INTERIOR, int PIXEL, typename Value, int VEC>
__device__ __forceinline__ void add_corners(float (&sum)[VEC], const char* base, const float4& share,
                                            const int2& place) {
  const float shares[4] = {share.x, share.y, share.z, share.w};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    float pixel[VEC] = {};  // outside the level reads exact zero
    if (INTERIOR || (place.x >> corner & 1))
      load(pixel, reinterpret_cast<const Value*>(pixel_pointer<INTERIOR, PIXEL>(base, place, corner)));
    add_product(sum, shares[corner], pixel);
  }
}

// The sums of COUNT records of every group of the warp, that of this thread from slot `first` on.
template <bool INTERIOR, int COUNT, int G, int PIXEL, typename Value, int VEC, int THREADS>
__device__ __forceinline__ void add_records(float (&sum)[VEC], const char* base, const Slots<THREADS>& slots,
                                            unsigned first) {
  __syncwarp();
  const float4* shares = slots.shares + first;
  const int2* places = slots.places + first;
  constexpr int UNROLL = INTERIOR ? 8 : 2;  // further, predicated loads spill registers
#pragma unroll UNROLL
  for (int j = 0; j < COUNT * (WARP / G); j += WARP / G)
    add_corners<INTERIOR, PIXEL, Value>(sum, base, shares[j], places[j]);
  __syncwarp();
}

// One stage: COUNT points of every group of the warp. The lane computes the record of `point`.
template <int COUNT, int G, int PIXEL, int P, typename Value, int VEC, int THREADS, typename Location, typename Weight>
__device__ __forceinline__ void add_stage(float (&sum)[VEC], const char* base, Slots<THREADS>& slots,
                                          const Level* levels, unsigned first, unsigned point,
                                          const Location* locations, const Weight* weights) {
  const Level level = levels[point / P];
  float loaded[2];
  load(loaded, locations + static_cast<size_t>(point) * 2);
  const float attention = load(weights + point);
  const Coordinates<float> at(loaded[0], loaded[1], level);
  const unsigned own = first + threadIdx.x % G * (WARP / G);
  if (__all_sync(ALL_LANES, is_interior(at, level))) {
    make_record<UNIT, true>(slots, own, at, attention, level);
    add_records<true, COUNT, G, PIXEL, Value>(sum, base, slots, first);
  } else {
    make_record<UNIT, false>(slots, own, at, attention, level);
    add_records<false, COUNT, G, PIXEL, Value>(sum, base, slots, first);
  }
}

// Points [begin, begin + PART) of every group's row, in stages of G; `locations` and `weights` are the row's. Pointers
// that stay what they are and one counter take fewer registers and instructions than pointers that move.
template <int PART, int G, int PIXEL, int P, typename Value, int VEC, int THREADS, typename Location, typename Weight>
__device__ __forceinline__ void add_points(float (&sum)[VEC], const char* base, Slots<THREADS>& slots,
                                           const Level* levels, unsigned first, unsigned begin,
                                           const Location* locations, const Weight* weights) {
  constexpr unsigned TAIL = PART % G;
  base = untraced(base);
  locations = untraced(locations);
  weights = untraced(weights);
  const unsigned member = threadIdx.x % G, end = begin + PART - TAIL;
  unsigned point = begin + member;
  if constexpr (PART >= G) {
#pragma unroll 1
    do {
      add_stage<G, G, PIXEL, P, Value>(sum, base, slots, levels, first, point, locations, weights);
      point = untraced(point + G);
    } while (PART >= 2 * G && point < end);
  }
  if constexpr (TAIL != 0) {
    // Lanes without a point repeat the last one, for a slot that nothing reads.
    point = end + min(member, TAIL - 1);
    add_stage<TAIL, G, PIXEL, P, Value>(sum, base, slots, levels, first, point, locations, weights);
  }
}

template <typename Value, typename Location, typename Weight, int M, int D, int L, int P, int SPLIT>
__global__ void __launch_bounds__(BLOCK, 4)
    msda_forward(const Value* __restrict__ value, const Location* __restrict__ locations,
                 const Weight* __restrict__ weights, Value* __restrict__ output, const long long* __restrict__ sizes,
                 const long long* __restrict__ starts, const __grid_constant__ Params<L> p) {
  constexpr int VEC = 16 / sizeof(Value), G = D / VEC, K = L * P, PART = K / SPLIT;
  constexpr int PIXEL = M * D * sizeof(Value);
  static_assert(D % VEC == 0 && G <= WARP && (G & (G - 1)) == 0, "D / VEC must be a power of two");
  static_assert(K % SPLIT == 0 && G * SPLIT <= WARP, "SPLIT parts must be equal and share a warp");

  __shared__ Shared<L, BLOCK> shared;
  load_levels(shared.levels, sizes, starts, p);

  Row<M, G, SPLIT> row(p, threadIdx.x);
  if (!__any_sync(ALL_LANES, row.active)) return;
  if (!row.active) row.image = row.query = 0;  // computes along with its warp, and stores nothing
  const size_t index = row.index(p);
  locations += index * K * 2;
  weights += index * K;
  const char* base = reinterpret_cast<const char*>(value + row.template base<D>(p) + row.member * VEC);

  float sum[VEC] = {};
  add_points<PART, G, PIXEL, P, Value>(sum, base, shared.slots, shared.levels, untraced(slot_of<G>(0)), row.part * PART,
                                       locations, weights);

#pragma unroll
  for (int offset = G; offset < G * SPLIT; offset *= 2)
#pragma unroll
    for (int c = 0; c < VEC; ++c) sum[c] += __shfl_xor_sync(ALL_LANES, sum[c], offset);
  const Row<M, G, SPLIT> done(p, reread_thread());
  if (done.active && done.part == 0) store(output + done.index(p) * D + done.member * VEC, sum);
}

// The same on persistent blocks, one to a multiprocessor, each with a contiguous range of the order of tile_scheduler.cuh.
template <typename Value, typename Location, typename Weight, int M, int D, int L, int P>
__global__ void __launch_bounds__(PERSISTENT_BLOCK, 1)
    msda_forward_persistent(const Value* __restrict__ value, const Location* __restrict__ locations,
                            const Weight* __restrict__ weights, Value* __restrict__ output,
                            const long long* __restrict__ sizes, const long long* __restrict__ starts,
                            const __grid_constant__ OrderedParams<L> p) {
  constexpr int VEC = 16 / sizeof(Value), G = D / VEC, K = L * P, PIXEL = M * D * sizeof(Value);

  __shared__ Shared<L, PERSISTENT_BLOCK> shared;
  __shared__ Order order;
  load_levels(shared.levels, sizes, starts, p);
  load_order(order, shared.levels, p);

  const unsigned member = threadIdx.x % G;
  visit_in_order<G>(order, p, [&](unsigned row, unsigned plane, bool counts) {
    const char* base = reinterpret_cast<const char*>(value + static_cast<size_t>(plane) * D + member * VEC);
    float sum[VEC] = {};
    const size_t point = static_cast<size_t>(row) * K;
    add_points<K, G, PIXEL, P, Value>(sum, base, shared.slots, shared.levels, slot_of<G>(0), 0, locations + 2 * point,
                                      weights + point);
    if (counts) store(output + static_cast<size_t>(row) * D + member * VEC, sum);
  });
}
