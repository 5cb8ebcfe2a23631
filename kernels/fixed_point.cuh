// SPDX-License-Identifier: Apache-2.0
// Gradients of value accumulated in fixed point: integer additions are bitwise identical in whatever order they happen.
//
// Each (image, head) has a fixed-point unit, a power of two such that no accumulator can overflow; README.md derives it.
// An addend coefficient * grad is rounded to a whole number of units and added to memory as a 64-bit integer. For
// float64 the rounding error goes, in finer units, to a second integer.
//
// Layout   LIMBS arrays of the shape of value, one after another, then for each (image, head) two 32-bit integers: the
//          largest exponent fields of grad_output and of the weights of points that contribute. All zero before the first launch.
#pragma once

#include "levels.cuh"
#include "scalar.cuh"

using FixedPoint = unsigned long long;  // two's complement: memory has no signed 64-bit addition

constexpr int MOST_BITS = 43;                  // of an addend's magnitude: the limit of to_fixed below
constexpr int VALID_BITS = 62;                 // of an accumulator's magnitude
constexpr FixedPoint NON_FINITE = 1ull << 63;  // poison: so far from zero that no finite addends reach a valid sum

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

// The type that accumulates a gradient of value.
template <typename Value, bool FIXED>
struct Accumulator {
  using type = typename Compute<Value>::type;
};
template <typename Value>
struct Accumulator<Value, true> {
  using type = FixedPoint;
};

// The exponent as stored; 0, as of zero, for infinity and NaN, which must not decide a unit.
__device__ __forceinline__ int exponent_field(float x) {
  const int field = __float_as_int(x) >> 23 & 0xff;
  return field == 0xff ? 0 : field;
}
__device__ __forceinline__ int exponent_field(double x) {
  const int field = static_cast<int>(__double_as_longlong(x) >> 52) & 0x7ff;
  return field == 0x7ff ? 0 : field;
}

// 2^e, a normal number. The first argument only names the type.
__device__ __forceinline__ float power(float, int e) { return __int_as_float((e + Binary<float>::HIGHEST) << 23); }
__device__ __forceinline__ double power(double, int e) {
  return __longlong_as_double(static_cast<long long>(e + Binary<double>::HIGHEST) << 52);
}

// x * 2^e for any e that two normal factors reach; beyond that, the products scaled here are zero or infinite anyway.
template <typename Real>
__device__ __forceinline__ Real times_power(Real x, int e) {
  constexpr int LOWEST = Binary<Real>::LOWEST, HIGHEST = Binary<Real>::HIGHEST;
  const int first = min(max(e, LOWEST), HIGHEST), rest = min(max(e - first, LOWEST), HIGHEST);
  return x * power(Real{}, first) * power(Real{}, rest);
}

// The two exponent fields of one (image, head).
template <typename Real>
__device__ __forceinline__ int* largest_exponents(FixedPoint* accumulator, const Shape& p, long long image_head) {
  return reinterpret_cast<int*>(accumulator + Binary<Real>::LIMBS * value_elements(p) + image_head);
}

// How one (image, head) converts to and from its unit.
template <typename Real>
struct Scale {
  Real weight;     // factor of a weight, whose magnitude then is at most 4
  int grad;        // grad_output * 2^grad, times a coefficient of such a weight, is the addend in units
  int unit;        // the unit is 2^unit
  int bits;        // no addend exceeds 2^bits units
  long long limb;  // elements from one limb to the next
};

template <typename Real>
__device__ inline Scale<Real> read_scale(FixedPoint* accumulator, const Shape& p, long long image_head) {
  constexpr int LOWEST = Binary<Real>::LOWEST;
  const int* fields = largest_exponents<Real>(accumulator, p, image_head);
  // |grad_output| < 2^of_grad and |weight| < 2^of_weight.
  const int of_grad = max(fields[0], 1) + LOWEST, of_weight = max(fields[1], 1) + LOWEST;
  long long addends = static_cast<long long>(p.num_queries) * p.row_points;
  // backward_value_binned.cu adds up to 4096 of them as floats, which makes a sum too large by 2^-12 at most.
  addends += addends >> 10;
  const int bits = min(MOST_BITS, VALID_BITS - (64 - __clzll(addends)));
  const int taken = min(of_weight, -LOWEST);  // 2^-taken must be a normal number
  const int grad = bits - of_grad - (of_weight - taken);
  return {power(Real{}, -taken), grad, of_grad + of_weight - bits, bits, value_elements(p)};
}

// coefficient * grad to the nearest whole number, at most 2^43. Next to HIGH a float counts in steps of 2^22, next to LOW
// in ones: `high` holds the steps in its mantissa, `low` the rest of the exact product. The conversion unit would be slow
// at 64 bits. HIGH is 1.5 * 2^45 less 301 steps, so that the bits of both cancel but for BIAS in the upper half.
__device__ __forceinline__ FixedPoint to_fixed(float coefficient, float grad) {
  const float HIGH = __uint_as_float(0x56400000u - 301u), LOW = __uint_as_float(301u << 22);
  constexpr FixedPoint BIAS = 0x56400000ull << 22;
  const float high = fmaf(coefficient, grad, HIGH);
  const float low = fmaf(coefficient, grad, HIGH + LOW - high);
  return static_cast<FixedPoint>(__float_as_uint(high)) * (1u << 22) + ((0 - BIAS) | __float_as_uint(low));
}

// Add coefficient * grad, in units, to an accumulator; poison it if that is non-finite.
__device__ __forceinline__ void add_fixed(FixedPoint* to, const Scale<float>&, float coefficient, float grad) {
  if (is_finite(coefficient * grad))
    atomicAdd(to, to_fixed(coefficient, grad));
  else
    atomicExch(to, NON_FINITE);
}
__device__ __forceinline__ void add_fixed(FixedPoint* to, const Scale<double>& scale, double coefficient, double grad) {
  const double product = coefficient * grad, high = rint(product);
  if (is_finite(product)) {
    atomicAdd(to, static_cast<FixedPoint>(__double2ll_rn(high)));
    const double rest = fma(coefficient, grad, -high) * power(double{}, scale.bits);
    atomicAdd(to + scale.limb, static_cast<FixedPoint>(__double2ll_rn(rest)));
  } else {
    atomicExch(to, NON_FINITE);
  }
}

// Add a float sum of such products, of up to 2^VALID_BITS units.
__device__ __forceinline__ void add_units(FixedPoint* to, float units) {
  if (is_finite(units))
    atomicAdd(to, static_cast<FixedPoint>(__float2ll_rn(units)));
  else
    atomicExch(to, NON_FINITE);
}

// The number that an accumulator holds.
template <typename Real>
__device__ __forceinline__ Real from_fixed(const FixedPoint* accumulator, const Scale<Real>& scale) {
  if (*accumulator + (1ull << VALID_BITS) >= NON_FINITE) return static_cast<Real>(__int_as_float(0x7fc00000));
  Real units = static_cast<Real>(static_cast<long long>(*accumulator));
  if constexpr (Binary<Real>::LIMBS == 2)
    units += static_cast<Real>(static_cast<long long>(accumulator[scale.limb])) * power(Real{}, -scale.bits);
  return times_power(units, scale.unit);
}
