// What every op of the CUDA backend does on the host around a kernel: tensors in, a launch, an error check.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "batch.h"

namespace fused_vse {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_cuda(cudaError_t result) {
  if (result == cudaSuccess) return;
  // The library's own runtime keeps an error until someone asks for it; the next check must not raise it
  // again.
  static_cast<void>(cudaGetLastError());
  STD_TORCH_CHECK(false, "CUDA error: ", cudaGetErrorString(result));
}

inline void check_launch() { check_cuda(cudaGetLastError()); }

// Makes the tensor's device the current one for as long as it lives, and knows its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline bool is_beside(const Tensor& x, const Tensor& like) {
  return x.is_cuda() && x.get_device_index() == like.get_device_index();
}

inline void check_batch(const Tensor& images, const Tensor& captions, const OptionalTensor& image_ids,
                        const OptionalTensor& caption_ids, int64_t num_pairs) {
  STD_TORCH_CHECK(images.dim() == 2 && captions.dim() == 2, "embeddings must be [N, D] and [M, D]");
  STD_TORCH_CHECK(images.scalar_type() == captions.scalar_type() && is_beside(captions, images),
                  "images and captions must agree in dtype and device");
  for (const OptionalTensor* ids : {&image_ids, &caption_ids})
    STD_TORCH_CHECK(!*ids || ((*ids)->scalar_type() == ScalarType::Long && is_beside(**ids, images)),
                    "ids must be int64, on the device of the embeddings");
  const auto count = [](const OptionalTensor& ids) { return ids ? ids->numel() : -1; };
  const std::string why = mistake({images.size(0), images.size(1), captions.size(0), captions.size(1),
                                   num_pairs, count(image_ids), count(caption_ids)});
  STD_TORCH_CHECK(why.empty(), why);
}

inline void check_scale(const OptionalTensor& scale, const Tensor& like) {
  STD_TORCH_CHECK(!scale || (scale->numel() == 1 && is_beside(*scale, like)),
                  "scale_tensor must hold one number, on the device of the embeddings");
}

inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// Calls f(T{}) with the type of the embeddings.
template <typename F>
auto dispatch_embeddings(const Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default:
      STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                      "fused_vse_cuda takes float16, bfloat16 and float32 embeddings");
      return f(float{});
  }
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

}  // namespace fused_vse
