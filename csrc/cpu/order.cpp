// The statistics with the order similarity on the CPU (ops.h, torch.ops.fused_vse_cpu_order). A block of S is
// computed pair by pair in registers, D in the innermost loop; nothing of the size N M D exists.
//
// Backward, dense: per block, G from S and W = G / |max(0, T_j - I_i)| in a block-sized buffer, then
//
//   d_images[i]   += sum_j W_ij max(0, T_j - I_i)      in parallel over i
//   d_captions[j] -= sum_i W_ij max(0, T_j - I_i)      in parallel over j
//
// W = 0 where the difference has no positive part: the subgradient that lets nothing move.
#include <tuple>

#include "../ops.h"
#include "score_pass.h"

namespace fused_vse {
namespace {

constexpr int64_t TASK_ROWS = 16;  // of embeddings, in the sums of the backward pass

// False if an embedding is not finite or so large that a squared distance could overflow.
template <typename T>
bool is_bounded(const Problem<T>& problem) {
  const auto square = [](const Tensor& x) {
    const int64_t rows = x.size(0), d = x.size(1);
    std::vector<T> row_max(rows);
    parallel_each(
        rows, [&](int64_t i) { row_max[i] = kernels<T>().max_abs(data<T>(x) + i * d, d); },
        Problem<T>::GRAIN);
    const double top = *std::max_element(row_max.begin(), row_max.end(), [](T a, T b) {
      return a < b || (b != b && a == a);  // NaN above all
    });
    return top * top;
  };
  const double bound = 4 * (square(problem.images) + square(problem.captions)) * double(problem.d);
  return bound < double(std::numeric_limits<T>::max()) / 4;
}

template <typename T>
T score_of(const Problem<T>& problem, int64_t i, int64_t j) {
  const T *a = problem.image(i), *b = problem.caption(j);
  T s;
  kernels<T>().order_scores(&a, 1, &b, 1, problem.d, &s, 1);
  return s;
}

template <typename T>
void positive_scores(const Problem<T>& problem, T* positive) {
  parallel_each(problem.k, [&](int64_t i) { positive[i] = score_of(problem, i, i); }, Problem<T>::GRAIN);
}

template <typename T>
T over_distance(T x, T score) {
  return score < 0 ? x / -score : T(0);
}

// Blocks of S, computed; into `saved` [N * M] if that is not empty, or known from there already.
template <typename T>
class OrderScores {
 public:
  OrderScores(const Problem<T>& problem, const Tensor& saved, bool known)
      : problem_(problem), saved_(saved), known_(known) {
    for (int64_t i = 0; i < problem.n; ++i) images_.push_back(problem.image(i));
    for (int64_t j = 0; j < problem.m; ++j) captions_.push_back(problem.caption(j));
  }

  ScoreBlock<T> block(int64_t row, int64_t rows, int64_t cols) {
    if (!saved_.numel() && int64_t(buffer_.size()) < rows * cols) buffer_.resize(rows * cols);
    const int64_t ld = saved_.numel() ? problem_.m : cols;
    T* const s = saved_.numel() ? data<T>(saved_) + row * problem_.m : buffer_.data();
    if (!known_) {
      const int64_t strips = (rows + STRIP_ROWS - 1) / STRIP_ROWS;
      const int64_t panels = (cols + ScorePass::PANEL - 1) / ScorePass::PANEL;
      parallel_each(strips * panels, [&](int64_t id) {
        const int64_t r = id / panels * STRIP_ROWS, c = id % panels * ScorePass::PANEL;
        kernels<T>().order_scores(&images_[row + r], std::min(STRIP_ROWS, rows - r), &captions_[c],
                                  std::min(ScorePass::PANEL, cols - c), problem_.d, s + r * ld + c, ld);
      });
    }
    return {s, ld, row, rows, cols};
  }

 private:
  const Problem<T>& problem_;
  Tensor saved_;
  bool known_;
  std::vector<const T*> images_, captions_;
  std::vector<T> buffer_;
};

template <typename T>
Pairing pairing_of(const Problem<T>& problem, const OptionalTensor& image_ids,
                   const OptionalTensor& caption_ids) {
  return Pairing(problem.n, problem.m, problem.k, image_ids, caption_ids);
}

// d_images and d_captions, from blocks of G.
template <typename T>
class OrderGradients {
 public:
  OrderGradients(const Problem<T>& problem, const ScorePass& pass, bool need_images, bool need_captions)
      : problem_(problem),
        w_(pass.block_rows * problem.m),
        d_images_(zeros(problem.images, need_images)),
        d_captions_(zeros(problem.captions, need_captions)) {}

