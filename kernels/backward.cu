// SPDX-License-Identifier: Apache-2.0
// Backward: the gradients of msda_forward with respect to value, locations and weights.
//
// Layout   as in forward.cu; grad_output like output. grad_value is a zeroed float32 accumulator of shape (N, S, M, D)
//          whatever Value is; grad_locations and grad_weights are written whole, in the dtypes of locations and weights.
//          VALUE and POINTS tell which gradients are wanted; the pointers of the others are null. FIXED: grad_value is
//          the fixed-point accumulator of fixed_point.cuh.
// Threads  G = D / 4 lanes own a row, or one of SPLIT_K parts of its points; a lane owns four channels at every dtype, so
//          that a corner's gradient leaves as full 16-byte additions (FIXED: 8-byte ones, of channels G apart). Each lane
//          forms four partial dot products per point, and an exchange over the group leaves the sums of point j with
//          lane j, which made that point's descriptor: it finishes the point alone, without atomics.
// Grid     msda_backward as msda_forward, msda_backward_persistent as msda_forward_persistent.
// Limits   as in forward.cu. msda_backward_persistent also needs G < 32: with one row per warp it exceeds the 64 registers
//          of a persistent block's threads.
#include "tile_scheduler.cuh"
#include "descriptors.cuh"

constexpr int VEC = 4;

// What a kernel is specialised for.
template <int THREADS_, typename Value_, int G_, int PIXEL_, typename S_, bool VALUE_, bool POINTS_, bool FIXED_>
struct Traits {
  using Value = Value_;
  using S = S_;
  using Addend = typename Accumulator<Value, FIXED_>::type;
  static constexpr int THREADS = THREADS_, G = G_, PIXEL = PIXEL_;
  static constexpr bool VALUE = VALUE_, POINTS = POINTS_, FIXED = FIXED_;
};

// What a group needs to walk through its descriptors.
template <typename T>
struct Walk {
  const Descriptors<T::THREADS>* descriptors;
  int first;          // where the group's first descriptor lies
  int first_lane;     // of the group
  const char* value;  // of the group's (image, head), at the lane's channels
  char* grad_value;   // likewise; FIXED: at the first of the lane's channels that lie G apart
  float grad[VEC];    // of the row's output
  // FIXED only: the gradient of channels that lie G apart, in fixed-point units. The group so adds to neighbouring
  // integers; with the lane's own four channels, each lane would add to a part of another 32-byte sector.
  float units[VEC];
  float weight_factor;
  unsigned non_finite;  // bit c: channel c of `units` is non-finite, and counts as zero there
};

// Where the gradient of corner i of a descriptor goes, of the lane's first channel.
template <typename T, bool INTERIOR>
__device__ __forceinline__ typename T::Addend* accumulator_pointer(const Walk<T>& walk, const int2& place, int corner) {
  constexpr int WIDER = sizeof(typename T::Addend) / sizeof(typename T::Value);
  return reinterpret_cast<typename T::Addend*>(
      corner_pointer<INTERIOR, T::PIXEL, WIDER>(walk.grad_value, place, corner));
}

// Add the gradient of one corner to memory. INTERIOR: all four lie inside the level.
template <typename T, bool INTERIOR>
__device__ __forceinline__ void add_corner(const Walk<T>& walk, const int2& place, int corner, float coefficient) {
  const auto to = accumulator_pointer<T, INTERIOR>(walk, place, corner);
  if constexpr (T::FIXED) {
#pragma unroll
    for (int c = 0; c < VEC; ++c) atomicAdd(to + c * T::G, to_fixed(coefficient, walk.units[c]));
  } else {
    const float (&grad)[VEC] = walk.grad;
    reduce_add(to, coefficient * grad[0], coefficient * grad[1], coefficient * grad[2], coefficient * grad[3]);
  }
}

