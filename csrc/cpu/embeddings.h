// What the two sources of scores of embeddings share.
#pragma once

#include "source.h"

namespace fused_vse {

// The embeddings in the accumulation type.
template <typename T>
struct Embeddings {
  explicit Embeddings(const Batch& batch)
      : images(contiguous_as(batch.images, SCALAR_TYPE<T>)),
        captions(contiguous_as(*batch.captions, SCALAR_TYPE<T>)),
        n(batch.n()),
        m(batch.m()),
        d(images.size(1)) {}

  const T* image(int64_t i) const { return data<T>(images) + i * d; }
  const T* caption(int64_t j) const { return data<T>(captions) + j * d; }

  // False if an embedding is not finite or so large that a score could overflow.
  bool has_bounded_dots() const { return has_bounded_dots(largest(images), largest(captions), d); }
  // The same from the largest elements.
  static bool has_bounded_dots(double image, double caption, int64_t d) {
    return image * caption * double(d) < double(std::numeric_limits<T>::max());
  }

  // The largest |element| of a side; infinity for NaN.
  static double largest(const Tensor& x) {
    const int64_t chunks = divided_up(x.size(0), GRAIN), d = x.size(1);
    std::vector<T> partial(chunks);
    parallel_each(chunks, [&](int64_t c) {
      const int64_t begin = c * GRAIN, count = std::min(x.size(0) - begin, GRAIN);
      partial[c] = kernels<T>().max_abs(data<T>(x) + begin * d, count * d);
    });
    return largest(partial);
  }
  static double largest(const std::vector<T>& partial) {
    T top = 0;
    for (T x : partial)
      if (!(x <= top)) top = x != x ? INFINITE<T> : x;
    return top;
  }

  Tensor images, captions;
  int64_t n, m, d;
};

// d_images and d_captions, to which every tile of S's gradient G adds its part.
template <typename T>
class EmbeddingGradients {
 public:
  EmbeddingGradients(const Batch& batch, const Needs& needs)
      : d_images(like(batch.images, needs.images)),
        d_captions(like(*batch.captions, needs.captions)),
        g(empty({largest_tile(batch)}, SCALAR_TYPE<T>)),
        type_(needs.accumulate ? SCALAR_TYPE<T> : batch.images.scalar_type()) {}

  // Where a strip's part of G is to be written.
  GradientStrip<T> at(const Strip<T>& strip) const {
    return {strip.in(data<T>(g), strip.tile.cols), strip.tile.cols};
  }

  Gradients result() const { return {converted(d_images, type_), converted(d_captions, type_)}; }

 protected:
  Tensor d_images, d_captions;
  const Tensor g;  // a tile of G

 private:
  static Tensor like(const Tensor& x, bool needed) {
    return needed ? empty({x.size(0), x.size(1)}, SCALAR_TYPE<T>) : empty({0}, SCALAR_TYPE<T>);
  }
  const ScalarType type_;
};

}  // namespace fused_vse