  GradientTile<T> tile_of(const Strip<T>& strip) {
    return {&w_[strip.row_in_block * problem_.m + strip.col], problem_.m};
  }

  static void divide_by_distance(const Strip<T>& strip, const GradientTile<T>& tile) {
    for (int64_t r = 0; r < strip.rows; ++r)
      for (int64_t c = 0; c < strip.cols; ++c) {
        T& w = tile.g[r * tile.ld + c];
        w = over_distance(w, strip.s[r * strip.ld + c]);
      }
  }

  // Adds a block; d_positive [k] goes to the pairs of its first k rows.
  void finish(const ScoreBlock<T>& block, const T* d_positive) {
    for (int64_t r = 0; r < block.rows && block.row + r < problem_.k; ++r) {
      const int64_t i = block.row + r;
      w_[r * problem_.m + i] += over_distance(d_positive[i], block.s[r * block.ld + i]);
    }
    std::vector<const T*> images, captions;
    for (int64_t r = 0; r < block.rows; ++r) images.push_back(problem_.image(block.row + r));
    for (int64_t c = 0; c < block.cols; ++c) captions.push_back(problem_.caption(c));
    const int64_t d = problem_.d, m = problem_.m;
    if (d_images_.numel())
      for_tasks(block.rows, [&](int64_t r, int64_t count) {
        kernels<T>().order_sums_of_images(images[r], count, captions.data(), block.cols, d, &w_[r * m], m, 1,
                                          data<T>(d_images_) + (block.row + r) * d);
      });
    if (!d_captions_.numel()) return;
    for_tasks(block.cols, [&](int64_t c, int64_t count) {
      kernels<T>().order_sums_of_captions(captions[c], count, images.data(), block.rows, d, &w_[c], 1, m,
                                          data<T>(d_captions_) + c * d);
    });
  }

  void fill_with_nan() {
    fill(d_images_, NOT_A_NUMBER<T>);
    fill(d_captions_, NOT_A_NUMBER<T>);
  }

  Tensor d_images(ScalarType type) const { return converted(d_images_, type); }
  Tensor d_captions(ScalarType type) const { return converted(d_captions_, type); }

 private:
  static Tensor zeros(const Tensor& x, bool needed) {
    const Tensor result = needed ? empty({x.size(0), x.size(1)}, SCALAR_TYPE<T>) : empty({0}, SCALAR_TYPE<T>);
    fill(result, T(0));
    return result;
  }

  template <typename Body>
  static void for_tasks(int64_t size, const Body& body) {
    parallel_each((size + TASK_ROWS - 1) / TASK_ROWS, [&](int64_t task) {
      body(task * TASK_ROWS, std::min(TASK_ROWS, size - task * TASK_ROWS));
    });
  }

  const Problem<T>& problem_;
  std::vector<T> w_;  // [block rows, M]
  Tensor d_images_, d_captions_;
};

std::tuple<Tensor, Tensor, Tensor> hardest_negatives(const Tensor& images, const Tensor& captions,
                                                     const OptionalTensor& image_ids,
                                                     const OptionalTensor& caption_ids, int64_t num_pairs) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor score = empty({2, num_pairs}, SCALAR_TYPE<T>);
    Tensor index = empty({2, num_pairs}, ScalarType::Long);
    if (is_bounded(problem)) {
      OrderScores<T> source(problem, empty({0}, SCALAR_TYPE<T>), false);
      positive_scores(problem, data<T>(positive));
      hardest_of_scores(pairing_of(problem, image_ids, caption_ids), source, data<T>(score),
                        data<int64_t>(index));
    } else {
      fill(positive, NOT_A_NUMBER<T>);
      fill(score, NOT_A_NUMBER<T>);
      fill(index, int64_t{-1});
    }
    return std::make_tuple(positive, score, index);
  });
}

