// One pass over a piece of S: which tiles, which scores are no negatives', which results are anchors'; and
// which partial results each anchor then merges. Plain arithmetic, shared with tests/hopper_model.cpp.
#pragma once

#include <cmath>
#include <cstdint>

#include "hopper_tile.h"

namespace fused_vse::hopper {

// Smallest and largest id of a tile's rows or columns.
struct IdRange {
  int64_t first, last;
  FUSED_VSE_HD bool meets(const IdRange& other) const { return first <= other.last && other.first <= last; }
};

struct Walk {
  Rectangle rectangle;
  Raster raster;
  int num_pairs;
  int depth_steps;  // along D
  // Or both null: the row numbers. May be read, whatever is there, for all rows and columns of a cluster
  // tile.
  const int64_t *image_ids, *caption_ids;
  const IdRange *row_ranges, *column_ranges;  // of their tiles

  // Whether any of the tile's scores may be no negative's.
  FUSED_VSE_HD bool may_hold_excluded(Tile tile) const {
    if (tile.is_ragged(rectangle)) return true;
    if (!image_ids) return tile.crosses_diagonal(rectangle);
    return row_ranges[tile.row_tile].meets(column_ranges[tile.column_tile]);
  }

  // acc = -inf where the score lies outside of the rectangle or the ids are equal. All that varies between a
  // thread's scores is known to the compiler, because there are hardly any registers left.
  FUSED_VSE_HD void leave_out(Fragment& acc, Tile tile, int warp, int lane) const {
    const int row = tile.row(rectangle) + lane_row(warp, lane, 0);
    const int column = tile.column() + lane_column(lane, 0, 0);
    if (tile.is_ragged(rectangle)) {
      const int rows = rectangle.row_stop - row, columns = rectangle.num_columns - column;
      leave_out_if(acc, [&](int slot, int chunk, int item) {
        return slot_row(slot) >= rows || item_column(chunk, item) >= columns;
      });
    }
    if (image_ids) {
      const int64_t *row_ids = image_ids + row, *column_ids = caption_ids + column;
      int64_t ids[LANE_ROWS];
      FUSED_VSE_UNROLL
      for (int slot = 0; slot < LANE_ROWS; ++slot) ids[slot] = row_ids[slot_row(slot)];
      leave_out_if(acc, [&](int slot, int chunk, int item) {
        return ids[slot] == column_ids[item_column(chunk, item)];
      });
    } else if (tile.crosses_diagonal(rectangle)) {
      const int offset = column - row;
      leave_out_if(acc, [&](int slot, int chunk, int item) {
        return slot_row(slot) - item_column(chunk, item) == offset;
      });
    }
  }

  template <typename Condition>
  FUSED_VSE_HD static void leave_out_if(Fragment& acc, const Condition& condition) {
    FUSED_VSE_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      FUSED_VSE_UNROLL
      for (int item = 0; item < LANE_COLS; ++item) {
        FUSED_VSE_UNROLL
        for (int slot = 0; slot < LANE_ROWS; ++slot)
          if (condition(slot, chunk, item)) acc[slot / 2][accumulator(slot, chunk, item)] = -HUGE_VALF;
      }
    }
  }

  FUSED_VSE_HD bool is_row_anchor(int row) const { return row < rectangle.row_stop && row < num_pairs; }
  // The second tile of the last cluster row may lie outside: it has no results.
  FUSED_VSE_HD bool is_column_anchor(Tile tile, int column) const {
    return tile.row(rectangle) < rectangle.row_stop && column < rectangle.num_columns && column < num_pairs;
  }
};

// Where an anchor's partial results are: slots [begin, stop) of partial[slot][plane][anchor].
struct Slots {
  int begin, stop;
  int64_t anchors, anchor;
  int64_t pair;  // k
  bool exists;
};

// Of anchor `anchor` of the piece's rows, or of the columns. `first`: the columns have no total yet.
FUSED_VSE_HD Slots slots_of(const Rectangle& rectangle, int64_t num_pairs, bool first, bool columns,
                            int64_t anchor) {
  Slots slots{};
  slots.begin = columns && first ? 1 : 0;
  slots.stop = columns ? rectangle.row_tiles() + 1 : rectangle.column_tiles();
  slots.anchors = columns ? num_pairs : rectangle.rows();
  slots.anchor = anchor;
  slots.pair = columns ? anchor : rectangle.row_start + anchor;
  slots.exists = anchor < slots.anchors && slots.pair < num_pairs;
  return slots;
}

}  // namespace fused_vse::hopper
