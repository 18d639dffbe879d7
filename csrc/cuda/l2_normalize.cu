// l2_normalize on CUDA (ops.h): y = x / max(|x|_2, 1e-12), row by row.
//
//   one block for a row:  each thread sums the squares of every 256th entry; once more, of the entries times
//                         2^-80, where they may overflow
//                         a tree over the threads, always of the same shape, adds the sums
//                         each thread writes every 256th entry
//   backward:             dx = (dy - y <y, dy>) / |x|, and dy / 1e-12 where the norm was clamped
//
// Resources: 1 KiB of shared memory, 256 threads; bound by the memory's bandwidth.
#include <tuple>

#include "../ops.h"
#include "l2_normalize.h"
#include "launch.h"

namespace fused_vse {
namespace {

template <typename T>
__global__ void __launch_bounds__(THREADS)
    l2_normalize_kernel(const T* rows, int64_t dim, T* normalized, float* inverse_norm) {
  __shared__ float partial[THREADS];
  const int64_t row = blockIdx.x;
  normalize::forward(partial, rows + row * dim, dim, normalized + row * dim, inverse_norm + row);
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    l2_normalize_backward_kernel(const T* d_normalized, const T* normalized, const float* inverse_norm,
                                 int64_t dim, T* d_rows) {
  __shared__ float partial[THREADS];
  const int64_t row = blockIdx.x, at = row * dim;
  normalize::backward(partial, d_normalized + at, normalized + at, inverse_norm[row], dim, d_rows + at);
}

std::tuple<Tensor, Tensor> l2_normalize(const Tensor& rows) {
  return dispatch_embeddings(rows, [&](auto zero) {
    using T = decltype(zero);
    const Launch launch(rows);
    const Tensor x = torch::stable::contiguous(rows);
    const int64_t n = rows.size(0), dim = rows.size(1);
    Tensor normalized = empty_on(rows, {n, dim}, rows.scalar_type());
    Tensor inverse_norm = empty_on(rows, {n}, ScalarType::Float);
    l2_normalize_kernel<<<unsigned(n), THREADS, 0, launch.stream()>>>(data<T>(x), dim, data<T>(normalized),
                                                                      data<float>(inverse_norm));
    check_launch();
    return std::make_tuple(normalized, inverse_norm);
  });
}

Tensor l2_normalize_backward(const Tensor& d_normalized, const Tensor& normalized,
                             const Tensor& inverse_norm) {
  return dispatch_embeddings(normalized, [&](auto zero) {
    using T = decltype(zero);
    const Launch launch(normalized);
    const Tensor dy = torch::stable::contiguous(d_normalized), y = torch::stable::contiguous(normalized);
    const int64_t n = y.size(0), dim = y.size(1);
    Tensor d_rows = empty_on(y, {n, dim}, y.scalar_type());
    l2_normalize_backward_kernel<<<unsigned(n), THREADS, 0, launch.stream()>>>(
        data<T>(dy), data<T>(y), data<float>(inverse_norm), dim, data<T>(d_rows));
    check_launch();
    return d_rows;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_vse_cuda, m) {
  m.def(L2_NORMALIZE_SCHEMA);
  m.def(L2_NORMALIZE_BACKWARD_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cuda, CUDA, m) {
  m.impl("l2_normalize", TORCH_BOX(&l2_normalize));
  m.impl("l2_normalize_backward", TORCH_BOX(&l2_normalize_backward));
}

}  // namespace fused_vse