std::tuple<Tensor, Tensor> hardest_negatives_backward(const Tensor& d_positive, const Tensor& d_score,
                                                      const Tensor& positive, const Tensor& index,
                                                      const Tensor& images, const Tensor& captions,
                                                      bool need_images, bool need_captions) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const int64_t k = positive.numel();
    const Problem<T> problem(images, captions, std::nullopt, std::nullopt, k);
    const Tensor direct = contiguous_as(d_positive, SCALAR_TYPE<T>);
    const Tensor upstream = contiguous_as(d_score, SCALAR_TYPE<T>);
    const bool poisoned = std::isnan(data<T>(positive)[0]);
    const auto gradient = [&](bool needed, bool of_images, ScalarType type) {
      if (!needed) return empty({0}, type);
      const Tensor& self = of_images ? problem.images : problem.captions;
      Tensor result = empty({self.size(0), problem.d}, SCALAR_TYPE<T>);
      fill(result, poisoned ? NOT_A_NUMBER<T> : T(0));
      const int64_t own = of_images ? 0 : k, theirs = k - own;
      const auto sum = [&](int64_t i, const std::vector<T>& weights, const std::vector<int64_t>& others) {
        std::vector<T> w(weights.size());
        std::vector<const T*> sources(weights.size());
        for (size_t a = 0; a < weights.size(); ++a) {
          const T s = of_images ? score_of(problem, i, others[a]) : score_of(problem, others[a], i);
          w[a] = over_distance(weights[a], s);
          sources[a] = of_images ? problem.caption(others[a]) : problem.image(others[a]);
        }
        const auto add = of_images ? kernels<T>().order_sums_of_images : kernels<T>().order_sums_of_captions;
        add(data<T>(self) + i * problem.d, 1, sources.data(), sources.size(), problem.d, w.data(), 0, 1,
            data<T>(result) + i * problem.d);
      };
      if (!poisoned)
        gather<T>(self.size(0), k, data<T>(direct), data<T>(upstream) + own, data<int64_t>(index) + own,
                  data<T>(upstream) + theirs, data<int64_t>(index) + theirs, sum);
      return converted(result, type);
    };
    return std::make_tuple(gradient(need_images, true, images.scalar_type()),
                           gradient(need_captions, false, captions.scalar_type()));
  });
}

std::tuple<Tensor, Tensor, Tensor> negative_logsumexp(const Tensor& images, const Tensor& captions,
                                                      const OptionalTensor& image_ids,
                                                      const OptionalTensor& caption_ids, int64_t num_pairs,
                                                      double scale, const OptionalTensor& scale_tensor,
                                                      bool save_scores) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor logsumexp = empty({2, num_pairs}, ScalarType::Double);
    Tensor saved = saved_scores(problem, save_scores);
    const T a = effective_scale<T>(scale, scale_tensor);
    if (is_bounded(problem) && a > 0 && std::isfinite(a)) {
      OrderScores<T> source(problem, saved, false);
      positive_scores(problem, data<T>(positive));
      logsumexp_of_scores(pairing_of(problem, image_ids, caption_ids), source, a, data<double>(logsumexp));
    } else {
      fill(positive, NOT_A_NUMBER<T>);
      fill(logsumexp, NOT_A_NUMBER<double>);
    }
    return std::make_tuple(positive, logsumexp, saved);
  });
}