// The lane's part of the four dot products of descriptor j; the gradients of its corners go to memory on the way.
template <typename T, bool INTERIOR>
__device__ __forceinline__ Four<float> visit(const Walk<T>& walk, int j) {
  using Value = typename T::Value;
  const float4 coefficient = walk.descriptors->coefficients[walk.first + padded(j)];
  const int2 place = walk.descriptors->places[walk.first + padded(j)];
  const float coefficients[4] = {coefficient.x, coefficient.y, coefficient.z, coefficient.w};
  const float (&grad)[VEC] = walk.grad;
  Four<float> dot = {};
#pragma unroll
  for (int corner = 0; corner < T::S::CORNERS; ++corner) {
    const bool counts = INTERIOR || has_corner(place.x, corner);
    if (T::POINTS) {
      float pixel[VEC] = {};
      if (counts)
        load(pixel, reinterpret_cast<const Value*>(corner_pointer<INTERIOR, T::PIXEL, 1>(walk.value, place, corner)));
#pragma unroll
      for (int c = 0; c < VEC; ++c) dot.at[corner] += grad[c] * pixel[c];
    }
    if constexpr (T::VALUE) {
      if (counts) add_corner<T, INTERIOR>(walk, place, corner, coefficients[corner]);
    }
  }
  return dot;
}

// Visit descriptors [first, first + SPAN) and leave in each lane, over SPAN lanes, the sums of the one whose number equals
// the lane's in its low bits. The two halves of the lanes exchange the two halves of the descriptors, so that every level
// of the recursion halves the data to move.
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

// FIXED: load the row's gradient once more, in units.
template <typename T, typename Value>
__device__ __forceinline__ void load_units(Walk<T>& walk, const Value* grad_output, const Scale<float>& scale) {
  walk.weight_factor = scale.weight;
#pragma unroll
  for (int c = 0; c < VEC; ++c) {
    const float grad = widen(grad_output[c * T::G]);
    walk.units[c] = is_finite(grad) ? times_power(grad, scale.grad) : 0.0f;
    walk.non_finite |= is_finite(grad) ? 0u : 1u << c;
  }
}

// Poison the accumulators that have a non-finite addend, which was added as zero. `weights`: bit j is set if the weight of
// descriptor j is non-finite. Short rather than fast.
template <typename T, int COUNT>
__device__ __forceinline__ void poison_non_finite(const Walk<T>& walk, unsigned weights) {
#pragma unroll 1
  for (int i = 0; i < COUNT * 4 * VEC; ++i) {
    const int j = i / (4 * VEC), corner = i / VEC % 4, c = i % VEC;
    const int2 place = walk.descriptors->places[walk.first + padded(j)];
    if (has_corner(place.x, corner) && ((weights >> j | walk.non_finite >> c) & 1u))
      atomicExch(accumulator_pointer<T, false>(walk, place, corner) + c * T::G, NON_FINITE);
  }
}

// Fused: what the lane keeps of its points until the row is done. Plain: nothing.
template <typename T, int STAGES, bool = T::S::FUSED && T::POINTS>
struct Kept {};
template <typename T, int STAGES>
struct Kept<T, STAGES, true> : WeightGradients<STAGES> {};

// One stage: COUNT points of every group of the warp, from point `first` of its row on.
template <typename T, int COUNT, typename Kept, typename Location, typename Weight>
__device__ __forceinline__ void backward_stage(Kept& kept, const Walk<T>& walk, Descriptors<T::THREADS>& descriptors,
                                               const Level* levels, int member, bool active, int first,
                                               const PointArrays<typename T::S, Location, Weight>& points,
                                               const PointGradientArrays<typename T::S, Location, Weight>& gradients) {
  const int k = first + member, own = walk.first + padded(member);
  const bool has_point = active && member < COUNT;
  LocatedPoint<float> point;
  if (has_point) {
    const int number = T::S::level_of(k);
    point = points.template locate_point<true>(points.load(k, levels[number], number));
    write_descriptor<T::PIXEL, false, T::FIXED>(descriptors, own, point, walk.weight_factor);
  } else {
    point = empty_descriptor(descriptors, own);
  }
  const bool interior = __all_sync(ALL_LANES, point.cell.corners == ALL_CORNERS || (active && member >= COUNT));
  __syncwarp();
  const Four<float> dot =
      interior ? visit_all<T, true, T::G, COUNT>(walk, 0, member) : visit_all<T, false, T::G, COUNT>(walk, 0, member);
  if constexpr (T::FIXED) {
    const bool non_finite = !is_finite(point.weight);
    if (__any_sync(ALL_LANES, non_finite || walk.non_finite != 0u))
      poison_non_finite<T, COUNT>(walk, __ballot_sync(ALL_LANES, non_finite) >> walk.first_lane);
  }
  __syncwarp();
  if constexpr (T::S::FUSED && T::POINTS) {
    kept.add(has_point ? gradients.store_offset(k, T::S::level_of(k), point, dot, points) : 0.0f);
  } else if (T::POINTS && has_point) {
    gradients.store(k, point, dot);
  }
}

