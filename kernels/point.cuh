// SPDX-License-Identifier: Apache-2.0
// One sampling point: load it, locate it, store its gradients. Every kernel reads and writes points through this file,
// so that a variant (nearest pixels, masks, levels of different numbers of points, reference points) is added once.
// In a fused call locations are offsets and weights are logits, as fused.cuh has them.
//
// Layout   locations (..., 2): (u, v) as fractions of the level; weights (...). An index counts points from where the
//          pointers begin: the whole array (N, Lq, M, K), or one row, or one level of an (image, head). The K points of a
//          row come level after level. mask (N, S): zero where a position of value is masked.
#pragma once

#include "bilinear.cuh"
#include "fused.cuh"
#include "scalar.cuh"

// How a kernel samples. NEAREST: one pixel instead of four. MASKED: masked positions read as zero. POINTS: how many each
// level has; none: generic kernels take them from the launch parameters.
template <bool NEAREST_, bool MASKED_, int... POINTS>
struct Sampling {
  using Reference = float;
  static constexpr bool NEAREST = NEAREST_, MASKED = MASKED_, FUSED = false;
  static constexpr int CORNERS = NEAREST ? 1 : 4;  // that a point may have
  static constexpr int L = sizeof...(POINTS), K = (0 + ... + POINTS);
  static constexpr int P = K > L ? K / L : 1;
  static constexpr bool EVEN = ((POINTS == P) && ...);  // every level has P points

  // The points of a level in a row.
  __device__ static constexpr int points(int level) {
    int i = 0, count = 0;
    ((count += i++ == level ? POINTS : 0), ...);
    return EVEN ? P : count;
  }

  // One by that number, 0 for a level without points.
  __device__ static constexpr float inverse_points(int level) {
    int i = 0;
    float inverse = 0.0f;
    ((inverse += i++ == level && POINTS > 0 ? 1.0f / (POINTS > 0 ? POINTS : 1) : 0.0f), ...);
    return EVEN ? 1.0f / P : inverse;
  }

  // The first of them.
  __device__ static constexpr int first(int level) {
    int i = 0, sum = 0;
    ((sum += i++ < level ? POINTS : 0), ...);
    return EVEN ? level * P : sum;
  }

  // The level of point k.
  __device__ static __forceinline__ unsigned level_of(unsigned k) {
    if constexpr (EVEN) {
      return k / P;
    } else {
      unsigned i = 1, end = 0, level = 0;
      ((end += POINTS, level += i++ < L && k >= end ? 1 : 0), ...);
      return level;
    }
  }
};

// The points of one level, whose number is known at run time only, in many rows: counted row by row.
template <typename S>
struct LevelSpan {
  int first, points;  // in a row
  unsigned inverse;   // 2^31 / points, rounded up; not used if it is known at compile time

  __device__ explicit LevelSpan(int level) : first(S::first(level)), points(S::points(level)), inverse(0) {
    if (!S::EVEN && points != 0) inverse = (0x7fffffffu / points) + 1u;
  }

  // The row of a point, for number * points < 2^31.
  __device__ __forceinline__ int row(int number) const {
    if constexpr (S::EVEN)
      return static_cast<unsigned>(number) / S::P;
    else
      return static_cast<int>(static_cast<unsigned long long>(number) * inverse >> 31);
  }
};

// A point as loaded.
template <typename Real>
struct Point {
  Level level;
  Coordinates<Real> at;
  Real weight;
};

// A point and its cell.
template <typename Real>
struct LocatedPoint {
  Cell<Real> cell;
  Level level;
  Real weight;  // zero if the point contributes nothing, whatever was loaded; NaN if its level does not fit S
};

template <typename S, typename Location, typename Weight>
struct PointArrays {
  const Location* locations;
  const Weight* weights;
  const unsigned char* mask;  // of the points' image, if S::MASKED
  RowOf<S> row;               // of the points' row, if S::FUSED

  // The points from `index` on.
  template <typename Index>
  __device__ PointArrays from(Index index) const {
    return {locations + 2 * index, weights + index, mask, row};
  }

  // The points as those of the image whose position 0 is at this index among N * S.
  template <typename Index>
  __device__ PointArrays of_image(Index position) const {
    return {locations, weights, S::MASKED ? mask + position : mask, row};
  }

