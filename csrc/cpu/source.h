// What the pass needs of a source of scores, a class S<T> of gemm.h, order.h or given.h:
//
//   S(batch, kept)                       see KeptScores
//   bool is_bounded()                    false if a score could be NaN or overflow
//   void prepare(tile)                   before the strips of a tile
//   bool read(strip, T* out)             their scores; false if one is not finite or too large
//   S::Sink(source, batch, d_positive, needs)  where S's gradient goes:
//     GradientStrip<T> at(strip)         where to write a strip's
//     void complete(strip, g)            what is left to do with it, the pairs' part included
//     void finish(tile)                  after the strips of a tile
//     Gradients result()
#pragma once

#include <tuple>

#include "pass.h"

namespace fused_vse {

// S [N * M] of embeddings, if it is kept for the backward pass, else [0].
struct KeptScores {
  Tensor scores = empty({0}, ScalarType::Float);
  bool is_known = false;  // else it is to be written

  bool none() const { return scores.numel() == 0; }
};

inline KeptScores kept_scores(const Batch& batch, bool save_scores) {
  const int64_t count = batch.captions && save_scores ? batch.n() * batch.m() : 0;
  return {empty({count <= MAX_SAVED_SCORES ? count : 0}, batch.accumulation_type()), false};
}

template <typename T>
struct GradientStrip {
  T* g;
  int64_t ld;

  void add_pairs(const Batch& batch, const Strip<T>& strip, const T* d_positive) const {
    const int64_t row = strip.row(), col = strip.col();
    batch.for_each_pair(row, strip.rows(), col, strip.cols(), [&](int64_t k) {
      g[(batch.pair_row + k - row) * ld + batch.pair_column + k - col] += d_positive[k];
    });
  }
};

// What a backward op is asked for.
struct Needs {
  bool images, captions, accumulate;  // `accumulate`: in the accumulation type
};

using Gradients = std::tuple<Tensor, Tensor>;  // d_images, d_captions

inline Gradients empty_gradients(const Batch& batch, const Needs& needs) {
  const bool wide = needs.accumulate && batch.captions;
  const ScalarType type = wide ? batch.accumulation_type() : batch.images.scalar_type();
  const auto like = [&](const Tensor& x, bool needed) {
    return needed ? empty({x.size(0), x.size(1)}, type) : empty({0}, type);
  };
  return {like(batch.images, needs.images),
          batch.captions ? like(*batch.captions, needs.captions) : empty({0}, type)};
}

inline Gradients nan_gradients(const Batch& batch, const Needs& needs) {
  Gradients result = empty_gradients(batch, needs);
  torch::stable::fill_(std::get<0>(result), NOT_A_NUMBER<double>);
  torch::stable::fill_(std::get<1>(result), NOT_A_NUMBER<double>);
  return result;
}

}  // namespace fused_vse
