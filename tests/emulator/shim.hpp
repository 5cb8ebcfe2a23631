// SPDX-License-Identifier: Apache-2.0
//
// The part of CUDA C++ that the kernels use, for a C++17 compiler. Included before the kernel
// source by `emulator.py`, which also turns each `__shared__` declaration into an `emu::Shared`.
//
// Left out on purpose: `__activemask` (no code may depend on which lanes happen to run together)
// and dynamic shared memory. Not modelled: flush to zero, the memory model, concurrent blocks.
#pragma once

#define MSDA_EMULATED 1

#include <math.h>

#include <limits>
#include <type_traits>

#include "races.hpp"

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (static_cast<const uint3&>(::emu::current->index))

// ---- vector types, with CUDA's alignment

#define EMU_VECTOR2(T, name, align) \
  struct alignas(align) name {      \
    T x, y;                         \
  };                                \
  inline name make_##name(T x, T y) { return {x, y}; }
#define EMU_VECTOR3(T, name) \
  struct name {              \
    T x, y, z;               \
  };                         \
  inline name make_##name(T x, T y, T z) { return {x, y, z}; }
#define EMU_VECTOR4(T, name, align) \
  struct alignas(align) name {      \
    T x, y, z, w;                   \
  };                                \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }

EMU_VECTOR2(float, float2, 8)
EMU_VECTOR3(float, float3)
EMU_VECTOR4(float, float4, 16)
EMU_VECTOR2(double, double2, 16)
EMU_VECTOR2(int, int2, 8)
EMU_VECTOR3(int, int3)
EMU_VECTOR4(int, int4, 16)
EMU_VECTOR2(unsigned, uint2, 8)
EMU_VECTOR4(unsigned, uint4, 16)
EMU_VECTOR2(short, short2, 4)
EMU_VECTOR4(short, short4, 8)
EMU_VECTOR2(unsigned short, ushort2, 4)
EMU_VECTOR4(unsigned short, ushort4, 8)
EMU_VECTOR2(unsigned char, uchar2, 2)
EMU_VECTOR4(unsigned char, uchar4, 4)
EMU_VECTOR2(long long, longlong2, 16)
EMU_VECTOR2(unsigned long long, ulonglong2, 16)
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }

#undef EMU_VECTOR2
#undef EMU_VECTOR3
#undef EMU_VECTOR4

// ---- barriers, votes, shuffles

namespace emu {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) >= sizeof(From) && std::is_arithmetic_v<From>);
  To to = 0;
  std::memcpy(&to, &from, sizeof from);
  return to;
}

// One shuffle. The lane to read follows the pseudo-code of `shfl.sync` in the PTX manual: within
// segments of `width` lanes, the own lane where the segment ends.
template <class T>
inline T shuffle(Op op, unsigned mask, T value, unsigned operand, int width, const Site& site) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles arithmetic types only");
  const unsigned lane = current->lane;
  const unsigned size = static_cast<unsigned>(width);
  if (size < 1 || size > 32 || (size & (size - 1))) fail(site, "shuffle width is no power of two");
  const unsigned first = lane & -size, last = first + size - 1;
  operand &= 31;
  unsigned source = lane;
  if (op == Op::shfl) source = first | (operand & (size - 1));
  if (op == Op::shfl_up && lane >= first + operand) source = lane - operand;
  if (op == Op::shfl_down && lane + operand <= last) source = lane + operand;
  if (op == Op::shfl_xor && (lane ^ operand) <= last) source = lane ^ operand;
  // A lane outside its own mask is reported by the operation itself.
  if (!(mask >> source & 1) && source != lane) {
    std::string text;
    append(text, "%s from lane %u, which is not in the mask 0x%08x", op_names[int(op)], source, mask);
    fail(site, text);
  }
  const std::uint64_t got = warp_operation({op, unsigned(sizeof(T)), mask, source, bits<std::uint64_t>(value), site});
  T result;
  std::memcpy(&result, &got, sizeof result);
  return result;
}

inline unsigned vote(Op op, unsigned mask, bool predicate, const Site& site) {
  return static_cast<unsigned>(warp_operation({op, 0, mask, 0, predicate, site}));
}

}  // namespace emu

