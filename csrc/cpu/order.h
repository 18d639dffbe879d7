// Scores pair by pair in registers, D in the innermost loop: nothing of the size N M D exists, and a score
// depends on nothing but its two embeddings. The order similarity -|max(0, T_j - I_i)|_2, and the dot
// product where it must be the same to the last bit however S is cut.
//
// Gradients of the order similarity: per tile, W = G / |max(0, T_j - I_i)|, then
//
//   d_images[i]   += sum_j W_ij max(0, T_j - I_i)      in parallel over i
//   d_captions[j] -= sum_i W_ij max(0, T_j - I_i)      in parallel over j
//
// W = 0 where the difference has no positive part: the subgradient that lets nothing move.
#pragma once

#include "embeddings.h"

namespace fused_vse {

template <typename T>
class Pairwise {
 public:
  using Kernel = decltype(Kernels<T>::dots);

  Pairwise(const Batch& batch, const KeptScores& kept, Kernel kernel)
      : e(batch), kept_(kept), kernel_(kernel) {
    for (int64_t i = 0; i < e.n; ++i) images_.push_back(e.image(i));
    for (int64_t j = 0; j < e.m; ++j) captions_.push_back(e.caption(j));
  }

  void prepare(const Tile&) {}

  bool read(const Strip<T>& strip, T* out) const {
    T* const s = kept_.none() ? nullptr : data<T>(kept_.scores) + strip.row() * e.m + strip.col();
    if (s && kept_.is_known) {
      strip.copy(s, e.m, out, strip.cols());
      return true;
    }
    kernel_(&images_[strip.row()], strip.rows(), &captions_[strip.col()], strip.cols(), e.d, out,
            strip.cols());
    if (s) strip.copy(out, strip.cols(), s, e.m);
    return true;
  }

  const T* const* images() const { return images_.data(); }
  const T* const* captions() const { return captions_.data(); }

  const Embeddings<T> e;

 private:
  const KeptScores kept_;
  const Kernel kernel_;
  std::vector<const T*> images_, captions_;
};

template <typename T>
class Order : public Pairwise<T> {
 public:
  Order(const Batch& batch, const KeptScores& kept) : Pairwise<T>(batch, kept, kernels<T>().order_scores) {}

  bool is_bounded() const {
    const auto& e = this->e;
    const double image = e.largest(e.images), caption = e.largest(e.captions);
    const double squares = 4 * (image * image + caption * caption) * double(e.d);
    return squares < double(std::numeric_limits<T>::max()) / 4;
  }

  static T score(const T* image, const T* caption, int64_t d) {
    T s;
    kernels<T>().order_scores(&image, 1, &caption, 1, d, &s, 1);
    return s;
  }
  // x / |max(0, T_j - I_i)|
  static T over_distance(T x, T score) { return score < 0 ? x / -score : T(0); }

  class Sink : public EmbeddingGradients<T> {
   public:
    Sink(const Order& source, const Batch& batch, const T* d_positive, const Needs& needs)
        : EmbeddingGradients<T>(batch, needs), source_(source), batch_(batch) {
      torch::stable::zero_(this->d_images);
      torch::stable::zero_(this->d_captions);
      for (int64_t k = 0; k < batch.pair_count; ++k) {
        const T *image = source.e.image(batch.pair_row + k),
                *caption = source.e.caption(batch.pair_column + k);
        pairs_.push_back(over_distance(d_positive[k], score(image, caption, source.e.d)));
      }
    }

    void complete(const Strip<T>& strip, const GradientStrip<T>& g) const {
      for (int64_t r = 0; r < strip.rows(); ++r)
        for (int64_t c = 0; c < strip.cols(); ++c) {
          T& w = g.g[r * g.ld + c];
          w = over_distance(w, strip.scores.row(r)[c]);
        }
      g.add_pairs(batch_, strip, pairs_.data());
    }

    void finish(const Tile& tile) {
      const T* const w = data<T>(this->g);
      const T *const *images = source_.images() + tile.row, *const *captions = source_.captions() + tile.col;
      const int64_t d = source_.e.d, ld = tile.cols;
      for_tasks(this->d_images, tile.rows, [&](int64_t r, int64_t count) {
        kernels<T>().order_sums_of_images(images[r], count, captions, tile.cols, d, w + r * ld, ld, 1,
                                          data<T>(this->d_images) + (tile.row + r) * d);
      });
      for_tasks(this->d_captions, tile.cols, [&](int64_t c, int64_t count) {
        kernels<T>().order_sums_of_captions(captions[c], count, images, tile.rows, d, w + c, 1, ld,
                                            data<T>(this->d_captions) + (tile.col + c) * d);
      });
    }

   private:
    static constexpr int64_t TASK_ROWS = 16;
    template <typename Body>
    static void for_tasks(const Tensor& out, int64_t size, const Body& body) {
      if (!out.numel()) return;
      parallel_each(divided_up(size, TASK_ROWS), [&](int64_t task) {
        body(task * TASK_ROWS, std::min(TASK_ROWS, size - task * TASK_ROWS));
      });
    }
    const Order& source_;
    const Batch& batch_;
    std::vector<T> pairs_;  // d_positive over the distance
  };
};

}  // namespace fused_vse
