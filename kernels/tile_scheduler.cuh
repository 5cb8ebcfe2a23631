// SPDX-License-Identifier: Apache-2.0
// The tile scheduler: the order in which blocks and batches take the rows (n, q, m). Image by image, head by head, and the
// queries of a head in tiles of the grids that they lie on, so that rows close in time sample the same pixels.
//
// Grids follow one another. A grid is cut into bands of HEIGHT rows, a band into tiles of WIDTH columns, all in scan order
// and smaller at the lower and right edges, so that every query has its place. kernels/README.md has the formulas.
#pragma once

#include "levels.cuh"

constexpr unsigned TILE = 16;  // height and width, where a kernel needs no others

// What a row costs, for the ranges of persistent blocks: one of the largest grid, and one of the others, whose queries lie
// further apart in the finest level. Measured on detr-encoder: 1.06 to 1.16 times as much.
constexpr unsigned FINE_COST = 11, COARSE_COST = 12;

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
  int num_grids;                   // 0: the grids do not hold Lq queries, and queries are taken in the order given
  unsigned fine_begin, fine_size;  // the queries of the largest grid
};

// The scheduler in shared memory, once per block, after its levels.
template <int L>
__device__ inline void load_scheduler(TileScheduler& scheduler, const Level (&levels)[L], const SchedulerParams<L>& p) {
  static_assert(L <= MAX_GRIDS, "the levels must fit");
  if (threadIdx.x == 0) {
    const int count = p.num_grids != 0 ? p.num_grids : L;
    long long queries = 0;
    scheduler.fine_begin = scheduler.fine_size = 0;
    for (int i = 0; i < count; ++i) {
      const int height = p.num_grids != 0 ? p.grids[i][0] : levels[i].height;
      const int width = p.num_grids != 0 ? p.grids[i][1] : levels[i].width;
      scheduler.grids[i] = {static_cast<unsigned>(height), static_cast<unsigned>(width)};
      const unsigned size = scheduler.grids[i].height * scheduler.grids[i].width;
      if (size > scheduler.fine_size) {
        scheduler.fine_begin = static_cast<unsigned>(queries);
        scheduler.fine_size = size;
      }
      queries += static_cast<long long>(height) * width;
    }
    scheduler.num_grids = queries == p.num_queries ? count : 0;
    if (scheduler.num_grids == 0) scheduler.fine_begin = scheduler.fine_size = 0;
  }
  __syncthreads();
}

// The pixel at `index` of a grid in tiles.
template <unsigned HEIGHT, unsigned WIDTH>
__device__ inline unsigned tiled_pixel(unsigned index, const Grid& grid) {
  const unsigned band = index / (HEIGHT * grid.width), in_band = index - band * HEIGHT * grid.width;
  const unsigned height = min(HEIGHT, grid.height - band * HEIGHT);
  const unsigned tile = in_band / (WIDTH * height), in_tile = in_band - tile * WIDTH * height;
  const unsigned width = min(WIDTH, grid.width - tile * WIDTH);
  const unsigned row = in_tile / width, column = in_tile - row * width;
  return (band * HEIGHT + row) * grid.width + tile * WIDTH + column;
}

// The query that comes at `index` within its (image, head).
template <unsigned HEIGHT, unsigned WIDTH>
__device__ inline unsigned scheduled_query(unsigned index, const TileScheduler& scheduler) {
  unsigned start = 0;
  for (int i = 0; i < scheduler.num_grids; ++i) {
    const Grid grid = scheduler.grids[i];
    const unsigned size = grid.height * grid.width;
    if (index - start < size) return start + tiled_pixel<HEIGHT, WIDTH>(index - start, grid);
    start += size;
  }
  return index;
}

// The row that comes at `index`: its own index among N * Lq * M, and that of position 0 of its image and head among
// N * S * M.
template <unsigned HEIGHT = TILE, unsigned WIDTH = TILE>
struct ScheduledRow {
  unsigned row, plane;

  __device__ ScheduledRow(unsigned index, const TileScheduler& scheduler, const Shape& p) {
    const unsigned queries = p.num_queries, heads = p.num_heads;
    const unsigned image_head = index / queries;
    const unsigned query = scheduled_query<HEIGHT, WIDTH>(index - image_head * queries, scheduler);
    const unsigned image = image_head / heads, head = image_head - image * heads;
    row = (image * queries + query) * heads + head;
    plane = image * p.spatial_size * heads + head;
  }
};

// Where the range of a persistent block begins among the N * M * Lq rows, so that all ranges cost the same. It ends where
// that of the next block begins.
__device__ inline unsigned range_begin(const TileScheduler& scheduler, const Shape& p, unsigned block) {
  using Cost = unsigned long long;
  const Cost queries = p.num_queries, image_heads = static_cast<unsigned>(p.batch * p.num_heads);
  const Cost fine = scheduler.fine_begin * Cost{COARSE_COST}, coarse = fine + scheduler.fine_size * Cost{FINE_COST};
  const Cost of_head = coarse + (queries - scheduler.fine_begin - scheduler.fine_size) * COARSE_COST;
  const Cost before = of_head * image_heads * block / gridDim.x, head = before / of_head,
             rest = before - head * of_head;
  Cost query = rest / COARSE_COST;
  if (rest >= coarse)
    query = scheduler.fine_begin + scheduler.fine_size + (rest - coarse) / COARSE_COST;
  else if (rest >= fine)
    query = scheduler.fine_begin + (rest - fine) / FINE_COST;
  return static_cast<unsigned>(head * queries + query);
}

// Call visit(row, plane, counts) for every row of a persistent block's range, with groups of G lanes to a row. The block's
// warps take turns, so that all of them sample the same few tiles at a time. Idle groups repeat the last row with
// counts = false, since the lanes of a warp must stay together.
template <int G, typename Visit>
__device__ __forceinline__ void visit_rows(const TileScheduler& scheduler, const Shape& p, Visit visit) {
  constexpr unsigned ROWS = WARP / G, STEP = PERSISTENT_BLOCK / G;  // at a time, of a warp and of the block
  __shared__ unsigned range[2];
  if (threadIdx.x < 2) range[threadIdx.x] = range_begin(scheduler, p, blockIdx.x + threadIdx.x);
  __syncthreads();
  const unsigned lane = threadIdx.x % WARP, group = lane / G, end = range[1];
  unsigned first = range[0] + threadIdx.x / WARP * ROWS;
  while (first < end) {
    // Each lane finds one of the rows of the warp's next G turns.
    const ScheduledRow<> mine(min(first + lane / ROWS * STEP + lane % ROWS, end - 1), scheduler, p);
#pragma unroll 1
    for (unsigned from = group; from < WARP && first < end; from += ROWS, first += STEP) {
      const unsigned row = __shfl_sync(ALL_LANES, mine.row, from), plane = __shfl_sync(ALL_LANES, mine.plane, from);
      visit(row, plane, first + group < end);
    }
  }
}
