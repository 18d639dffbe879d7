// A given score matrix: one read of it, and one write of its gradient.
#pragma once

#include "source.h"

namespace fused_vse {

template <typename T>
class Given {
 public:
  explicit Given(const Batch& batch, const KeptScores& = {}) : scores_(batch.images) {}

  bool is_bounded() const { return true; }  // read() will see

  // Only 16-bit scores and those that are not in rows are copied.
  void prepare(const Tile& tile) {
    ld_ = scores_.stride(0);
    if (scores_.scalar_type() == SCALAR_TYPE<T> && scores_.stride(1) == 1) {
      s_ = data<T>(scores_) + tile.row * ld_ + tile.col;
      return;
    }
    copy_ = contiguous_as(part_of(scores_, tile.row, tile.rows, tile.col, tile.cols), SCALAR_TYPE<T>);
    s_ = data<T>(*copy_);
    ld_ = tile.cols;
  }

  // Also false if a score is so large that differences could overflow.
  bool read(const Strip<T>& strip, T* out) const {
    strip.copy(strip.in(s_, ld_), ld_, out, strip.cols());
    return kernels<T>().max_abs(out, strip.rows() * strip.cols()) < std::numeric_limits<T>::max() / 4;
  }

  // d_scores [N, M]: written in place, or converted from a tile in the accumulation type.
  class Sink {
   public:
    Sink(const Given&, const Batch& batch, const T* d_positive, const Needs& needs)
        : batch_(batch), d_positive_(d_positive), gradients_(empty_gradients(batch, needs)) {
      const Tensor& d_scores = std::get<0>(gradients_);
      in_place_ = d_scores.numel() > 0 && d_scores.scalar_type() == SCALAR_TYPE<T>;
      if (!in_place_) buffer_ = empty({largest_tile(batch)}, SCALAR_TYPE<T>);
      if (!d_scores.numel() || batch.row_anchors == batch.n() || batch.column_anchors == batch.m()) return;
      Tensor unseen = part_of(d_scores, batch.row_anchors, batch.n() - batch.row_anchors,
                              batch.column_anchors, batch.m() - batch.column_anchors);
      torch::stable::zero_(unseen);
    }

    GradientStrip<T> at(const Strip<T>& strip) const {
      if (!in_place_) return {strip.in(data<T>(*buffer_), strip.tile.cols), strip.tile.cols};
      const int64_t m = batch_.m();
      return {data<T>(std::get<0>(gradients_)) + strip.row() * m + strip.col(), m};
    }

    void complete(const Strip<T>& strip, const GradientStrip<T>& g) const {
      g.add_pairs(batch_, strip, d_positive_);
    }

    void finish(const Tile& tile) const {
      const Tensor& d_scores = std::get<0>(gradients_);
      if (in_place_ || !d_scores.numel()) return;
      Tensor out = part_of(d_scores, tile.row, tile.rows, tile.col, tile.cols);
      torch::stable::copy_(out, tile.view(*buffer_));
    }

    Gradients result() const { return gradients_; }

   private:
    const Batch& batch_;
    const T* const d_positive_;
    Gradients gradients_;
    bool in_place_;
    OptionalTensor buffer_;
  };

 private:
  const Tensor& scores_;
  OptionalTensor copy_;
  const T* s_ = nullptr;  // the tile
  int64_t ld_ = 0;
};

}  // namespace fused_vse
