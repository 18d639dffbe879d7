// The tiles of the Hopper statistics kernel: their shape, who holds which score, who computes which tile.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fused_vse::hopper {

// A warpgroup's tile. 192 of its scores are in each thread's registers, which leaves 40 for the epilogue; it
// is as wide as that allows, since each operand element that is loaded takes part in one multiplication per
// row or column of the tile.
constexpr int TILE_ROWS = 128;
constexpr int TILE_COLS = 192;
// 64 16-bit elements are the 128 bytes of the widest shared-memory swizzle.
constexpr int TILE_DEPTH = 64;
// Two blocks take tiles of neighbouring rows and the same columns, and load half of the captions each for
// both: 28 KiB from L2 for 768 clocks of multiplication instead of 40 KiB.
constexpr int CLUSTER = 2;
constexpr int SHARE_COLS = TILE_COLS / CLUSTER;
// 5 x 40 KiB fit into 227 KiB: more than two steps' latency to L2 ahead.
constexpr int STAGES = 5;
// Clusters next to each other in time share 2048 rows of I and some 1600 rows of T, 7 MiB at D = 1024.
constexpr int GROUP_CLUSTER_ROWS = 8;

constexpr int WARPS = 4;   // of a warpgroup
constexpr int BLOCKS = 2;  // of 64 rows, each the result of one wgmma
constexpr int ACCUMULATORS = 64 * TILE_COLS / 128;

constexpr int LANE_ROWS = 4;    // rows of the tile in one thread's registers ("slots")
constexpr int CHUNK_COLS = 32;  // columns that are reduced together: one a lane at the end
constexpr int LANE_COLS = 8;    // of them in one thread's registers ("items")
constexpr int CHUNKS = TILE_COLS / CHUNK_COLS;

constexpr int MAX_ITEM_BYTES = 8;  // what a statistic keeps of some scores

// One thread's scores, as wgmma.m64n192 leaves them.
using Fragment = float[BLOCKS][ACCUMULATORS];

// Both ascend with `slot` or `item`: the first of equal scores is then the one of the smallest index.
HOST_DEVICE constexpr int slot_row(int slot) { return 64 * (slot / 2) + 8 * (slot % 2); }
HOST_DEVICE constexpr int item_column(int chunk, int item) {
  return CHUNK_COLS * chunk + 8 * (item / 2) + item % 2;
}
HOST_DEVICE constexpr int lane_row(int warp, int lane, int slot) {
  return 16 * warp + lane / 4 + slot_row(slot);
}
HOST_DEVICE constexpr int lane_column(int lane, int chunk, int item) {
  return 2 * (lane % 4) + item_column(chunk, item);
}
// Where a thread's score of (slot, chunk, item) is in acc[slot / 2].
HOST_DEVICE constexpr int accumulator(int slot, int chunk, int item) {
  return 16 * chunk + 4 * (item / 2) + 2 * (slot % 2) + item % 2;
}

// What a thread has of one of its rows, and of one of its columns: scores[i] is `place(i)` columns, or rows,
// beyond the thread's first. All of that is known to the compiler.
struct RowScores {
  static constexpr int COUNT = CHUNKS * LANE_COLS;
  const Fragment& acc;
  int slot;

  HOST_DEVICE float operator[](int i) const {
    return acc[slot / 2][accumulator(slot, i / LANE_COLS, i % LANE_COLS)];
  }
  HOST_DEVICE static constexpr int place(int i) { return item_column(i / LANE_COLS, i % LANE_COLS); }
};
struct ColumnScores {
  static constexpr int COUNT = LANE_ROWS;
  const Fragment& acc;
  int chunk, item;

  HOST_DEVICE float operator[](int i) const { return acc[i / 2][accumulator(i, chunk, item)]; }
  HOST_DEVICE static constexpr int place(int i) { return slot_row(i); }
};

// Swap-shuffle. 2 HALF lanes hold 2 HALF items each and want one total an item. In each step a lane keeps
// one half of its items, gives the other half to the lane whose number differs in one bit, and merges what
// it gets: HALF + HALF / 2 + ... + 1 shuffles in place of the 2 HALF log(2 HALF) of a butterfly, and as many
// merges. For a tile that is 45 shuffles a word in place of 152. In the end, lane r of them holds the total
// of item r in items[0]. Chosen for these counts; the alternative was not measured.
template <int HALF, typename Item>
HOST_DEVICE void swap_halves(Item* items, Item* outgoing, bool upper) {
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    outgoing[i] = upper ? items[i] : items[i + HALF];
    items[i] = upper ? items[i + HALF] : items[i];
  }
}
// The lanes that share rows differ in bits 0 and 1, those that share columns in bits 2, 3 and 4.
constexpr int ROW_STRIDE = 1, COLUMN_STRIDE = 4;
HOST_DEVICE constexpr int slot_of_lane(int lane) { return lane % 4; }
HOST_DEVICE constexpr int item_of_lane(int lane) { return lane / 4; }

// A piece of S: rows [row_start, row_stop), columns [0, num_columns).
struct Rectangle {
  int row_start, row_stop, num_columns;

  HOST_DEVICE int rows() const { return row_stop - row_start; }
  HOST_DEVICE int row_tiles() const { return (rows() + TILE_ROWS - 1) / TILE_ROWS; }
  HOST_DEVICE int column_tiles() const { return (num_columns + TILE_COLS - 1) / TILE_COLS; }
  HOST_DEVICE int cluster_rows() const { return (row_tiles() + CLUSTER - 1) / CLUSTER; }
  HOST_DEVICE int cluster_tiles() const { return cluster_rows() * column_tiles(); }
};

// A tile by the number of its row tile and of its column tile.
struct Tile {
  int row_tile, column_tile;

  HOST_DEVICE int row(const Rectangle& r) const { return r.row_start + row_tile * TILE_ROWS; }
  HOST_DEVICE int column() const { return column_tile * TILE_COLS; }
  // The sums stay below 2^31 (hopper_plan.h).
  HOST_DEVICE bool is_ragged(const Rectangle& r) const {
    return row(r) + TILE_ROWS > r.row_stop || column() + TILE_COLS > r.num_columns;
  }
};

// The order of a rectangle's tiles, in clusters: computed once, since the kernel has no registers for it.
struct Raster {
  int cluster_rows, column_tiles, cluster_tiles;

  static Raster of(const Rectangle& r) { return {r.cluster_rows(), r.column_tiles(), r.cluster_tiles()}; }

  // Cluster tile number -> tile of block `rank`: down a group of rows, then to the next column, so that
  // operands stay in L2. With an odd number of row tiles, the last row tile of rank 1 lies outside.
  // Cluster c of C computes the numbers c, c + C, ...
  HOST_DEVICE Tile tile(int number, int rank) const {
    const int group_tiles = GROUP_CLUSTER_ROWS * column_tiles;
    const int first = number / group_tiles * GROUP_CLUSTER_ROWS;
    const int left = cluster_rows - first;
    const int height = left < GROUP_CLUSTER_ROWS ? left : GROUP_CLUSTER_ROWS;
    const int within = number % group_tiles;
    return {CLUSTER * (first + within % height) + rank, within / height};
  }
};

// The place in the ring of stages after so many steps, and how often it went around, modulo 2.
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  HOST_DEVICE void advance(int steps) {
    stage += steps;
    phase ^= static_cast<uint32_t>(stage / STAGES) & 1;
    stage %= STAGES;
  }
};

}  // namespace fused_vse::hopper
