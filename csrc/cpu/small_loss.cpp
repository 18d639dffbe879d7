// small_loss on the CPU (ops.py): a whole loss of a small batch. S stays in the cache: it is computed once,
// by Kernels::dots, and is from then on a given score matrix, whose gradient the backward pass multiplies.
#include <cmath>

#include "hardest.h"
#include "order.h"
#include "statistics.h"

namespace fused_vse {
namespace {

enum Kind : int64_t { ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM };

template <typename T>
Tensor tensor_of(const std::vector<double>& values) {
  const Tensor x = empty({static_cast<int64_t>(values.size())}, SCALAR_TYPE<T>);
  std::copy(values.begin(), values.end(), data<T>(x));
  return x;
}

// The loss of an anchor, and its slope by alpha h; by the sum of hinges.
struct AnchorLoss {
  double loss, slope;
};

AnchorLoss softplus(double logit) {
  const double e = std::exp(-std::fabs(logit));
  return {std::max(logit, 0.0) + std::log1p(e), (logit > 0 ? 1 : e) / (1 + e)};
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results small_loss(const Tensor& images, const Tensor& captions, const OptionalTensor& image_ids,
                   const OptionalTensor& caption_ids, int64_t num_pairs, int64_t kind, double scale,
                   const OptionalTensor& scale_tensor, double margin, double image_weight,
                   double caption_weight, bool mean, bool, bool) {
  const Batch batch{images, captions, image_ids, caption_ids, num_pairs, num_pairs, 0, 0, num_pairs, DOT};
  batch.check();
  STD_TORCH_CHECK(num_pairs > 0, "num_pairs must be positive");
  STD_TORCH_CHECK(ALL_NEGATIVES <= kind && kind <= HINGE_SUM, "kind must be from 0 to 3");
  return dispatch(images, [&](auto zero) -> Results {
    using T = decltype(zero);
    const int64_t n = batch.n(), m = batch.m(), k = num_pairs;
    const double alpha = kind == HINGE_SUM ? 1 : effective_scale(scale, scale_tensor);
    const bool one_negative = kind == HARDEST || kind == HARDEST_SMOOTH;
    const Tensor loss = empty({}, SCALAR_TYPE<T>), d_scale = empty({}, SCALAR_TYPE<T>);
    const Tensor positive = empty({k}, SCALAR_TYPE<T>), score = empty({2 * k}, SCALAR_TYPE<T>);
    const Tensor index = empty({2 * k}, ScalarType::Long), scores = empty({n * m}, SCALAR_TYPE<T>);
    Tensor saved_one = one_negative ? empty({k}, SCALAR_TYPE<T>) : empty({n, m}, SCALAR_TYPE<T>);
    Tensor saved_two = empty({one_negative ? 2 * k : 0}, SCALAR_TYPE<T>);

    Pairwise<T> source(batch, {scores, false}, kernels<T>().dots);
    BestOfSides<T> best(batch);
    if (!is_usable<T>(alpha) || !source.e.has_bounded_dots() ||
        !search_everything(Pass<T>(batch), source, &best)) {
      for (const Tensor& x : {loss, positive, score, d_scale, saved_one, saved_two}) fill(x, NOT_A_NUMBER<T>);
      fill(index, int64_t{-1});
      return {loss, positive, score, index, d_scale, saved_one, saved_two};
    }
    T *const p = data<T>(positive), *const h = data<T>(score);
    for (int64_t i = 0; i < k; ++i) p[i] = data<T>(scores)[i * m + i];
    best.report(h, data<int64_t>(index));

    Batch given = batch;
    given.images = torch::stable::view(scores, {n, m});
    given.captions.reset();
    LogSums sums;
    Hinges hinges;
    Tensor threshold;
    if (kind == ALL_NEGATIVES) sums = negative_logsumexp(given, std::nullopt, alpha, std::nullopt, false);
    if (kind == HINGE_SUM) {
      threshold = empty({2 * k}, SCALAR_TYPE<T>);
      for (int64_t a = 0; a < 2 * k; ++a) data<T>(threshold)[a] = T(double(p[a % k]) - margin);
      hinges = hinge_sum(given, std::nullopt, threshold, false);
    }
    const auto& [reference, log_sum, none] = sums;  // the reference is the hardest negative's score
    const auto& [hinge_sums, active, none_either] = hinges;

    double total = 0, by_alpha = 0;
    std::vector<double> d_positive(k), d_statistic(2 * k);
    for (int64_t a = 0; a < 2 * k; ++a) {
      if (data<int64_t>(index)[a] < 0) continue;
      const double violation = double(h[a]) - double(p[a % k]) + margin;
      AnchorLoss of_anchor{0, 0};
      double pull = alpha;  // on the positive, by slope
      if (kind == ALL_NEGATIVES) of_anchor = softplus(alpha * violation + data<double>(log_sum)[a]);
      if (kind == HARDEST && violation > 0) of_anchor = {alpha * violation, 1};
      if (kind == HARDEST_SMOOTH) of_anchor = softplus(alpha * violation);
      if (kind == HINGE_SUM) {
        of_anchor = {data<T>(hinge_sums)[a], 1};
        pull = double(data<int64_t>(active)[a]);
      }
      const double weight = (a < k ? image_weight : caption_weight) / (mean ? double(k) : 1);
      total += weight * of_anchor.loss;
      d_statistic[a] = weight * of_anchor.slope;
      d_positive[a % k] -= pull * d_statistic[a];
      if (kind != HINGE_SUM) by_alpha += d_statistic[a] * violation;
    }

    if (one_negative) {
      for (double& d : d_statistic) d *= alpha;
      saved_one = tensor_of<T>(d_positive);
      saved_two = tensor_of<T>(d_statistic);
    } else if (kind == HINGE_SUM) {
      saved_one = std::get<0>(hinge_sum_backward(given, std::nullopt, threshold, hinge_sums, none_either,
                                                 tensor_of<T>(d_positive), tensor_of<T>(d_statistic), true,
                                                 false, false));
    } else {
      Tensor through_scores;
      std::tie(saved_one, std::ignore, through_scores) = negative_logsumexp_backward(
          given, std::nullopt, alpha, std::nullopt, reference, log_sum, none, tensor_of<T>(d_positive),
          tensor_of<double>(d_statistic), true, false, false);
      by_alpha += double(*data<T>(through_scores));
    }
    fill(loss, T(total));
    fill(d_scale, T(by_alpha));
    return {loss, positive, score, index, d_scale, saved_one, saved_two};
  });
}

// The hardest: a gather and a scatter. The others: d_images = upstream G T, d_captions = upstream G^t I.
std::tuple<Tensor, Tensor, Tensor> small_loss_backward(const Tensor& images, const Tensor& captions,
                                                       const Tensor& index, const Tensor& d_scale,
                                                       const Tensor& saved_one, const Tensor& saved_two,
                                                       const Tensor& upstream, bool need_images,
                                                       bool need_captions) {
  const Batch batch{images, captions, std::nullopt, std::nullopt, 0, 0, 0, 0, 0, DOT};
  batch.check();
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const Tensor by_alpha = empty({}, SCALAR_TYPE<T>);
    const Tensor up = contiguous_as(upstream, SCALAR_TYPE<T>);
    STD_TORCH_CHECK(up.numel() == 1 && d_scale.numel() == 1, "upstream and d_scale must have one element");
    const T factor = *data<T>(up);
    *data<T>(by_alpha) = *data<T>(d_scale) * factor;
    const int64_t k = saved_two.numel() / 2;
    std::vector<T> d_positive(k), d_score(2 * k);
    for (int64_t a = 0; a < k; ++a) d_positive[a] = data<T>(saved_one)[a] * factor;
    for (int64_t a = 0; a < 2 * k; ++a) d_score[a] = data<T>(saved_two)[a] * factor;
    const bool poisoned = k > 0 && d_positive[0] != d_positive[0];
    const auto gradient = [&](bool of_images, bool needed) {
      const Tensor &self = of_images ? images : captions, &other = of_images ? captions : images;
      if (!needed) return empty({0}, self.scalar_type());
      const Tensor others = contiguous_as(other, SCALAR_TYPE<T>);
      Tensor out = empty({self.size(0), self.size(1)}, SCALAR_TYPE<T>);
      if (poisoned) {
        fill(out, NOT_A_NUMBER<T>);
      } else if (k > 0) {
        const int64_t own = of_images ? 0 : k, theirs = k - own, *chosen = data<int64_t>(index);
        gather_rows<T>({self.size(0), k, 0, &d_score[own], chosen + own},
                       {other.size(0), k, 0, &d_score[theirs], chosen + theirs}, d_positive.data(), k, others,
                       data<T>(out));
      } else {
        matmul_add(out, of_images ? saved_one : transposed(saved_one), others, 0, factor);
      }
      return converted(out, self.scalar_type());
    };
    return std::make_tuple(gradient(true, need_images), gradient(false, need_captions), by_alpha);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("small_loss", TORCH_BOX(&small_loss));
  m.impl("small_loss_backward", TORCH_BOX(&small_loss_backward));
}

}  // namespace fused_vse
