// SPDX-License-Identifier: Apache-2.0
// The level table: by value in the launch parameters where the host knows it, from device arrays where only they do.
#pragma once

constexpr unsigned ALL_LANES = 0xffffffffu;

struct Shape {
  int batch;         // N
  int spatial_size;  // S
  int num_heads;     // M
  int head_dim;      // D
  int num_queries;   // Lq
  int num_levels;    // L
  int num_points;    // P
};

// Elements of value.
__device__ __forceinline__ long long value_elements(const Shape& p) {
  return static_cast<long long>(p.batch) * p.spatial_size * p.num_heads * p.head_dim;
}

// Every scalar of a launch in one struct, with room for LEVELS levels; plans.py builds the same layout.
template <int LEVELS>
struct Params : Shape {
  int levels[LEVELS][3];  // H, W, start
};

using GenericParams = Params<MAX_LEVELS>;

struct alignas(16) Level {  // one load
  int height, width;
  int start;  // negative: the level does not fit S, and every output that touches it is NaN
};

// sizes (L, 2) and starts (L,) override the table in p where they are not null. Nothing on the host has checked them.
template <int LEVELS>
__device__ inline Level read_level(int level, const long long* sizes, const long long* starts,
                                   const Params<LEVELS>& p) {
  long long height, width, start;
  if (sizes != nullptr) {
    height = sizes[2 * level];
    width = sizes[2 * level + 1];
  } else {
    height = p.levels[level][0];
    width = p.levels[level][1];
  }
  if (starts != nullptr) {
    start = starts[level];
  } else if (level < LEVELS && p.levels[level][2] != DERIVED_START) {
    start = p.levels[level][2];
  } else {
    unsigned long long sum = 0;  // unsigned: a nonsensical table may wrap, it is refused below
#pragma unroll 1
    for (int i = 0; i < level; ++i)
      sum += static_cast<unsigned long long>(sizes[2 * i]) * static_cast<unsigned long long>(sizes[2 * i + 1]);
    start = static_cast<long long>(sum);
  }
  const long long largest = 0x7fffffff;
  const bool fits = height >= 0 && width >= 0 && start >= 0 && height <= largest && width <= largest &&
                    start <= p.spatial_size - height * width;
  // Without pixels, but with a width: then width - 1 does not wrap. Its other size may be too large to compute with.
  if (!fits) return {0, 1, -1};
  if (height == 0 || width == 0) return {0, 1, 0};
  return {static_cast<int>(height), static_cast<int>(width), static_cast<int>(start)};
}

// The table in shared memory, once per block.
template <int L>
__device__ inline void load_levels(Level (&table)[L], const long long* sizes, const long long* starts,
                                   const Params<L>& p) {
  static_assert(L <= BLOCK, "one thread reads one level");
  if (threadIdx.x < L) table[threadIdx.x] = read_level(threadIdx.x, sizes, starts, p);
  __syncthreads();
}
