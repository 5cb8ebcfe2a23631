// SPDX-License-Identifier: Apache-2.0
// The gradient of value for encoders: a counting sort of the points by cell, then a segmented reduction in registers, so
// that far fewer additions go to memory than there are corners.
//
// Layout   as in backward.cu: grad_value is a zeroed float32 accumulator, to which other blocks add as well. FIXED: it is
//          the fixed-point accumulator of fixed_point.cuh. backward.cu computes the other two gradients.
// Threads  A block takes BINNED_QUERIES queries, consecutive in the order of the tile scheduler, of one image and head. It
//          bins their points by level, row modulo 32 and column modulo 32, and lists them bin by bin; their rows of
//          grad_output wait in shared memory where there is room. Then every group of G = D / 4 lanes walks through a
//          segment of the list, a lane on four channels: the sums of the four corners stay in
//          registers while consecutive points lie in the same cell. If the next cell is the neighbour to the right, the
//          sums of the right column become those of its left column. FIXED: the points of a bin are listed in the order
//          of their rows, so that every sum is bitwise identical in every run; a lane's channels lie G apart.
// Grid     x: batches of queries, y and z: (image, head).
// Limits   as backward.cu; at most MAX_BINNED_LEVELS levels and MAX_BINNED_POINTS points a row, fewer than 2^31 rows.
#include "tile_scheduler.cuh"
#include "descriptors.cuh"

constexpr int VEC = 4, CORNERS = 4;
constexpr int SIDE = 32, BINS = SIDE * SIDE;  // of a level
constexpr unsigned NONE = 0xffffffffu, NO_BIN = 0xffffu;
constexpr int SHARED_BYTES = 48 * 1024;  // that a kernel may declare

// Counters of the bins, two to a word; after the prefix sum, where each bin begins in the list.
template <int L>
struct Bins {
  static constexpr int WORDS = L * BINS / 2;
  unsigned words[WORDS];
  // The compiler loads four at a time: unaligned, such a load would include a counter that another thread writes.
  alignas(16) unsigned warp_sums[BLOCK / WARP];

  __device__ void clear() {
    for (int i = threadIdx.x; i < WORDS; i += BLOCK) words[i] = 0;
  }

  // Count points of a bin. Returns its count before.
  __device__ unsigned add(unsigned bin, unsigned points = 1) {
    return get(atomicAdd(&words[bin / 2], points << bin % 2 * 16), bin);
  }

  __device__ unsigned begin(unsigned bin) const { return get(words[bin / 2], bin); }

  static __device__ unsigned get(unsigned word, unsigned bin) { return word >> bin % 2 * 16 & 0xffffu; }

  // Exclusive prefix sum over the counters. Returns the total. Every thread takes consecutive words.
  __device__ unsigned exclusive_prefix_sum() {
    constexpr int OWN = WORDS / BLOCK;
    static_assert(WORDS % BLOCK == 0, "every thread takes as many words");
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = threadIdx.x * OWN;
    unsigned sum = 0;
    for (int i = first; i < first + OWN; ++i) sum += get(words[i], 0) + get(words[i], 1);
    unsigned up_to = sum;  // of the warp, this thread included
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
      const unsigned before = __shfl_up_sync(ALL_LANES, up_to, offset);
      if (lane >= offset) up_to += before;
    }
    if (lane == WARP - 1) warp_sums[warp] = up_to;
    __syncthreads();
    unsigned begin = up_to - sum, all = 0;
    for (int i = 0; i < BLOCK / WARP; ++i) {
      if (i < warp) begin += warp_sums[i];
      all += warp_sums[i];
    }
#pragma unroll 1  // unrolled, it takes the kernel above 64 registers
    for (int i = first; i < first + OWN; ++i) {
      const unsigned word = words[i], second = begin + get(word, 0);
      words[i] = begin | second << 16;
      begin = second + get(word, 1);
    }
    __syncthreads();
    return all;
  }
};

// Fused: what the points of each row of the batch have in common. Plain: nothing.
template <typename S, bool = S::FUSED>
struct SharedRows {};
template <typename S>
struct SharedRows<S, true> {
  const typename S::Reference* references[BINNED_QUERIES];  // of the rows' queries
  Softmax softmax[BINNED_QUERIES];
};

