// small_loss on the CPU (ops.py): a whole loss of a small batch. S is one tile that stays in the cache: it is
// computed once, and its gradient takes its place.
//
//   for each strip of S, in parallel:   scores; the largest embedding; maxima of rows and columns
//   for each strip, in parallel:        sums over the negatives (not for the hardest)
//   for each anchor:                    its loss and the derivatives
//   for each strip, in parallel:        G in place of S (not for the hardest)
#include <cmath>

#include "hardest.h"

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
  std::vector<T> weight;       // alpha slope, ALL_NEGATIVES: over the sum; 0 for what is no anchor
};

template <typename T>
class SmallLoss {
 public:
  SmallLoss(const Batch& batch, const Options& options)
      : e_(batch),
        excluded_(batch),
        k_(batch.pair_count),
        o_(options),
        tile_{0, e_.n, 0, e_.m},
        buffer_(empty({e_.n, e_.m}, SCALAR_TYPE<T>)),
        s_(data<T>(buffer_)),
        rows_(e_.n, k_),
        cols_(e_.m, k_),
        strip_cols_(tile_.strips() * e_.m) {}

  // False if a score could be NaN or overflow: then nothing is to be used.
  bool find_hardest(T* positive) {
    std::vector<const T*> images(e_.n), captions(e_.m);
    for (int64_t i = 0; i < e_.n; ++i) images[i] = e_.image(i);
    for (int64_t j = 0; j < e_.m; ++j) captions[j] = e_.caption(j);
    std::vector<T> image_max(tile_.strips()), caption_max(tile_.strips()), row_max(e_.n);
    std::fill(strip_cols_.begin(), strip_cols_.end(), EXCLUDED<T>);
    for_each_strip([&](int64_t strip, int64_t begin, int64_t count) {
      const int64_t first = e_.m * strip / tile_.strips(), last = e_.m * (strip + 1) / tile_.strips();
      image_max[strip] = kernels<T>().max_abs(e_.image(begin), count * e_.d);
      caption_max[strip] = kernels<T>().max_abs(e_.caption(first), (last - first) * e_.d);
      kernels<T>().dots(&images[begin], count, captions.data(), e_.m, e_.d, row(begin), e_.m);
      for (int64_t i = begin; i < std::min(begin + count, k_); ++i) positive[i] = row(i)[i];
      for (int64_t i = begin; i < begin + count; ++i)
        excluded_.for_each(i, 0, e_.m, [&](int64_t j) { row(i)[j] = EXCLUDED<T>; });
      kernels<T>().maxima(scores(begin, count), &row_max[begin], cols_of(strip));
      for (int64_t i = begin; i < begin + count; ++i)
        if (row_max[i] != EXCLUDED<T>)
          rows_.best.offer(i, row_max[i], std::find(row(i), row(i) + e_.m, row_max[i]) - row(i));
    });
    if (!e_.has_bounded_dots(e_.largest(image_max), e_.largest(caption_max), e_.d)) return false;
    for (int64_t strip = 0; strip < tile_.strips(); ++strip)
      for (int64_t j = 0; j < e_.m; ++j) {
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
      if (hinges) std::fill(side->reference.begin(), side->reference.end(), INFINITE<T>);
      for (int64_t a = 0; hinges && a < k_; ++a) side->reference[a] = positive[a] - T(o_.margin);
      for (size_t i = 0; !hinges && i < side->sum.size(); ++i)
        side->reference[i] = side->best.index[i] < 0 ? 0 : side->best.score[i];
    }
    std::vector<T> sum(e_.n), count(e_.n), strip_count(hinges ? strip_cols_.size() : 0);
    std::fill(strip_cols_.begin(), strip_cols_.end(), T(0));
    for_each_strip([&](int64_t strip, int64_t begin, int64_t n) {
      if (hinges)
        kernels<T>().hinge_sums(scores(begin, n), &rows_.reference[begin], cols_.reference.data(),
                                &sum[begin], &count[begin], cols_of(strip), &strip_count[strip * e_.m]);
      else
        kernels<T>().exp_sums(scores(begin, n), o_.alpha, &rows_.reference[begin], cols_.reference.data(),
                              &sum[begin], cols_of(strip));
    });
    std::copy(sum.begin(), sum.end(), rows_.sum.begin());
    std::copy(count.begin(), count.end(), rows_.active.begin());
    for (int64_t strip = 0; strip < tile_.strips(); ++strip)
      for (int64_t j = 0; j < e_.m; ++j) {
        cols_.sum[j] += double(cols_of(strip)[j]);
        if (hinges) cols_.active[j] += double(strip_count[strip * e_.m + j]);
      }
  }

