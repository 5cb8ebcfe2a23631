// SPDX-License-Identifier: Apache-2.0
// Forward and backward for everything that the specialised kernels do not cover: any D, L, P and M, float64, more than
// 2^31 bytes.
//
// Layout   as in forward.cu and backward.cu; grad_value is a zeroed accumulator in Compute<Value> or, with FIXED, the
//          fixed-point accumulator of fixed_point.cuh.
// Threads  One warp owns a row (n, q, m). Points are taken 32 at a time: each lane makes the descriptor of one of them in
//          shared memory, and the warp visits the descriptors with its lanes over the channels.
// Grid     x: blocks of queries, y and z: (image, head). All offsets are 64-bit.
#include "fixed_point.cuh"
#include "point.cuh"

template <typename Real>
struct Descriptor {
  Four<Real> coefficient;
  long long corner;  // element index of the top-left corner's first channel in value, -1 row or column allowed
  long long pitch;   // elements per pixel row
  unsigned corners;
};

// The row of a warp.
struct WarpRow {
  int image, head, query;
  bool active;
  long long index;  // among N * Lq * M

  __device__ explicit WarpRow(const Shape& p) {
    const unsigned image_head = blockIdx.y + blockIdx.z * gridDim.y;
    image = image_head / p.num_heads;
    head = image_head % p.num_heads;
    const long long at = static_cast<long long>(blockIdx.x) * (BLOCK / WARP) + threadIdx.x / WARP;
    active = at < p.num_queries && image < p.batch;
    query = static_cast<int>(at);
    index = (static_cast<long long>(image) * p.num_queries + at) * p.num_heads + head;
  }

  // The points of this row among those of a launch.
  template <typename Points>
  __device__ Points points_of(const Points& points, const Shape& p) const {
    return points.of_image(static_cast<long long>(image) * p.spatial_size).from(index * p.row_points);
  }
};

// The points of a row, with the table of their levels.
template <typename S, typename Location, typename Weight>
struct RowPoints {
  PointArrays<S, Location, Weight> arrays;
  const long long* sizes;
  const long long* starts;
  const GenericParams& p;
};

// Make the descriptor of point k of the row, its coefficients multiplied by `factor`.
template <typename Real, typename S, typename Location, typename Weight>
__device__ LocatedPoint<Real> make_descriptor(Descriptor<Real>& descriptor, const WarpRow& row, int k,
                                              const RowPoints<S, Location, Weight>& points, Real factor) {
  const GenericParams& p = points.p;
  const int number = level_of(p, k);
  const Level level = read_level(number, points.sizes, points.starts, p);
  const LocatedPoint<Real> point =
      points.arrays.template locate_point<false>(points.arrays.template load<Real>(k, level, number));
  const long long pixel = level.start + static_cast<long long>(point.cell.row) * level.width + point.cell.column;
  const long long position = static_cast<long long>(row.image) * p.spatial_size + pixel;
  descriptor.coefficient = corner_coefficients(point.cell, point.weight * factor);
  descriptor.corner = (position * p.num_heads + row.head) * p.head_dim;
  descriptor.pitch = static_cast<long long>(level.width) * p.num_heads * p.head_dim;
  descriptor.corners = point.cell.corners;
  return point;
}

// Call visit(descriptor, j) for every point of the row, WARP points at a time, j counting within them; after each of these
// stages, in every lane that has made a descriptor, finish(k, point) with the point that it was made of.
template <typename Real, typename S, typename Location, typename Weight, typename Visit, typename Finish>
__device__ __forceinline__ void visit_points(Descriptor<Real> (&descriptors)[BLOCK], const WarpRow& row,
                                             const RowPoints<S, Location, Weight>& points, Real factor, Visit visit,
                                             Finish finish) {
  const int lane = threadIdx.x % WARP;
  const Descriptor<Real>* own = descriptors + (threadIdx.x - lane);
  const int row_points = points.p.row_points;
  for (int first = 0; first < row_points; first += WARP) {
    const int count = min(WARP, row_points - first);
    LocatedPoint<Real> point = {};
    if (lane < count) point = make_descriptor(descriptors[threadIdx.x], row, first + lane, points, factor);
    __syncwarp();
    for (int j = 0; j < count; ++j) visit(own[j], j);
    __syncwarp();
    if (lane < count) finish(first + lane, point);
  }
}

// Element index of corner i of a descriptor.
template <typename Real>
__device__ __forceinline__ long long corner_index(const Descriptor<Real>& descriptor, int corner, const Shape& p) {
  return descriptor.corner + (corner & 1 ? static_cast<long long>(p.num_heads) * p.head_dim : 0) +
         (corner & 2 ? descriptor.pitch : 0);
}

