// SPDX-License-Identifier: Apache-2.0
// Backward: the gradients of msda_forward with respect to value, locations and weights.
//
// Layout   as in forward.cu; grad_output like output. grad_value is a zeroed float32 accumulator of shape (N, S, M, D)
//          whatever Value is; grad_locations and grad_weights are written whole, in the dtypes of what they belong to.
//          VALUE and POINTS tell which of the gradients are wanted; the pointers of the others are null. FIXED:
//          grad_value is summed in fixed point instead, in the array that fixed_point.cuh describes.
// Threads  G = D / 4 lanes own a row, or one of SPLIT parts of its points; a lane owns four channels at every dtype, so
//          that a corner's gradient leaves as full 16-byte additions (FIXED: 8-byte ones, of channels G apart). Each lane
//          forms four partial dot products per point, and an exchange over the group leaves the sums of point j with
//          lane j, which computed that point's record: it finishes the point alone, without atomics.
// Grid     as in forward.cu; msda_backward_persistent as msda_forward_persistent.
// Limits   as in forward.cu; of msda_backward_persistent also G < 32: there the visit of a row's points leaves too few of the
//          64 registers that a block of 1024 threads can have.
#include "tile_scheduler.cuh"
#include "records.cuh"

constexpr int VEC = 4;

// What a kernel is specialised for, handed down in one piece.
template <int THREADS_, typename Value_, int G_, int PIXEL_, int P_, bool VALUE_, bool POINTS_, bool FIXED_>
struct Traits {
  using Value = Value_;
  using Addend = typename Accumulator<Value, FIXED_>::type;
  static constexpr int THREADS = THREADS_, G = G_, PIXEL = PIXEL_, P = P_;
  static constexpr bool VALUE = VALUE_, POINTS = POINTS_, FIXED = FIXED_;
};

// What a group needs to walk through its slots.
template <typename T>
struct Walk {
  const Slots<T::THREADS>* slots;
  int slot;           // of the group's first record
  int first_lane;     // of the group
  const char* value;  // of the group's (image, head), at the lane's channels
  char* grad_value;   // likewise; FIXED: at the lane's first quanta
  float grad[VEC];    // of the row's output
  // FIXED only: the gradient of channels that lie G apart, in quanta. So the group adds to neighbouring integers, where
  // channels of its own would leave each lane a part of the 32 bytes that memory adds to at a time.
  float quanta[VEC];
  float weight_factor;
  unsigned broken;  // bit c: channel c of those is not finite, and its quanta are zero
};

// Where the gradient of corner i of a record goes, of the lane's first channel.
template <typename T, bool INTERIOR>
__device__ __forceinline__ typename T::Addend* sum_pointer(const Walk<T>& walk, const int2& place, int corner) {
  constexpr int WIDER = sizeof(typename T::Addend) / sizeof(typename T::Value);
  return reinterpret_cast<typename T::Addend*>(
      corner_pointer<INTERIOR, T::PIXEL, WIDER>(walk.grad_value, place, corner));
}

// Add the gradient of one corner to memory. INTERIOR: all four lie inside the level.
template <typename T, bool INTERIOR>
__device__ __forceinline__ void add_corner(const Walk<T>& walk, const int2& place, int corner, float share) {
  const auto to = sum_pointer<T, INTERIOR>(walk, place, corner);
  if constexpr (T::FIXED) {
#pragma unroll
    for (int c = 0; c < VEC; ++c) atomicAdd(to + c * T::G, whole(share, walk.quanta[c]));
  } else {
    const float (&grad)[VEC] = walk.grad;
    reduce_add(to, share * grad[0], share * grad[1], share * grad[2], share * grad[3]);
  }
}

// The lane's share of the four dot products of one point; its corners' gradients go to memory on the way.
template <typename T, bool INTERIOR>
__device__ __forceinline__ Four<float> visit(const Walk<T>& walk, int j) {
  using Value = typename T::Value;
  const float4 share = walk.slots->shares[walk.slot + j * (WARP / T::G)];
  const int2 place = walk.slots->places[walk.slot + j * (WARP / T::G)];
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
    if constexpr (T::VALUE) {
      if (counts) add_corner<T, INTERIOR>(walk, place, corner, shares[corner]);
    }
  }
  return dot;
}

