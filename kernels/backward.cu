// SPDX-License-Identifier: Apache-2.0
// Backward: the gradients of msda_forward with respect to value, locations and weights.
//
// Layout   as in forward.cu; grad_output like output. grad_value is a zeroed float32 accumulator of shape (N, S, M, D)
//          whatever Value is; grad_locations and grad_weights are written whole, in the dtypes of what they belong to.
//          VALUE and POINTS tell which of the gradients are wanted; the pointers of the others are null.
// Threads  G = D / 4 lanes own a row, or one of SPLIT parts of its points; a lane owns four channels at every dtype, so
//          that a corner's gradient leaves as full 16-byte additions. Each lane forms four partial dot products per
//          point, and an exchange over the group leaves the sums of point j with lane j, which computed that point's
//          record: it finishes the point alone, without atomics.
// Grid and limits as in forward.cu.
#include "records.cuh"

constexpr int VEC = 4;

// What a group needs to walk through its slots.
struct Walk {
  const Slots* slots;
  int slot;           // the group's first
  const char* value;  // of the group's (image, head), at the lane's channels
  char* grad_value;   // likewise
  float grad[VEC];    // of the row's output
};

// What a kernel is specialised for, handed down in one piece.
template <typename Value_, int G_, int PIXEL_, int P_, bool VALUE_, bool POINTS_>
struct Traits {
  using Value = Value_;
  static constexpr int G = G_, PIXEL = PIXEL_, P = P_;
  static constexpr bool VALUE = VALUE_, POINTS = POINTS_;
};

// The lane's share of the four dot products of one point; its corners' gradients go to memory on the way.
template <typename T, bool INTERIOR>
__device__ __forceinline__ Four<float> visit(const Walk& walk, int j) {
  using Value = typename T::Value;
  const float4 share = walk.slots->shares[walk.slot + j];
  const int2 place = walk.slots->places[walk.slot + j];
  const float shares[4] = {share.x, share.y, share.z, share.w};
  const float (&grad)[VEC] = walk.grad;
  Four<float> dot = {};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const bool counts = INTERIOR || (place.x >> corner & 1);
    if (T::POINTS) {
      float pixel[VEC] = {};
      if (counts)
        load(pixel, reinterpret_cast<const Value*>(corner_pointer<INTERIOR, T::PIXEL, 1>(walk.value, place, corner)));
#pragma unroll
      for (int c = 0; c < VEC; ++c) dot.at[corner] += grad[c] * pixel[c];
    }
    if (T::VALUE && counts) {
      const float s = shares[corner];
      constexpr int WIDER = sizeof(float) / sizeof(Value);
      char* to = corner_pointer<INTERIOR, T::PIXEL, WIDER>(walk.grad_value, place, corner);
      reduce_add(reinterpret_cast<float*>(to), s * grad[0], s * grad[1], s * grad[2], s * grad[3]);
    }
  }
  return dot;
}

// Visit points [first, first + SPAN) and leave in each lane, over SPAN lanes, the sums of the point whose number equals
// the lane's in its low bits: the two halves of the points change hands between the two halves of the lanes, so every
// level halves what is left to move.
template <typename T, bool INTERIOR, int SPAN, int COUNT>
__device__ __forceinline__ Four<float> visit_all(const Walk& walk, int first, int member) {
  if constexpr (SPAN == 1) {
    return first < COUNT ? visit<T, INTERIOR>(walk, first) : Four<float>{};
  } else {
    constexpr int HALF = SPAN / 2;
    const Four<float> low = visit_all<T, INTERIOR, HALF, COUNT>(walk, first, member);
    const Four<float> high = visit_all<T, INTERIOR, HALF, COUNT>(walk, first + HALF, member);
    Four<float> sum = {};
    if constexpr (T::POINTS) {
      const bool upper = member & HALF;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float keep = upper ? high.at[i] : low.at[i], give = upper ? low.at[i] : high.at[i];
        sum.at[i] = keep + __shfl_xor_sync(ALL_LANES, give, HALF);
      }
    }
    return sum;
  }
}

