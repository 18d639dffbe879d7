// Host-side decisions of the Hopper backend, as plain functions: what it takes, and in which pieces.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "hopper_walk.h"

namespace fused_vse::hopper {

// One side's embeddings [rows, D] as they lie in memory.
struct Layout {
  int64_t rows, dimensions;
  int64_t row_stride, column_stride;  // elements
  uint64_t address;
  bool is_16_bit;  // bfloat16 or float16
};

// Why the copy engine or the kernel's 32-bit numbers cannot take these embeddings, or "".
inline std::string obstacle(const char* name, const Layout& x) {
  const auto text = [&](const std::string& why) { return std::string(name) + " " + why; };
  if (!x.is_16_bit) return text("must be bfloat16 or float16");
  if (x.dimensions % 8 != 0)
    return text("have D = " + std::to_string(x.dimensions) + ", which must be a multiple of 8");
  if (x.column_stride != 1) return text("must have unit stride along D");
  if (x.rows > 1 && (x.row_stride % 8 != 0 || x.row_stride < x.dimensions))
    return text("have rows " + std::to_string(x.row_stride) +
                " elements apart, which must be a multiple of 8 and at least D");
  if (x.address % 16 != 0) return text("must begin on a 16-byte boundary");
  if (x.dimensions > INT32_MAX - TILE_DEPTH) return text("have too many dimensions for 32-bit numbers");
  return "";
}

// The kernels need compute capability 9.0 itself: wgmma and setmaxnreg are in no later architecture.
inline std::string obstacle(int major, int minor, const Layout& images, const Layout& captions) {
  if (major != 9 || minor != 0)
    return "the GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           ", not 9.0";
  const std::string why = obstacle("images", images);
  if (!why.empty()) return why;
  const std::string also = obstacle("captions", captions);
  if (!also.empty()) return also;
  // Of a cluster tile beyond the last one, too, and of a row's and a column's number together.
  if (std::max(images.rows, captions.rows) > INT32_MAX / 2 - CLUSTER * TILE_ROWS)
    return "there are too many rows for 32-bit numbers";
  const Rectangle all{0, int(images.rows), int(captions.rows)};
  // Numbers of two rounds of clusters beyond the last tile, and of a whole group of rows, too.
  constexpr int64_t MARGIN = 1 << 20;
  if ((int64_t{all.cluster_rows()} + GROUP_CLUSTER_ROWS) * all.column_tiles() > INT32_MAX - MARGIN)
    return "there are too many tiles for 32-bit numbers";
  return "";
}

// Bytes of partial results that each row of a rectangle takes: one item a column tile for itself, and its
// share of one item a column for its row tile.
inline int64_t partial_bytes_per_row(int64_t num_columns, int64_t column_anchors) {
  const int64_t row_slots = (num_columns + TILE_COLS - 1) / TILE_COLS;
  const int64_t column_slots = (column_anchors + TILE_ROWS - 1) / TILE_ROWS;
  return MAX_ITEM_BYTES * (row_slots + column_slots);
}

// What anchors see of S [n, m], in pieces of at most `height` rows: all columns for the row anchors, the
// column anchors for the other rows.
inline std::vector<Rectangle> rectangles(int64_t n, int64_t m, int64_t row_anchors, int64_t column_anchors,
                                         int64_t height) {
  std::vector<Rectangle> pieces;
  const auto add = [&](int64_t begin, int64_t end, int64_t columns) {
    for (int64_t row = begin; row < end && columns > 0; row += height)
      pieces.push_back({int(row), int(std::min(row + height, end)), int(columns)});
  };
  add(0, row_anchors, m);
  add(row_anchors, n, column_anchors);
  return pieces;
}

// Whole cluster tiles, at least one row of them.
inline int64_t piece_height(int64_t workspace_bytes, int64_t bytes_per_row) {
  constexpr int64_t STEP = CLUSTER * TILE_ROWS;
  return std::max(workspace_bytes / bytes_per_row / STEP * STEP, STEP);
}

// Bytes of partial results that the largest of the pieces needs.
struct PartialSizes {
  int64_t rows, columns;
};

inline PartialSizes partial_sizes(const std::vector<Rectangle>& pieces, int64_t column_anchors) {
  PartialSizes sizes{0, 0};
  for (const Rectangle& piece : pieces) {
    sizes.rows = std::max(sizes.rows, int64_t{MAX_ITEM_BYTES} * piece.column_tiles() * piece.rows());
    sizes.columns = std::max(sizes.columns, MAX_ITEM_BYTES * (piece.row_tiles() + 1) * column_anchors);
  }
  return sizes;
}

}  // namespace fused_vse::hopper
