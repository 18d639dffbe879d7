// negative_logsumexp on the CPU (ops.py). Forward, for each strip: maxima of its rows and columns; where they
// raise the running ones, the sums so far are rescaled; sums of exp(a (s - maximum)), rows and columns.
#include <cmath>

#include "sources.h"
#include "statistics.h"

namespace fused_vse {
namespace {

// The running maximum and sum of exp(a (s - maximum)) of every row, or of every column.
template <typename T>
class RunningSums {
 public:
  RunningSums(int64_t size, double a) : a_(a), maximum_(size, EXCLUDED<T>), sum_(size, 0) {}

  // Raises the maximum of one element and rescales its sum.
  void raise(int64_t i, T maximum) {
    if (maximum <= maximum_[i]) return;
    if (sum_[i] > 0) sum_[i] *= std::exp(a_ * (double(maximum_[i]) - double(maximum)));
    maximum_[i] = maximum;
  }

  void add(int64_t i, T sum) { sum_[i] += double(sum); }

  // Adds a sum that was taken relative to another maximum.
  void merge(int64_t i, T maximum, double sum) {
    if (maximum == EXCLUDED<T>) return;
    raise(i, maximum);
    const double distance = double(maximum) - double(maximum_[i]);
    sum_[i] += distance == 0 ? sum : sum * std::exp(a_ * distance);
  }
  void merge(int64_t i, const RunningSums& other) { merge(i, other.maximum_[i], other.sum_[i]); }

  // What to subtract from the scores: the maximum, or 0 where nothing but excluded pairs was seen.
  T reference(int64_t i) const { return reference_of(maximum_[i]); }
  static T reference_of(T maximum) { return maximum == EXCLUDED<T> ? T(0) : maximum; }

  void report(T* reference, double* log_sum) const {
    for (size_t i = 0; i < sum_.size(); ++i) {
      reference[i] = reference_of(maximum_[i]);
      log_sum[i] = maximum_[i] == EXCLUDED<T> ? -INFINITE<double> : std::log(sum_[i]);
    }
  }

 private:
  const double a_;
  std::vector<T> maximum_;
  std::vector<double> sum_;
};

template <typename T, typename Source>
bool forward(const Pass<T>& pass, Source& source, double a, T* reference, double* log_sum) {
  constexpr int64_t MERGED = 128;  // a task
  const int64_t num_rows = pass.batch.row_anchors, num_cols = pass.batch.column_anchors;
  RunningSums<T> rows(num_rows, a), cols(num_cols, a);
  std::vector<RunningSums<T>> group_cols(pass.groups(), RunningSums<T>(pass.batch.m(), a));
  std::vector<T> row_max(pass.row_slots()), row_sum(pass.row_slots());

  const auto task = [&](const Strip<T>& strip) {
    RunningSums<T>& sums = group_cols[strip.group];
    const int64_t at = pass.row_slot(strip.panel, strip.row_in_tile);
    T row_reference[STRIP_ROWS], col_reference[PANEL], of_cols[PANEL];
    std::fill_n(of_cols, strip.cols(), EXCLUDED<T>);
    kernels<T>().maxima(strip.scores, &row_max[at], of_cols);
    for (int64_t c = 0; c < strip.cols(); ++c) {
      sums.raise(strip.col() + c, of_cols[c]);
      col_reference[c] = sums.reference(strip.col() + c);
      of_cols[c] = 0;
    }
    for (int64_t r = 0; r < strip.rows(); ++r) row_reference[r] = sums.reference_of(row_max[at + r]);
    kernels<T>().exp_sums(strip.scores, a, row_reference, col_reference, &row_sum[at], of_cols);
    for (int64_t c = 0; c < strip.cols(); ++c) sums.add(strip.col() + c, of_cols[c]);
  };
  const auto finish = [&](const Tile& tile) {
    parallel_each(
        std::clamp(num_rows - tile.row, int64_t{0}, tile.rows),
        [&](int64_t r) {
          for (int64_t panel = 0; panel < tile.panels(); ++panel) {
            const int64_t at = pass.row_slot(panel, r);
            rows.merge(tile.row + r, row_max[at], row_sum[at]);
          }
        },
        MERGED);
  };
  if (!pass.run(source, task, finish)) return false;
  parallel_each(
      num_cols,
      [&](int64_t c) {
        for (const RunningSums<T>& group : group_cols) cols.merge(c, group);
      },
      MERGED);
  rows.report(reference, log_sum);
  cols.report(reference + num_rows, log_sum + num_rows);
  return true;
}

}  // namespace

LogSums negative_logsumexp(const Batch& batch, const OptionalTensor& ceiling, double scale,
                           const OptionalTensor& scale_tensor, bool save_scores) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    Tensor reference = empty({batch.anchors()}, SCALAR_TYPE<T>);
    Tensor log_sum = empty({batch.anchors()}, ScalarType::Double);
    const KeptScores kept = kept_scores(batch, save_scores);
    const double a = effective_scale(scale, scale_tensor);
    const Pass<T> pass(batch, ceiling);
    const bool done =
        is_usable<T>(a) && with_source<T>(batch, kept, [&](auto& source) {
          return source.is_bounded() && forward(pass, source, a, data<T>(reference), data<double>(log_sum));
        });
    if (!done) {
      fill(reference, NOT_A_NUMBER<T>);
      fill(log_sum, NOT_A_NUMBER<double>);
    }
    return std::make_tuple(reference, log_sum, kept.scores);
  });
}

