// Tensors as the CPU backend uses them, and the two library calls that do its GEMMs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace fused_vse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
constexpr ScalarType SCALAR_TYPE = ScalarType::Float;
template <>
inline constexpr ScalarType SCALAR_TYPE<double> = ScalarType::Double;
template <>
inline constexpr ScalarType SCALAR_TYPE<int64_t> = ScalarType::Long;

template <typename T>
constexpr T NOT_A_NUMBER = std::numeric_limits<T>::quiet_NaN();
template <typename T>
constexpr T INFINITE = std::numeric_limits<T>::infinity();

// Calls f(T{}) with the accumulation type of `x`.
template <typename F>
auto dispatch(const Tensor& x, F&& f) {
  return x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

inline Tensor converted(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type ? x : torch::stable::to(x, type);
}

inline Tensor contiguous_as(const Tensor& x, ScalarType type) {
  const Tensor y = converted(x, type);
  return y.is_contiguous() ? y : torch::stable::contiguous(y);
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::empty(shape, type);
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// f(pointer to the first element), of whatever type the elements are.
template <typename F>
void with_elements(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return f(data<c10::Half>(x));
    case ScalarType::BFloat16: return f(data<c10::BFloat16>(x));
    case ScalarType::Double: return f(data<double>(x));
    default: return f(data<float>(x));
  }
}

template <typename T>
void fill(const Tensor& x, T value) {
  std::fill_n(data<T>(x), x.numel(), value);
}

inline Tensor rows_of(const Tensor& x, int64_t begin, int64_t count) {
  if (count == x.size(0)) return x;
  Tensor view = x;
  return torch::stable::narrow(view, 0, begin, count);
}

inline Tensor part_of(const Tensor& x, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  Tensor view = rows_of(x, row, rows);
  return torch::stable::narrow(view, 1, col, cols);
}

inline Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

// out = a b
inline void matmul_into(Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = beta out + alpha a b
inline void matmul_add(Tensor& out, const Tensor& a, const Tensor& b, double beta, double alpha) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), beta, alpha));
}

// body(i) for i in [0, n), in parallel on PyTorch's own threads; an iteration must be worth a task.
template <typename Body>
void parallel_each(int64_t n, const Body& body, int64_t grain = 1) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

constexpr int64_t GRAIN = 64;  // rows: a smaller task is not worth a thread

}  // namespace fused_vse