// What a block shares. "Row" is one of the batch, from 0 to BINNED_QUERIES.
template <typename S>
struct Shared : SharedRows<S> {
  static constexpr int L = S::L, K = S::K;
  Level levels[L];
  TileScheduler scheduler;
  unsigned rows[BINNED_QUERIES];  // which of the N * Lq * M each row is; NONE beyond the last
  Bins<L> bins;
  // Points of the batch as row * K + point of the row, bin by bin. Before that, FIXED: each point's bin, then its number
  // within the bin.
  unsigned short list[BINNED_QUERIES * K];
  Descriptors<BLOCK> descriptors;
  unsigned descriptor_rows[Descriptors<BLOCK>::SIZE];  // the row of each descriptor
};

// The rows of grad_output, copied to shared memory if BYTES is enough for them.
template <typename Value, int D, int BYTES>
struct Gradients {
  static constexpr int PIECES = D * sizeof(Value) / 16;  // of a row
  static constexpr bool STAGED = BINNED_QUERIES * PIECES * 16 <= BYTES;
  uint4 staged[STAGED ? BINNED_QUERIES * PIECES : 1];

  __device__ void load(const Value* grad_output, const unsigned* rows) {
    if constexpr (STAGED) {
      const uint4* from = reinterpret_cast<const uint4*>(grad_output);
      for (int i = threadIdx.x; i < BINNED_QUERIES * PIECES; i += BLOCK) {
        const unsigned row = rows[i / PIECES];
        if (row != NONE) staged[i] = __ldg(from + static_cast<size_t>(row) * PIECES + i % PIECES);
      }
    }
  }
};

// Start a batch: its rows, and empty bins.
template <typename S>
__device__ __forceinline__ void load_batch(Shared<S>& shared, unsigned image_head, const Shape& p) {
  const unsigned index = blockIdx.x * BINNED_QUERIES + threadIdx.x, queries = p.num_queries;
  if (threadIdx.x < BINNED_QUERIES)
    shared.rows[threadIdx.x] =
        index < queries ? ScheduledRow<>(image_head * queries + index, shared.scheduler, p).row : NONE;
  shared.bins.clear();
  __syncthreads();
}

// Fused: what the points of each row have in common, found by groups of G lanes.
template <int M, int G, typename S, typename Location, typename Weight, typename Params>
__device__ __forceinline__ void load_rows(Shared<S>& shared, const PointArrays<S, Location, Weight>& points,
                                          const typename S::Reference* references, const Params& p) {
  if constexpr (S::FUSED) {
    const unsigned member = threadIdx.x % G;
#pragma unroll 1
    for (int row = threadIdx.x / G; row < BINNED_QUERIES; row += BLOCK / G) {  // as often in every group
      const unsigned index = shared.rows[row] == NONE ? shared.rows[0] : shared.rows[row];
      const auto of_row = points.template of_row<M, G>(static_cast<size_t>(index), references, p);
      if (member == 0) {
        shared.references[row] = of_row.row.references;
        shared.softmax[row] = of_row.row.softmax;
      }
    }
    __syncthreads();
  }
}

// The points as those of a row of the batch.
template <typename S, typename Location, typename Weight>
__device__ __forceinline__ PointArrays<S, Location, Weight> of_batch_row(PointArrays<S, Location, Weight> points,
                                                                         const Shared<S>& shared, unsigned row) {
  if constexpr (S::FUSED) points.row = {shared.references[row], 0, points.row.offset_scale, shared.softmax[row]};
  return points;
}

