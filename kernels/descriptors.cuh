// SPDX-License-Identifier: Apache-2.0
// Sample descriptors in shared memory: computed once per point, read by every lane of a group.
//
// A group of G lanes owns a row (n, q, m) or, with split-K, one of SPLIT_K equal parts of its K points; each lane
// of the group owns D / G channels. Points are taken in stages of G: every lane computes the descriptor of one point, then
// the whole group walks through its G descriptors. A descriptor is shared within one warp, so __syncwarp orders all.
#pragma once

#include "fixed_point.cuh"
#include "point.cuh"

// Where descriptor i lies: after every eighth one is a gap, so that neither the lanes, which write one each, nor the
// groups of a warp, which read those of the same number, meet in a bank.
__device__ constexpr int padded(int i) { return i + i / 8; }

// The descriptors of a block's warps, thread by thread, at `padded` places.
template <int THREADS>
struct Descriptors {
  static constexpr int SIZE = padded(THREADS);
  float4 coefficients[SIZE];  // of the four corners
  // Bytes from the (image, head) base to the top-left corner | corner bits, and bytes per pixel row. INTERIOR: pixels from
  // the base to the top-left and to the bottom-left corner.
  int2 places[SIZE];
};

// Where the first descriptor of this thread's group lies. Descriptor j of the group lies padded(j) after it.
template <int G>
__device__ __forceinline__ int first_descriptor() {
  return padded(threadIdx.x / G * G);
}

// threadIdx.x, read anew: the compiler cannot merge it with an earlier read, which shortens the lives of the registers
// computed from it.
__device__ __forceinline__ unsigned reread_thread() {
#if MSDA_PTX
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// The row of a group. Blocks run over queries first, then heads, then images: neighbours in time share a head.
template <int M, int G, int SPLIT_K>
struct GroupRow {
  unsigned image, head, query;
  unsigned part;    // of the row's points
  unsigned member;  // lane within the group
  bool active;

  __device__ GroupRow(const Shape& p, unsigned thread) {
    const unsigned image_head = blockIdx.y + blockIdx.z * gridDim.y;
    const unsigned group = thread / G;
    image = image_head / M;
    head = image_head % M;
    part = group % SPLIT_K;
    member = thread % G;
    query = blockIdx.x * (blockDim.x / (G * SPLIT_K)) + group / SPLIT_K;
    active = query < static_cast<unsigned>(p.num_queries) && image < static_cast<unsigned>(p.batch);
  }

  // Index of the row among N * Lq * M.
  __device__ size_t index(const Shape& p) const {
    return (static_cast<size_t>(image) * static_cast<unsigned>(p.num_queries) + query) * M + head;
  }

  // Index of position 0 of the row's image among N * S.
  __device__ size_t image_start(const Shape& p) const {
    return static_cast<size_t>(image) * static_cast<unsigned>(p.spatial_size);
  }

  // Index of the first element of position 0 of the row's (image, head) in an array of shape (N, S, M, D).
  template <int D>
  __device__ size_t base(const Shape& p) const {
    return (static_cast<size_t>(image) * static_cast<unsigned>(p.spatial_size) * M + head) * D;
  }
};

// Write the descriptor of a point to the place `index`. PIXEL: bytes between neighbouring pixels of one head. INTERIOR: all
// four corners are known to count, and the descriptor counts pixels. FIXED: the coefficients are multiplied by `factor`, and
// are zero where the weight is non-finite.
template <int PIXEL, bool INTERIOR, bool FIXED = false, int THREADS>
__device__ __forceinline__ void write_descriptor(Descriptors<THREADS>& descriptors, int index,
                                                 const LocatedPoint<float>& point, float factor = 1.0f) {
  float weight = point.weight;
  if (FIXED) weight = is_finite(weight) ? weight * factor : 0.0f;
  const Four<float> coefficient = corner_coefficients<FIXED>(point.cell, weight);
  const int width = point.level.width, pixel = point.level.start + point.cell.pixel;
  descriptors.coefficients[index] =
      make_float4(coefficient.at[0], coefficient.at[1], coefficient.at[2], coefficient.at[3]);
  descriptors.places[index] = INTERIOR ? make_int2(pixel, pixel + width)
                                       : make_int2(pixel * PIXEL | static_cast<int>(point.cell.corners), width * PIXEL);
}

// A descriptor that contributes nothing.
template <int THREADS>
__device__ __forceinline__ LocatedPoint<float> empty_descriptor(Descriptors<THREADS>& descriptors, int index) {
  descriptors.coefficients[index] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  descriptors.places[index] = make_int2(0, 0);
  return {{0, 0, 0, 0.0f, 0.0f, 0u}, {0, 0, 0}, 0.0f};
}

// Address of corner i of a descriptor. WIDER: size of the array's elements over that of Value, which the descriptor was
// made for. INTERIOR: all corner bits are known to be set, so subtraction removes them.
template <bool INTERIOR, int PIXEL, int WIDER, typename Bytes>
__device__ __forceinline__ Bytes* corner_pointer(Bytes* base, const int2& place, int corner) {
  const int corner_bits = static_cast<int>(ALL_CORNERS);
  const int top_left = INTERIOR ? place.x - corner_bits : place.x & ~corner_bits;
  Bytes* row = base + static_cast<long long>(top_left) * WIDER;
  if (corner & 2) row += static_cast<long long>(place.y) * WIDER;
  return corner & 1 ? row + PIXEL * WIDER : row;
}
