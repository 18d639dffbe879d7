// A whole loss of a small batch on the CPU (ops.h). S is one tile that stays in the cache: it is computed
// once, and its gradient takes its place.
//
//   for each strip of S, in parallel:   scores; the largest embedding; maxima of rows and columns
//   for each strip, in parallel:        sums over the negatives (not for the hardest)
//   for each anchor:                    its loss and the derivatives
//   for each strip, in parallel:        G in place of S (not for the hardest)
#include <cmath>
#include <tuple>

#include "../ops.h"
#include "hardest.h"
#include "running_sums.h"
#include "thresholds.h"

namespace fused_vse {
namespace {

enum Kind : int64_t { ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM };

struct Options {
  Kind kind;
  double alpha, margin;
  double weight[2];  // of the directions, reduction included

  bool one_negative() const { return kind == HARDEST || kind == HARDEST_SMOOTH; }
};

// The anchors of one side, and what is known of their negatives.
template <typename T>
struct Side {
  Side(int64_t size, int64_t k)
      : best(size), reference(size), sum(size), active(size), slope(k), weight(size) {}
  Best<T> best;
  // What a score is compared with. ALL_NEGATIVES: the best score; HINGE_SUM: the threshold.
  std::vector<T> reference;
  std::vector<double> sum;     // ALL_NEGATIVES: of exp(alpha (s - reference)); HINGE_SUM: of the hinges
  std::vector<double> active;  // HINGE_SUM: how many hinges are above 0
  std::vector<double> slope;   // of the loss by alpha h; HINGE_SUM: by the sum
  std::vector<T> weight;       // ALL_NEGATIVES: slope / sum, else slope; 0 for what is no anchor
};

template <typename T>
class OneTileLoss {
 public:
  OneTileLoss(const Problem<T>& problem, const Options& options)
      : p_(problem),
        o_(options),
        tile_{0, problem.n, 0, problem.m},
        buffer_(empty({problem.n, problem.m}, SCALAR_TYPE<T>)),
        s_(data<T>(buffer_)),
        rows_(problem.n, problem.k),
        cols_(problem.m, problem.k),
        strip_cols_(tile_.strips() * problem.m) {}

  // False if a score could be NaN or overflow: then nothing is to be used.
  bool find_hardest(T* positive) {
    std::vector<const T*> images(p_.n), captions(p_.m);
    for (int64_t i = 0; i < p_.n; ++i) images[i] = p_.image(i);
    for (int64_t j = 0; j < p_.m; ++j) captions[j] = p_.caption(j);
    std::vector<T> image_max(tile_.strips()), caption_max(tile_.strips()), row_max(p_.n);
    std::fill(strip_cols_.begin(), strip_cols_.end(), EXCLUDED<T>);
    for_each_strip([&](int64_t strip, int64_t begin, int64_t count) {
      const int64_t first = p_.m * strip / tile_.strips(), last = p_.m * (strip + 1) / tile_.strips();
      image_max[strip] = kernels<T>().max_abs(p_.image(begin), count * p_.d);
      caption_max[strip] = kernels<T>().max_abs(p_.caption(first), (last - first) * p_.d);
      kernels<T>().dots(&images[begin], count, captions.data(), p_.m, p_.d, row(begin), p_.m);
      for (int64_t i = begin; i < std::min(begin + count, p_.k); ++i) positive[i] = row(i)[i];
      for (int64_t i = begin; i < begin + count; ++i)
        p_.excluded.for_each(i, 0, p_.m, [&](int64_t j) { row(i)[j] = EXCLUDED<T>; });
      kernels<T>().maxima(row(begin), count, p_.m, p_.m, &row_max[begin], cols_of(strip));
      for (int64_t i = begin; i < begin + count; ++i)
        if (row_max[i] != EXCLUDED<T>)
          rows_.best.offer(i, row_max[i], std::find(row(i), row(i) + p_.m, row_max[i]) - row(i));
    });
    if (!p_.is_bounded(largest(image_max), largest(caption_max))) return false;
    for (int64_t strip = 0; strip < tile_.strips(); ++strip)
      for (int64_t j = 0; j < p_.m; ++j) {
        const T top = cols_of(strip)[j];
        if (top <= cols_.best.score[j]) continue;
        int64_t i = tile_.strip_begin(strip);
        while (row(i)[j] != top) ++i;
        cols_.best.offer(j, top, i);
      }
    return true;
  }