// Visit points [first, first + SPAN) and leave in each lane, over SPAN lanes, the sums of the point whose number equals
// the lane's in its low bits: the two halves of the points change hands between the two halves of the lanes, so every
// level halves what is left to move.
template <typename T, bool INTERIOR, int SPAN, int COUNT>
__device__ __forceinline__ Four<float> visit_all(const Walk<T>& walk, int first, int member) {
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

// The row's gradient once more, for the sums.
template <typename T, typename Value>
__device__ __forceinline__ void load_quanta(Walk<T>& walk, const Value* grad_output, const Scale<float>& scale) {
  walk.weight_factor = scale.weight;
#pragma unroll
  for (int c = 0; c < VEC; ++c) {
    const float grad = widen(grad_output[c * T::G]);
    walk.quanta[c] = is_finite(grad) ? times_power(grad, scale.grad) : 0.0f;
    walk.broken |= is_finite(grad) ? 0u : 1u << c;
  }
}

// Mark the sums that numbers that are not finite take part in; such numbers have been added as zero. `weights`: bit j is
// set where the weight of point j is one. Short rather than fast.
template <typename T, int COUNT>
__device__ __forceinline__ void mark_broken(const Walk<T>& walk, unsigned weights) {
#pragma unroll 1
  for (int i = 0; i < COUNT * 4 * VEC; ++i) {
    const int j = i / (4 * VEC), corner = i / VEC % 4, c = i % VEC;
    const int2 place = walk.slots->places[walk.slot + j * (WARP / T::G)];
    if ((place.x >> corner & 1) && ((weights >> j | walk.broken >> c) & 1u))
      atomicExch(sum_pointer<T, false>(walk, place, corner) + c * T::G, NOT_FINITE);
  }
}

// One stage: COUNT points of every group of the warp.
template <typename T, int COUNT, typename Location, typename Weight>
__device__ __forceinline__ void backward_stage(const Walk<T>& walk, Slots<T::THREADS>& slots, const Level* levels,
                                               int member, bool active, int first, const Location* locations,
                                               const Weight* weights, Location* grad_locations, Weight* grad_weights) {
  const int index = first + member, slot = slot_of<T::G>(member);
  const bool owner = active && member < COUNT;
  Point point;
  if (owner) {
    const Level level = levels[index / T::P];
    float location[2];
    load(location, locations + 2 * index);
    point = make_record<T::PIXEL, false, T::FIXED>(slots, slot, {location[0], location[1], level},
                                                   widen(weights[index]), level, walk.weight_factor);
  } else {
    point = empty_record(slots, slot);
  }
  const bool interior = __all_sync(ALL_LANES, point.cell.corners == ALL_CORNERS || (active && member >= COUNT));
  __syncwarp();
  const Four<float> dot =
      interior ? visit_all<T, true, T::G, COUNT>(walk, 0, member) : visit_all<T, false, T::G, COUNT>(walk, 0, member);
  if constexpr (T::FIXED) {
    const bool broken = !is_finite(point.weight);
    if (__any_sync(ALL_LANES, broken || walk.broken != 0u))
      mark_broken<T, COUNT>(walk, __ballot_sync(ALL_LANES, broken) >> walk.first_lane);
  }
  __syncwarp();
  if (!T::POINTS || !owner) return;
  PointGradient<float> gradient = point_gradient(point.cell, point.weight, point.level, dot);
  if (point.level.start < 0) gradient = {point.weight, point.weight, point.weight};  // NaN
  const float by_location[2] = {gradient.x, gradient.y};
  store(grad_locations + 2 * index, by_location);
  grad_weights[index] = narrow_to<Weight>(gradient.weight);
}

// Points [begin, begin + PART) of every group's row, in stages of G; the arrays are the row's.
template <typename T, int PART, typename Location, typename Weight>
__device__ __forceinline__ void backward_points(const Walk<T>& walk, Slots<T::THREADS>& slots, const Level* levels,
                                                int member, bool active, int begin, const Location* locations,
                                                const Weight* weights, Location* grad_locations, Weight* grad_weights) {
  constexpr int G = T::G, TAIL = PART % G;
  const int end = begin + PART;
#pragma unroll 1
  for (int first = begin; first + G <= end; first += G)
    backward_stage<T, G>(walk, slots, levels, member, active, first, locations, weights, grad_locations, grad_weights);
  if constexpr (TAIL != 0)
    backward_stage<T, TAIL>(walk, slots, levels, member, active, end - TAIL, locations, weights, grad_locations,
                            grad_weights);
}

template <typename Value, typename Location, typename Weight, int M, int D, int L, int P, int SPLIT, bool VALUE,
          bool POINTS, bool FIXED>
__global__ void __launch_bounds__(BLOCK)
    msda_backward(const Value* __restrict__ grad_output, const Value* __restrict__ value,
                  const Location* __restrict__ locations, const Weight* __restrict__ weights,
                  typename Accumulator<Value, FIXED>::type* __restrict__ grad_value,
                  Location* __restrict__ grad_locations, Weight* __restrict__ grad_weights,
                  const long long* __restrict__ sizes, const long long* __restrict__ starts,
                  const __grid_constant__ Params<L> p) {
  constexpr int G = D / VEC, K = L * P, PART = K / SPLIT;
  constexpr int PIXEL = M * D * sizeof(Value);
  using T = Traits<BLOCK, Value, G, PIXEL, P, VALUE, POINTS, FIXED>;
  static_assert(D % VEC == 0 && G <= WARP && (G & (G - 1)) == 0, "D / 4 must be a power of two");
  static_assert(PIXEL % 16 == 0, "the corner bits need the low four bits of an offset");
  static_assert(VALUE || !FIXED, "only gradients of value are summed");
  static_assert(K % SPLIT == 0 && G * SPLIT <= WARP, "SPLIT parts must be equal and share a warp");

  __shared__ Level levels[L];
  __shared__ Slots<BLOCK> slots;
  load_levels(levels, sizes, starts, p);

  Row<M, G, SPLIT> row(p, threadIdx.x);
  if (!__any_sync(ALL_LANES, row.active)) return;
  if (!row.active) row.image = row.query = 0;  // takes part in its warp's exchanges, and writes nothing
  const long long index = row.index(p);
  const long long base = row.template base<D>(p) + row.member * VEC;
  Walk<T> walk = {};
  walk.slots = &slots;
  walk.slot = slot_of<G>(0);
  walk.first_lane = threadIdx.x % WARP - row.member;
  walk.value = reinterpret_cast<const char*>(value + base);
  load(walk.grad, grad_output + index * D + row.member * VEC);
  if constexpr (FIXED) {
    const long long image_head = static_cast<long long>(row.image) * M + row.head;
    load_quanta(walk, grad_output + index * D + row.member, read_scale<float>(grad_value, p, image_head));
    walk.grad_value = reinterpret_cast<char*>(grad_value + row.template base<D>(p) + row.member);
  } else if (VALUE) {
    walk.grad_value = reinterpret_cast<char*>(grad_value + base);
  }
  locations += 2 * index * K;
  weights += index * K;
  if (POINTS) {
    grad_locations += 2 * index * K;
    grad_weights += index * K;
  }

  backward_points<T, PART>(walk, slots, levels, row.member, row.active, row.part * PART, locations, weights,
                           grad_locations, grad_weights);
}

// The gradients of locations and weights alone, as VALUE = false gives them, on persistent blocks like
// msda_forward_persistent. It takes the arguments of msda_backward.
template <typename Value, typename Location, typename Weight, int M, int D, int L, int P>
__global__ void __launch_bounds__(PERSISTENT_BLOCK, 1)
    msda_backward_persistent(const Value* __restrict__ grad_output, const Value* __restrict__ value,
                             const Location* __restrict__ locations, const Weight* __restrict__ weights,
                             float* __restrict__ /*grad_value*/, Location* __restrict__ grad_locations,
                             Weight* __restrict__ grad_weights, const long long* __restrict__ sizes,
                             const long long* __restrict__ starts, const __grid_constant__ OrderedParams<L> p) {
  constexpr int G = D / VEC, K = L * P, PIXEL = M * D * sizeof(Value);
  using T = Traits<PERSISTENT_BLOCK, Value, G, PIXEL, P, false, true, false>;
  static_assert(D % VEC == 0 && G < WARP && (G & (G - 1)) == 0, "D / 4 must be a power of two, less than a warp");

  __shared__ Level levels[L];
  __shared__ Slots<PERSISTENT_BLOCK> slots;
  __shared__ Order order;
  load_levels(levels, sizes, starts, p);
  load_order(order, levels, p);

  const unsigned member = threadIdx.x % G;
  Walk<T> walk = {};
  walk.slots = &slots;
  walk.slot = slot_of<G>(0);
  visit_in_order<G>(order, p, [&](unsigned row, unsigned plane, bool counts) {
    walk.value = reinterpret_cast<const char*>(value + static_cast<size_t>(plane) * D + member * VEC);
    load(walk.grad, grad_output + static_cast<size_t>(row) * D + member * VEC);
    const size_t point = static_cast<size_t>(row) * K;
    backward_points<T, K>(walk, slots, levels, member, counts, 0, locations + 2 * point, weights + point,
                          grad_locations + 2 * point, grad_weights + point);
  });
}