  // The points of a row among N * Lq * M, which LANES neighbours own. All lanes of the warp take part.
  template <int M, int LANES, typename Index, typename Params>
  __device__ __forceinline__ PointArrays of_row(Index index, const typename S::Reference* references,
                                                const Params& p) const {
    if constexpr (S::FUSED) {
      const unsigned row = static_cast<unsigned>(index), first = row * S::K;
      return {locations,
              weights,
              mask,
              {query_references<S, M>(references, row, p), first, p.offset_scale,
               softmax_of<S::K, LANES>(weights + first)}};
    } else {
      return from(index * S::K);
    }
  }

  // The index of point k of a row among N * Lq * M.
  __device__ static auto point(unsigned row, unsigned k) {
    if constexpr (S::FUSED)
      return row * S::K + k;  // 32 bits, as below
    else
      return static_cast<size_t>(row) * S::K + k;
  }

  // The place of a point in the arrays. Fused: one index of 32 bits for all, which takes fewer registers than pointers.
  template <typename Index>
  __device__ auto at(Index index) const {
    if constexpr (S::FUSED)
      return static_cast<size_t>(row.first + static_cast<unsigned>(index));
    else
      return index;
  }

  template <typename Real = float, typename Index>
  __device__ Fractions<Real> location(Index index) const {
    Real loaded[2];
    ::load(loaded, locations + 2 * at(index));
    return {loaded[0], loaded[1]};
  }

  template <typename Real = float, typename Index>
  __device__ Coordinates<Real> coordinates(Index index, const Level& level) const {
    return to_pixels<S::NEAREST>(location<Real>(index), level);
  }

  template <typename Real = float, typename Index>
  __device__ Real weight(Index index) const {
    return widen(weights[at(index)]);
  }

  // Where a point of the level of this number lies, as loaded.
  template <typename Real = float, typename Index>
  __device__ auto place(Index index, [[maybe_unused]] int number) const {
    if constexpr (S::FUSED) {
      OffsetPoint<S> at;
      at.offset = location(index);
      ::load(at.reference, row.references + (S::BY_LEVEL ? number * S::COORDINATES : 0));
      return at;
    } else {
      return location<Real>(index);
    }
  }

  // Where that is in pixels.
  template <typename Place>
  __device__ auto pixels(const Place& at, const Level& level, [[maybe_unused]] int number) const {
    if constexpr (S::FUSED)
      return to_pixels(at, row.offset_scale, level, number);
    else
      return to_pixels<S::NEAREST>(at, level);
  }

  // The attention weight of a point by what `weight` has loaded.
  template <typename Real>
  __device__ Real attention(Real loaded) const {
    if constexpr (S::FUSED)
      return row.softmax.weight(loaded);
    else
      return loaded;
  }

  // The level by value: by reference, the compiler reads it from shared memory twice.
  template <typename Real = float, typename Index>
  __device__ Point<Real> load(Index index, Level level, int number) const {
    return {level, pixels(place<Real>(index, number), level, number), attention(weight<Real>(index))};
  }

  // The cell at these coordinates, of the corners that count. INTERIOR: they are known to be all four.
  template <bool SMALL, bool INTERIOR = false, typename Real>
  __device__ __forceinline__ Cell<Real> cell(const Coordinates<Real>& at, const Level& level) const {
    static_assert(!INTERIOR || !(S::NEAREST || S::MASKED), "a corner may be missing anywhere");
    Cell<Real> cell;
    if constexpr (S::NEAREST)
      cell = locate_nearest<SMALL>(at, level);
    else
      cell = locate<SMALL, INTERIOR>(at, level);
    if constexpr (S::MASKED) {
      long long pixel = cell.pixel;
      if constexpr (!SMALL) pixel = static_cast<long long>(cell.row) * level.width + cell.column;
      cell.corners = unmasked_corners(cell.corners, mask + level.start + pixel, level.width);
    }
    return cell;
  }

  template <bool SMALL, bool INTERIOR = false, typename Real>
  __device__ __forceinline__ LocatedPoint<Real> locate_point(const Point<Real>& point) const {
    LocatedPoint<Real> located = {cell<SMALL, INTERIOR>(point.at, point.level), point.level, point.weight};
    if (located.cell.corners == 0u) located.weight = 0;
    if (!INTERIOR && point.level.start < 0) located.weight = static_cast<Real>(__int_as_float(0x7fc00000));
    return located;
  }

