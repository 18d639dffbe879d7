// The one pass over S.
//
//   for each tile:                                        source.prepare(tile): a GEMM, or nothing
//     for each group of its rows and panel of its columns, in parallel:
//       for each strip of these:                          source.read(): into a buffer in the cache
//         leave out what is excluded
//         task(strip)
//     finish(tile)
//
// A strip is read from memory once. What a task keeps for columns is owned by its group, what it keeps for
// rows by its panel; both are merged in ascending order, whatever the number of threads.
#pragma once

#include <atomic>
#include <memory>

#include "tiles.h"

namespace fused_vse {

template <typename T>
struct Strip {
  StripScores<T> scores;
  const Tile& tile;
  int64_t row_in_tile, col_in_tile, group, panel;

  int64_t rows() const { return scores.rows; }
  int64_t cols() const { return scores.cols; }
  int64_t row() const { return tile.row + row_in_tile; }
  int64_t col() const { return tile.col + col_in_tile; }
  // This part of the tile that starts at x, whose rows are ld apart.
  template <typename U>
  U* in(U* x, int64_t ld) const {
    return x + row_in_tile * ld + col_in_tile;
  }
  void copy(const T* from, int64_t ld_from, T* to, int64_t ld_to) const {
    for (int64_t r = 0; r < rows(); ++r) std::copy_n(from + r * ld_from, cols(), to + r * ld_to);
  }
};

template <typename T>
class Pass {
 public:
  // `keeps_excluded`: what is excluded is left to the tasks.
  explicit Pass(const Batch& batch, const OptionalTensor& ceiling = std::nullopt, bool keeps_excluded = false)
      : batch(batch), excluded_(batch), keeps_excluded_(keeps_excluded) {
    if (ceiling) ceiling_.emplace(batch, vector_of<T>(*ceiling, "ceiling", batch.anchors()), INFINITE<T>);
  }

  // False, with nothing to be used, if source.read() finds a score that is not finite.
  template <typename Source, typename Task, typename Finish>
  bool run(Source& source, const Task& task, const Finish& finish) const {
    std::atomic<bool> finite{true};
    for (const Tile& tile : tiles_of(batch)) {
      source.prepare(tile);
      const int64_t panels = tile.panels(), strips = divided_up(tile.strips(), GROUPS);
      parallel_each(divided_up(tile.strips(), strips) * panels, [&](int64_t id) {
        const int64_t group = id / panels, panel = id % panels, c = panel * PANEL;
        const int64_t cols = std::min(PANEL, tile.cols - c);
        const std::unique_ptr<T[]> buffer(new T[STRIP_ROWS * cols]);
        for (int64_t s = group * strips; s < std::min((group + 1) * strips, tile.strips()); ++s) {
          const int64_t r = tile.strip_begin(s), rows = tile.strip_rows(s);
          Strip<T> strip{{buffer.get(), rows, cols, cols}, tile, r, c, group, panel};
          if (ceiling_) {
            strip.scores.row_ceiling = &ceiling_->rows[strip.row()];
            strip.scores.col_ceiling = &ceiling_->cols[strip.col()];
          }
          if (!source.read(strip, buffer.get())) finite = false;
          if (!finite) return;
          if (!keeps_excluded_)
            for_each_excluded(strip, [&](int64_t i, int64_t j) { buffer[i * cols + j] = EXCLUDED<T>; });
          task(strip);
        }
      });
      if (!finite) return false;
      finish(tile);
    }
    return true;
  }

  // f(row, column) of the strip
  template <typename F>
  void for_each_excluded(const Strip<T>& strip, const F& f) const {
    for (int64_t i = 0; i < strip.rows(); ++i)
      excluded_.for_each(strip.row() + i, strip.col(), strip.col() + strip.cols(),
                         [&](int64_t j) { f(i, j - strip.col()); });
  }

  // How many groups there are, and where a task keeps what it finds for a row of the tile.
  int64_t groups() const { return std::min(GROUPS, divided_up(std::min(TILE_ROWS, batch.n()), STRIP_ROWS)); }
  int64_t row_slots() const { return row_slot(divided_up(std::min(TILE_COLS, batch.m()), PANEL), 0); }
  int64_t row_slot(int64_t panel, int64_t row) const { return panel * std::min(TILE_ROWS, batch.n()) + row; }

  const Batch& batch;

 private:
  const ExcludedPairs excluded_;
  const bool keeps_excluded_;
  std::optional<PerAnchor<T>> ceiling_;
};

}  // namespace fused_vse
