// The statistics of a given score matrix on the CPU (ops.h, torch.ops.fused_vse_cpu_scores). Forward: one
// read of S. Backward: one read of S (none for the hardest negatives) and one write of its gradient.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <tuple>

#include "../ops.h"
#include "score_pass.h"

namespace fused_vse {
namespace {

// f(pointer to the first element), of whatever type the elements are.
template <typename F>
void with_elements(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return f(data<c10::Half>(x));
    case ScalarType::BFloat16: return f(data<c10::BFloat16>(x));
    case ScalarType::Double: return f(data<double>(x));
    default: return f(data<float>(x));
  }
}

template <typename T>
void positive_scores(const Tensor& scores, int64_t k, T* positive) {
  const int64_t step = scores.stride(0) + scores.stride(1);
  with_elements(scores, [&](const auto* s) {
    for (int64_t i = 0; i < k; ++i) positive[i] = static_cast<T>(s[i * step]);
  });
}

// Blocks of S itself; only 16-bit and non-contiguous ones are copied.
template <typename T>
class GivenScores {
 public:
  explicit GivenScores(const Tensor& scores) : scores_(scores) {}

  ScoreBlock<T> block(int64_t row, int64_t rows, int64_t cols) {
    current_ = contiguous_as(rows_of(scores_, row, rows), SCALAR_TYPE<T>);
    return {data<T>(*current_), scores_.size(1), row, rows, cols};
  }

 private:
  const Tensor& scores_;
  OptionalTensor current_;
};

// d_scores [N, M], written block by block: in place, or converted from a block in the accumulation type.
template <typename T>
class ScoreGradient {
 public:
  ScoreGradient(const Tensor& scores, int64_t block_rows)
      : m_(scores.size(1)), d_scores_(empty({scores.size(0), m_}, scores.scalar_type())) {
    if (scores.scalar_type() != SCALAR_TYPE<T>)
      buffer_ = empty({std::min(block_rows, scores.size(0)), m_}, SCALAR_TYPE<T>);
  }

  GradientTile<T> tile_of(const Strip<T>& strip) const {
    const int64_t row = buffer_ ? strip.row_in_block : strip.row;
    return {data<T>(buffer_ ? *buffer_ : d_scores_) + row * m_ + strip.col, m_};
  }

  // Completes the rows of a block: what no anchor sees, and the positives of the first k rows.
  void finish(const ScoreBlock<T>& block, int64_t k, const T* d_positive) {
    T* const g = data<T>(buffer_ ? *buffer_ : d_scores_) + (buffer_ ? 0 : block.row * m_);
    for (int64_t r = 0; r < block.rows; ++r) {
      std::fill(g + r * m_ + block.cols, g + (r + 1) * m_, T(0));
      if (block.row + r < k) g[r * m_ + block.row + r] += d_positive[block.row + r];
    }
    if (!buffer_) return;
    Tensor rows = rows_of(d_scores_, block.row, block.rows);
    torch::stable::copy_(rows, rows_of(*buffer_, 0, block.rows));
  }

  Tensor result() const { return d_scores_; }

 private:
  int64_t m_;
  Tensor d_scores_;
  OptionalTensor buffer_;
};

Tensor all_nan(const Tensor& scores) {
  Tensor x = empty({scores.size(0), scores.size(1)}, scores.scalar_type());
  return torch::stable::fill_(x, NOT_A_NUMBER<double>);
}

Pairing pairing_of(const Tensor& scores, const OptionalTensor& image_ids, const OptionalTensor& caption_ids,
                   int64_t num_pairs) {
  return Pairing(scores.size(0), scores.size(1), num_pairs, image_ids, caption_ids);
}

std::tuple<Tensor, Tensor, Tensor> hardest_negatives(const Tensor& scores, const OptionalTensor& image_ids,
                                                     const OptionalTensor& caption_ids, int64_t num_pairs) {
  return dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    const Pairing pairing = pairing_of(scores, image_ids, caption_ids, num_pairs);
    GivenScores<T> source(scores);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor score = empty({2, num_pairs}, SCALAR_TYPE<T>);
    Tensor index = empty({2, num_pairs}, ScalarType::Long);
    positive_scores(scores, num_pairs, data<T>(positive));
    if (!hardest_of_scores(pairing, source, data<T>(score), data<int64_t>(index))) {
      fill(positive, NOT_A_NUMBER<T>);
      fill(score, NOT_A_NUMBER<T>);
      fill(index, int64_t{-1});
    }
    return std::make_tuple(positive, score, index);
  });
}

