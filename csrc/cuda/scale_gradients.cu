// scale_gradients (ops.h): y = upstream x for the gradients of a whole loss, in one launch; float32 in, the
// embeddings' type out.
//
//   each thread scales one entry of d_images, then of d_captions, then of d_scale, and moves on by the grid
//
// Resources: no shared memory; bound by the memory's bandwidth, at N = 128 by the launch.
#include <algorithm>
#include <tuple>

#include "../ops.h"
#include "launch.h"

namespace fused_vse {
namespace {

constexpr int THREADS = 256;
constexpr int64_t MAX_BLOCKS = 1024;

template <typename T>
struct Scaled {
  const float* from;
  T* to;
  int64_t size;
};

template <typename T>
__global__ void __launch_bounds__(THREADS)
    scale_gradients_kernel(const float* upstream, Scaled<T> images, Scaled<T> captions, Scaled<float> scale) {
  const float factor = *upstream;
  const int64_t start = int64_t(blockIdx.x) * THREADS + threadIdx.x, step = int64_t(gridDim.x) * THREADS;
  for (int64_t i = start; i < images.size; i += step) images.to[i] = T(images.from[i] * factor);
  for (int64_t i = start; i < captions.size; i += step) captions.to[i] = T(captions.from[i] * factor);
  for (int64_t i = start; i < scale.size; i += step) scale.to[i] = scale.from[i] * factor;
}

std::tuple<Tensor, Tensor, Tensor> scale_gradients(const Tensor& upstream, const Tensor& d_images,
                                                   const Tensor& d_captions, const Tensor& d_scale,
                                                   const Tensor& like) {
  for (const Tensor* x : {&upstream, &d_images, &d_captions, &d_scale})
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && is_beside(*x, like),
                    "scale_gradients takes float32 gradients, on one device");
  STD_TORCH_CHECK(upstream.numel() == 1 && d_scale.numel() == 1, "upstream and d_scale are one number each");
  return dispatch_embeddings(like, [&](auto zero) {
    using T = decltype(zero);
    const Launch launch(d_images);
    // small_loss made them contiguous, but a compiler may have come between.
    const auto contiguous = [](const Tensor& x) {
      return x.is_contiguous() ? x : torch::stable::contiguous(x);
    };
    const Tensor unit_images = contiguous(d_images), unit_captions = contiguous(d_captions);
    const auto result = [&](const Tensor& x) {
      return torch::stable::new_empty(x, x.sizes(), like.scalar_type());
    };
    Tensor images = result(d_images), captions = result(d_captions);
    Tensor scale = torch::stable::empty_like(d_scale);
    const int64_t most = std::max({d_images.numel(), d_captions.numel(), int64_t{1}});
    const int64_t blocks = std::min((most + THREADS - 1) / THREADS, MAX_BLOCKS);
    scale_gradients_kernel<T><<<unsigned(blocks), THREADS, 0, launch.stream()>>>(
        data<float>(upstream), {data<float>(unit_images), data<T>(images), images.numel()},
        {data<float>(unit_captions), data<T>(captions), captions.numel()},
        {data<float>(d_scale), data<float>(scale), 1});
    check_launch();
    return std::make_tuple(images, captions, scale);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fused_vse_cuda, m) { m.def(SCALE_GRADIENTS_SCHEMA); }

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cuda, CUDA, m) { m.impl("scale_gradients", TORCH_BOX(&scale_gradients)); }

}  // namespace fused_vse