// Number the points of every bin in the order of their rows. One warp takes a level, whose bins are its own.
template <typename S>
__device__ void number_by_rows(Shared<S>& shared) {
  static_assert(S::L <= BLOCK / WARP, "every level needs a warp");
  const unsigned level = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (level >= S::L) return;
  const LevelSpan<S> span(level);
  // Whole turns of the warp: the lanes match together.
  static_assert(BINNED_QUERIES % WARP == 0, "every level has whole turns");
#pragma unroll 1
  for (unsigned point = lane; point < BINNED_QUERIES * span.points; point += WARP) {
    const unsigned row = span.row(point), id = row * S::K + span.first + point - row * span.points;
    const unsigned bin = shared.list[id];
    const unsigned same = __match_any_sync(ALL_LANES, bin), before = __popc(same & ((1u << lane) - 1));
    if (bin != NO_BIN) shared.list[id] = static_cast<unsigned short>(shared.bins.begin(bin) + before);
    __syncwarp();
    if (bin != NO_BIN && before == 0) shared.bins.add(bin, __popc(same));
    __syncwarp();
  }
}

// The counting sort: list the points of the batch bin by bin; STABLE: within a bin in the order of their rows. Returns how
// many there are.
template <bool STABLE, typename S, typename Location, typename Weight>
__device__ unsigned sort_points(Shared<S>& shared, const PointArrays<S, Location, Weight>& points) {
  constexpr int K = S::K, OWN = (BINNED_QUERIES * K + BLOCK - 1) / BLOCK;
  unsigned ranks[OWN];  // bin << 16 | number within the bin, of every point that this thread takes
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const unsigned id = i * BLOCK + threadIdx.x, k = id % K, l = S::level_of(k);
    ranks[i] = NONE;
    if (BINNED_QUERIES * K % BLOCK != 0 && id >= BINNED_QUERIES * K) continue;
    const unsigned row = shared.rows[id / K];
    if (STABLE) shared.list[id] = NO_BIN;
    if (row == NONE) continue;
    const Level level = shared.levels[l];
    const auto of_row = of_batch_row(points, shared, id / K);
    const auto place = of_row.place(points.point(row, k), l);
    const Cell<float> cell = points.template cell<true>(of_row.pixels(place, level, l), level);
    if (cell.corners == 0u) continue;
    const unsigned bin = (l * SIDE + (cell.row & SIDE - 1)) * SIDE + (cell.column & SIDE - 1);
    if (STABLE) shared.list[id] = static_cast<unsigned short>(bin);
    ranks[i] = bin << 16 | (STABLE ? 0 : shared.bins.add(bin));
  }
  __syncthreads();
  if constexpr (STABLE) {
    number_by_rows<S>(shared);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (ranks[i] != NONE) ranks[i] |= shared.list[i * BLOCK + threadIdx.x];
  }
  const unsigned count = shared.bins.exclusive_prefix_sum();
#pragma unroll
  for (int i = 0; i < OWN; ++i)
    if (ranks[i] != NONE)
      shared.list[shared.bins.begin(ranks[i] >> 16) + (ranks[i] & 0xffffu)] = i * BLOCK + threadIdx.x;
  __syncthreads();
  return count;
}

// The sums of one cell's corners, in the lane's channels, until they go to memory.
template <typename Addend, int PIXEL, int WIDER, int G>
struct CellSums {
  char* base;  // of the (image, head), at the lane's channels
  int2 place;  // of the cell, as in its descriptor
  float sum[CORNERS][VEC];

  __device__ void flush(int corner) const {
    if (has_corner(place.x, corner))
      add_to(reinterpret_cast<Addend*>(corner_pointer<false, PIXEL, WIDER>(base, place, corner)), sum[corner]);
  }

  static __device__ void add_to(float* to, const float (&s)[VEC]) { reduce_add(to, s[0], s[1], s[2], s[3]); }
  static __device__ void add_to(FixedPoint* to, const float (&s)[VEC]) {
#pragma unroll
    for (int c = 0; c < VEC; ++c) add_units(to + c * G, s[c]);
  }

  // Go to another cell: write the sums that it does not share.
  __device__ void move(const int2& next) {
    // The right column is the left one of the next cell if addresses and corner bits agree.
    const bool beside =
        next.x >> 4 == (place.x >> 4) + PIXEL / 16 && next.y == place.y && (place.x >> 1 & 5) == (next.x & 5);
    flush(0);
    flush(2);
    if (!beside) {
      flush(1);
      flush(3);
    }
#pragma unroll
    for (int c = 0; c < VEC; ++c) {
      sum[0][c] = beside ? sum[1][c] : 0.0f;
      sum[2][c] = beside ? sum[3][c] : 0.0f;
      sum[1][c] = sum[3][c] = 0.0f;
    }
    place = next;
  }