inline void __syncthreads(emu::Site site = emu::Site::here()) { emu::barrier(emu::Op::syncthreads, false, site); }
inline int __syncthreads_count(int predicate, emu::Site site = emu::Site::here()) {
  return int(emu::barrier(emu::Op::syncthreads_count, predicate, site));
}
inline int __syncthreads_and(int predicate, emu::Site site = emu::Site::here()) {
  return emu::barrier(emu::Op::syncthreads_and, predicate, site) == emu::machine.thread_count;
}
inline int __syncthreads_or(int predicate, emu::Site site = emu::Site::here()) {
  return emu::barrier(emu::Op::syncthreads_or, predicate, site) != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emu::Site site = emu::Site::here()) {
  emu::warp_operation({emu::Op::syncwarp, 0, mask, 0, 0, site});
}
inline int __all_sync(unsigned mask, int predicate, emu::Site site = emu::Site::here()) {
  return int(emu::vote(emu::Op::all, mask, predicate, site));
}
inline int __any_sync(unsigned mask, int predicate, emu::Site site = emu::Site::here()) {
  return int(emu::vote(emu::Op::any, mask, predicate, site));
}
inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Site site = emu::Site::here()) {
  return emu::vote(emu::Op::ballot, mask, predicate, site);
}
template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, emu::Site site = emu::Site::here()) {
  const auto pattern = emu::bits<std::uint64_t>(value);
  return unsigned(emu::warp_operation({emu::Op::match_any, unsigned(sizeof(T)), mask, 0, pattern, site}));
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, emu::Site site = emu::Site::here()) {
  return emu::shuffle(emu::Op::shfl, mask, value, unsigned(lane), width, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emu::Site site = emu::Site::here()) {
  return emu::shuffle(emu::Op::shfl_up, mask, value, delta, width, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, emu::Site site = emu::Site::here()) {
  return emu::shuffle(emu::Op::shfl_down, mask, value, delta, width, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, emu::Site site = emu::Site::here()) {
  return emu::shuffle(emu::Op::shfl_xor, mask, value, unsigned(lanes), width, site);
}

// ---- memory

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
inline T __ldcg(const T* p) {
  return *p;
}
template <class T>
inline void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
inline void __stcg(T* p, T value) {
  *p = value;
}
template <class T>
inline void __stwb(T* p, T value) {
  *p = value;
}

namespace emu {

template <class T, class... Allowed>
constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);
template <class T>
using same = std::common_type_t<T>;  // not deduced, so that the pointer decides the type

template <class T, class F>
EMU_UNSEEN inline T exchange(T* p, const Site& site, F&& next) {
  track_atomic(p, sizeof(T), site, __builtin_return_address(0));
  const T old = *p;
  *p = next(old);
  return old;
}

}  // namespace emu

template <class T>
inline T atomicAdd(T* p, emu::same<T> value, emu::Site site = emu::Site::here()) {
  static_assert(emu::one_of<T, int, unsigned, unsigned long long, float, double>);
  return emu::exchange(p, site, [&](T old) {
    if constexpr (std::is_same_v<T, int>)
      return int(unsigned(old) + unsigned(value));  // wraps
    else
      return T(old + value);
  });
}
template <class T>
inline T atomicMax(T* p, emu::same<T> value, emu::Site site = emu::Site::here()) {
  static_assert(emu::one_of<T, int, unsigned, long long, unsigned long long>);
  return emu::exchange(p, site, [&](T old) { return old < value ? value : old; });
}
template <class T>
inline T atomicMin(T* p, emu::same<T> value, emu::Site site = emu::Site::here()) {
  static_assert(emu::one_of<T, int, unsigned, long long, unsigned long long>);
  return emu::exchange(p, site, [&](T old) { return value < old ? value : old; });
}
template <class T>
inline T atomicOr(T* p, emu::same<T> value, emu::Site site = emu::Site::here()) {
  static_assert(emu::one_of<T, int, unsigned, unsigned long long>);
  return emu::exchange(p, site, [&](T old) { return old | value; });
}
template <class T>
inline T atomicAnd(T* p, emu::same<T> value, emu::Site site = emu::Site::here()) {
  static_assert(emu::one_of<T, int, unsigned, unsigned long long>);
  return emu::exchange(p, site, [&](T old) { return old & value; });
}
template <class T>
inline T atomicExch(T* p, emu::same<T> value, emu::Site site = emu::Site::here()) {
  static_assert(emu::one_of<T, int, unsigned, unsigned long long, float>);
  return emu::exchange(p, site, [&](T) { return value; });
}
template <class T>
inline T atomicCAS(T* p, emu::same<T> compare, emu::same<T> value, emu::Site site = emu::Site::here()) {
  static_assert(emu::one_of<T, int, unsigned, unsigned short, unsigned long long>);
  return emu::exchange(p, site, [&](T old) { return old == compare ? value : old; });
}

// ---- arithmetic

inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emu::bits<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)(a)*b >> 32); }

// Of a number and a NaN, the number: the rule of fmin and fmax in C and of min and max in CUDA.
template <bool LARGER, class T>
inline T one_of(T a, T b) {
  if constexpr (std::is_same_v<T, float>)
    return LARGER ? fmaxf(a, b) : fminf(a, b);
  else if constexpr (std::is_floating_point_v<T>)
    return LARGER ? fmax(a, b) : fmin(a, b);
  else
    return (a < b) == LARGER ? b : a;
}
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  return one_of<false, std::common_type_t<A, B>>(a, b);
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  return one_of<true, std::common_type_t<A, B>>(a, b);
}

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }

// The sum rounded toward minus infinity: the nearest sum, one step down where the exact error of
// that sum (Knuth's two-sum) is negative.
inline float __fadd_rd(float a, float b) {
  const float sum = a + b;
  if (!isfinite(a) || !isfinite(b)) return sum;
  if (isinf(sum)) return sum < 0 ? sum : std::numeric_limits<float>::max();
  if (sum == 0) return signbit(a) || signbit(b) ? -0.0f : 0.0f;
  const float from_b = sum - a;
  const float error = (a - (sum - from_b)) + (b - from_b);
  return error < 0 ? nextafterf(sum, -std::numeric_limits<float>::infinity()) : sum;
}

namespace emu {

// `cvt` of PTX, which saturates. NaN gives zero for float to int, else only the top bit.
template <class To, class From>
inline To convert(From x) {
  using Limits = std::numeric_limits<To>;
  if (isnan(x)) return sizeof(To) == 4 && sizeof(From) == 4 ? To(0) : Limits::min();
  if (x >= -From(Limits::min())) return Limits::max();
  return x < From(Limits::min()) ? Limits::min() : To(x);
}

}  // namespace emu

inline int __float2int_rd(float x) { return emu::convert<int>(floorf(x)); }
inline int __float2int_rn(float x) { return emu::convert<int>(rintf(x)); }
inline int __float2int_rz(float x) { return emu::convert<int>(truncf(x)); }
inline long long __float2ll_rn(float x) { return emu::convert<long long>(rintf(x)); }
inline long long __double2ll_rn(double x) { return emu::convert<long long>(rint(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline double __ll2double_rn(long long x) { return double(x); }
