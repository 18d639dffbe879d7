// The forward pass of a statistic that is two sums an anchor: hinge_sum, softplus_sum.
#pragma once

#include "sources.h"

namespace fused_vse {

// Both sums of every row, or of every column.
template <typename Second>
struct SideSums {
  explicit SideSums(int64_t size) : first(size), second(size) {}
  void add(int64_t i, double x, Second y) {
    first[i] += x;
    second[i] += y;
  }
  std::vector<double> first;
  std::vector<Second> second;
};

// task(strip, row_first, row_second, col_first, col_second) leaves the sums over the strip of its rows, and
// adds those of its columns. False, with nothing to be used, if a score is not finite.
template <typename Second, typename T, typename Source, typename Task, typename Result>
bool sum_anchors(const Pass<T>& pass, Source& source, const Task& task, T* first, Result* second) {
  const int64_t num_rows = pass.batch.row_anchors, num_cols = pass.batch.column_anchors;
  SideSums<Second> rows(num_rows), cols(num_cols);
  std::vector<SideSums<Second>> group_cols(pass.groups(), SideSums<Second>(pass.batch.m()));
  std::vector<T> row_first(pass.row_slots()), row_second(pass.row_slots());

  const auto of_strip = [&](const Strip<T>& strip) {
    T col_first[PANEL], col_second[PANEL];
    std::fill_n(col_first, strip.cols(), T(0));
    std::fill_n(col_second, strip.cols(), T(0));
    const int64_t at = pass.row_slot(strip.panel, strip.row_in_tile);
    task(strip, &row_first[at], &row_second[at], col_first, col_second);
    for (int64_t c = 0; c < strip.cols(); ++c)
      group_cols[strip.group].add(strip.col() + c, double(col_first[c]), Second(col_second[c]));
  };
  const auto finish = [&](const Tile& tile) {
    for (int64_t panel = 0; panel < tile.panels(); ++panel)
      for (int64_t r = 0; r < std::min(tile.rows, num_rows - tile.row); ++r) {
        const int64_t at = pass.row_slot(panel, r);
        rows.add(tile.row + r, double(row_first[at]), Second(row_second[at]));
      }
  };
  if (!pass.run(source, of_strip, finish)) return false;
  for (const SideSums<Second>& group : group_cols)
    for (int64_t c = 0; c < num_cols; ++c) cols.add(c, group.first[c], group.second[c]);
  for (const SideSums<Second>* side : {&rows, &cols}) {
    first = std::copy(side->first.begin(), side->first.end(), first);
    second = std::copy(side->second.begin(), side->second.end(), second);
  }
  return true;
}

}  // namespace fused_vse