  void sum_over_negatives(const T* positive) {
    if (o_.one_negative()) return;
    const bool hinges = o_.kind == HINGE_SUM;
    for (Side<T>* side : {&rows_, &cols_}) {
      if (hinges) side->reference = thresholds(side->sum.size(), p_.k, positive, T(o_.margin));
      for (size_t i = 0; !hinges && i < side->sum.size(); ++i)
        side->reference[i] = side->best.index[i] < 0 ? 0 : side->best.score[i];
    }
    std::vector<T> sum(p_.n), count(p_.n), strip_count(hinges ? strip_cols_.size() : 0);
    std::fill(strip_cols_.begin(), strip_cols_.end(), T(0));
    for_each_strip([&](int64_t strip, int64_t begin, int64_t n) {
      if (hinges)
        kernels<T>().hinge_sums(row(begin), n, p_.m, p_.m, &rows_.reference[begin], cols_.reference.data(),
                                &sum[begin], &count[begin], cols_of(strip), &strip_count[strip * p_.m]);
      else
        kernels<T>().exp_sums(row(begin), n, p_.m, p_.m, T(o_.alpha), &rows_.reference[begin],
                              cols_.reference.data(), &sum[begin], cols_of(strip));
    });
    std::copy(sum.begin(), sum.end(), rows_.sum.begin());
    std::copy(count.begin(), count.end(), rows_.active.begin());
    for (int64_t strip = 0; strip < tile_.strips(); ++strip)
      for (int64_t j = 0; j < p_.m; ++j) {
        cols_.sum[j] += double(cols_of(strip)[j]);
        if (hinges) cols_.active[j] += double(strip_count[strip * p_.m + j]);
      }
  }

  // The loss; leaves the slopes, and the derivative by alpha but for the part that goes through S.
  double reduce(const T* positive) {
    double loss = 0;
    for (int number : {0, 1}) {
      Side<T>& side = number ? cols_ : rows_;
      const double w = o_.weight[number];
      for (int64_t a = 0; a < p_.k; ++a) {
        if (side.best.index[a] < 0) continue;
        const double violation = double(side.best.score[a]) - double(positive[a]) + o_.margin;
        double& slope = side.slope[a];
        if (o_.kind == HINGE_SUM) {
          loss += w * side.sum[a];
          slope = w;
        } else if (o_.kind == HARDEST) {
          if (!(violation > 0)) continue;
          loss += w * o_.alpha * violation;
          slope = w;
          d_alpha_ += w * violation;
        } else {
          const bool all = o_.kind == ALL_NEGATIVES;
          const double logit = o_.alpha * violation + (all ? std::log(side.sum[a]) : 0);
          const double e = std::exp(-std::fabs(logit));  // the loss is softplus(logit)
          loss += w * (std::max(logit, 0.0) + std::log1p(e));
          slope = w * (logit > 0 ? 1 : e) / (1 + e);
          d_alpha_ += slope * (all ? o_.margin - double(positive[a]) : violation);
        }
        side.weight[a] = T(o_.kind == ALL_NEGATIVES ? slope / side.sum[a] : slope);
      }
    }
    return loss;
  }

  // The derivatives by the positives' and the hardest negatives' scores.
  void differentiate_hardest(T* d_positive, T* d_score) const {
    for (int64_t a = 0; a < p_.k; ++a) {
      d_positive[a] = -pull(a);
      d_score[a] = T(o_.alpha) * rows_.weight[a];
      d_score[p_.k + a] = T(o_.alpha) * cols_.weight[a];
    }
  }

  // The derivatives by all scores; completes the one by alpha.
  Tensor differentiate() {
    const T alpha = T(o_.alpha);
    for (Side<T>* side : {&rows_, &cols_})
      for (T& x : side->weight) x *= alpha;
    std::vector<double> total(tile_.strips());
    for_each_strip([&](int64_t strip, int64_t begin, int64_t count) {
      if (o_.kind == HINGE_SUM)
        kernels<T>().hinge_gradient(row(begin), count, p_.m, p_.m, &rows_.reference[begin],
                                    &rows_.weight[begin], cols_.reference.data(), cols_.weight.data(),
                                    row(begin), p_.m);
      else
        total[strip] = kernels<T>().exp_gradient(
            row(begin), count, p_.m, p_.m, alpha, &rows_.reference[begin], &rows_.weight[begin],
            cols_.reference.data(), cols_.weight.data(), row(begin), p_.m);
      for (int64_t i = begin; i < std::min(begin + count, p_.k); ++i) row(i)[i] -= pull(i);
    });
    for (double x : total) d_alpha_ += x / o_.alpha;
    return buffer_;
  }

  double d_alpha() const { return d_alpha_; }

  void report(T* score, int64_t* index) const {
    for (const Side<T>* side : {&rows_, &cols_})
      for (int64_t a = 0; a < p_.k; ++a) {
        *score++ = side->best.index[a] < 0 ? -std::numeric_limits<T>::infinity() : side->best.score[a];
        *index++ = side->best.index[a];
      }
  }

