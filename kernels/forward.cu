// SPDX-License-Identifier: Apache-2.0
// Forward: out[n, q, m, :] = sum over l, p of weight * sample(value level l, location).
//
// Layout   value (N, S, M, D), locations (N, Lq, M, K, 2), weights (N, Lq, M, K), mask (N, S), output (N, Lq, M, D),
//          contiguous. The K points of a row come level after level. Fused: offsets and logits in the places of locations
//          and weights, and references, as in fused.cuh.
// Threads  G = D / VEC lanes own a row (n, q, m); VEC channels are 16 bytes of value, so every gather is one 128-bit
//          load. Split-K: SPLIT_K groups share a row when there are too few rows to fill the device; shuffles add their
//          partial sums.
// Grid     msda_forward: x: blocks of queries, y and z: (image, head); blocks of up to BLOCK threads.
//          msda_forward_query_tiles: the same, but x covers the tile scheduler's order; each block has one small tile.
//          msda_forward_persistent: a few blocks per multiprocessor, each with a contiguous range of the tile scheduler's
//          rows.
// Limits   M, D and the points of each level are template arguments; D / VEC a power of two up to 32; at most MAX_SPECIALISED_LEVELS levels; fewer
//          than 2^22 positions and 2^31 bytes per image. generic.cu takes everything else.
#include "tile_scheduler.cuh"
#include "descriptors.cuh"

// In one struct, so that one address serves both.
template <int L, int THREADS>
struct Shared {
  Level levels[L];
  Descriptors<THREADS> descriptors;
};

// Descriptors that are not interior count in units of so many bytes, which leaves room for the corner bits.
constexpr int UNIT = 16;

// Address of corner i of a descriptor: the base plus a product of a 32-bit number of pixels, which is one instruction
// instead of two 64-bit additions.
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

// Add the corners of one descriptor to the lane's channels. INTERIOR: all four count.
template <bool INTERIOR, int CORNERS, int PIXEL, typename Value, int VEC>
__device__ __forceinline__ void add_corners(float (&sum)[VEC], const char* base, const float4& coefficient,
                                            const int2& place) {
  const float coefficients[4] = {coefficient.x, coefficient.y, coefficient.z, coefficient.w};
#pragma unroll
  for (int corner = 0; corner < CORNERS; ++corner) {
    float pixel[VEC] = {};  // a corner that does not count reads exact zero
    if (INTERIOR || has_corner(place.x, corner))
      load(pixel, reinterpret_cast<const Value*>(pixel_pointer<INTERIOR, PIXEL>(base, place, corner)));
    add_product(sum, coefficients[corner], pixel);
  }
}

// Add COUNT descriptors of every group of the warp. The first of this thread's group lies at `first`.
template <bool INTERIOR, int CORNERS, int COUNT, int G, int PIXEL, typename Value, int VEC, int THREADS>
__device__ __forceinline__ void add_descriptors(float (&sum)[VEC], const char* base,
                                                const Descriptors<THREADS>& descriptors, unsigned first) {
  __syncwarp();
  const float4* coefficients = descriptors.coefficients + first;
  const int2* places = descriptors.places + first;
  constexpr int UNROLL = INTERIOR ? 8 : 2;  // unrolled further, predicated loads spill registers
#pragma unroll UNROLL
  for (int j = 0; j < COUNT; ++j)
    add_corners<INTERIOR, CORNERS, PIXEL, Value>(sum, base, coefficients[padded(j)], places[padded(j)]);
  __syncwarp();
}

// One stage: COUNT points of every group of the warp. The lane makes the descriptor of point k of its row.
template <int COUNT, int G, int PIXEL, typename Value, int VEC, int THREADS, typename S, typename Location,
          typename Weight>