namespace {

// What the gradient needs of every anchor: exp(a (s - reference) - log_sum) a g = exp(a (s - reference))
// weight. Where there is no anchor or no negative, the reference is so high that the exponential vanishes.
template <typename T>
struct Weights {
  Weights(const Batch& batch, double a, const std::vector<T>& references, const std::vector<double>& log_sums,
          const std::vector<double>& g)
      : reference(batch, std::numeric_limits<T>::max()), weight(batch, T(0)) {
    constexpr double FAR = 30;  // merged statistics may have a reference whose exponentials overflow
    for (int64_t i = 0; i < batch.anchors(); ++i) {
      double log_sum = log_sums[i];
      if (!std::isfinite(log_sum)) continue;
      T& shifted = reference.at(batch, i) = references[i];
      if (std::fabs(log_sum) > FAR) {
        shifted = T(double(references[i]) + log_sum / a);
        log_sum -= a * (double(shifted) - double(references[i]));
      }
      weight.at(batch, i) = T(a * g[i] * std::exp(-log_sum));
    }
  }
  PerAnchor<T> reference, weight;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> negative_logsumexp_backward(
    const Batch& batch, const OptionalTensor& ceiling, double scale, const OptionalTensor& scale_tensor,
    const Tensor& reference, const Tensor& log_sum, const Tensor& scores, const Tensor& d_positive,
    const Tensor& d_log_sum, bool need_images, bool need_captions, bool accumulate) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    const Needs needs{need_images, need_captions, accumulate};
    const auto references = vector_of<T>(reference, "reference", batch.anchors());
    const auto log_sums = vector_of<double>(log_sum, "log_sum", batch.anchors());
    const auto g = upstream_of<double>(d_log_sum, "d_log_sum", batch.anchors());
    const double a = effective_scale(scale, scale_tensor);
    Tensor d_scale = empty({}, SCALAR_TYPE<T>);
    if (is_poisoned(batch, log_sums)) {
      fill(d_scale, NOT_A_NUMBER<T>);
      return std::tuple_cat(nan_gradients(batch, needs), std::make_tuple(d_scale));
    }
    const Weights<T> w(batch, a, references, log_sums, g);
    std::vector<double> totals(GROUPS * TILE_PANELS);
    const Pass<T> pass(batch, ceiling);
    const Gradients gradients = dense_gradients<T>(
        pass, scores, d_positive, needs, [&](const Strip<T>& strip, const GradientStrip<T>& out) {
          totals[strip.group * TILE_PANELS + strip.panel] += kernels<T>().exp_gradient(
              strip.scores, a, &w.reference.rows[strip.row()], &w.weight.rows[strip.row()],
              &w.reference.cols[strip.col()], &w.weight.cols[strip.col()], out.g, out.ld);
        });
    fill(d_scale, T(std::accumulate(totals.begin(), totals.end(), 0.0) / a));
    return std::tuple_cat(gradients, std::make_tuple(d_scale));
  });
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("negative_logsumexp", TORCH_BOX(&WithBatch<&negative_logsumexp>::call));
  m.impl("negative_logsumexp_backward", TORCH_BOX(&WithBatch<&negative_logsumexp_backward>::call));
}

}  // namespace fused_vse
