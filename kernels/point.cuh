// SPDX-License-Identifier: Apache-2.0
// One sampling point: load it, locate it, store its gradients. Every kernel reads and writes points through this file,
// so that a variant (reference points added here, masks, levels of different numbers of points) is added once.
//
// Layout   locations (..., 2): (u, v) as fractions of the level; weights (...). An index counts points from where the
//          pointers begin: the whole array (N, Lq, M, L, P), or one row, or one level of an (image, head).
#pragma once

#include "bilinear.cuh"
#include "scalar.cuh"

// A point as loaded.
template <typename Real>
struct Point {
  Level level;
  Coordinates<Real> at;
  Real weight;
};

// The level of point k of a row of L * P points.
template <int P>
__device__ __forceinline__ unsigned level_of(unsigned k) {
  return k / P;
}

template <typename Location, typename Weight>
struct PointArrays {
  const Location* locations;
  const Weight* weights;

  // The points from `index` on.
  template <typename Index>
  __device__ PointArrays from(Index index) const {
    return {locations + 2 * index, weights + index};
  }

  template <typename Real = float, typename Index>
  __device__ Fractions<Real> location(Index index) const {
    Real loaded[2];
    ::load(loaded, locations + 2 * index);
    return {loaded[0], loaded[1]};
  }

  template <typename Real = float, typename Index>
  __device__ Coordinates<Real> coordinates(Index index, const Level& level) const {
    return to_pixels(location<Real>(index), level);
  }

  template <typename Real = float, typename Index>
  __device__ Real weight(Index index) const {
    return widen(weights[index]);
  }

  // The level by value: by reference, the compiler reads it from shared memory twice.
  template <typename Real = float, typename Index>
  __device__ Point<Real> load(Index index, Level level) const {
    return {level, coordinates<Real>(index, level), weight<Real>(index)};
  }
};

// A point and its cell.
template <typename Real>
struct LocatedPoint {
  Cell<Real> cell;
  Level level;
  Real weight;  // zero if the point contributes nothing, whatever was loaded; NaN if its level does not fit S
};

// INTERIOR: all four corners are known to lie inside the level.
template <bool SMALL, bool INTERIOR = false, typename Real>
__device__ __forceinline__ LocatedPoint<Real> locate_point(const Point<Real>& point) {
  LocatedPoint<Real> located = {locate<SMALL, INTERIOR>(point.at, point.level), point.level, point.weight};
  if (located.cell.corners == 0u) located.weight = 0;
  if (!INTERIOR && point.level.start < 0) located.weight = static_cast<Real>(__int_as_float(0x7fc00000));
  return located;
}

// Where the gradients of points go.
template <typename Location, typename Weight>
struct PointGradientArrays {
  Location* locations;
  Weight* weights;

  // As PointArrays::from. Both pointers are null where these gradients are not wanted.
  template <typename Index>
  __device__ PointGradientArrays from(Index index) const {
    return {locations + 2 * index, weights + index};
  }

  // `dot` as for point_gradient. All three gradients are NaN if the level does not fit S.
  template <typename Real, typename Index>
  __device__ void store(Index index, const LocatedPoint<Real>& point, const Four<Real>& dot) const {
    using Wide = typename Compute<Location>::type;
    PointGradient<Real> gradient = point_gradient(point.cell, point.weight, point.level, dot);
    if (point.level.start < 0) gradient = {point.weight, point.weight, point.weight};  // NaN
    const Wide by_location[2] = {static_cast<Wide>(gradient.x), static_cast<Wide>(gradient.y)};
    ::store(locations + 2 * index, by_location);
    weights[index] = narrow_to<Weight>(static_cast<typename Compute<Weight>::type>(gradient.weight));
  }
};