// One stage: COUNT points of every group of the warp.
template <typename T, int COUNT, typename Location, typename Weight>
__device__ __forceinline__ void backward_stage(const Walk& walk, Slots& slots, const Level* levels, int member,
                                               bool active, int first, const Location* locations, const Weight* weights,
                                               Location* grad_locations, Weight* grad_weights) {
  const int index = first + member;
  const bool owner = active && member < COUNT;
  Point point;
  if (owner)
    point = make_record<T::PIXEL>(slots, locations + 2 * index, weights + index, levels[index / T::P]);
  else
    point = empty_record(slots);
  const bool interior = __all_sync(ALL_LANES, point.cell.corners == ALL_CORNERS || (active && member >= COUNT));
  __syncwarp();
  const Four<float> dot =
      interior ? visit_all<T, true, T::G, COUNT>(walk, 0, member) : visit_all<T, false, T::G, COUNT>(walk, 0, member);
  __syncwarp();
  if (!T::POINTS || !owner) return;
  PointGradient<float> gradient = point_gradient(point.cell, point.weight, point.level, dot);
  if (point.level.start < 0) gradient = {point.weight, point.weight, point.weight};  // NaN
  const float by_location[2] = {gradient.x, gradient.y};
  store(grad_locations + 2 * index, by_location);
  grad_weights[index] = narrow_to<Weight>(gradient.weight);
}

template <typename Value, typename Location, typename Weight, int M, int D, int L, int P, int SPLIT, bool VALUE,
          bool POINTS>
__global__ void __launch_bounds__(BLOCK)
    msda_backward(const Value* __restrict__ grad_output, const Value* __restrict__ value,
                  const Location* __restrict__ locations, const Weight* __restrict__ weights,
                  float* __restrict__ grad_value, Location* __restrict__ grad_locations,
                  Weight* __restrict__ grad_weights, const long long* __restrict__ sizes,
                  const long long* __restrict__ starts, const __grid_constant__ Params<L> p) {
  constexpr int G = D / VEC, K = L * P, PART = K / SPLIT;
  constexpr int PIXEL = M * D * sizeof(Value), TAIL = PART % G;
  using T = Traits<Value, G, PIXEL, P, VALUE, POINTS>;
  static_assert(D % VEC == 0 && G <= WARP && (G & (G - 1)) == 0, "D / 4 must be a power of two");
  static_assert(PIXEL % 16 == 0, "the corner bits need the low four bits of an offset");
  static_assert(K % SPLIT == 0 && G * SPLIT <= WARP, "SPLIT parts must be equal and share a warp");

  __shared__ Level levels[L];
  __shared__ Slots slots;
  load_levels(levels, sizes, starts, p);

  Row<M, G, SPLIT> row(p, threadIdx.x);
  if (!__any_sync(ALL_LANES, row.active)) return;
  if (!row.active) row.image = row.query = 0;  // takes part in its warp's exchanges, and writes nothing
  const long long index = row.index(p);
  const long long base = row.template base<D>(p) + row.member * VEC;
  Walk walk = {
      &slots, static_cast<int>(threadIdx.x) - row.member, reinterpret_cast<const char*>(value + base), nullptr, {}};
  if (VALUE) walk.grad_value = reinterpret_cast<char*>(grad_value + base);
  load(walk.grad, grad_output + index * D + row.member * VEC);
  locations += 2 * index * K;
  weights += index * K;
  if (POINTS) {
    grad_locations += 2 * index * K;
    grad_weights += index * K;
  }

  const int begin = row.part * PART, end = begin + PART;
#pragma unroll 1
  for (int first = begin; first + G <= end; first += G)
    backward_stage<T, G>(walk, slots, levels, row.member, row.active, first, locations, weights, grad_locations,
                         grad_weights);
  if constexpr (TAIL != 0)
    backward_stage<T, TAIL>(walk, slots, levels, row.member, row.active, end - TAIL, locations, weights, grad_locations,
                            grad_weights);
}
