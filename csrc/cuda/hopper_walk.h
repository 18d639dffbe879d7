// One pass over a piece of S: which tiles, which scores are no negatives', which results are anchors'; where
// partial results lie, and which of them an anchor merges.
#pragma once

#include <cmath>
#include <cstdint>

#include "hopper_tile.h"

namespace fused_vse::hopper {

// Smallest and largest id of a tile's rows or columns.
struct IdRange {
  int64_t first, last;
  HOST_DEVICE bool meets(const IdRange& other) const { return first <= other.last && other.first <= last; }
};

struct Walk {
  Rectangle rectangle;
  Raster raster;
  int row_anchors, column_anchors;
  int pair_row, pair_column, pair_count;
  int depth_steps;  // along D
  // Or both null: the pairs decide. May be read, whatever is there, for all rows and columns of a cluster
  // tile.
  const int64_t *image_ids, *caption_ids;
  const IdRange *row_ranges, *column_ranges;  // of their tiles

  HOST_DEVICE bool stores_row(int row) const { return row < rectangle.row_stop && row < row_anchors; }
  // The second tile of the last cluster row may lie outside: it has no results.
  HOST_DEVICE bool stores_column(Tile tile, int column) const {
    return tile.row(rectangle) < rectangle.row_stop && column < column_anchors;
  }

  // Whether any of the tile's scores may be no negative's.
  HOST_DEVICE bool may_hold_excluded(Tile tile) const {
    if (tile.is_ragged(rectangle)) return true;
    if (!image_ids) return holds_pairs(tile);
    return row_ranges[tile.row_tile].meets(column_ranges[tile.column_tile]);
  }
  // Whether the tile's rows, its columns and all pairs have a number of a pair in common: any two do.
  HOST_DEVICE bool holds_pairs(Tile tile) const {
    const int of_row = tile.row(rectangle) - pair_row, of_column = tile.column() - pair_column;
    return of_row < of_column + TILE_COLS && of_column < of_row + TILE_ROWS && of_row < pair_count &&
           of_row + TILE_ROWS > 0 && of_column < pair_count && of_column + TILE_COLS > 0;
  }

  // acc = -inf where the score lies outside of the rectangle, the ids are equal, or it is a pair's. All that
  // varies between a thread's scores is known to the compiler, because there are hardly any registers left.
  HOST_DEVICE void leave_out(Fragment& acc, Tile tile, int warp, int lane) const {
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
#pragma unroll
      for (int slot = 0; slot < LANE_ROWS; ++slot) ids[slot] = row_ids[slot_row(slot)];
      leave_out_if(acc, [&](int slot, int chunk, int item) {
        return ids[slot] == column_ids[item_column(chunk, item)];
      });
    } else if (holds_pairs(tile)) {
      // Of each row, in how many columns from the thread's first its caption is.
      int caption[LANE_ROWS];
#pragma unroll
      for (int slot = 0; slot < LANE_ROWS; ++slot) {
        const int pair = row + slot_row(slot) - pair_row;
        caption[slot] = pair >= 0 && pair < pair_count ? pair + pair_column - column : -1;
      }
      leave_out_if(acc,
                   [&](int slot, int chunk, int item) { return caption[slot] == item_column(chunk, item); });
    }
  }

  template <typename Condition>
  HOST_DEVICE static void leave_out_if(Fragment& acc, const Condition& condition) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
#pragma unroll
      for (int item = 0; item < LANE_COLS; ++item) {
#pragma unroll
        for (int slot = 0; slot < LANE_ROWS; ++slot)
          if (condition(slot, chunk, item)) acc[slot / 2][accumulator(slot, chunk, item)] = -HUGE_VALF;
      }
    }
  }
};

// What an anchor merges: partial results [slots][anchors], of which those of this anchor are items [begin,
// stop).
struct Slots {
  void* partial;
  int begin, stop;
  int64_t anchors, at;
  int64_t number;  // the anchor's in the statistic
  bool exists, carries;

  template <typename Item>
  HOST_DEVICE Item& item(int slot) const {
    return static_cast<Item*>(partial)[slot * anchors + at];
  }
  // The total so far, for the next rectangle.
  template <typename Item>
  HOST_DEVICE void carry(const Item& total) const {
    if (carries) item<Item>(0) = total;
  }
};

// Partial results of a rectangle's tiles, of the type that the statistic merges. Slot 0 of the columns
// carries the total of the rectangles before.
struct Partials {
  void *rows, *columns;  // [column tiles, rows], [1 + row tiles, C]
  Rectangle rectangle;
  int64_t row_anchors, column_anchors;

  template <typename Item>
  HOST_DEVICE void store_row(Tile tile, int row, const Item& item) const {
    static_cast<Item*>(rows)[int64_t{tile.column_tile} * rectangle.rows() + row - rectangle.row_start] = item;
  }
  template <typename Item>
  HOST_DEVICE void store_column(Tile tile, int column, const Item& item) const {
    static_cast<Item*>(columns)[(tile.row_tile + 1) * column_anchors + column] = item;
  }
  // Of place `at` of the rectangle's rows, or of the columns. `first`: the columns have no total yet.
  HOST_DEVICE Slots slots(bool of_columns, bool first, int64_t at) const {
    if (of_columns)
      return {columns,
              first,
              rectangle.row_tiles() + 1,
              column_anchors,
              at,
              row_anchors + at,
              at < column_anchors,
              true};
    const int64_t row = rectangle.row_start + at;
    return {rows,
            0,
            rectangle.column_tiles(),
            rectangle.rows(),
            at,
            row,
            row < rectangle.row_stop && row < row_anchors,
            false};
  }
};

}  // namespace fused_vse::hopper