  // The loss; leaves the slopes, and the derivative by alpha but for the part that goes through S.
  double reduce(const T* positive) {
    double loss = 0;
    for (int number : {0, 1}) {
      Side<T>& side = number ? cols_ : rows_;
      const double w = o_.weight[number];
      for (int64_t a = 0; a < k_; ++a) {
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
          d_alpha_ += slope * violation;
        }
        side.weight[a] = T(o_.alpha * (o_.kind == ALL_NEGATIVES ? slope / side.sum[a] : slope));
      }
    }
    return loss;
  }

  // What the backward pass needs: S's gradient, or the derivatives by the positives' and the hardest
  // negatives' scores.
  std::pair<Tensor, Tensor> saved() const {
    if (o_.one_negative()) return {empty({k_}, SCALAR_TYPE<T>), empty({2 * k_}, SCALAR_TYPE<T>)};
    return {buffer_, empty({0}, SCALAR_TYPE<T>)};
  }

  // Writes that, and completes the derivative by alpha.
  void differentiate(const Tensor& saved_one, const Tensor& saved_two) {
    if (o_.one_negative()) {
      for (int64_t a = 0; a < k_; ++a) data<T>(saved_one)[a] = -pull(a);
      T* const d_score = std::copy_n(rows_.weight.begin(), k_, data<T>(saved_two));
      std::copy_n(cols_.weight.begin(), k_, d_score);
      return;
    }
    std::vector<double> total(tile_.strips());
    for_each_strip([&](int64_t strip, int64_t begin, int64_t count) {
      const auto write = [&](const auto& kernel, auto... scale) {
        return kernel(scores(begin, count), scale..., &rows_.reference[begin], &rows_.weight[begin],
                      cols_.reference.data(), cols_.weight.data(), row(begin), e_.m);
      };
      if (o_.kind == HINGE_SUM)
        write(kernels<T>().hinge_gradient);
      else
        total[strip] = write(kernels<T>().exp_gradient, o_.alpha);
      for (int64_t i = begin; i < std::min(begin + count, k_); ++i) row(i)[i] -= pull(i);
    });
    for (double x : total) d_alpha_ += x / o_.alpha;
  }

  double d_alpha() const { return d_alpha_; }

  void report(T* score, int64_t* index) const {
    for (const Side<T>* side : {&rows_, &cols_})
      for (int64_t a = 0; a < k_; ++a) {
        *score++ = side->best.index[a] < 0 ? -INFINITE<T> : side->best.score[a];
        *index++ = side->best.index[a];
      }
  }

 private:
  T* row(int64_t i) const { return s_ + i * e_.m; }
  StripScores<T> scores(int64_t begin, int64_t count) const { return {row(begin), count, e_.m, e_.m}; }
  T* cols_of(int64_t strip) { return &strip_cols_[strip * e_.m]; }

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

  const Embeddings<T> e_;
  const ExcludedPairs excluded_;
  const int64_t k_;
  const Options o_;
  const Tile tile_;
  Tensor buffer_;  // S [N, M], excluded entries hold EXCLUDED; in the end G
  T* const s_;
  Side<T> rows_, cols_;
  std::vector<T> strip_cols_;  // [strips, M]
  double d_alpha_ = 0;
};

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
    const double alpha = kind == HINGE_SUM ? 1 : effective_scale(scale, scale_tensor);
    const double share = mean ? 1.0 / num_pairs : 1.0;
    const Options options{Kind(kind), alpha, margin, {image_weight * share, caption_weight * share}};
    const Tensor loss = empty({}, SCALAR_TYPE<T>), d_scale = empty({}, SCALAR_TYPE<T>);
    const Tensor positive = empty({num_pairs}, SCALAR_TYPE<T>);
    const Tensor score = empty({2 * num_pairs}, SCALAR_TYPE<T>),
                 index = empty({2 * num_pairs}, ScalarType::Long);
    SmallLoss<T> tile(batch, options);
    const auto [saved_one, saved_two] = tile.saved();
    if (tile.find_hardest(data<T>(positive)) && is_usable<T>(alpha)) {
      tile.report(data<T>(score), data<int64_t>(index));
      tile.sum_over_negatives(data<T>(positive));
      fill(loss, T(tile.reduce(data<T>(positive))));
      tile.differentiate(saved_one, saved_two);
      fill(d_scale, T(tile.d_alpha()));
    } else {
      for (const Tensor& x : {loss, positive, score, d_scale, saved_one, saved_two}) fill(x, NOT_A_NUMBER<T>);
      fill(index, int64_t{-1});
    }
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
