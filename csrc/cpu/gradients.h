// Gradients of dense statistics: d_images = scale G T, d_captions = scale G^t I, tile by tile of G, and
// the positive's part d_positive[k] times the other side's row.
#pragma once

#include "tiles.h"

namespace fused_vse {

template <typename T>
class Gradients {
 public:
  Gradients(const Problem<T>& problem, bool need_images, bool need_captions)
      : problem_(problem),
        d_images_(empty_like(problem.images, need_images)),
        d_captions_(empty_like(problem.captions, need_captions)) {}

  // Call first: it writes every row. weight[k] * T_k to d_images[k], weight[k] * I_k to d_captions[k].
  void start_with_positives(const T* weight) {
    scale_rows(problem_.captions, weight, d_images_);
    scale_rows(problem_.images, weight, d_captions_);
  }

  void add_tile(const Tile& tile, const Tensor& g, double scale) {
    if (d_images_.numel()) {
      Tensor out = rows_of(d_images_, tile.row, tile.rows);
      matmul_add(out, g, rows_of(problem_.captions, tile.col, tile.cols), 1, scale);
    }
    if (d_captions_.numel()) {
      Tensor out = rows_of(d_captions_, tile.col, tile.cols);
      matmul_add(out, transposed(g), rows_of(problem_.images, tile.row, tile.rows), 1, scale);
    }
  }

  void fill_with_nan() {
    fill(d_images_, NOT_A_NUMBER<T>);
    fill(d_captions_, NOT_A_NUMBER<T>);
  }

  Tensor d_images(ScalarType type) const { return converted(d_images_, type); }
  Tensor d_captions(ScalarType type) const { return converted(d_captions_, type); }

 private:
  static Tensor empty_like(const Tensor& x, bool needed) {
    return needed ? empty({x.size(0), x.size(1)}, SCALAR_TYPE<T>) : empty({0}, SCALAR_TYPE<T>);
  }

  void scale_rows(const Tensor& source, const T* weight, const Tensor& out) {
    if (!out.numel()) return;
    const int64_t d = problem_.d;
    parallel_each(
        out.size(0),
        [&](int64_t i) {
          const T* row = data<T>(source) + i * d;
          kernels<T>().weighted_sum(weight + i, &row, i < problem_.k ? 1 : 0, d, data<T>(out) + i * d);
        },
        Problem<T>::GRAIN);
  }

  const Problem<T>& problem_;
  Tensor d_images_, d_captions_;
};

}  // namespace fused_vse