std::tuple<Tensor, Tensor, Tensor> negative_logsumexp_backward(
    const Tensor& d_positive, const Tensor& d_logsumexp, const Tensor& logsumexp, const Tensor& saved,
    const Tensor& images, const Tensor& captions, const OptionalTensor& image_ids,
    const OptionalTensor& caption_ids, double scale, const OptionalTensor& scale_tensor, bool need_images,
    bool need_captions) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(images, captions, image_ids, caption_ids, logsumexp.size(1));
    const Pairing pairing = pairing_of(problem, image_ids, caption_ids);
    OrderGradients<T> gradients(problem, ScorePass(pairing), need_images, need_captions);
    Tensor d_scale = empty({}, SCALAR_TYPE<T>);
    if (std::isnan(data<double>(logsumexp)[0])) {
      gradients.fill_with_nan();
      fill(d_scale, NOT_A_NUMBER<T>);
    } else {
      OrderScores<T> source(problem, saved, saved.numel() > 0);
      const Tensor direct = contiguous_as(d_positive, SCALAR_TYPE<T>);
      const Tensor upstream = contiguous_as(d_logsumexp, SCALAR_TYPE<T>);
      const T a = effective_scale<T>(scale, scale_tensor);
      const double total = logsumexp_gradient(
          pairing, source, a, data<double>(logsumexp), data<T>(upstream),
          [&](const Strip<T>& strip) { return gradients.tile_of(strip); },
          OrderGradients<T>::divide_by_distance,
          [&](const ScoreBlock<T>& block) { gradients.finish(block, data<T>(direct)); });
      fill(d_scale, T(scale * total / double(a)));
    }
    return std::make_tuple(gradients.d_images(images.scalar_type()),
                           gradients.d_captions(captions.scalar_type()), d_scale);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hinge_sum(const Tensor& images, const Tensor& captions,
                                                     const OptionalTensor& image_ids,
                                                     const OptionalTensor& caption_ids, int64_t num_pairs,
                                                     double margin, bool save_scores) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    Tensor sums = empty({2, num_pairs}, SCALAR_TYPE<T>);
    Tensor active = empty({2, num_pairs}, ScalarType::Long);
    Tensor saved = saved_scores(problem, save_scores);
    if (is_bounded(problem)) {
      OrderScores<T> source(problem, saved, false);
      positive_scores(problem, data<T>(positive));
      hinge_of_scores(pairing_of(problem, image_ids, caption_ids), source, T(margin), data<T>(positive),
                      data<T>(sums), data<int64_t>(active));
    } else {
      fill(positive, NOT_A_NUMBER<T>);
      fill(sums, NOT_A_NUMBER<T>);
      fill(active, int64_t{0});
    }
    return std::make_tuple(positive, sums, active, saved);
  });
}

std::tuple<Tensor, Tensor> hinge_sum_backward(const Tensor& d_positive, const Tensor& d_hinge_sum,
                                              const Tensor& positive, const Tensor& active,
                                              const Tensor& saved, const Tensor& images,
                                              const Tensor& captions, const OptionalTensor& image_ids,
                                              const OptionalTensor& caption_ids, double margin,
                                              bool need_images, bool need_captions) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const int64_t k = positive.numel();
    const Problem<T> problem(images, captions, image_ids, caption_ids, k);
    const Pairing pairing = pairing_of(problem, image_ids, caption_ids);
    OrderGradients<T> gradients(problem, ScorePass(pairing), need_images, need_captions);
    if (std::isnan(data<T>(positive)[0])) {
      gradients.fill_with_nan();
    } else {
      OrderScores<T> source(problem, saved, saved.numel() > 0);
      const Tensor direct = contiguous_as(d_positive, SCALAR_TYPE<T>);
      const Tensor upstream = contiguous_as(d_hinge_sum, SCALAR_TYPE<T>);
      const std::vector<T> weight =
          hinge_positive_gradient(k, data<T>(direct), data<int64_t>(active), data<T>(upstream));
      hinge_gradient(
          pairing, source, T(margin), data<T>(positive), data<T>(upstream),
          [&](const Strip<T>& strip) { return gradients.tile_of(strip); },
          OrderGradients<T>::divide_by_distance,
          [&](const ScoreBlock<T>& block) { gradients.finish(block, weight.data()); });
    }
    return std::make_tuple(gradients.d_images(images.scalar_type()),
                           gradients.d_captions(captions.scalar_type()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(fused_vse_cpu_order, m) {
  m.def(HARDEST_NEGATIVES_SCHEMA);
  m.def(HARDEST_NEGATIVES_BACKWARD_SCHEMA);
  m.def(NEGATIVE_LOGSUMEXP_SCHEMA);
  m.def(NEGATIVE_LOGSUMEXP_BACKWARD_SCHEMA);
  m.def(HINGE_SUM_SCHEMA);
  m.def(HINGE_SUM_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu_order, CPU, m) {
  m.impl("hardest_negatives", TORCH_BOX(&hardest_negatives));
  m.impl("hardest_negatives_backward", TORCH_BOX(&hardest_negatives_backward));
  m.impl("negative_logsumexp", TORCH_BOX(&negative_logsumexp));
  m.impl("negative_logsumexp_backward", TORCH_BOX(&negative_logsumexp_backward));
  m.impl("hinge_sum", TORCH_BOX(&hinge_sum));
  m.impl("hinge_sum_backward", TORCH_BOX(&hinge_sum_backward));
}

}  // namespace fused_vse
