// The scores I T^t: one GEMM of the library a tile. Gradients: two more, d_images += G T, d_captions += G^t
// I.
#pragma once

#include "embeddings.h"

namespace fused_vse {

template <typename T>
class Gemm {
 public:
  Gemm(const Batch& batch, const KeptScores& kept) : e(batch), known_(!kept.none() && kept.is_known) {
    if (kept.none())
      buffer_ = empty({largest_tile(batch)}, SCALAR_TYPE<T>);
    else
      kept_ = torch::stable::view(kept.scores, {e.n, e.m});
  }

  bool is_bounded() const { return e.has_bounded_dots(); }

  void prepare(const Tile& tile) {
    Tensor out = kept_ ? part_of(*kept_, tile.row, tile.rows, tile.col, tile.cols) : tile.view(*buffer_);
    if (!known_)
      matmul_into(out, rows_of(e.images, tile.row, tile.rows),
                  transposed(rows_of(e.captions, tile.col, tile.cols)));
    s_ = data<T>(out);
    ld_ = out.stride(0);
  }

  bool read(const Strip<T>& strip, T* out) const {
    strip.copy(strip.in(s_, ld_), ld_, out, strip.cols());
    return true;
  }

  class Sink : public EmbeddingGradients<T> {
   public:
    Sink(const Gemm& source, const Batch& batch, const T* d_positive, const Needs& needs)
        : EmbeddingGradients<T>(batch, needs), e_(source.e), batch_(batch), d_positive_(d_positive) {
      if (batch.column_anchors == 0) zero(this->d_images, batch.row_anchors);
      if (batch.row_anchors == 0) zero(this->d_captions, batch.column_anchors);
    }

    void complete(const Strip<T>& strip, const GradientStrip<T>& g) const {
      g.add_pairs(batch_, strip, d_positive_);
    }

    void finish(const Tile& tile) {
      const Tensor g = tile.view(this->g);
      add(this->d_images, tile.row, g, rows_of(e_.captions, tile.col, tile.cols), tile.col == 0);
      add(this->d_captions, tile.col, transposed(g), rows_of(e_.images, tile.row, tile.rows), tile.row == 0);
    }

   private:
    static void add(const Tensor& d, int64_t row, const Tensor& g, const Tensor& others, bool is_first) {
      if (!d.numel()) return;
      Tensor out = rows_of(d, row, g.size(0));
      matmul_add(out, g, others, is_first ? 0 : 1, 1);
    }
    // What is in no tile.
    static void zero(const Tensor& d, int64_t begin) {
      if (!d.numel() || begin == d.size(0)) return;
      Tensor rest = rows_of(d, begin, d.size(0) - begin);
      torch::stable::zero_(rest);
    }
    const Embeddings<T>& e_;
    const Batch& batch_;
    const T* const d_positive_;
  };

  const Embeddings<T> e;

 private:
  const bool known_;
  OptionalTensor kept_, buffer_;
  const T* s_ = nullptr;  // the tile
  int64_t ld_ = 0;
};

}  // namespace fused_vse
