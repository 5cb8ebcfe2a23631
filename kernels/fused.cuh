// SPDX-License-Identifier: Apache-2.0
// What a fused call holds in place of locations and weights: offsets from reference points, and logits. Here is how to
// get from these to a point's coordinates and attention weight, and its gradient back; README.md has the equations.
//
// Layout   offsets (N, Lq, M, K, 2) and logits (N, Lq, M, K), where locations and weights would be; references
//          (N or 1, Lq, L or 1, 2 or 4): (x, y) or (x, y, w, h).
#pragma once

#include "bilinear.cuh"
#include "scalar.cuh"

// How a fused kernel samples: as a plain one does, at points from reference points of so many coordinates. BY_LEVEL: a
// query has one for each level, else one for all.
template <typename Sampling, typename Reference_, int COORDINATES_, bool BY_LEVEL_>
struct Fused : Sampling {
  using Reference = Reference_;
  static constexpr bool FUSED = true, BOXES = COORDINATES_ == 4, BY_LEVEL = BY_LEVEL_;
  static constexpr int COORDINATES = COORDINATES_;
  static constexpr int QUERY = COORDINATES * (BY_LEVEL ? Sampling::L : 1);  // numbers of a query
};

// The launch parameters of a kernel that samples so. plans.py builds the same layout.
template <typename Params, typename S, bool = S::FUSED>
struct ParamsOf : Params {};
template <typename Params, typename S>
struct ParamsOf<Params, S, true> : Params {
  float offset_scale;  // of boxes
  int reference_rows;  // (image, query) that have reference points of their own: those of one image serve all
};

// e^x for x <= 0, by one multiplication and 2^x: its relative error is up to about 2^-22 (1 + |x| / 3), where expf's is half
// of that and takes four times the instructions. Where |x| is large the result counts for little in a softmax.
__device__ __forceinline__ float exp_not_positive(float x) {
  const float power = x * 1.44269504f;  // log2(e)
#if MSDA_PTX
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(power));
  return result;
#else
  return exp2f(power);
#endif
}

// 1 / x for x >= 1, to one unit in the last place: without the steps of a division for results that underflow.
__device__ __forceinline__ float reciprocal(float x) {
#if MSDA_PTX
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

// The softmax of a row's logits. The largest is subtracted first, so that no finite logit is too large.
struct Softmax {
  float largest, inverse_sum;

  __device__ float weight(float logit) const { return exp_not_positive(logit - largest) * inverse_sum; }
};

// How many of LANES lanes share the logits of a row: no more than have one.
__device__ constexpr int sharing(int num_logits, int lanes) {
  return lanes > 1 && lanes / 2 >= num_logits ? sharing(num_logits, lanes / 2) : lanes;
}

// Of the K logits of a row that LANES neighbours have in common; each of them gets it.
template <int K, int LANES, typename Logit>
__device__ __forceinline__ Softmax softmax_of(const Logit* logits) {
  constexpr int G = sharing(K, LANES), OWN = (K + G - 1) / G;
  const unsigned member = threadIdx.x % G;
  const float nothing = -__int_as_float(0x7f800000);  // infinity: a logit that adds nothing
  float own[OWN], largest = nothing, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const unsigned k = i * G + member;
    own[i] = (i + 1) * G <= K || k < K ? widen(logits[k]) : nothing;
    largest = fmaxf(largest, own[i]);  // NaN shows in the sum
  }
#pragma unroll
  for (int offset = 1; offset < G; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
#pragma unroll
  for (int i = 0; i < OWN; ++i) sum += exp_not_positive(own[i] - largest);
#pragma unroll
  for (int offset = 1; offset < G; offset *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
  return {largest, reciprocal(sum)};  // sum >= 1: the largest logit adds 1
}

// What the points of a row have in common: in a plain call, nothing.
template <typename S, bool = S::FUSED>
struct RowOf {};
template <typename S>
struct RowOf<S, true> {
  const typename S::Reference* references;  // of the row's query
  unsigned first;                           // of the row's points among N * Lq * M * K
  float offset_scale;
  Softmax softmax;
};

// A point as loaded: an offset and its reference point.
template <typename S>
struct OffsetPoint {
  Fractions<float> offset;
  float reference[S::COORDINATES];
};

// The reference points of a row's query: among all of them, where a row stands for N * Lq * M.
template <typename S, int M, typename Params>
__device__ __forceinline__ const typename S::Reference* query_references(const typename S::Reference* references,
                                                                         unsigned row, const Params& p) {
  unsigned query = row / M;
  // At most once: a loop, since the compiler would compute the remainder of an `if` in any case.
#pragma unroll 1
  while (query >= static_cast<unsigned>(p.reference_rows)) query = opaque(query % p.reference_rows);
  return references + static_cast<size_t>(query) * S::QUERY;
}

// Pixels that a box's point moves by an offset of one.
template <typename S>
__device__ __forceinline__ Coordinates<float> box_step(const float (&reference)[4], float offset_scale,
                                                       const Level& level, int number) {
  const float scale = offset_scale * S::inverse_points(number);
  return {reference[2] * scale * static_cast<float>(level.width),
          reference[3] * scale * static_cast<float>(level.height)};
}

// The location, with a rounding after each operation as torch has it: the nearest pixel is then that of torch.
template <typename S>
__device__ __forceinline__ Fractions<float> rounded_location(const OffsetPoint<S>& at, float offset_scale,
                                                             const Level& level, int number) {
  float u, v;
  if constexpr (S::BOXES) {
    const float points = static_cast<float>(S::points(number));
    u = __fmul_rn(__fmul_rn(at.offset.u / points, at.reference[2]), offset_scale);
    v = __fmul_rn(__fmul_rn(at.offset.v / points, at.reference[3]), offset_scale);
  } else {
    u = at.offset.u / static_cast<float>(level.width);
    v = at.offset.v / static_cast<float>(level.height);
  }
  return {__fadd_rn(at.reference[0], u), __fadd_rn(at.reference[1], v)};
}

// Coordinates in pixels, of a point of the level of this number. No division: the size of the level cancels.
template <typename S>
__device__ __forceinline__ Coordinates<float> to_pixels(const OffsetPoint<S>& at, float offset_scale,
                                                        const Level& level, int number) {
  if constexpr (S::NEAREST) {
    return to_pixels<true>(rounded_location(at, offset_scale, level, number), level);
  } else if constexpr (S::BOXES) {
    const Coordinates<float> step = box_step<S>(at.reference, offset_scale, level, number);
    const Coordinates<float> center = to_pixels<false>(Fractions<float>{at.reference[0], at.reference[1]}, level);
    return {center.x + at.offset.u * step.x, center.y + at.offset.v * step.y};
  } else {
    return {at.reference[0] * static_cast<float>(level.width) + (at.offset.u - 0.5f),
            at.reference[1] * static_cast<float>(level.height) + (at.offset.v - 0.5f)};
  }
}