  __device__ void add(const float4& coefficient, const float (&grad)[VEC]) {
    const float coefficients[CORNERS] = {coefficient.x, coefficient.y, coefficient.z, coefficient.w};
#pragma unroll
    for (int corner = 0; corner < CORNERS; ++corner)
#pragma unroll
      for (int c = 0; c < VEC; ++c) sum[corner][c] += coefficients[corner] * grad[c];
  }
};

// A point of the list, fetched before it is needed.
template <typename Place>
struct Fetched {
  unsigned id;  // as in the list; NONE: no point
  Place place;
  float weight;  // as loaded
};

// Fetch the points at `first` and after it in the list, one by each lane of a group.
template <int G, typename S, typename Location, typename Weight>
__device__ __forceinline__ auto fetch(const Shared<S>& shared, unsigned first, unsigned end,
                                      const PointArrays<S, Location, Weight>& points) {
  Fetched<decltype(points.place(0, 0))> point = {NONE, {}, 0.0f};
  const unsigned member = threadIdx.x % G;
  if (first + member < end) {
    point.id = shared.list[first + member];
    const unsigned row = point.id / S::K, k = point.id % S::K;
    const auto index = points.point(shared.rows[row], k);
    point.place = of_batch_row(points, shared, row).place(index, S::level_of(k));
    point.weight = points.weight(index);
  }
  return point;
}

// The descriptor of the lane's point, with its weight multiplied by `weight_factor`.
template <int PIXEL, typename Place, typename S, typename Location, typename Weight>
__device__ __forceinline__ void describe(Shared<S>& shared, const Fetched<Place>& fetched, float weight_factor,
                                         const PointArrays<S, Location, Weight>& points) {
  const int own = padded(threadIdx.x);
  if (fetched.id == NONE) {
    empty_descriptor(shared.descriptors, own);
    shared.descriptor_rows[own] = 0;
    return;
  }
  const unsigned number = S::level_of(fetched.id % S::K);
  const Level level = shared.levels[number];
  const auto of_row = of_batch_row(points, shared, fetched.id / S::K);
  const Point<float> point = {level, of_row.pixels(fetched.place, level, number),
                              of_row.attention(fetched.weight) * weight_factor};
  write_descriptor<PIXEL, false>(shared.descriptors, own, points.template locate_point<true>(point));
  shared.descriptor_rows[own] = fetched.id / S::K;
}

// Four channels of a row's gradient: neighbours or, FIXED, channels that lie G apart, in fixed-point units. STAGED: from
// shared memory.
template <bool FIXED, bool STAGED, int G, typename Value>
__device__ __forceinline__ void load_grad(float (&to)[VEC], const Value* from, const Scale<float>& scale) {
  if constexpr (FIXED) {
#pragma unroll
    for (int c = 0; c < VEC; ++c) to[c] = times_power(widen(from[c * G]), scale.grad);
  } else if constexpr (STAGED) {
    load_shared(to, from);
  } else {
    load(to, from);
  }
}

// The segmented reduction: each group walks through its segment of the list of `count` points, and adds the sums of every
// cell to memory. `cell` begins as one without corners; `channel` is the lane's first.
template <int G, int PIXEL, bool FIXED, typename Cell, typename Value, int D, int BYTES, typename S, typename Location,
          typename Weight>
