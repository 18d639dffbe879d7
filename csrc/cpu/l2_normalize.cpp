// l2_normalize on the CPU (ops.h), row by row.
#include <tuple>

#include "../ops.h"
#include "tiles.h"

namespace fused_vse {
namespace {

constexpr int64_t GRAIN = 64;  // rows

std::tuple<Tensor, Tensor> l2_normalize(const Tensor& rows) {
  return dispatch(rows, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = rows.size(0), d = rows.size(1);
    const Tensor x = contiguous_as(rows, SCALAR_TYPE<T>);
    Tensor normalized = empty({n, d}, SCALAR_TYPE<T>);
    Tensor inverse_norm = empty({n}, SCALAR_TYPE<T>);
    parallel_each(
        n,
        [&](int64_t i) {
          data<T>(inverse_norm)[i] =
              kernels<T>().normalize(data<T>(x) + i * d, d, data<T>(normalized) + i * d);
        },
        GRAIN);
    return std::make_tuple(converted(normalized, rows.scalar_type()), inverse_norm);
  });
}

Tensor l2_normalize_backward(const Tensor& d_normalized, const Tensor& normalized,
                             const Tensor& inverse_norm) {
  return dispatch(normalized, [&](auto zero) {
    using T = decltype(zero);
    const int64_t n = normalized.size(0), d = normalized.size(1);
    const Tensor y = contiguous_as(normalized, SCALAR_TYPE<T>);
    const Tensor dy = contiguous_as(d_normalized, SCALAR_TYPE<T>);
    Tensor d_rows = empty({n, d}, SCALAR_TYPE<T>);
    parallel_each(
        n,
        [&](int64_t i) {
          kernels<T>().normalize_backward(data<T>(dy) + i * d, data<T>(y) + i * d, data<T>(inverse_norm)[i],
                                          d, data<T>(d_rows) + i * d);
        },
        GRAIN);
    return converted(d_rows, normalized.scalar_type());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_vse_cpu, m) {
  m.def(L2_NORMALIZE_SCHEMA);
  m.def(L2_NORMALIZE_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("l2_normalize", TORCH_BOX(&l2_normalize));
  m.impl("l2_normalize_backward", TORCH_BOX(&l2_normalize_backward));
}

}  // namespace fused_vse
