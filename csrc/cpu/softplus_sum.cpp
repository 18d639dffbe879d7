// softplus_sum on the CPU (ops.py).
#include <cmath>

#include "anchor_sums.h"

namespace fused_vse {
namespace {

// The entries' x = a s + bias. Those of equal ids, if they count as positives, have a minus: these few are
// taken out of a strip, and computed one by one in double.
struct Entries {
  Entries(double scale, const OptionalTensor& scale_tensor, const Tensor& bias_tensor, bool equal_positive,
          const Batch& batch)
      : a(effective_scale(scale, scale_tensor)),
        bias(scalar_of(bias_tensor, "bias")),
        negates(equal_positive && batch.image_ids) {}

  template <typename T>
  struct Equal {
    int64_t row, col;
    T s;
  };
  template <typename T>
  std::vector<Equal<T>> take(const Pass<T>& pass, const Strip<T>& strip) const {
    std::vector<Equal<T>> taken;
    if (negates)
      pass.for_each_excluded(strip, [&](int64_t row, int64_t col) {
        T& s = strip.scores.s[row * strip.scores.ld + col];
        taken.push_back({row, col, s});
        s = EXCLUDED<T>;
      });
    return taken;
  }
  double x(double s) const { return a * s + bias; }

  double a, bias;
  bool negates;
};

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x))); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> softplus_sum(const Batch& batch, double scale,
                                                const OptionalTensor& scale_tensor, const Tensor& bias,
                                                bool equal_positive, bool save_scores) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    Tensor sums = empty({batch.anchors()}, SCALAR_TYPE<T>), slopes = empty({batch.anchors()}, SCALAR_TYPE<T>);
    const KeptScores kept = kept_scores(batch, save_scores);
    const Entries entries(scale, scale_tensor, bias, equal_positive, batch);
    const Pass<T> pass(batch, std::nullopt, entries.negates);
    const auto task = [&](const Strip<T>& strip, T* row_sum, T* row_slope, T* col_sum, T* col_slope) {
      const auto equal = entries.take(pass, strip);
      kernels<T>().softplus_sums(strip.scores, entries.a, entries.bias, row_sum, row_slope, col_sum,
                                 col_slope);
      const bool of_rows = strip.row() < batch.row_anchors;  // all of its rows are anchors, or none is
      for (const auto& [r, c, score] : equal) {
        const double x = entries.x(score);
        (of_rows ? row_sum[r] : col_sum[c]) += T(softplus(-x));
        (of_rows ? row_slope[r] : col_slope[c]) -= T(sigmoid(-x));
      }
      if (!of_rows) return;
      std::fill_n(col_sum, strip.cols(), T(0));  // an entry counts once
      std::fill_n(col_slope, strip.cols(), T(0));
    };
    const bool done = is_usable<T>(entries.a) && with_source<T>(batch, kept, [&](auto& source) {
                        return source.is_bounded() &&
                               sum_anchors<double>(pass, source, task, data<T>(sums), data<T>(slopes));
                      });
    if (!done) {
      fill(sums, NOT_A_NUMBER<T>);
      fill(slopes, NOT_A_NUMBER<T>);
    }
    return std::make_tuple(sums, slopes, kept.scores);
  });
}

std::tuple<Tensor, Tensor, Tensor> softplus_sum_backward(
    const Batch& batch, double scale, const OptionalTensor& scale_tensor, const Tensor& bias,
    bool equal_positive, const Tensor& softplus_sum, const Tensor& scores, const Tensor& d_positive,
    const Tensor& d_softplus_sum, bool need_images, bool need_captions, bool accumulate) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    const Needs needs{need_images, need_captions, accumulate};
    Tensor d_scale = empty({}, SCALAR_TYPE<T>);
    if (is_poisoned(batch, vector_of<T>(softplus_sum, "softplus_sum", batch.anchors()))) {
      fill(d_scale, NOT_A_NUMBER<T>);
      return std::tuple_cat(nan_gradients(batch, needs), std::make_tuple(d_scale));
    }
    const Entries entries(scale, scale_tensor, bias, equal_positive, batch);
    // a g; of an entry's two anchors one counts.
    const auto g = upstream_of<double>(d_softplus_sum, "d_softplus_sum", batch.anchors());
    PerAnchor<T> weight(batch, 0);
    for (int64_t i = 0; i < batch.anchors(); ++i) weight.at(batch, i) = T(entries.a * g[i]);
    const std::vector<T> nothing(std::max(batch.n(), batch.m()));
    const Pass<T> pass(batch, std::nullopt, entries.negates);
    std::vector<double> totals(GROUPS * TILE_PANELS);
    const Gradients gradients = dense_gradients<T>(
        pass, scores, d_positive, needs, [&](const Strip<T>& strip, const GradientStrip<T>& out) {
          const bool of_rows = strip.row() < batch.row_anchors;
          const auto equal = entries.take(pass, strip);
          double& total = totals[strip.group * TILE_PANELS + strip.panel];
          total += kernels<T>().softplus_gradient(
              strip.scores, entries.a, entries.bias, of_rows ? &weight.rows[strip.row()] : nothing.data(),
              of_rows ? nothing.data() : &weight.cols[strip.col()], out.g, out.ld);
          for (const auto& [r, c, score] : equal) {
            strip.scores.s[r * strip.scores.ld + c] = score;
            const T g_i = of_rows ? weight.rows[strip.row() + r] : weight.cols[strip.col() + c];
            const double q = -sigmoid(-entries.x(score)) * double(g_i);
            out.g[r * out.ld + c] = T(q);
            total += q * double(score);
          }
        });
    fill(d_scale, T(std::accumulate(totals.begin(), totals.end(), 0.0) / entries.a));
    return std::tuple_cat(gradients, std::make_tuple(d_scale));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("softplus_sum", TORCH_BOX(&WithBatch<&softplus_sum>::call));
  m.impl("softplus_sum_backward", TORCH_BOX(&WithBatch<&softplus_sum_backward>::call));
}

}  // namespace fused_vse