  // Whether the point contributes anything.
  template <typename Real, typename Index>
  __device__ bool contributes(Index index, const Level& level) const {
    const Coordinates<Real> at = coordinates<Real>(index, level);
    if constexpr (S::MASKED)
      return cell<false>(at, level).corners != 0u;
    else
      return is_inside<S::NEAREST>(at, level);
  }
};

// Fused: the gradients by the attention weights of a lane's points, the latest first, until all of the row are known.
template <int COUNT>
struct WeightGradients {
  float gradient[COUNT];

  __device__ __forceinline__ void add(float by_weight) {
#pragma unroll
    for (int i = COUNT - 1; i > 0; --i) gradient[i] = gradient[i - 1];
    gradient[0] = by_weight;
  }
};

// Where the gradients of points go.
template <typename S, typename Location, typename Weight>
struct PointGradientArrays {
  Location* locations;
  Weight* weights;
  float* by_location;  // fused: by the locations that offsets stand for; null where they are not wanted

  // As PointArrays::from. The pointers are null where these gradients are not wanted.
  template <typename Index>
  __device__ PointGradientArrays from(Index index) const {
    if constexpr (S::FUSED) return *this;  // an index is taken through PointArrays::at
    return {locations + 2 * index, weights + index, nullptr};
  }

  // `dot` as for point_gradient. All three gradients are NaN if the level does not fit S.
  template <typename Real, typename Index>
  __device__ void store(Index index, const LocatedPoint<Real>& point, const Four<Real>& dot) const {
    using Wide = typename Compute<Location>::type;
    PointGradient<Real> gradient = point_gradient<S::NEAREST>(point.cell, point.weight, point.level, dot);
    if (point.level.start < 0) gradient = {point.weight, point.weight, point.weight};  // NaN
    const Wide by_location[2] = {static_cast<Wide>(gradient.x), static_cast<Wide>(gradient.y)};
    ::store(locations + 2 * index, by_location);
    weights[index] = narrow_to<Weight>(static_cast<typename Compute<Weight>::type>(gradient.weight));
  }

  // Fused, of a point of the level of this number: store all but the gradient by its logit, and return that by its
  // attention weight. `points` has the point at the same index.
  __device__ float store_offset(int index, int number, const LocatedPoint<float>& point, const Four<float>& dot,
                                const PointArrays<S, Location, Weight>& points) const {
    PointGradient<float> by_pixel = point_gradient<S::NEAREST>(point.cell, point.weight, Level{1, 1, 0}, dot);
    if (point.level.start < 0) by_pixel = {point.weight, point.weight, point.weight};  // NaN
    const float width = static_cast<float>(point.level.width), height = static_cast<float>(point.level.height);
    Coordinates<float> step = {1.0f, 1.0f};  // pixels that the point moves by an offset of one
    if constexpr (S::BOXES)
      step = box_step<S>(points.place(index, number).reference, points.row.offset_scale, point.level, number);
    const float by_offset[2] = {by_pixel.x * step.x, by_pixel.y * step.y};
    ::store(locations + 2 * points.at(index), by_offset);
    if (by_location != nullptr) {
      const float gradient[2] = {by_pixel.x * width, by_pixel.y * height};
      ::store(by_location + 2 * points.at(index), gradient);
    }
    return by_pixel.weight;
  }

  // Fused: store the gradients by the logits of a lane's points: `first` and every Gth one after it up to `end`. LANES
  // neighbours hold the points of the row.
  template <int G, int LANES, int COUNT>
  __device__ void store_logits(const WeightGradients<COUNT>& of_lane, int first, int end,
                               const PointArrays<S, Location, Weight>& points) const {
    float weight[COUNT], sum = 0.0f;  // of weight * gradient over the row
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int k = first + i * G;
      weight[i] = k < end ? points.attention(points.weight(k)) : 0.0f;
      sum += weight[i] * of_lane.gradient[COUNT - 1 - i];
    }
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const int k = first + i * G;
      if (k < end) weights[points.at(k)] = narrow_to<Weight>(weight[i] * (of_lane.gradient[COUNT - 1 - i] - sum));
    }
  }
};
