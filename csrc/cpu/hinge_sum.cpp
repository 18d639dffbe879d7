// hinge_sum on the CPU (ops.py).
#include "anchor_sums.h"
#include "statistics.h"

namespace fused_vse {
namespace {

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
    const auto task = [&](const Strip<T>& strip, T* row_sum, T* row_count, T* col_sum, T* col_count) {
      kernels<T>().hinge_sums(strip.scores, &of_anchors.rows[strip.row()], &of_anchors.cols[strip.col()],
                              row_sum, row_count, col_sum, col_count);
    };
    const bool done = with_source<T>(batch, kept, [&](auto& source) {
      return source.is_bounded() &&
             sum_anchors<int64_t>(pass, source, task, data<T>(sums), data<int64_t>(active));
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