Tensor hardest_negatives_backward(const Tensor& d_positive, const Tensor& d_score, const Tensor& positive,
                                  const Tensor& index, const Tensor& scores) {
  return dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    const int64_t k = positive.numel(), m = scores.size(1);
    if (std::isnan(data<T>(positive)[0])) return all_nan(scores);
    const Tensor direct = contiguous_as(d_positive, SCALAR_TYPE<T>);
    const Tensor upstream = contiguous_as(d_score, SCALAR_TYPE<T>);
    Tensor d_scores = empty({scores.size(0), m}, scores.scalar_type());
    torch::stable::zero_(d_scores);
    with_elements(d_scores, [&](auto* g) {
      using Element = std::remove_pointer_t<decltype(g)>;  // an entry has at most three summands
      gather<T>(scores.size(0), k, data<T>(direct), data<T>(upstream), data<int64_t>(index),
                data<T>(upstream) + k, data<int64_t>(index) + k,
                [&](int64_t i, const std::vector<T>& weights, const std::vector<int64_t>& others) {
                  for (size_t a = 0; a < others.size(); ++a) {
                    Element& entry = g[i * m + others[a]];
                    entry = static_cast<Element>(static_cast<T>(entry) + weights[a]);
                  }
                });
    });
    return d_scores;
  });
}

std::tuple<Tensor, Tensor> negative_logsumexp(const Tensor& scores, const OptionalTensor& image_ids,
                                              const OptionalTensor& caption_ids, int64_t num_pairs,
                                              double scale, const OptionalTensor& scale_tensor) {
  return dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    const Pairing pairing = pairing_of(scores, image_ids, caption_ids, num_pairs);
    GivenScores<T> source(scores);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor logsumexp = empty({2, num_pairs}, ScalarType::Double);
    const T a = effective_scale<T>(scale, scale_tensor);
    positive_scores(scores, num_pairs, data<T>(positive));
    if (!(a > 0 && std::isfinite(a)) || !logsumexp_of_scores(pairing, source, a, data<double>(logsumexp))) {
      fill(positive, NOT_A_NUMBER<T>);
      fill(logsumexp, NOT_A_NUMBER<double>);
    }
    return std::make_tuple(positive, logsumexp);
  });
}

std::tuple<Tensor, Tensor> negative_logsumexp_backward(const Tensor& d_positive, const Tensor& d_logsumexp,
                                                       const Tensor& logsumexp, const Tensor& scores,
                                                       const OptionalTensor& image_ids,
                                                       const OptionalTensor& caption_ids, double scale,
                                                       const OptionalTensor& scale_tensor) {
  return dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    const int64_t k = logsumexp.size(1);
    Tensor d_scale = empty({}, SCALAR_TYPE<T>);
    if (std::isnan(data<double>(logsumexp)[0])) {
      fill(d_scale, NOT_A_NUMBER<T>);
      return std::make_tuple(all_nan(scores), d_scale);
    }
    const Pairing pairing = pairing_of(scores, image_ids, caption_ids, k);
    GivenScores<T> source(scores);
    const Tensor direct = contiguous_as(d_positive, SCALAR_TYPE<T>);
    const Tensor upstream = contiguous_as(d_logsumexp, SCALAR_TYPE<T>);
    ScoreGradient<T> gradient(scores, ScorePass::BLOCK_ROWS);
    const T a = effective_scale<T>(scale, scale_tensor);
    const double total = logsumexp_gradient(
        pairing, source, a, data<double>(logsumexp), data<T>(upstream),
        [&](const Strip<T>& strip) { return gradient.tile_of(strip); }, [](const auto&, const auto&) {},
        [&](const ScoreBlock<T>& block) { gradient.finish(block, k, data<T>(direct)); });
    fill(d_scale, T(scale * total / double(a)));
    return std::make_tuple(gradient.result(), d_scale);
  });
}

