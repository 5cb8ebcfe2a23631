// SPDX-License-Identifier: Apache-2.0
// The geometry of one sampling point: its cell, the coefficients of its four corners, and the gradients of both.
// Corners are numbered top-left, top-right, bottom-left, bottom-right; bit i of `corners` is set if corner i lies inside
// the level.
#pragma once

#include "levels.cuh"

constexpr unsigned ALL_CORNERS = 15u;

template <typename Real>
struct Cell {
  int column, row;   // of the top-left corner; -1 where the point lies left of or above the first pixel
  Real right, down;  // fractions of the way to the right and lower corners
  unsigned corners;  // 0: the point contributes nothing
};

template <typename Real>
struct Four {
  Real at[4];
};

// Whether corner i lies inside the level. `corners` may hold other bits above the four.
__device__ __forceinline__ bool has_corner(unsigned corners, int i) { return corners >> i & 1u; }

// x = index + fraction. SMALL: |x| < 2^22, and two additions replace the slow conversions: next to 1.5 * 2^23 a float
// has no fraction bits left, so adding it rounded down leaves floor(x) in the low bits.
template <bool SMALL>
__device__ __forceinline__ void floor_and_fraction(float x, int& index, float& fraction) {
  if constexpr (SMALL) {
    const float shifted = __fadd_rd(x, 12582912.0f);
    index = static_cast<int>(__float_as_uint(shifted) - 0x4b400000u);
    fraction = x - (shifted - 12582912.0f);
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

template <typename Real>
__device__ __forceinline__ Coordinates<Real> to_pixels(const Fractions<Real>& at, const Level& level) {
  const Real half = static_cast<Real>(0.5);
  return {at.u * static_cast<Real>(level.width) - half, at.v * static_cast<Real>(level.height) - half};
}

// Whether the point contributes anything. The comparisons are false for NaN and infinity, here and below.
template <typename Real>
__device__ __forceinline__ bool is_inside(const Coordinates<Real>& at, const Level& level) {
  const Real one = static_cast<Real>(1);
  return at.x > -one && at.y > -one && at.x < static_cast<Real>(level.width) && at.y < static_cast<Real>(level.height);
}

// Whether all four corners lie inside a level of fewer than 2^22 positions. floor_and_fraction turns NaN, infinity and
// large numbers into an index that is negative or beyond every such level.
__device__ __forceinline__ bool is_interior(const Coordinates<float>& at, const Level& level) {
  int column, row;
  float right, down;
  floor_and_fraction<true>(at.x, column, right);
  floor_and_fraction<true>(at.y, row, down);
  const bool between_columns = static_cast<unsigned>(column) < static_cast<unsigned>(level.width - 1);
  const bool between_rows = static_cast<unsigned>(row) < static_cast<unsigned>(level.height - 1);
  return between_columns & between_rows;  // without a branch
}

// The point's cell. INTERIOR: all four corners are known to lie inside the level.
template <bool SMALL, bool INTERIOR = false, typename Real>
__device__ __forceinline__ Cell<Real> locate(Coordinates<Real> at, const Level& level) {
  const bool inside = INTERIOR || is_inside(at, level);
  at.x = inside ? at.x : 0;
  at.y = inside ? at.y : 0;
  Cell<Real> cell;
  floor_and_fraction<SMALL>(at.x, cell.column, cell.right);
  floor_and_fraction<SMALL>(at.y, cell.row, cell.down);
  const unsigned columns = (cell.column >= 0 ? 5u : 0u) | (cell.column + 1 < level.width ? 10u : 0u);
  const unsigned rows = (cell.row >= 0 ? 3u : 0u) | (cell.row + 1 < level.height ? 12u : 0u);
  cell.corners = INTERIOR ? ALL_CORNERS : inside ? columns & rows : 0u;
  return cell;
}

// The coefficient of each corner in the output: attention weight times bilinear weight.
template <typename Real>
__device__ __forceinline__ Four<Real> corner_coefficients(const Cell<Real>& cell, Real weight) {
  const Real lower = weight * cell.down, upper = weight - lower;
  const Real upper_right = upper * cell.right, lower_right = lower * cell.right;
  return {upper - upper_right, upper_right, lower - lower_right, lower_right};
}

template <typename Real>
struct PointGradient {
  Real x, y, weight;
};

// dot[i] is the sum over D of grad_output times corner i; the gradient of corner i is its coefficient * grad_output.
template <typename Real>
__device__ __forceinline__ PointGradient<Real> point_gradient(const Cell<Real>& cell, Real weight, const Level& level,
                                                              const Four<Real>& dot) {
  if (cell.corners == 0u) return {0, 0, 0};
  const Real upper = dot.at[0] + cell.right * (dot.at[1] - dot.at[0]);
  const Real lower = dot.at[2] + cell.right * (dot.at[3] - dot.at[2]);
  const Real across_upper = dot.at[1] - dot.at[0], across_lower = dot.at[3] - dot.at[2];
  const Real across = across_upper + cell.down * (across_lower - across_upper);
  return {static_cast<Real>(level.width) * weight * across, static_cast<Real>(level.height) * weight * (lower - upper),
          upper + cell.down * (lower - upper)};
}
