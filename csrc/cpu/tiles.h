// S in tiles, and their parts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "batch.h"

namespace fused_vse {

// A tile of S is what one library GEMM computes into a reused buffer: large enough for it to be near its
// peak, 16 MiB in float32. Its strips stay in a core's cache, 128 KiB; a task has those of one group of
// rows in one panel of columns.
constexpr int64_t TILE_ROWS = 1024;
constexpr int64_t TILE_COLS = 4096;
constexpr int64_t STRIP_ROWS = 32;
constexpr int64_t PANEL = 1024;
constexpr int64_t TILE_PANELS = TILE_COLS / PANEL;
constexpr int64_t GROUPS = 8;
// S is kept for the backward pass up to this size: it saves one GEMM of four. ops.py has it, too.
constexpr int64_t MAX_SAVED_SCORES = TILE_ROWS * TILE_COLS;

constexpr int64_t divided_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

struct Tile {
  int64_t row, rows, col, cols;
  int64_t strips() const { return divided_up(rows, STRIP_ROWS); }
  int64_t panels() const { return divided_up(cols, PANEL); }
  int64_t strip_begin(int64_t strip) const { return strip * STRIP_ROWS; }
  // A buffer's beginning as the tile [rows, cols].
  Tensor view(const Tensor& buffer) const {
    return torch::stable::view(rows_of(buffer, 0, rows * cols), {rows, cols});
  }
  int64_t strip_rows(int64_t strip) const { return std::min(STRIP_ROWS, rows - strip_begin(strip)); }
};

// The tiles of S that some anchor sees: all columns for row anchors, column anchors for the other rows.
inline std::vector<Tile> tiles_of(const Batch& batch) {
  std::vector<Tile> tiles;
  const auto add_rows = [&](int64_t begin, int64_t end, int64_t cols) {
    for (int64_t row = begin; row < end; row += TILE_ROWS)
      for (int64_t col = 0; col < cols; col += TILE_COLS)
        tiles.push_back({row, std::min(TILE_ROWS, end - row), col, std::min(TILE_COLS, cols - col)});
  };
  add_rows(0, batch.row_anchors, batch.m());
  add_rows(batch.row_anchors, batch.n(), batch.column_anchors);
  return tiles;
}

// In scores.
inline int64_t largest_tile(const Batch& batch) {
  return std::min(TILE_ROWS, batch.n()) * std::min(TILE_COLS, batch.m());
}

}  // namespace fused_vse