// Points [begin, begin + PART) of every group's row, in stages of G; the arrays are the row's.
template <typename T, int PART, typename Location, typename Weight>
__device__ __forceinline__ void backward_points(const Walk<T>& walk, Descriptors<T::THREADS>& descriptors,
                                                const Level* levels, int member, bool active, int begin,
                                                const PointArrays<typename T::S, Location, Weight>& points,
                                                const PointGradientArrays<typename T::S, Location, Weight>& gradients) {
  constexpr int G = T::G, TAIL = PART % G;
  const int end = begin + PART;
  Kept<T, (PART + G - 1) / G> kept = {};
#pragma unroll 1
  for (int first = begin; first + G <= end; first += G)
    backward_stage<T, G>(kept, walk, descriptors, levels, member, active, first, points, gradients);
  if constexpr (TAIL != 0)
    backward_stage<T, TAIL>(kept, walk, descriptors, levels, member, active, end - TAIL, points, gradients);
  if constexpr (T::S::FUSED && T::POINTS) {
    // The parts of a row are neighbours.
    constexpr int LANES = G * (T::S::K / PART);
    gradients.template store_logits<G, LANES>(kept, begin + member, active ? end : 0, points);
  }
}

template <typename Value, typename Location, typename Weight, int M, int D, typename S, int SPLIT_K, bool VALUE,
          bool POINTS, bool FIXED>
__global__ void __launch_bounds__(BLOCK)
    msda_backward(const Value* __restrict__ grad_output, const Value* __restrict__ value,
                  const Location* __restrict__ locations, const Weight* __restrict__ weights,
                  const unsigned char* __restrict__ mask, const typename S::Reference* __restrict__ references,
                  typename Accumulator<Value, FIXED>::type* __restrict__ grad_value,
                  Location* __restrict__ grad_locations, Weight* __restrict__ grad_weights,
                  float* __restrict__ by_location, const long long* __restrict__ sizes,
                  const long long* __restrict__ starts, const __grid_constant__ ParamsOf<Params<S::L>, S> p) {
  constexpr int G = D / VEC, L = S::L, K = S::K, PART = K / SPLIT_K;
  constexpr int PIXEL = M * D * sizeof(Value);
  using T = Traits<BLOCK, Value, G, PIXEL, S, VALUE, POINTS, FIXED>;
  static_assert(D % VEC == 0 && G <= WARP && (G & (G - 1)) == 0, "D / 4 must be a power of two");
  static_assert(PIXEL % 16 == 0, "the corner bits need the low four bits of an offset");
  static_assert(VALUE || !FIXED, "only gradients of value are accumulated in fixed point");
  static_assert(K % SPLIT_K == 0 && G * SPLIT_K <= WARP, "the parts must be equal and share a warp");
  static_assert(L <= MAX_SPECIALISED_LEVELS, "generic.cu takes more levels");

  __shared__ Level levels[L];
  __shared__ Descriptors<BLOCK> descriptors;
  load_levels(levels, sizes, starts, p);

  GroupRow<M, G, SPLIT_K> row(p, threadIdx.x);
  if (!__any_sync(ALL_LANES, row.active)) return;
  if (!row.active) row.image = row.query = 0;  // takes part in its warp's exchanges, and writes nothing
  const long long index = row.index(p);
  const long long base = row.template base<D>(p) + row.member * VEC;
  Walk<T> walk = {};
  walk.descriptors = &descriptors;
  walk.first = first_descriptor<G>();
  walk.first_lane = threadIdx.x % WARP - row.member;
  walk.value = reinterpret_cast<const char*>(value + base);
  load(walk.grad, grad_output + index * D + row.member * VEC);
  if constexpr (FIXED) {
    const long long image_head = static_cast<long long>(row.image) * M + row.head;
    load_units(walk, grad_output + index * D + row.member, read_scale<float>(grad_value, p, image_head));
    walk.grad_value = reinterpret_cast<char*>(grad_value + row.template base<D>(p) + row.member);
  } else if (VALUE) {
    walk.grad_value = reinterpret_cast<char*>(grad_value + base);
  }
  const PointArrays<S, Location, Weight> points = {locations, weights, mask};
  PointGradientArrays<S, Location, Weight> gradients = {grad_locations, grad_weights, by_location};
  if (POINTS) gradients = gradients.from(index * K);
  backward_points<T, PART>(walk, descriptors, levels, row.member, row.active, row.part * PART,
                           points.of_image(row.image_start(p)).template of_row<M, G * SPLIT_K>(index, references, p),
                           gradients);
}

