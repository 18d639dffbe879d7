// positive_scores on the CPU (ops.py).
#include "sources.h"

namespace fused_vse {
namespace {

Tensor positive_scores(const Batch& batch) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    const Tensor positive = empty({batch.pair_count}, SCALAR_TYPE<T>);
    if (!batch.captions) {
      const int64_t row_stride = batch.images.stride(0), column_stride = batch.images.stride(1);
      with_elements(batch.images, [&](const auto* s) {
        for (int64_t k = 0; k < batch.pair_count; ++k)
          data<T>(positive)[k] =
              static_cast<T>(s[(batch.pair_row + k) * row_stride + (batch.pair_column + k) * column_stride]);
      });
      return positive;
    }
    const Tensor images =
        contiguous_as(rows_of(batch.images, batch.pair_row, batch.pair_count), SCALAR_TYPE<T>);
    const Tensor captions =
        contiguous_as(rows_of(*batch.captions, batch.pair_column, batch.pair_count), SCALAR_TYPE<T>);
    const auto kernel = batch.similarity == ORDER ? kernels<T>().order_scores : kernels<T>().dots;
    const int64_t d = images.size(1);
    parallel_each(
        batch.pair_count,
        [&](int64_t k) {
          const T *a = data<T>(images) + k * d, *b = data<T>(captions) + k * d;
          kernel(&a, 1, &b, 1, d, data<T>(positive) + k, 1);
        },
        GRAIN);
    return positive;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("positive_scores", TORCH_BOX(&WithBatch<&positive_scores>::call));
}

}  // namespace fused_vse
