// SPDX-License-Identifier: Apache-2.0
// Gradients of value as sums of whole numbers, which come out the same in whatever order they are added.
//
// Each (image, head) has a quantum, a power of two such that no sum can overflow; README.md derives it. An addend
// share * grad is rounded to a whole number of quanta and added to memory as a 64-bit integer. For float64 what the
// rounding left goes, in quanta so much finer, to a second integer.
//
// Sums   LIMBS arrays of the shape of value, one after another, then for each (image, head) two 32-bit integers: the
//        largest exponent fields of grad_output and of the weights that count. All zero before the first launch.
#pragma once

#include "levels.cuh"
#include "scalar.cuh"

using Sum = unsigned long long;  // in two's complement: memory adds no signed 64-bit integers

constexpr int MOST_BITS = 43;           // of an addend's magnitude: what the conversion below can hold
constexpr Sum NOT_FINITE = 1ull << 63;  // as far from zero as can be: no finite addends lead from here to a valid sum
constexpr int VALID_BITS = 62;          // of a sum's magnitude

template <typename Real>
struct Binary;
template <>
struct Binary<float> {
  static constexpr int LOWEST = -126, HIGHEST = 127, LIMBS = 1;  // exponents of normal numbers
};
template <>
struct Binary<double> {
  static constexpr int LOWEST = -1022, HIGHEST = 1023, LIMBS = 2;
};

// What a gradient of value is summed in.
template <typename Value, bool FIXED>
struct Accumulator {
  using type = typename Compute<Value>::type;
};
template <typename Value>
struct Accumulator<Value, true> {
  using type = Sum;
};

// The exponent as stored; 0, as of zero, for infinity and NaN, which must not decide a scale.
__device__ __forceinline__ int exponent_field(float x) {
  const int field = __float_as_int(x) >> 23 & 0xff;
  return field == 0xff ? 0 : field;
}
__device__ __forceinline__ int exponent_field(double x) {
  const int field = static_cast<int>(__double_as_longlong(x) >> 52) & 0x7ff;
  return field == 0x7ff ? 0 : field;
}

// 2 to the power of e, of a normal number. The first argument only names the type.
__device__ __forceinline__ float power(float, int e) { return __int_as_float((e + Binary<float>::HIGHEST) << 23); }
__device__ __forceinline__ double power(double, int e) {
  return __longlong_as_double(static_cast<long long>(e + Binary<double>::HIGHEST) << 52);
}

// x * 2^e for any e that two normal factors reach; beyond, the product of what is scaled here is zero or infinite anyway.
template <typename Real>
__device__ __forceinline__ Real times_power(Real x, int e) {
  constexpr int LOWEST = Binary<Real>::LOWEST, HIGHEST = Binary<Real>::HIGHEST;
  const int first = min(max(e, LOWEST), HIGHEST), rest = min(max(e - first, LOWEST), HIGHEST);
  return x * power(Real{}, first) * power(Real{}, rest);
}

// The two exponent fields of one (image, head).
template <typename Real>
__device__ __forceinline__ int* largest_exponents(Sum* sums, const Shape& p, long long image_head) {
  return reinterpret_cast<int*>(sums + Binary<Real>::LIMBS * value_elements(p) + image_head);
}

// How one (image, head) is counted in quanta.
template <typename Real>
struct Scale {
  Real weight;     // factor of a weight, which then is at most 4
  int grad;        // grad_output times 2^grad, times such a share, is the addend in quanta
  int sum;         // a quantum is 2^sum
  int bits;        // no addend exceeds 2^bits quanta
  long long limb;  // elements from one limb to the next
};

template <typename Real>
__device__ inline Scale<Real> read_scale(Sum* sums, const Shape& p, long long image_head) {
  constexpr int LOWEST = Binary<Real>::LOWEST;
  const int* fields = largest_exponents<Real>(sums, p, image_head);
  // |grad_output| < 2^of_grad and |weight| < 2^of_weight.
  const int of_grad = max(fields[0], 1) + LOWEST, of_weight = max(fields[1], 1) + LOWEST;
  long long addends = static_cast<long long>(p.num_queries) * p.num_levels * p.num_points;
  addends +=
      addends >> 10;  // backward_value_binned.cu adds up to 8192 of them as floats, each sum too large by 2^-11 at most
  const int bits = min(MOST_BITS, VALID_BITS - (64 - __clzll(addends)));
  const int taken = min(of_weight, -LOWEST);  // 2^-taken must be a normal number
  return {power(Real{}, -taken), bits - of_grad - (of_weight - taken), of_grad + of_weight - bits, bits,
          value_elements(p)};
}

// share * grad to the nearest whole number, at most 2^43. Next to HIGH a float counts in steps of 2^22, next to LOW in
// ones: one sum holds in its mantissa the steps, the other what they leave of the exact product. The conversion unit
// would be slow at 64 bits. HIGH is 1.5 * 2^45 less 301 steps: so the bits of both cancel but for BIAS in the upper half.
__device__ __forceinline__ Sum whole(float share, float grad) {
  const float HIGH = __uint_as_float(0x56400000u - 301u), LOW = __uint_as_float(301u << 22);
  constexpr Sum BIAS = 0x56400000ull << 22;
  const float high = fmaf(share, grad, HIGH);
  const float low = fmaf(share, grad, HIGH + LOW - high);
  return static_cast<Sum>(__float_as_uint(high)) * (1u << 22) + ((0 - BIAS) | __float_as_uint(low));
}

// Add share * grad to a sum, or mark the sum where that is not finite.
__device__ __forceinline__ void add_fixed(Sum* to, const Scale<float>&, float share, float grad) {
  if (is_finite(share * grad))
    atomicAdd(to, whole(share, grad));
  else
    atomicExch(to, NOT_FINITE);
}
__device__ __forceinline__ void add_fixed(Sum* to, const Scale<double>& scale, double share, double grad) {
  const double product = share * grad, high = rint(product);
  if (is_finite(product)) {
    atomicAdd(to, static_cast<Sum>(__double2ll_rn(high)));
    const double rest = fma(share, grad, -high) * power(double{}, scale.bits);
    atomicAdd(to + scale.limb, static_cast<Sum>(__double2ll_rn(rest)));
  } else {
    atomicExch(to, NOT_FINITE);
  }
}

// Add a sum of such products, of any number of quanta up to 2^VALID_BITS.
__device__ __forceinline__ void add_quanta(Sum* to, float quanta) {
  if (is_finite(quanta))
    atomicAdd(to, static_cast<Sum>(__float2ll_rn(quanta)));
  else
    atomicExch(to, NOT_FINITE);
}

// The number that a sum stands for.
template <typename Real>
__device__ __forceinline__ Real from_fixed(const Sum* sum, const Scale<Real>& scale) {
  if (*sum + (1ull << VALID_BITS) >= NOT_FINITE) return static_cast<Real>(__int_as_float(0x7fc00000));
  Real quanta = static_cast<Real>(static_cast<long long>(*sum));
  if constexpr (Binary<Real>::LIMBS == 2)
    quanta += static_cast<Real>(static_cast<long long>(sum[scale.limb])) * power(Real{}, -scale.bits);
  return times_power(quanta, scale.sum);
}
