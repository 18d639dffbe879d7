// hinge_sum on the CPU (ops.py).
#include "sources.h"
#include "statistics.h"

namespace fused_vse {
namespace {

// The sum and the number of the hinges above 0 of every row, or of every column.
struct SideHinges {
  explicit SideHinges(int64_t size) : sum(size), active(size) {}
  void add(int64_t i, double s, int64_t count) {
    sum[i] += s;
    active[i] += count;
  }
  std::vector<double> sum;
  std::vector<int64_t> active;
};

template <typename T, typename Source>
bool forward(const Pass<T>& pass, Source& source, const PerAnchor<T>& threshold, T* hinge_sum,
             int64_t* active) {
  const int64_t num_rows = pass.batch.row_anchors, num_cols = pass.batch.column_anchors;
  SideHinges rows(num_rows), cols(num_cols);
  std::vector<SideHinges> group_cols(pass.groups(), SideHinges(pass.batch.m()));
  std::vector<T> row_sum(pass.row_slots()), row_count(pass.row_slots());

  const auto task = [&](const Strip<T>& strip) {
    T sum[PANEL], count[PANEL];
    std::fill_n(sum, strip.cols(), T(0));
    std::fill_n(count, strip.cols(), T(0));
    const int64_t at = pass.row_slot(strip.panel, strip.row_in_tile);
    kernels<T>().hinge_sums(strip.scores, &threshold.rows[strip.row()], &threshold.cols[strip.col()],
                            &row_sum[at], &row_count[at], sum, count);
    for (int64_t c = 0; c < strip.cols(); ++c)
      group_cols[strip.group].add(strip.col() + c, double(sum[c]), int64_t(count[c]));
  };
  const auto finish = [&](const Tile& tile) {
    for (int64_t panel = 0; panel < tile.panels(); ++panel)
      for (int64_t r = 0; r < std::min(tile.rows, num_rows - tile.row); ++r) {
        const int64_t at = pass.row_slot(panel, r);
        rows.add(tile.row + r, double(row_sum[at]), int64_t(row_count[at]));
      }
  };
  if (!pass.run(source, task, finish)) return false;
  for (const SideHinges& group : group_cols)
    for (int64_t c = 0; c < num_cols; ++c) cols.add(c, group.sum[c], group.active[c]);
  for (const SideHinges* side : {&rows, &cols}) {
    hinge_sum = std::copy(side->sum.begin(), side->sum.end(), hinge_sum);
    active = std::copy(side->active.begin(), side->active.end(), active);
  }
  return true;
}

template <typename T>
PerAnchor<T> thresholds(const Batch& batch, const Tensor& threshold) {
  return {batch, vector_of<T>(threshold, "threshold", batch.anchors()), INFINITE<T>};
}

}  // namespace

Hinges hinge_sum(const Batch& batch, const OptionalTensor& ceiling, const Tensor& threshold,
                 bool save_scores) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    Tensor sums = empty({batch.anchors()}, SCALAR_TYPE<T>);
    Tensor active = empty({batch.anchors()}, ScalarType::Long);
    const KeptScores kept = kept_scores(batch, save_scores);
    const PerAnchor<T> of_anchors = thresholds<T>(batch, threshold);
    const Pass<T> pass(batch, ceiling);
    const bool done = with_source<T>(batch, kept, [&](auto& source) {
      return source.is_bounded() && forward(pass, source, of_anchors, data<T>(sums), data<int64_t>(active));
    });
    if (!done) {
      fill(sums, NOT_A_NUMBER<T>);
      fill(active, int64_t{0});
    }
    return std::make_tuple(sums, active, kept.scores);
  });
}

Gradients hinge_sum_backward(const Batch& batch, const OptionalTensor& ceiling, const Tensor& threshold,
                             const Tensor& hinge_sum, const Tensor& scores, const Tensor& d_positive,
                             const Tensor& d_hinge_sum, bool need_images, bool need_captions,
                             bool accumulate) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    const Needs needs{need_images, need_captions, accumulate};
    if (is_poisoned(batch, vector_of<T>(hinge_sum, "hinge_sum", batch.anchors())))
      return nan_gradients(batch, needs);
    const PerAnchor<T> of_anchors = thresholds<T>(batch, threshold);
    const PerAnchor<T> g(batch, upstream_of<T>(d_hinge_sum, "d_hinge_sum", batch.anchors()), 0);
    const Pass<T> pass(batch, ceiling);
    return dense_gradients<T>(
        pass, scores, d_positive, needs, [&](const Strip<T>& strip, const GradientStrip<T>& out) {
          const int64_t row = strip.row(), col = strip.col();
          kernels<T>().hinge_gradient(strip.scores, &of_anchors.rows[row], &g.rows[row],
                                      &of_anchors.cols[col], &g.cols[col], out.g, out.ld);
        });
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("hinge_sum", TORCH_BOX(&WithBatch<&hinge_sum>::call));
  m.impl("hinge_sum_backward", TORCH_BOX(&WithBatch<&hinge_sum_backward>::call));
}

}  // namespace fused_vse