__device__ __forceinline__ void add_stage(float (&sum)[VEC], const char* base, Descriptors<THREADS>& descriptors,
                                          const Level* levels, unsigned first, unsigned k,
                                          const PointArrays<S, Location, Weight>& points) {
  constexpr bool MAY_MISS = S::NEAREST || S::MASKED;  // a corner anywhere
  const Point<float> point = points.load(static_cast<size_t>(k), levels[S::level_of(k)], S::level_of(k));
  const unsigned own = first + padded(threadIdx.x % G);
  LocatedPoint<float> located;
  bool interior;
  if constexpr (MAY_MISS) {
    located = points.template locate_point<true>(point);
    interior = located.cell.corners == ALL_CORNERS;
  } else {
    interior = is_interior(point.at, point.level);
  }
  if (__all_sync(ALL_LANES, interior)) {
    if constexpr (!MAY_MISS) located = points.template locate_point<true, true>(point);
    write_descriptor<UNIT, true>(descriptors, own, located);
    add_descriptors<true, S::CORNERS, COUNT, G, PIXEL, Value>(sum, base, descriptors, first);
  } else {
    if constexpr (!MAY_MISS) located = points.template locate_point<true>(point);
    write_descriptor<UNIT, false>(descriptors, own, located);
    add_descriptors<false, S::CORNERS, COUNT, G, PIXEL, Value>(sum, base, descriptors, first);
  }
}

// Points [begin, begin + PART) of every group's row, in stages of G; `points` are the row's. A fixed base and one index
// take fewer registers and instructions than moving pointers.
template <int PART, int G, int PIXEL, typename Value, int VEC, int THREADS, typename S, typename Location,
          typename Weight>
__device__ __forceinline__ void add_points(float (&sum)[VEC], const char* base, Descriptors<THREADS>& descriptors,
                                           const Level* levels, unsigned first, unsigned begin,
                                           PointArrays<S, Location, Weight> points) {
  constexpr unsigned TAIL = PART % G;
  base = opaque(base);
  if constexpr (!S::FUSED) {
    points.locations = opaque(points.locations);
    points.weights = opaque(points.weights);
  }
  const unsigned member = threadIdx.x % G, end = begin + PART - TAIL;
  unsigned k = begin + member;
  if constexpr (PART >= G) {
#pragma unroll 1
    do {
      add_stage<G, G, PIXEL, Value>(sum, base, descriptors, levels, first, k, points);
      k = opaque(k + G);
    } while (PART >= 2 * G && k < end);
  }
  if constexpr (TAIL != 0) {
    // Lanes without a point repeat the last one, in a descriptor that nothing reads.
    k = end + min(member, TAIL - 1);
    add_stage<TAIL, G, PIXEL, Value>(sum, base, descriptors, levels, first, k, points);
  }
}

template <typename Value, typename Location, typename Weight, int M, int D, typename S, int SPLIT_K>
__global__ void __launch_bounds__(BLOCK, 4)
    msda_forward(const Value* __restrict__ value, const Location* __restrict__ locations,
                 const Weight* __restrict__ weights, const unsigned char* __restrict__ mask,
                 const typename S::Reference* __restrict__ references, Value* __restrict__ output,
                 const long long* __restrict__ sizes, const long long* __restrict__ starts,
                 const __grid_constant__ ParamsOf<Params<S::L>, S> p) {
  constexpr int VEC = 16 / sizeof(Value), G = D / VEC, L = S::L, PART = S::K / SPLIT_K;
  constexpr int PIXEL = M * D * sizeof(Value);
  static_assert(D % VEC == 0 && G <= WARP && (G & (G - 1)) == 0, "D / VEC must be a power of two");
  static_assert(S::K % SPLIT_K == 0 && G * SPLIT_K <= WARP, "the parts must be equal and share a warp");
  static_assert(L <= MAX_SPECIALISED_LEVELS, "generic.cu takes more levels");

  __shared__ Shared<L, BLOCK> shared;
  load_levels(shared.levels, sizes, starts, p);

  GroupRow<M, G, SPLIT_K> row(p, threadIdx.x);
  if (!__any_sync(ALL_LANES, row.active)) return;
  if (!row.active) row.image = row.query = 0;  // computes along with its warp, and stores nothing
  const PointArrays<S, Location, Weight> points = {locations, weights, mask};
  const char* base = reinterpret_cast<const char*>(value + row.template base<D>(p) + row.member * VEC);

  float sum[VEC] = {};
  add_points<PART, G, PIXEL, Value>(
      sum, base, shared.descriptors, shared.levels, opaque(first_descriptor<G>()), row.part * PART,
      points.of_image(row.image_start(p)).template of_row<M, G * SPLIT_K>(row.index(p), references, p));

#pragma unroll
  for (int offset = G; offset < G * SPLIT_K; offset *= 2)
#pragma unroll
    for (int c = 0; c < VEC; ++c) sum[c] += __shfl_xor_sync(ALL_LANES, sum[c], offset);
  const GroupRow<M, G, SPLIT_K> done(p, reread_thread());
  if (done.active && done.part == 0) store(output + done.index(p) * D + done.member * VEC, sum);
}