// The gradients of locations and weights alone, bitwise identical to those of VALUE = false, on persistent blocks. It takes
// the arguments of msda_backward.
template <typename Value, typename Location, typename Weight, int M, int D, typename S>
__global__ void __launch_bounds__(PERSISTENT_BLOCK, 1)
    msda_backward_persistent(const Value* __restrict__ grad_output, const Value* __restrict__ value,
                             const Location* __restrict__ locations, const Weight* __restrict__ weights,
                             const unsigned char* __restrict__ mask,
                             const typename S::Reference* __restrict__ references, float* __restrict__ /*grad_value*/,
                             Location* __restrict__ grad_locations, Weight* __restrict__ grad_weights,
                             float* __restrict__ by_location, const long long* __restrict__ sizes,
                             const long long* __restrict__ starts,
                             const __grid_constant__ ParamsOf<SchedulerParams<S::L>, S> p) {
  constexpr int G = D / VEC, K = S::K, PIXEL = M * D * sizeof(Value);
  using T = Traits<PERSISTENT_BLOCK, Value, G, PIXEL, S, false, true, false>;
  static_assert(D % VEC == 0 && G < WARP && (G & (G - 1)) == 0, "D / 4 must be a power of two, less than a warp");

  __shared__ Level levels[S::L];
  __shared__ Descriptors<PERSISTENT_BLOCK> descriptors;
  __shared__ TileScheduler scheduler;
  load_levels(levels, sizes, starts, p);
  load_scheduler(scheduler, levels, p);

  const unsigned member = threadIdx.x % G;
  const PointArrays<S, Location, Weight> points = {locations, weights, mask};
  const PointGradientArrays<S, Location, Weight> gradients = {grad_locations, grad_weights, by_location};
  Walk<T> walk = {};
  walk.descriptors = &descriptors;
  walk.first = first_descriptor<G>();
  visit_rows<G>(scheduler, p, [&](unsigned row, unsigned plane, bool counts) {
    walk.value = reinterpret_cast<const char*>(value + static_cast<size_t>(plane) * D + member * VEC);
    load(walk.grad, grad_output + static_cast<size_t>(row) * D + member * VEC);
    const auto image = points.of_image(plane / M);
    if constexpr (S::FUSED) {
      backward_points<T, K>(walk, descriptors, levels, member, counts, 0,
                            image.template of_row<M, G>(static_cast<size_t>(row), references, p), gradients);
    } else {
      const size_t first = static_cast<size_t>(row) * K;  // computed once, or sm_100 spills
      backward_points<T, K>(walk, descriptors, levels, member, counts, 0, image.from(first), gradients.from(first));
    }
  });
}
