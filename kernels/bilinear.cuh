// SPDX-License-Identifier: Apache-2.0
// The geometry of one sampling point: its cell, the coefficients of its four corners, and the gradients of both.
// Corners are numbered top-left, top-right, bottom-left, bottom-right; bit i of `corners` is set if corner i lies inside
// the level and is not masked. NEAREST: the cell is one pixel, its corner 0.
#pragma once

#include "levels.cuh"
#include "scalar.cuh"

constexpr unsigned ALL_CORNERS = 15u;

template <typename Real>
struct Cell {
  int column, row;   // of the top-left corner; -1 where the point lies left of or above the first pixel
  int pixel;         // row * width + column; only if the level is SMALL
  Real right, down;  // fractions of the way to the right and lower corners
  unsigned corners;  // 0: the point contributes nothing
};

template <typename Real>
struct Four {
  Real at[4];
};

// Whether corner i lies inside the level. `corners` may hold other bits above the four.
__device__ __forceinline__ bool has_corner(unsigned corners, int i) { return corners >> i & 1u; }

// Between 2^23 and 2^24 a float counts in ones: for |x| < 2^22, x + ONES has no fraction bits, and rounded down its low bits
// hold floor(x). Two additions so replace the slow conversions.
constexpr float ONES = 12582912.0f;  // 1.5 * 2^23
constexpr unsigned ONES_BITS = 0x4b400000u;

// x = index + fraction. SMALL: |x| < 2^22.
template <bool SMALL>
__device__ __forceinline__ void floor_and_fraction(float x, int& index, float& fraction) {
  if constexpr (SMALL) {
    const float shifted = __fadd_rd(x, ONES);
    index = static_cast<int>(__float_as_uint(shifted) - ONES_BITS);
    fraction = x - (shifted - ONES);
  } else {
    const float whole = floorf(x);
    index = static_cast<int>(whole);
    fraction = x - whole;
  }
}
template <bool SMALL>
__device__ __forceinline__ void floor_and_fraction(double x, int& index, double& fraction) {
  const double whole = floor(x);
  index = static_cast<int>(whole);
  fraction = x - whole;
}

// A location as fractions of the level, and the same in pixels.
template <typename Real>
struct Fractions {
  Real u, v;
};
template <typename Real>
struct Coordinates {
  Real x, y;
};

// u * size + 1/2 in two roundings: fused to one, the nearest pixel might not be that of the reference.
__device__ __forceinline__ float scaled_plus_half(float u, float size) { return __fadd_rn(__fmul_rn(u, size), 0.5f); }
__device__ __forceinline__ double scaled_plus_half(double u, double size) { return __dadd_rn(__dmul_rn(u, size), 0.5); }

// NEAREST: without its fraction, a coordinate is the index of the nearest pixel.
template <bool NEAREST, typename Real>
__device__ __forceinline__ Coordinates<Real> to_pixels(const Fractions<Real>& at, const Level& level) {
  const Real width = static_cast<Real>(level.width), height = static_cast<Real>(level.height);
  if constexpr (NEAREST) {
    return {scaled_plus_half(at.u, width), scaled_plus_half(at.v, height)};
  } else {
    const Real half = static_cast<Real>(0.5);
    return {at.u * width - half, at.v * height - half};
  }
}

// row * width + column of the point's cell, in a level of fewer than 2^22 positions. One multiplication of floats, which are
// at hand, instead of three instructions on integers.
__device__ __forceinline__ int cell_pixel(const Coordinates<float>& at, const Level& level) {
  const float column = __fadd_rd(at.x, ONES), row = __fadd_rd(at.y, ONES) - ONES;
  return static_cast<int>(__float_as_uint(row * static_cast<float>(level.width) + column) - ONES_BITS);
}

// Whether the point contributes anything, if nothing is masked. The comparisons are false for NaN and infinity, here and
// below. NEAREST: all but NaN are moved inside, unless there is no pixel.
template <bool NEAREST, typename Real>
__device__ __forceinline__ bool is_inside(const Coordinates<Real>& at, const Level& level) {
  if constexpr (NEAREST) {
    return at.x == at.x && at.y == at.y && level.height > 0;
  } else {
    const Real one = static_cast<Real>(1);
    return at.x > -one && at.y > -one && at.x < static_cast<Real>(level.width) &&
           at.y < static_cast<Real>(level.height);
  }
}

// Whether all four corners lie inside the level: 0 <= x < W - 1, and so for y, by one comparison each. The bits of positive
// floats have the order of the floats; those of negative numbers, infinity and NaN are greater than any width's.
__device__ __forceinline__ bool is_interior(const Coordinates<float>& at, const Level& level) {
  const float last_column = static_cast<float>(level.width) - 1.0f, last_row = static_cast<float>(level.height) - 1.0f;
  const bool between_columns = __float_as_uint(at.x) < __float_as_uint(last_column);
  const bool between_rows = __float_as_uint(at.y) < __float_as_uint(last_row);
  return between_columns & between_rows;  // without a branch
}