// The whole row at `row` among N * Lq * M, whose (image, head) begins at position `plane` of value. `counts`: it is stored.
template <int M, int D, typename Value, typename S, typename Location, typename Weight, int THREADS, typename Params>
__device__ __forceinline__ void forward_row(const Value* value, const PointArrays<S, Location, Weight>& points,
                                            const typename S::Reference* references, Value* output,
                                            Shared<S::L, THREADS>& shared, unsigned row, unsigned plane, bool counts,
                                            const Params& p) {
  constexpr int VEC = 16 / sizeof(Value), G = D / VEC, PIXEL = M * D * sizeof(Value);
  const unsigned member = threadIdx.x % G;
  const char* base = reinterpret_cast<const char*>(value + static_cast<size_t>(plane) * D + member * VEC);
  float sum[VEC] = {};
  add_points<S::K, G, PIXEL, Value>(
      sum, base, shared.descriptors, shared.levels, first_descriptor<G>(), 0,
      points.of_image(plane / M).template of_row<M, G>(static_cast<size_t>(row), references, p));
  if (counts) store(output + static_cast<size_t>(row) * D + member * VEC, sum);
}

// A tile of 8 columns for each block, which holds as many queries as the block has groups.
template <typename Value, typename Location, typename Weight, int M, int D, typename S>
__global__ void __launch_bounds__(BLOCK, 4)
    msda_forward_query_tiles(const Value* __restrict__ value, const Location* __restrict__ locations,
                             const Weight* __restrict__ weights, const unsigned char* __restrict__ mask,
                             const typename S::Reference* __restrict__ references, Value* __restrict__ output,
                             const long long* __restrict__ sizes, const long long* __restrict__ starts,
                             const __grid_constant__ ParamsOf<SchedulerParams<S::L>, S> p) {
  constexpr unsigned QUERIES = BLOCK * 16 / (D * sizeof(Value)), WIDTH = 8;

  __shared__ Shared<S::L, BLOCK> shared;
  __shared__ TileScheduler scheduler;
  const unsigned image_head = blockIdx.y + blockIdx.z * gridDim.y, queries = p.num_queries;
  if (image_head >= static_cast<unsigned>(p.batch * M)) return;
  load_levels(shared.levels, sizes, starts, p);
  load_scheduler(scheduler, shared.levels, p);

  // Idle groups repeat the last row, since the lanes of a warp must stay together.
  const unsigned index = blockIdx.x * QUERIES + threadIdx.x / (BLOCK / QUERIES);
  const ScheduledRow<QUERIES / WIDTH, WIDTH> place(image_head * queries + min(index, queries - 1), scheduler, p);
  const PointArrays<S, Location, Weight> points = {locations, weights, mask};
  forward_row<M, D>(value, points, references, output, shared, place.row, place.plane, index < queries, p);
}

template <typename Value, typename Location, typename Weight, int M, int D, typename S>
__global__ void __launch_bounds__(PERSISTENT_BLOCK, 1)
    msda_forward_persistent(const Value* __restrict__ value, const Location* __restrict__ locations,
                            const Weight* __restrict__ weights, const unsigned char* __restrict__ mask,
                            const typename S::Reference* __restrict__ references, Value* __restrict__ output,
                            const long long* __restrict__ sizes, const long long* __restrict__ starts,
                            const __grid_constant__ ParamsOf<SchedulerParams<S::L>, S> p) {
  __shared__ Shared<S::L, PERSISTENT_BLOCK> shared;
  __shared__ TileScheduler scheduler;
  load_levels(shared.levels, sizes, starts, p);
  load_scheduler(scheduler, shared.levels, p);

  const PointArrays<S, Location, Weight> points = {locations, weights, mask};
  visit_rows<D * sizeof(Value) / 16>(scheduler, p, [&](unsigned row, unsigned plane, bool counts) {
    forward_row<M, D>(value, points, references, output, shared, row, plane, counts, p);
  });
}