std::tuple<Tensor, Tensor, Tensor> hinge_sum(const Tensor& scores, const OptionalTensor& image_ids,
                                             const OptionalTensor& caption_ids, int64_t num_pairs,
                                             double margin) {
  return dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    const Pairing pairing = pairing_of(scores, image_ids, caption_ids, num_pairs);
    GivenScores<T> source(scores);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor sums = empty({2, num_pairs}, SCALAR_TYPE<T>);
    Tensor active = empty({2, num_pairs}, ScalarType::Long);
    positive_scores(scores, num_pairs, data<T>(positive));
    if (!hinge_of_scores(pairing, source, T(margin), data<T>(positive), data<T>(sums),
                         data<int64_t>(active))) {
      fill(positive, NOT_A_NUMBER<T>);
      fill(sums, NOT_A_NUMBER<T>);
      fill(active, int64_t{0});
    }
    return std::make_tuple(positive, sums, active);
  });
}

Tensor hinge_sum_backward(const Tensor& d_positive, const Tensor& d_hinge_sum, const Tensor& positive,
                          const Tensor& active, const Tensor& scores, const OptionalTensor& image_ids,
                          const OptionalTensor& caption_ids, double margin) {
  return dispatch(scores, [&](auto zero) {
    using T = decltype(zero);
    const int64_t k = positive.numel();
    if (std::isnan(data<T>(positive)[0])) return all_nan(scores);
    const Pairing pairing = pairing_of(scores, image_ids, caption_ids, k);
    GivenScores<T> source(scores);
    const Tensor direct = contiguous_as(d_positive, SCALAR_TYPE<T>);
    const Tensor upstream = contiguous_as(d_hinge_sum, SCALAR_TYPE<T>);
    const std::vector<T> weight =
        hinge_positive_gradient(k, data<T>(direct), data<int64_t>(active), data<T>(upstream));
    ScoreGradient<T> gradient(scores, ScorePass::BLOCK_ROWS);
    hinge_gradient(
        pairing, source, T(margin), data<T>(positive), data<T>(upstream),
        [&](const Strip<T>& strip) { return gradient.tile_of(strip); }, [](const auto&, const auto&) {},
        [&](const ScoreBlock<T>& block) { gradient.finish(block, k, weight.data()); });
    return gradient.result();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_vse_cpu_scores, m) {
  m.def(SCORES_HARDEST_NEGATIVES_SCHEMA);
  m.def(SCORES_HARDEST_NEGATIVES_BACKWARD_SCHEMA);
  m.def(SCORES_NEGATIVE_LOGSUMEXP_SCHEMA);
  m.def(SCORES_NEGATIVE_LOGSUMEXP_BACKWARD_SCHEMA);
  m.def(SCORES_HINGE_SUM_SCHEMA);
  m.def(SCORES_HINGE_SUM_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu_scores, CPU, m) {
  m.impl("hardest_negatives", TORCH_BOX(&hardest_negatives));
  m.impl("hardest_negatives_backward", TORCH_BOX(&hardest_negatives_backward));
  m.impl("negative_logsumexp", TORCH_BOX(&negative_logsumexp));
  m.impl("negative_logsumexp_backward", TORCH_BOX(&negative_logsumexp_backward));
  m.impl("hinge_sum", TORCH_BOX(&hinge_sum));
  m.impl("hinge_sum_backward", TORCH_BOX(&hinge_sum_backward));
}

}  // namespace fused_vse
