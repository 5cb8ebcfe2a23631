// SPDX-License-Identifier: Apache-2.0
// Storage types and how they are loaded, widened, rounded and added to memory. No CUDA toolkit header is needed:
// 16-bit floats are plain bits here, converted by PTX on a device and by integer arithmetic elsewhere.
#pragma once

#if defined(__CUDA_ARCH__)
#define MSDA_PTX 1
#else
#define MSDA_PTX 0
#endif

struct half_t {
  unsigned short bits;
};
struct bfloat16_t {
  unsigned short bits;
};

// The type that computes with a value and accumulates its gradient.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16_t x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ __forceinline__ float widen(half_t x) {
#if MSDA_PTX
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const unsigned sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | magnitude << 13);
  // 2^112 moves the exponent's bias; the product is exact, subnormals included.
  const float y = __uint_as_float(magnitude << 13) * __uint_as_float(0x77800000u);
  return __uint_as_float(sign | __float_as_uint(y));
#endif
}

// Round to nearest, ties to even. The first argument only names the type.
__device__ __forceinline__ float narrow(float, float x) { return x; }
__device__ __forceinline__ double narrow(double, double x) { return x; }
__device__ __forceinline__ bfloat16_t narrow(bfloat16_t, float x) {
#if MSDA_PTX && __CUDA_ARCH__ >= 800
  bfloat16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {static_cast<unsigned short>(bits >> 16 | 0x40u)};
  return {static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
}
__device__ __forceinline__ half_t narrow(half_t, float x) {
#if MSDA_PTX
  half_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u;
  const unsigned magnitude = bits & 0x7fffffffu;
  unsigned out;
  if (magnitude > 0x7f800000u) {
    out = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    out = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    out = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    out = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<unsigned short>(sign | out)};
#endif
}

template <typename T>
__device__ __forceinline__ T narrow_to(typename Compute<T>::type x) {
  return narrow(T{}, x);
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < __int_as_float(0x7f800000); }
__device__ __forceinline__ bool is_finite(double x) { return fabs(x) < __longlong_as_double(0x7ff0000000000000ll); }

__device__ __forceinline__ bool is_infinite(float x) { return fabsf(x) == __int_as_float(0x7f800000); }
__device__ __forceinline__ bool is_infinite(double x) { return fabs(x) == __longlong_as_double(0x7ff0000000000000ll); }

// The type that one memory instruction of BYTES bytes moves.
template <int BYTES>
struct Word;
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <typename T, int COUNT>
using Words = typename Word<sizeof(T) * COUNT>::type;

// COUNT elements of type T from the bits that one memory instruction has moved.
template <typename T, typename Real, int COUNT>
__device__ __forceinline__ void unpack(T, Real (&to)[COUNT], Words<T, COUNT> bits) {
  union {
    Words<T, COUNT> bits;
    T at[COUNT];
  } word;
  word.bits = bits;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) to[i] = widen(word.at[i]);
}

// bfloat16 in pairs, one word each: half the instructions of one by one.
template <int COUNT>
__device__ __forceinline__ void unpack(bfloat16_t, float (&to)[COUNT], Words<bfloat16_t, COUNT> bits) {
  union {
    Words<bfloat16_t, COUNT> bits;
    unsigned words[COUNT / 2];
  } pairs;
  pairs.bits = bits;
#pragma unroll
  for (int i = 0; i < COUNT / 2; ++i) {
    to[2 * i] = __uint_as_float(pairs.words[i] << 16);
    to[2 * i + 1] = __uint_as_float(pairs.words[i] & 0xffff0000u);
  }
}

// COUNT elements by one memory instruction, from data that no thread of the launch writes.
template <typename Real, typename T, int COUNT>
__device__ __forceinline__ void load(Real (&to)[COUNT], const T* from) {
  unpack(T{}, to, __ldg(reinterpret_cast<const Words<T, COUNT>*>(from)));
}

// COUNT elements by one memory instruction, from shared memory.
template <typename Real, typename T, int COUNT>
__device__ __forceinline__ void load_shared(Real (&to)[COUNT], const T* from) {
  unpack(T{}, to, *reinterpret_cast<const Words<T, COUNT>*>(from));
}

__device__ __forceinline__ void store_words(void* to, const unsigned (&words)[1]) {
  __stwb(static_cast<unsigned*>(to), words[0]);
}
__device__ __forceinline__ void store_words(void* to, const unsigned (&words)[2]) {
  __stwb(static_cast<uint2*>(to), make_uint2(words[0], words[1]));
}
__device__ __forceinline__ void store_words(void* to, const unsigned (&words)[4]) {
  __stwb(static_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
}

// COUNT elements, rounded, by one memory instruction: the compiler splits an assignment through a pointer to uint4 in four.
template <typename T, int COUNT>
__device__ __forceinline__ void store(T* to, const float (&from)[COUNT]) {
  constexpr int PER_WORD = 4 / sizeof(T);
  unsigned words[COUNT / PER_WORD];
#pragma unroll
  for (int i = 0; i < COUNT / PER_WORD; ++i) {
    if constexpr (PER_WORD == 1)
      words[i] = __float_as_uint(from[i]);
    else
      words[i] = narrow_to<T>(from[2 * i]).bits | static_cast<unsigned>(narrow_to<T>(from[2 * i + 1]).bits) << 16;
  }
  store_words(to, words);
}

__device__ __forceinline__ void store(double* to, const double (&from)[2]) {
  __stwb(reinterpret_cast<double2*>(to), make_double2(from[0], from[1]));
}

// sum += a * x, fused. From sm_100 on one instruction does two, with the same rounding; ftz as in all code that CuPy compiles.
template <int COUNT>
__device__ __forceinline__ void add_product(float (&sum)[COUNT], float a, const float (&x)[COUNT]) {
#if MSDA_PTX && __CUDA_ARCH__ >= 1000
  static_assert(COUNT % 2 == 0, "pairs");
#pragma unroll
  for (int i = 0; i < COUNT; i += 2)
    asm("{\n\t"
        ".reg .b64 sums, factors, xs;\n\t"
        "mov.b64 sums, {%0, %1};\n\t"
        "mov.b64 factors, {%2, %2};\n\t"
        "mov.b64 xs, {%3, %4};\n\t"
        "fma.rn.ftz.f32x2 sums, factors, xs, sums;\n\t"
        "mov.b64 {%0, %1}, sums;\n\t"
        "}"
        : "+f"(sum[i]), "+f"(sum[i + 1])
        : "f"(a), "f"(x[i]), "f"(x[i + 1]));
#else
#pragma unroll
  for (int i = 0; i < COUNT; ++i) sum[i] += a * x[i];
#endif
}

// Add four neighbouring floats to memory, 16-byte aligned. No memory clobber: no kernel reads what it adds, so loads may
// move across.
__device__ __forceinline__ void reduce_add(float* to, float a, float b, float c, float d) {
#if MSDA_PTX && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d));
#else
  atomicAdd(to, a);
  atomicAdd(to + 1, b);
  atomicAdd(to + 2, c);
  atomicAdd(to + 3, d);
#endif
}

// Optimisation barrier: the compiler keeps x in a register, and neither recomputes it nor splits the sum behind it.
__device__ __forceinline__ unsigned opaque(unsigned x) {
#if MSDA_PTX
  asm volatile("" : "+r"(x));
#endif
  return x;
}
template <typename T>
__device__ __forceinline__ T* opaque(T* x) {
#if MSDA_PTX
  asm volatile("" : "+l"(x));
#endif
  return x;
}