template <typename Value, typename Location, typename Weight, typename S>
__global__ void __launch_bounds__(BLOCK)
    msda_forward_generic(const Value* __restrict__ value, const Location* __restrict__ locations,
                         const Weight* __restrict__ weights, const unsigned char* __restrict__ mask,
                         Value* __restrict__ output, const long long* __restrict__ sizes,
                         const long long* __restrict__ starts, const __grid_constant__ GenericParams p) {
  using Real = typename Compute<Value>::type;
  __shared__ Descriptor<Real> descriptors[BLOCK];
  const WarpRow row(p);
  if (!row.active) return;
  const PointArrays<S, Location, Weight> arrays = {locations, weights, mask};
  const RowPoints<S, Location, Weight> points = {row.points_of(arrays, p), sizes, starts, p};
  for (int first_channel = 0; first_channel < p.head_dim; first_channel += WARP) {
    const int channel = first_channel + threadIdx.x % WARP;
    Real sum = 0;
    const auto add_corners = [&](const Descriptor<Real>& descriptor, int) {
      if (channel >= p.head_dim) return;
      for (int corner = 0; corner < S::CORNERS; ++corner) {
        const bool counts = has_corner(descriptor.corners, corner);
        const Real pixel = counts ? static_cast<Real>(widen(value[corner_index(descriptor, corner, p) + channel])) : 0;
        sum += descriptor.coefficient.at[corner] * pixel;
      }
    };
    visit_points(descriptors, row, points, static_cast<Real>(1), add_corners, [](int, const LocatedPoint<Real>&) {});
    if (channel < p.head_dim) output[row.index * p.head_dim + channel] = narrow_to<Value>(sum);
  }
}

// Add coefficient * grad to memory, in fixed-point units if the accumulator is one.
template <typename Real>
__device__ __forceinline__ void add(Real* to, const Scale<Real>&, Real coefficient, Real grad) {
  atomicAdd(to, coefficient * grad);
}
template <typename Real>
__device__ __forceinline__ void add(FixedPoint* to, const Scale<Real>& scale, Real coefficient, Real grad) {
  add_fixed(to, scale, coefficient, times_power(grad, scale.grad));
}

// The four dot products of one point over all channels, in every lane; its corners' gradients go to memory on the way.
template <typename Value, typename Real, typename Addend>
__device__ Four<Real> visit(const Descriptor<Real>& descriptor, const Value* grad_row, const Value* value,
                            Addend* grad_value, const Scale<Real>& scale, const Shape& p) {
  Four<Real> dot = {};
  for (int channel = threadIdx.x % WARP; channel < p.head_dim; channel += WARP) {
    const Real grad = static_cast<Real>(widen(grad_row[channel]));
    for (int corner = 0; corner < 4; ++corner) {
      if (!has_corner(descriptor.corners, corner)) continue;
      const long long at = corner_index(descriptor, corner, p) + channel;
      dot.at[corner] += grad * static_cast<Real>(widen(value[at]));
      if (grad_value != nullptr) add(grad_value + at, scale, descriptor.coefficient.at[corner], grad);
    }
  }
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    for (int corner = 0; corner < 4; ++corner) dot.at[corner] += __shfl_xor_sync(ALL_LANES, dot.at[corner], offset);
  return dot;
}

template <typename Value, typename Location, typename Weight, typename S, bool FIXED>
__global__ void __launch_bounds__(BLOCK)
    msda_backward_generic(const Value* __restrict__ grad_output, const Value* __restrict__ value,
                          const Location* __restrict__ locations, const Weight* __restrict__ weights,
                          const unsigned char* __restrict__ mask,
                          typename Accumulator<Value, FIXED>::type* __restrict__ grad_value,
                          Location* __restrict__ grad_locations, Weight* __restrict__ grad_weights,
                          const long long* __restrict__ sizes, const long long* __restrict__ starts,
                          const __grid_constant__ GenericParams p) {
  using Real = typename Compute<Value>::type;
  __shared__ Descriptor<Real> descriptors[BLOCK];
  const WarpRow row(p);
  if (!row.active) return;
  const int lane = threadIdx.x % WARP;
  const PointArrays<S, Location, Weight> arrays = {locations, weights, mask};
  const RowPoints<S, Location, Weight> points = {row.points_of(arrays, p), sizes, starts, p};
  const PointGradientArrays<S, Location, Weight> gradients = {grad_locations, grad_weights};
  const Value* grad_row = grad_output + row.index * p.head_dim;
  Scale<Real> scale = {1, 0, 0, 0, 0};
  if constexpr (FIXED)
    scale = read_scale<Real>(grad_value, p, static_cast<long long>(row.image) * p.num_heads + row.head);
  Four<Real> dot = {};  // of the lane's own point
  const auto visit_one = [&](const Descriptor<Real>& descriptor, int j) {
    const Four<Real> all = visit(descriptor, grad_row, value, grad_value, scale, p);
    if (j == lane) dot = all;
  };
  visit_points(descriptors, row, points, scale.weight, visit_one, [&](int k, const LocatedPoint<Real>& point) {
    if (grad_locations != nullptr) gradients.store(row.index * p.row_points + k, point, dot);
  });
}
