// SPDX-License-Identifier: Apache-2.0
// The tile scheduler: the order in which persistent blocks and batches take the rows (n, q, m). Image by image, head by
// head, and the queries of a head in tiles of the grids that they lie on, so that rows close in time sample the same pixels.
//
// Grids follow one another. A grid is cut into bands of TILE rows, a band into tiles of TILE columns, all in scan order
// and smaller at the lower and right edges, so that every query has its place. kernels/README.md has the formulas.
#pragma once

#include "levels.cuh"

constexpr unsigned TILE = 16;

// plans.py builds the same layout.
template <int LEVELS>
struct SchedulerParams : Params<LEVELS> {
  int num_grids;            // 0: the levels are the grids
  int grids[MAX_GRIDS][2];  // H, W
};

struct Grid {
  unsigned height, width;
};

struct TileScheduler {
  Grid grids[MAX_GRIDS];
  int num_grids;  // 0: the grids do not hold Lq queries, and queries are taken in the order given
};

// The scheduler in shared memory, once per block, after its levels.
template <int L>
__device__ inline void load_scheduler(TileScheduler& scheduler, const Level (&levels)[L], const SchedulerParams<L>& p) {
  static_assert(L <= MAX_GRIDS, "the levels must fit");
  if (threadIdx.x == 0) {
    const int count = p.num_grids != 0 ? p.num_grids : L;
    long long queries = 0;
    for (int i = 0; i < count; ++i) {
      const int height = p.num_grids != 0 ? p.grids[i][0] : levels[i].height;
      const int width = p.num_grids != 0 ? p.grids[i][1] : levels[i].width;
      scheduler.grids[i] = {static_cast<unsigned>(height), static_cast<unsigned>(width)};
      queries += static_cast<long long>(height) * width;
    }
    scheduler.num_grids = queries == p.num_queries ? count : 0;
  }
  __syncthreads();
}

// The pixel at `index` of a grid in tiles.
__device__ inline unsigned tiled_pixel(unsigned index, const Grid& grid) {
  const unsigned band = index / (TILE * grid.width), in_band = index - band * TILE * grid.width;
  const unsigned height = min(TILE, grid.height - band * TILE);
  const unsigned tile = in_band / (TILE * height), in_tile = in_band - tile * TILE * height;
  const unsigned width = min(TILE, grid.width - tile * TILE);
  const unsigned row = in_tile / width, column = in_tile - row * width;
  return (band * TILE + row) * grid.width + tile * TILE + column;
}

// The query that comes at `index` within its (image, head).
__device__ inline unsigned scheduled_query(unsigned index, const TileScheduler& scheduler) {
  unsigned start = 0;
  for (int i = 0; i < scheduler.num_grids; ++i) {
    const Grid grid = scheduler.grids[i];
    const unsigned size = grid.height * grid.width;
    if (index - start < size) return start + tiled_pixel(index - start, grid);
    start += size;
  }
  return index;
}

// The row that comes at `index`: its own index among N * Lq * M, and that of position 0 of its image and head among
// N * S * M.
struct ScheduledRow {
  unsigned row, plane;

  __device__ ScheduledRow(unsigned index, const TileScheduler& scheduler, const Shape& p) {
    const unsigned queries = p.num_queries, heads = p.num_heads;
    const unsigned image_head = index / queries, query = scheduled_query(index - image_head * queries, scheduler);
    const unsigned image = image_head / heads, head = image_head - image * heads;
    row = (image * queries + query) * heads + head;
    plane = image * p.spatial_size * heads + head;
  }
};

// Where the range of a persistent block begins among the N * M * Lq rows. It ends where that of the next block begins.
__device__ inline unsigned range_begin(const Shape& p, unsigned block) {
  const unsigned rows = static_cast<unsigned>(p.batch * p.num_heads) * p.num_queries;
  return static_cast<unsigned>(static_cast<unsigned long long>(rows) * block / gridDim.x);
}

// Call visit(row, plane, counts) for every row of a persistent block's range, with groups of G lanes to a row. The block's
// warps take turns, so that all of them sample the same few tiles at a time. Idle groups repeat the last row with
// counts = false, since the lanes of a warp must stay together.
template <int G, typename Visit>
__device__ __forceinline__ void visit_rows(const TileScheduler& scheduler, const Shape& p, Visit visit) {
  constexpr unsigned ROWS = WARP / G, STEP = PERSISTENT_BLOCK / G;  // at a time, of a warp and of the block
  const unsigned lane = threadIdx.x % WARP, group = lane / G;
  const unsigned end = range_begin(p, blockIdx.x + 1);
  unsigned first = range_begin(p, blockIdx.x) + threadIdx.x / WARP * ROWS;
  while (first < end) {
    // Each lane finds one of the rows of the warp's next G turns.
    const ScheduledRow mine(min(first + lane / ROWS * STEP + lane % ROWS, end - 1), scheduler, p);
#pragma unroll 1
    for (unsigned from = group; from < WARP && first < end; from += ROWS, first += STEP) {
      const unsigned row = __shfl_sync(ALL_LANES, mine.row, from), plane = __shfl_sync(ALL_LANES, mine.plane, from);
      visit(row, plane, first + group < end);
    }
  }
}
