// SPDX-License-Identifier: Apache-2.0
// Forward and backward for what the specialised kernels do not cover: any D, L, P and M, float64, more than 2^31 bytes.
//
// Layout   as in forward.cu and backward.cu; grad_value is a zeroed accumulator in Compute<Value>, or with
//          FIXED the array of sums that fixed_point.cuh describes.
// Threads  One warp owns a row (n, q, m). Points are taken 32 at a time: each lane locates one of them, leaves it in the
//          warp's slots, and the warp walks through the slots with its lanes over the channels.
// Grid     x: blocks of queries, y and z: (image, head). All offsets are 64-bit.
#include "bilinear.cuh"
#include "fixed_point.cuh"
#include "scalar.cuh"

template <typename Real>
struct Slot {
  Four<Real> share;
  long long corner;  // element index of the top-left corner's first channel in value, -1 row or column allowed
  long long pitch;   // elements per pixel row
  unsigned corners;
};

struct Row {
  int image, head, query;
  bool active;
  long long index;  // among N * Lq * M
};

__device__ inline Row this_row(const Shape& p) {
  const unsigned image_head = blockIdx.y + blockIdx.z * gridDim.y;
  Row row;
  row.image = image_head / p.num_heads;
  row.head = image_head % p.num_heads;
  const long long query = static_cast<long long>(blockIdx.x) * (BLOCK / WARP) + threadIdx.x / WARP;
  row.active = query < p.num_queries && row.image < p.batch;
  row.query = static_cast<int>(query);
  row.index = (static_cast<long long>(row.image) * p.num_queries + query) * p.num_heads + row.head;
  return row;
}

template <typename Real>
struct Point {
  Cell<Real> cell;
  Level level;
  Real weight;
};

// Locate point k of the row and leave it in the lane's slot, its shares multiplied by `factor`.
template <typename Real, typename Location, typename Weight>
__device__ Point<Real> make_slot(Slot<Real>& slot, const Row& row, int k, const Location* locations,
                                 const Weight* weights, const long long* sizes, const long long* starts,
                                 const GenericParams& p, Real factor = 1) {
  const long long at = row.index * (p.num_levels * p.num_points) + k;
  Point<Real> point;
  point.level = read_level(k / p.num_points, sizes, starts, p);
  const Real x = static_cast<Real>(widen(locations[2 * at])), y = static_cast<Real>(widen(locations[2 * at + 1]));
  point.cell = locate<false, false, Real>({x, y, point.level}, point.level);
  point.weight = point.cell.corners == 0u ? 0 : static_cast<Real>(widen(weights[at]));
  if (point.level.start < 0) point.weight = static_cast<Real>(__int_as_float(0x7fc00000));
  const long long pixel =
      point.level.start + static_cast<long long>(point.cell.row) * point.level.width + point.cell.column;
  const long long position = static_cast<long long>(row.image) * p.spatial_size + pixel;
  slot.share = corner_shares(point.cell, point.weight * factor);
  slot.corner = (position * p.num_heads + row.head) * p.head_dim;
  slot.pitch = static_cast<long long>(point.level.width) * p.num_heads * p.head_dim;
  slot.corners = point.cell.corners;
  return point;
}

// Element index of corner i of a slot.
template <typename Real>
__device__ __forceinline__ long long corner_index(const Slot<Real>& slot, int corner, const Shape& p) {
  return slot.corner + (corner & 1 ? static_cast<long long>(p.num_heads) * p.head_dim : 0) +
         (corner & 2 ? slot.pitch : 0);
}

template <typename Value, typename Location, typename Weight>
__global__ void __launch_bounds__(BLOCK)
    msda_forward_generic(const Value* __restrict__ value, const Location* __restrict__ locations,
                         const Weight* __restrict__ weights, Value* __restrict__ output,
                         const long long* __restrict__ sizes, const long long* __restrict__ starts,
                         const __grid_constant__ GenericParams p) {
  using Real = typename Compute<Value>::type;
  __shared__ Slot<Real> slots[BLOCK];
  const Row row = this_row(p);
  if (!row.active) return;
  const int lane = threadIdx.x % WARP, points = p.num_levels * p.num_points;
  const Slot<Real>* own = slots + (threadIdx.x - lane);
  for (int first_channel = 0; first_channel < p.head_dim; first_channel += WARP) {
    const int channel = first_channel + lane;
    Real sum = 0;
    for (int first = 0; first < points; first += WARP) {
      const int count = min(WARP, points - first);
      if (lane < count) make_slot(slots[threadIdx.x], row, first + lane, locations, weights, sizes, starts, p);
      __syncwarp();
      for (int j = 0; j < count && channel < p.head_dim; ++j)
        for (int corner = 0; corner < 4; ++corner) {
          const bool counts = own[j].corners >> corner & 1u;
          const Real pixel = counts ? static_cast<Real>(widen(value[corner_index(own[j], corner, p) + channel])) : 0;
          sum += own[j].share.at[corner] * pixel;
        }
      __syncwarp();
    }
    if (channel < p.head_dim) output[row.index * p.head_dim + channel] = narrow_to<Value>(sum);
  }
}