 private:
  T* row(int64_t i) const { return s_ + i * p_.m; }
  T* cols_of(int64_t strip) { return &strip_cols_[strip * p_.m]; }

  template <typename Body>
  void for_each_strip(const Body& body) const {
    parallel_each(tile_.strips(),
                  [&](int64_t strip) { body(strip, tile_.strip_begin(strip), tile_.strip_rows(strip)); });
  }

  // What an anchor's positive loses.
  T pull(int64_t a) const {
    const bool hinges = o_.kind == HINGE_SUM;
    return T(o_.alpha * (rows_.slope[a] * (hinges ? rows_.active[a] : 1) +
                         cols_.slope[a] * (hinges ? cols_.active[a] : 1)));
  }

  const Problem<T>& p_;
  const Options o_;
  const Tile tile_;
  Tensor buffer_;  // S [N, M], excluded entries hold EXCLUDED; in the end G
  T* const s_;
  Side<T> rows_, cols_;
  std::vector<T> strip_cols_;  // [strips, M]
  double d_alpha_ = 0;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results one_tile_loss(const Tensor& images, const Tensor& captions, const OptionalTensor& image_ids,
                      const OptionalTensor& caption_ids, int64_t num_pairs, int64_t kind, double scale,
                      const OptionalTensor& scale_tensor, double margin, double image_weight,
                      double caption_weight, bool mean) {
  return dispatch(images, [&](auto zero) -> Results {
    using T = decltype(zero);
    const Problem<T> problem(images, captions, image_ids, caption_ids, num_pairs);
    const double alpha = effective_scale<T>(scale, scale_tensor), share = mean ? 1.0 / num_pairs : 1.0;
    const Options options{Kind(kind), alpha, margin, {image_weight * share, caption_weight * share}};
    const int64_t listed = options.one_negative() ? num_pairs : 0;
    Tensor loss = empty({}, SCALAR_TYPE<T>), d_scale = empty({}, SCALAR_TYPE<T>);
    Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>), d_positive = empty({listed}, SCALAR_TYPE<T>);
    Tensor score = empty({2, num_pairs}, SCALAR_TYPE<T>), d_score = empty({2, listed}, SCALAR_TYPE<T>);
    Tensor index = empty({2, num_pairs}, ScalarType::Long), d_scores = empty({0, 0}, SCALAR_TYPE<T>);
    T* const p = data<T>(positive);

    OneTileLoss<T> tile(problem, options);
    if (tile.find_hardest(p) && alpha > 0 && std::isfinite(alpha)) {
      tile.report(data<T>(score), data<int64_t>(index));
      tile.sum_over_negatives(p);
      fill(loss, T(tile.reduce(p)));
      if (options.one_negative())
        tile.differentiate_hardest(data<T>(d_positive), data<T>(d_score));
      else
        d_scores = tile.differentiate();
      fill(d_scale, T(scale * tile.d_alpha()));
    } else {
      if (!options.one_negative()) d_scores = empty({problem.n, problem.m}, SCALAR_TYPE<T>);
      for (const Tensor& x : {loss, d_scores, d_positive, d_score, d_scale, positive, score})
        fill(x, NOT_A_NUMBER<T>);
      fill(index, int64_t{-1});
    }
    return {loss, d_scores, d_positive, d_score, d_scale, positive, score, index};
  });
}

std::tuple<Tensor, Tensor> one_tile_loss_backward(const Tensor& upstream, const Tensor& d_scores,
                                                  const Tensor& images, const Tensor& captions,
                                                  bool need_images, bool need_captions) {
  return dispatch(images, [&](auto zero) {
    using T = decltype(zero);
    const T factor = *data<T>(contiguous_as(upstream, SCALAR_TYPE<T>));
    const auto product = [&](bool needed, const Tensor& g, const Tensor& rows) {
      if (!needed) return empty({0}, rows.scalar_type());
      Tensor out = empty({g.size(0), rows.size(1)}, SCALAR_TYPE<T>);
      matmul_add(out, g, contiguous_as(rows, SCALAR_TYPE<T>), 0, factor);
      return converted(out, rows.scalar_type());
    };
    return std::make_tuple(product(need_images, d_scores, captions),
                           product(need_captions, transposed(d_scores), images));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_vse_cpu, m) {
  m.def(ONE_TILE_LOSS_SCHEMA);
  m.def(ONE_TILE_LOSS_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("one_tile_loss", TORCH_BOX(&one_tile_loss));
  m.impl("one_tile_loss_backward", TORCH_BOX(&one_tile_loss_backward));
}

}  // namespace fused_vse
