// SPDX-License-Identifier: Apache-2.0
// The gradient of value for few queries, bitwise identical in every run: each block keeps one tile of positions
// (output-stationary) and collects what its points add to it. Every element is written once, without a zero fill, atomics or
// a pass afterwards.
//
// Layout   grad_output, locations, weights and mask as in backward.cu; grad_value (N, S, M, D), written whole, in Value.
// Threads  A block keeps the float accumulators of TILE positions of one (image, head) in shared memory. For each level that
//          meets the tile the threads test one point each, STEP points a round, and list those that touch the tile, in
//          order. Then every warp walks through the list and adds to its own columns of the level, those of its number
//          modulo WARPS; half of its lanes to even rows, half to odd ones. The four corners of a cell so belong to four
//          groups of lanes, and one thread adds the addends of an element, in the order of the points: each sum is the
//          same however blocks and warps are scheduled.
// Grid     x: (image, head), then tiles from the last: mostly the coarsest levels, whose tiles have the most to add.
// Limits   as backward.cu, and query * TILE below 2^31. Every block tests every point of its levels: see plans.py.
#include "point.cuh"

constexpr int WARPS = BLOCK / WARP;
constexpr int WORDS = 8;             // points that a thread tests in a round: that many loads are under way at a time
constexpr int STEP = BLOCK * WORDS;  // points in a round
constexpr int QUEUE = 2 * WARP;      // points that wait for their warp, a power of two
constexpr int VEC = 2;               // neighbouring channels of a lane

// What one position of the tile receives from one point.
struct __align__(8) Addend {
  int place;  // query * TILE + position in the tile; negative: it receives nothing
  float coefficient;
};

// What the two positions of one point in one column receive: in even rows, in odd rows.
struct Pair {
  Addend of_row[2];
};

// The points of one (image, head, level), numbered query by query.
template <typename S, typename Location, typename Weight, int M>
struct LevelPoints {
  PointArrays<S, Location, Weight> arrays;  // from the level's first point on
  Level level;
  LevelSpan<S> span;

  __device__ LevelPoints(const PointArrays<S, Location, Weight>& all, int l, const Level& level)
      : arrays(all.from(S::first(l))), level(level), span(l) {}

  __device__ int query(int point) const { return span.row(point); }

  // Index in the arrays of the point that comes `times` STRIDE points after `point`.
  template <int STRIDE = 0>
  __device__ long long index(int point, int times = 0) const {
    constexpr bool WHOLE_ROWS = S::EVEN && STRIDE % S::P == 0;
    constexpr long long ROW = M * S::K;
    if (!WHOLE_ROWS) point += times * STRIDE;
    const int row = query(point);
    const long long at = row * ROW + (point - row * span.points);
    return WHOLE_ROWS ? at + times * (STRIDE / S::P) * ROW : at;
  }
};

// How many lanes before this one have their bits set.
__device__ __forceinline__ int count_below(unsigned set, int lane) { return __popc(set & ((1u << lane) - 1u)); }

// Position of the cell's top-left corner in the tile, which it may lie outside of.
__device__ __forceinline__ int top_left(const Cell<float>& cell, const Level& level, int tile_start) {
  return level.start + cell.row * level.width + cell.column - tile_start;
}

// Whether a corner of the point's cell lies in the tile, and the cell's column. Points that contribute nothing may pass:
// make_pair drops them.
template <int TILE, bool NEAREST>
__device__ __forceinline__ bool touches(int& column, const Coordinates<float>& at, const Level& level, int tile_start) {
  // NEAREST: at the border pixels; else: just outside.
  const float width = static_cast<float>(level.width - NEAREST), height = static_cast<float>(level.height - NEAREST);
  const float least = NEAREST ? 0.0f : -1.0f;
  Cell<float> cell;
  floor_and_fraction<true>(fminf(fmaxf(at.x, least), width), cell.column, cell.right);
  floor_and_fraction<true>(fminf(fmaxf(at.y, least), height), cell.row, cell.down);
  const int upper = top_left(cell, level, tile_start), lower = upper + level.width;
  column = cell.column;
  // At -1 it is the right corner that lies in the tile.
  return static_cast<unsigned>(upper + 1) <= TILE || static_cast<unsigned>(lower + 1) <= TILE;
}

