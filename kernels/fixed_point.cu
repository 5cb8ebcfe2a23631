// SPDX-License-Identifier: Apache-2.0
// Before and after a backward that accumulates gradients of value in fixed point (fixed_point.cuh). msda_fixed_point_scale
// finds the largest exponents, which decide the unit of each (image, head); msda_fixed_point_finish converts the accumulator
// into grad_value.
//
// Layout   grad_output, locations, weights, mask and grad_value as in backward.cu, the accumulator as in fixed_point.cuh.
// Threads  One warp takes a row of one (image, head): of a query in msda_fixed_point_scale, of a position in
//          msda_fixed_point_finish, with its lanes over the channels or points; then the next row, as many rows on as the
//          grid has warps.
// Grid     x: enough blocks to fill the device, y and z: (image, head). All offsets are 64-bit.
#include "fixed_point.cuh"
#include "point.cuh"

// The rows of one (image, head) that a warp takes.
struct Rows {
  int image, head;
  long long image_head, first, step;
  bool active;
};

__device__ inline Rows these_rows(const Shape& p) {
  Rows rows;
  rows.image_head = blockIdx.y + static_cast<long long>(blockIdx.z) * gridDim.y;
  rows.image = static_cast<int>(rows.image_head / p.num_heads);
  rows.head = static_cast<int>(rows.image_head % p.num_heads);
  rows.first = static_cast<long long>(blockIdx.x) * (BLOCK / WARP) + threadIdx.x / WARP;
  rows.step = static_cast<long long>(gridDim.x) * (BLOCK / WARP);
  rows.active = rows.image < p.batch;
  return rows;
}

// Raise a number in memory to the warp's largest one. The order does not matter.
__device__ inline void keep_largest(int* to, int number) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) number = max(number, __shfl_xor_sync(ALL_LANES, number, offset));
  if (threadIdx.x % WARP == 0) atomicMax(to, number);
}

template <typename Value, typename Location, typename Weight, typename S>
__global__ void __launch_bounds__(BLOCK, 4)
    msda_fixed_point_scale(const Value* __restrict__ grad_output, const Location* __restrict__ locations,
                           const Weight* __restrict__ weights, const unsigned char* __restrict__ mask,
                           FixedPoint* __restrict__ accumulator, const long long* __restrict__ sizes,
                           const long long* __restrict__ starts, const __grid_constant__ GenericParams p) {
  using Real = typename Compute<Value>::type;
  const Rows rows = these_rows(p);
  if (!rows.active) return;
  const int lane = threadIdx.x % WARP, points = p.row_points;
  const long long image_start = static_cast<long long>(rows.image) * p.spatial_size;
  const auto arrays = PointArrays<S, Location, Weight>{locations, weights, mask}.of_image(image_start);
  int of_grad = 0, of_weights = 0;
  for (long long query = rows.first; query < p.num_queries; query += rows.step) {
    const long long row = (rows.image * static_cast<long long>(p.num_queries) + query) * p.num_heads + rows.head;
    for (int channel = lane; channel < p.head_dim; channel += WARP)
      of_grad = max(of_grad, exponent_field(static_cast<Real>(widen(grad_output[row * p.head_dim + channel]))));
#pragma unroll 1
    for (int k = lane; k < points; k += WARP) {
      const long long at = row * points + k;
      const int field = exponent_field(arrays.template weight<Real>(at));
      if (field <= of_weights) continue;  // mostly so, which spares the location
      // The weight of a point that contributes nothing may be anything, and must not make the unit coarse.
      if (arrays.template contributes<Real>(at, read_level(level_of(p, k), sizes, starts, p))) of_weights = field;
    }
  }
  int* fields = largest_exponents<Real>(accumulator, p, rows.image_head);
  keep_largest(fields, of_grad);
  keep_largest(fields + 1, of_weights);
}

template <typename Value>
__global__ void __launch_bounds__(BLOCK)
    msda_fixed_point_finish(FixedPoint* __restrict__ accumulator, Value* __restrict__ grad_value,
                            const __grid_constant__ Shape p) {
  using Real = typename Compute<Value>::type;
  const Rows rows = these_rows(p);
  if (!rows.active) return;
  const Scale<Real> scale = read_scale<Real>(accumulator, p, rows.image_head);
#pragma unroll 4
  for (long long position = rows.first; position < p.spatial_size; position += rows.step) {
    const long long row = (rows.image * static_cast<long long>(p.spatial_size) + position) * p.num_heads + rows.head;
    for (int channel = threadIdx.x % WARP; channel < p.head_dim; channel += WARP) {
      const long long at = row * p.head_dim + channel;
      grad_value[at] = narrow_to<Value>(from_fixed(accumulator + at, scale));
    }
  }
}