__device__ __forceinline__ void reduce_cells(Cell& cell, Shared<S>& shared, const Gradients<Value, D, BYTES>& gradients,
                                             unsigned count, const PointArrays<S, Location, Weight>& points,
                                             const Value* grad_output, unsigned channel, const Scale<float>& scale) {
  constexpr int AHEAD = G < 4 ? G : 4;  // loads of gradients under way at a time
  constexpr bool STAGED = Gradients<Value, D, BYTES>::STAGED;
  if (STAGED) grad_output = reinterpret_cast<const Value*>(gradients.staged);
  const int group = first_descriptor<G>();
  const unsigned segment = (count + BLOCK / G - 1) / (BLOCK / G);
  const unsigned begin = threadIdx.x / G * segment, end = min(begin + segment, count);
  auto next = fetch<G>(shared, begin, end, points);
#pragma unroll 1
  for (unsigned first = 0; first < segment; first += G) {  // as often in every group of the warp
    const auto now = next;
    next = fetch<G>(shared, begin + first + G, end, points);
    describe<PIXEL>(shared, now, scale.weight, points);
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < G; j += AHEAD) {
      float grad[AHEAD][VEC];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const unsigned row = shared.descriptor_rows[group + padded(j + i)];
        const size_t index = STAGED ? row : shared.rows[row];
        load_grad<FIXED, STAGED, G>(grad[i], grad_output + index * D + channel, scale);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int2 place = shared.descriptors.places[group + padded(j + i)];
        if (place.x != cell.place.x || place.y != cell.place.y) cell.move(place);
        cell.add(shared.descriptors.coefficients[group + padded(j + i)], grad[i]);
      }
    }
    __syncwarp();
  }
  cell.move({0, 0});
}

template <typename Value, typename Location, typename Weight, int M, int D, typename S, bool FIXED>
__global__ void __launch_bounds__(BLOCK, 3)
    msda_backward_value_binned(const Value* __restrict__ grad_output, const Location* __restrict__ locations,
                               const Weight* __restrict__ weights, const unsigned char* __restrict__ mask,
                               const typename S::Reference* __restrict__ references,
                               typename Accumulator<Value, FIXED>::type* __restrict__ grad_value,
                               const long long* __restrict__ sizes, const long long* __restrict__ starts,
                               const __grid_constant__ ParamsOf<SchedulerParams<S::L>, S> p) {
  using Addend = typename Accumulator<Value, FIXED>::type;
  constexpr int G = D / VEC, L = S::L, K = S::K, PIXEL = M * D * sizeof(Value);
  static_assert(D % VEC == 0 && G <= WARP && (G & (G - 1)) == 0, "D / 4 must be a power of two");
  static_assert(PIXEL % 16 == 0, "the corner bits need the low four bits of an offset");
  static_assert(L <= MAX_BINNED_LEVELS && K <= MAX_BINNED_POINTS, "plans.py sends the problem elsewhere");
  static_assert(BINNED_QUERIES <= BLOCK && BINNED_QUERIES * MAX_BINNED_POINTS < 1 << 16, "a counter has 16 bits");

  __shared__ Shared<S> shared;
  __shared__ Gradients<Value, D, SHARED_BYTES - static_cast<int>(sizeof(Shared<S>))> gradients;
  const unsigned image_head = blockIdx.y + blockIdx.z * gridDim.y;
  if (image_head >= static_cast<unsigned>(p.batch * M)) return;
  load_levels(shared.levels, sizes, starts, p);
  load_scheduler(shared.scheduler, shared.levels, p);
  load_batch(shared, image_head, p);
  gradients.load(grad_output, shared.rows);
  const size_t image_start = static_cast<size_t>(image_head / M) * p.spatial_size;
  auto points = PointArrays<S, Location, Weight>{locations, weights, mask}.of_image(image_start);
  if constexpr (S::FUSED) points.row.offset_scale = p.offset_scale;
  load_rows<M, G>(shared, points, references, p);
  const unsigned count = sort_points<FIXED>(shared, points);

  const unsigned member = threadIdx.x % G, channel = FIXED ? member : member * VEC;
  const size_t plane = image_start * M + image_head % M;
  Scale<float> scale = {1.0f, 0, 0, 0, 0};
  if constexpr (FIXED) scale = read_scale<float>(grad_value, p, image_head);
  CellSums<Addend, PIXEL, sizeof(Addend) / sizeof(Value), G> cell = {
      reinterpret_cast<char*>(grad_value + plane * D + channel), {0, 0}, {}};
  reduce_cells<G, PIXEL, FIXED>(cell, shared, gradients, count, points, grad_output, channel, scale);
}