// Add share * grad to memory; as a number of quanta, if that is a sum.
template <typename Real>
__device__ __forceinline__ void add(Real* to, const Scale<Real>&, Real share, Real grad) {
  atomicAdd(to, share * grad);
}
template <typename Real>
__device__ __forceinline__ void add(Sum* to, const Scale<Real>& scale, Real share, Real grad) {
  add_fixed(to, scale, share, times_power(grad, scale.grad));
}

// The four dot products of one point over all channels, in every lane; its corners' gradients go to memory on the way.
template <typename Value, typename Real, typename Addend>
__device__ Four<Real> visit(const Slot<Real>& slot, const Value* grad_row, const Value* value, Addend* grad_value,
                            const Scale<Real>& scale, const Shape& p) {
  Four<Real> dot = {};
  for (int channel = threadIdx.x % WARP; channel < p.head_dim; channel += WARP) {
    const Real grad = static_cast<Real>(widen(grad_row[channel]));
    for (int corner = 0; corner < 4; ++corner) {
      if (!(slot.corners >> corner & 1u)) continue;
      const long long at = corner_index(slot, corner, p) + channel;
      dot.at[corner] += grad * static_cast<Real>(widen(value[at]));
      if (grad_value != nullptr) add(grad_value + at, scale, slot.share.at[corner], grad);
    }
  }
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    for (int corner = 0; corner < 4; ++corner) dot.at[corner] += __shfl_xor_sync(ALL_LANES, dot.at[corner], offset);
  return dot;
}

template <typename Value, typename Location, typename Weight, bool FIXED>
__global__ void __launch_bounds__(BLOCK)
    msda_backward_generic(const Value* __restrict__ grad_output, const Value* __restrict__ value,
                          const Location* __restrict__ locations, const Weight* __restrict__ weights,
                          typename Accumulator<Value, FIXED>::type* __restrict__ grad_value,
                          Location* __restrict__ grad_locations, Weight* __restrict__ grad_weights,
                          const long long* __restrict__ sizes, const long long* __restrict__ starts,
                          const __grid_constant__ GenericParams p) {
  using Real = typename Compute<Value>::type;
  __shared__ Slot<Real> slots[BLOCK];
  const Row row = this_row(p);
  if (!row.active) return;
  const int lane = threadIdx.x % WARP, points = p.num_levels * p.num_points;
  const Slot<Real>* own = slots + (threadIdx.x - lane);
  const Value* grad_row = grad_output + row.index * p.head_dim;
  Scale<Real> scale = {1, 0, 0, 0, 0};
  if constexpr (FIXED)
    scale = read_scale<Real>(grad_value, p, static_cast<long long>(row.image) * p.num_heads + row.head);
  for (int first = 0; first < points; first += WARP) {
    const int count = min(WARP, points - first);
    Point<Real> point = {};
    if (lane < count)
      point = make_slot(slots[threadIdx.x], row, first + lane, locations, weights, sizes, starts, p, scale.weight);
    __syncwarp();
    Four<Real> dot = {};
    for (int j = 0; j < count; ++j) {
      const Four<Real> all = visit(own[j], grad_row, value, grad_value, scale, p);
      if (j == lane) dot = all;
    }
    __syncwarp();
    if (lane >= count || grad_locations == nullptr) continue;
    PointGradient<Real> gradient = point_gradient(point.cell, point.weight, point.level, dot);
    if (point.level.start < 0) gradient = {point.weight, point.weight, point.weight};  // NaN
    const long long at = row.index * points + first + lane;
    grad_locations[2 * at] = narrow_to<Location>(static_cast<typename Compute<Location>::type>(gradient.x));
    grad_locations[2 * at + 1] = narrow_to<Location>(static_cast<typename Compute<Location>::type>(gradient.y));
    grad_weights[at] = narrow_to<Weight>(static_cast<typename Compute<Weight>::type>(gradient.weight));
  }
}
