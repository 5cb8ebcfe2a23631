// SPDX-License-Identifier: Apache-2.0
// What the specialised kernels compute once per point and read once per group.
//
// A group of G lanes owns a row (n, q, m) or, with SPLIT, one of SPLIT equal parts of its K = L*P points; each lane of
// the group owns D / G channels. Points are taken in stages of G: every lane computes the record of one point, writes it
// to its own slot of a shared array, and then the whole group walks through its G slots. A slot belongs to one warp, so
// __syncwarp is all the ordering there is.
#pragma once

#include "bilinear.cuh"
#include "fixed_point.cuh"
#include "scalar.cuh"

// The records of a block's warps. Those that the groups of a warp read together, number j of each, lie side by side:
// one access without bank conflicts.
template <int THREADS>
struct Slots {
  float4 shares[THREADS];  // of the four corners
  int2 places[THREADS];  // bytes from the (image, head) base to the top-left corner | corner bits, bytes per pixel row;
                         // of INTERIOR records the pixels from there to the top-left and to the bottom-left corner
};

// The slot of record j of this thread's group.
template <int G>
__device__ __forceinline__ int slot_of(int j) {
  return threadIdx.x / WARP * WARP + threadIdx.x % WARP / G + j * (WARP / G);
}

// threadIdx.x in a way that the compiler cannot trace back to an earlier reading: what is computed from it is computed
// anew, and keeps no register occupied in between.
__device__ __forceinline__ unsigned reread_thread() {
#if MSDA_PTX
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return threadIdx.x;
#endif
}

// x as if it came from elsewhere: the compiler keeps it, and neither computes it anew nor takes its sum apart.
__device__ __forceinline__ unsigned untraced(unsigned x) {
#if MSDA_PTX
  asm volatile("" : "+r"(x));
#endif
  return x;
}
template <typename T>
__device__ __forceinline__ T* untraced(T* x) {
#if MSDA_PTX
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// Which rows a group works on. Blocks run over queries first, then heads, then images: neighbours in time share a head.
template <int M, int G, int SPLIT>
struct Row {
  unsigned image, head, query;
  unsigned part;    // of the row's points
  unsigned member;  // lane within the group
  bool active;

  static constexpr int QUERIES = BLOCK / (G * SPLIT);  // per block

  __device__ Row(const Shape& p, unsigned thread) {
    const unsigned image_head = blockIdx.y + blockIdx.z * gridDim.y;
    const unsigned group = thread / G;
    image = image_head / M;
    head = image_head % M;
    part = group % SPLIT;
    member = thread % G;
    query = blockIdx.x * QUERIES + group / SPLIT;
    active = query < static_cast<unsigned>(p.num_queries) && image < static_cast<unsigned>(p.batch);
  }

  // Index of the row among N * Lq * M.
  __device__ size_t index(const Shape& p) const {
    return (static_cast<size_t>(image) * static_cast<unsigned>(p.num_queries) + query) * M + head;
  }

  // Index of the row's first element of position 0 in an array of shape (N, S, M, D).
  template <int D>
  __device__ size_t base(const Shape& p) const {
    return (static_cast<size_t>(image) * static_cast<unsigned>(p.spatial_size) * M + head) * D;
  }
};

// A point as the lane that computed it keeps it, for the gradients.
struct Point {
  Cell<float> cell;
  Level level;
  float weight;
};

// PIXEL: bytes between neighbouring pixels of one head. INTERIOR: all four corners are known to lie inside the level,
// and the record counts pixels. FIXED: the shares are multiplied by `factor`, and zero where the weight is not finite.
template <int PIXEL, bool INTERIOR, bool FIXED = false, int THREADS>
__device__ __forceinline__ Point make_record(Slots<THREADS>& slots, int slot, const Coordinates<float>& at,
                                             float weight, const Level& level, float factor = 1.0f) {
  Point point = {locate<true, INTERIOR>(at, level), level, weight};
  if (point.cell.corners == 0u) point.weight = 0.0f;
  if (!INTERIOR && level.start < 0) point.weight = __int_as_float(0x7fc00000);
  float shared = point.weight;
  if (FIXED) shared = is_finite(shared) ? shared * factor : 0.0f;
  const Four<float> share = corner_shares(point.cell, shared);
  const int pixel = level.start + point.cell.row * level.width + point.cell.column;
  slots.shares[slot] = make_float4(share.at[0], share.at[1], share.at[2], share.at[3]);
  slots.places[slot] = INTERIOR ? make_int2(pixel, pixel + level.width)
                                : make_int2(pixel * PIXEL | static_cast<int>(point.cell.corners), level.width * PIXEL);
  return point;
}

// A slot that contributes nothing.
template <int THREADS>
__device__ __forceinline__ Point empty_record(Slots<THREADS>& slots, int slot) {
  slots.shares[slot] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  slots.places[slot] = make_int2(0, 0);
  return {{0, 0, 0.0f, 0.0f, 0u}, {0, 0, 0}, 0.0f};
}

// Where corner i of a record lies. WIDER: the array's elements are so many times as wide as those the record was made for.
// INTERIOR: all corner bits are known to be set, so that no mask is needed to take them off.
template <bool INTERIOR, int PIXEL, int WIDER, typename Bytes>
__device__ __forceinline__ Bytes* corner_pointer(Bytes* base, const int2& place, int corner) {
  const int corner_bits = static_cast<int>(ALL_CORNERS);
  const int top_left = INTERIOR ? place.x - corner_bits : place.x & ~corner_bits;
  Bytes* row = base + static_cast<long long>(top_left) * WIDER;
  if (corner & 2) row += static_cast<long long>(place.y) * WIDER;
  return corner & 1 ? row + PIXEL * WIDER : row;
}