// The point's cell. INTERIOR: all four corners are known to lie inside the level.
template <bool SMALL, bool INTERIOR = false, typename Real>
__device__ __forceinline__ Cell<Real> locate(Coordinates<Real> at, const Level& level) {
  const bool inside = INTERIOR || is_inside<false>(at, level);
  at.x = inside ? at.x : 0;
  at.y = inside ? at.y : 0;
  Cell<Real> cell;
  floor_and_fraction<SMALL>(at.x, cell.column, cell.right);
  floor_and_fraction<SMALL>(at.y, cell.row, cell.down);
  if constexpr (SMALL) cell.pixel = cell_pixel(at, level);
  const unsigned columns = (cell.column >= 0 ? 5u : 0u) | (cell.column + 1 < level.width ? 10u : 0u);
  const unsigned rows = (cell.row >= 0 ? 3u : 0u) | (cell.row + 1 < level.height ? 12u : 0u);
  cell.corners = INTERIOR ? ALL_CORNERS : inside ? columns & rows : 0u;
  return cell;
}

// The index of the pixel nearest to a coordinate, among `size` of them. SMALL: size < 2^22.
template <bool SMALL, typename Real>
__device__ __forceinline__ int nearest_index(Real x, int size) {
  if constexpr (SMALL) {
    int index;
    Real fraction;
    floor_and_fraction<true>(min(max(x, static_cast<Real>(0)), static_cast<Real>(size - 1)), index, fraction);
    return index;
  } else {  // a float of `size` or `size - 1` may be larger
    const Real limited = min(max(x, static_cast<Real>(0)), static_cast<Real>(size));
    return static_cast<int>(min(static_cast<long long>(limited), size - 1ll));
  }
}

// The nearest pixel as a cell.
template <bool SMALL, typename Real>
__device__ __forceinline__ Cell<Real> locate_nearest(const Coordinates<Real>& at, const Level& level) {
  const int column = nearest_index<SMALL>(at.x, level.width), row = nearest_index<SMALL>(at.y, level.height);
  const unsigned corners = is_inside<true>(at, level) ? 1u : 0u;
  return {column, row, SMALL ? row * level.width + column : 0, 0, 0, corners};
}

// The corners that are not masked. `pixel`: the mask of the top-left one.
__device__ __forceinline__ unsigned unmasked_corners(unsigned corners, const unsigned char* pixel, int width) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (has_corner(corners, i) && (pixel + (i & 2 ? width : 0))[i & 1] == 0) corners &= ~(1u << i);
  return corners;
}

// The coefficient of each corner in the output: attention weight times bilinear weight. Products alone: weight - weight *
// down would be NaN for an infinite weight. FINITE: the weight is known to be finite.
template <bool FINITE = false, typename Real>
__device__ __forceinline__ Four<Real> corner_coefficients(const Cell<Real>& cell, Real weight) {
  const Real upper = weight * (1 - cell.down), lower = weight * cell.down, left = 1 - cell.right;
  Four<Real> coefficient = {upper * left, upper * cell.right, lower * left, lower * cell.right};
  // For a corner that does not count zero is read, which must not meet infinity.
  if (!FINITE && is_infinite(weight)) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!has_corner(cell.corners, i)) coefficient.at[i] = 0;
  }
  return coefficient;
}

template <typename Real>
struct PointGradient {
  Real x, y, weight;
};

// By the equations of README.md, of a point with an attention weight of 1 in a level of 1 x 1.
template <typename Real>
__device__ __forceinline__ PointGradient<Real> unit_gradient(const Cell<Real>& cell, const Four<Real>& dot) {
  Real at[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) at[i] = has_corner(cell.corners, i) ? dot.at[i] : 0;
  const Real right = cell.right, left = 1 - right, down = cell.down, up = 1 - down;
  return {up * (at[1] - at[0]) + down * (at[3] - at[2]), left * (at[2] - at[0]) + right * (at[3] - at[1]),
          up * (left * at[0] + right * at[1]) + down * (left * at[2] + right * at[3])};
}

// dot[i] is the sum over D of grad_output times corner i, or times zero if the corner does not count; the gradient of
// corner i is its coefficient * grad_output.
template <bool NEAREST, typename Real>
__device__ __forceinline__ PointGradient<Real> point_gradient(const Cell<Real>& cell, Real weight, const Level& level,
                                                              const Four<Real>& dot) {
  if constexpr (NEAREST) {
    return {0, 0, has_corner(cell.corners, 0) ? dot.at[0] : 0};
  } else {
    const Real across_upper = dot.at[1] - dot.at[0], across_lower = dot.at[3] - dot.at[2];
    const Real upper = dot.at[0] + cell.right * across_upper, lower = dot.at[2] + cell.right * across_lower;
    PointGradient<Real> unit = {across_upper + cell.down * (across_lower - across_upper), lower - upper,
                                upper + cell.down * (lower - upper)};
    // These are fewer operations than in the equations. Where a dot product is not finite they may give NaN instead of
    // infinity, always by the weight too; and a corner that does not count has NaN there if grad_output is not finite.
    if (unit.weight != unit.weight) unit = unit_gradient(cell, dot);
    return {static_cast<Real>(level.width) * weight * unit.x, static_cast<Real>(level.height) * weight * unit.y,
            unit.weight};
  }
}