// List the points of a round that touch the tile, in their order, and return how many they are. Each is listed as its
// number in the round and, in front of that, the cell's column modulo WARPS.
template <int TILE, bool NEAREST, typename Points>
__device__ __forceinline__ int list_hits(unsigned short (&list)[STEP], int (&counts)[WARPS], const Points& points,
                                         int first, int end, int tile_start) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int words = (min(end - first, STEP) + BLOCK - 1) / BLOCK;  // each warp takes so many times 32 points, in a row
  const int own = warp * words * WARP + lane, room = min(words * WARP, end - first - own);
  Fractions<float> at[WORDS];  // converting to pixels here, not below, takes more registers
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    at[i] = {0.0f, 0.0f};
    if (i * WARP < room) at[i] = points.arrays.location(points.template index<WARP>(first + own, i));
  }
  unsigned hits[WORDS];
  unsigned columns = 0u;  // four bits each
  int count = 0;
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    hits[i] = 0u;
    if (i >= words) continue;
    int column;
    const bool hit = touches<TILE, NEAREST>(column, to_pixels<NEAREST>(at[i], points.level), points.level, tile_start);
    columns |= static_cast<unsigned>(column & (WARPS - 1)) << 4 * i;
    hits[i] = __ballot_sync(ALL_LANES, hit & (i * WARP < room));
    count += __popc(hits[i]);
  }
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  int next = 0, total = 0;
#pragma unroll
  for (int i = 0; i < WARPS; ++i) {
    if (i < warp) next += counts[i];
    total += counts[i];
  }
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    if (hits[i] == 0u) continue;
    const int number = static_cast<int>(columns >> 4 * i & (WARPS - 1)) * STEP | (own + i * WARP);
    if (hits[i] >> lane & 1u) list[next + count_below(hits[i], lane)] = static_cast<unsigned short>(number);
    next += __popc(hits[i]);
  }
  __syncthreads();
  return total;
}

// What a point adds to the warp's column; false if nothing.
template <int TILE, typename Points>
__device__ __forceinline__ bool make_pair(Pair& pair, const Points& points, int point, int tile_start) {
  const int query = points.query(point);
  const long long index = points.index(point);
  const Coordinates<float> at = points.arrays.coordinates(index, points.level);
  const Cell<float> cell = points.arrays.template cell<true>(at, points.level);
  const int right = (static_cast<int>(threadIdx.x / WARP) - cell.column) & (WARPS - 1);
  if (right > 1) return false;
  const Four<float> coefficient = corner_coefficients(cell, points.arrays.weight(index));
  const int upper = top_left(cell, points.level, tile_start) + right;
  bool any = false;
#pragma unroll
  for (int down = 0; down < 2; ++down) {
    const int position = upper + down * points.level.width;
    const bool counts = has_corner(cell.corners, 2 * down + right) && static_cast<unsigned>(position) < TILE;
    pair.of_row[(cell.row + down) & 1] = {counts ? query * TILE + position : -1,
                                          right ? coefficient.at[2 * down + 1] : coefficient.at[2 * down]};
    any |= counts;
  }
  return any;
}

// Add the pairs whose bits are set, in their order, to the lane's accumulators.
template <typename Value, int M, int D, int TILE>
__device__ __forceinline__ void add_pairs(float2* tile, const Pair* pairs, unsigned set, const Value* grad_output) {
  constexpr int GROUP = D / VEC < WARP / 2 ? D / VEC : WARP / 2;  // lanes to a position
  constexpr int TURNS = D / (GROUP * VEC);
  constexpr int BATCH = TURNS < 4 ? 4 / TURNS : 1;  // so many pairs wait for their gradients at the same time
  const int lane = threadIdx.x % WARP, parity = lane / GROUP, member = lane % GROUP;
  if (parity > 1) return;
#pragma unroll 1
  while (set != 0u) {
    bool counts[BATCH];
    float coefficient[BATCH], grad[BATCH][TURNS][VEC];
    float2* to[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const Addend addend = pairs[(__ffs(static_cast<int>(set)) - 1) & (WARP - 1)].of_row[parity];
      counts[b] = set != 0u && addend.place >= 0;
      set &= set - 1u;
      coefficient[b] = addend.coefficient;
      to[b] = tile + static_cast<unsigned>(addend.place) % TILE * (D / VEC) + member;
      const long long query = static_cast<unsigned>(addend.place) / TILE;
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn)
        if (counts[b]) load(grad[b][turn], grad_output + query * (M * D) + (turn * GROUP + member) * VEC);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
#pragma unroll
      for (int turn = 0; turn < TURNS; ++turn) {
        if (!counts[b]) continue;
        float2 sum = to[b][turn * GROUP];
        sum.x += coefficient[b] * grad[b][turn][0];
        sum.y += coefficient[b] * grad[b][turn][1];
        to[b][turn * GROUP] = sum;
      }
    }
  }
}

// Add the listed hits of a round that touch the warp's columns: queue them, and make and add pairs 32 at a time.
template <typename Value, int M, int D, int TILE, typename Points>
__device__ __forceinline__ void add_hits(float4* tile, unsigned short (&queue)[QUEUE], Pair (&pairs)[WARP],
                                         const unsigned short (&list)[STEP], int hits, const Points& points, int first,
                                         int tile_start, const Value* grad_output) {
  const unsigned warp = threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP;
  int head = 0, tail = 0;  // of the queue, whose numbers wrap
#pragma unroll 1
  for (int hit = lane; hit - lane < hits || head < tail; hit += WARP) {
    const unsigned number = hit < hits ? list[hit] : 0u;
    const bool mine = hit < hits && ((warp - number / STEP) & (WARPS - 1)) <= 1u;
    const unsigned queued = __ballot_sync(ALL_LANES, mine);
    if (mine) queue[(tail + count_below(queued, lane)) % QUEUE] = static_cast<unsigned short>(number % STEP);
    tail += __popc(queued);
    __syncwarp();
    if (tail - head < WARP && hit - lane + WARP < hits) continue;
    const bool any =
        lane < tail - head && make_pair<TILE>(pairs[lane], points, first + queue[(head + lane) % QUEUE], tile_start);
    head = min(head + WARP, tail);
    const unsigned set = __ballot_sync(ALL_LANES, any);
    __syncwarp();
    add_pairs<Value, M, D, TILE>(reinterpret_cast<float2*>(tile), pairs, set, grad_output);
  }
}

// Write the tile.
template <int M, int D, int TILE, typename Value>
__device__ __forceinline__ void store_tile(Value* grad_value, const float4* tile, long long image, int head,
                                           int tile_start, const Shape& p) {
  constexpr int COUNT = 16 / sizeof(Value);  // channels that a thread writes at a time
  constexpr int ROWS = BLOCK * COUNT / D;    // positions that the block writes at a time
  static_assert(TILE % ROWS == 0, "all threads write");
  const int element = threadIdx.x * COUNT, position = tile_start + element / D;
  grad_value += ((image * p.spatial_size + position) * M + head) * D + element % D;
#pragma unroll
  for (int i = 0; i < TILE; i += ROWS) {
    if (position + i >= p.spatial_size) break;
    float whole[COUNT];
#pragma unroll
    for (int c = 0; c < COUNT; c += 4) {
      const float4 sum = tile[(element + i * D + c) / 4];
      whole[c] = sum.x;
      whole[c + 1] = sum.y;
      whole[c + 2] = sum.z;
      whole[c + 3] = sum.w;
    }
    store(grad_value + static_cast<long long>(i) * M * D, whole);
  }
}

template <typename Value, typename Location, typename Weight, int M, int D, typename S, int TILE>
__global__ void __launch_bounds__(BLOCK, 4)
    msda_backward_value_tiled(const Value* __restrict__ grad_output, const Location* __restrict__ locations,
                              const Weight* __restrict__ weights, const unsigned char* __restrict__ mask,
                              Value* __restrict__ grad_value, const long long* __restrict__ sizes,
                              const long long* __restrict__ starts, const __grid_constant__ Params<S::L> p) {
  static_assert(STEP * WARPS <= 1 << 16, "a listed point has 16 bits");
  static_assert(D % 8 == 0 && D <= 128 && (D & (D - 1)) == 0, "lanes share out the channels evenly");
  static_assert((TILE & (TILE - 1)) == 0, "shifts take places apart");
  __shared__ Level levels[S::L];
  __shared__ float4 tile[TILE * D / 4];
  __shared__ unsigned short list[STEP];
  __shared__ int counts[WARPS];
  __shared__ unsigned short queue[WARPS][QUEUE];
  __shared__ Pair pairs[WARPS][WARP];
#pragma unroll
  for (int i = 0; i < TILE * D / 4; i += BLOCK) tile[threadIdx.x + i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  load_levels(levels, sizes, starts, p);  // its barrier comes after the zeros, too

  const unsigned image_heads = static_cast<unsigned>(p.batch) * M, image_head = blockIdx.x % image_heads;
  const long long image = image_head / M;
  const int head = image_head % M;
  const int tile_start = static_cast<int>(gridDim.x / image_heads - 1u - blockIdx.x / image_heads) * TILE;
  const long long first_row = image * p.num_queries * M + head;
  grad_output += first_row * D;
  const unsigned warp = threadIdx.x / WARP;
  const PointArrays<S, Location, Weight> arrays = {locations, weights, mask};
  const auto all = arrays.of_image(image * p.spatial_size).from(first_row * S::K);

#pragma unroll 1
  for (int l = 0; l < S::L; ++l) {
    const Level level = levels[l];
    const int beyond = level.start + level.height * level.width;  // the start, where the level is empty or does not fit
    if (beyond <= max(level.start, tile_start) || level.start >= tile_start + TILE) continue;
    const LevelPoints<S, Location, Weight, M> points(all, l, level);
    const int end = p.num_queries * points.span.points;
#pragma unroll 1
    for (int first = 0; first < end; first += STEP) {
      const int hits = list_hits<TILE, S::NEAREST>(list, counts, points, first, end, tile_start);
      add_hits<Value, M, D, TILE>(tile, queue[warp], pairs[warp], list, hits, points, first, tile_start, grad_output);
    }
  }
  __syncthreads();
  store_tile<M, D, TILE>(grad_value, tile, image, head, tile_start, p);
}
