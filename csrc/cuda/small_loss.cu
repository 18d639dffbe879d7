// small_loss (fused_vse/ops.py): a whole loss of at most 512 images and captions, and its gradients, in one
// launch.
//
//   S = I T^t; per anchor its negatives' statistics, loss and weights (small_statistics.cuh);
//   d_images = factor (G T - pull T_k), d_captions = factor (G^t I - pull I_k), G_ij from S_ij and the
//   weights of anchors i and j.
//
//   for each 64 x 64 tile of S, a cluster each:                       (cluster = 1 before sm_90)
//     each block multiplies its slice of D                            4 stages of cp.async, mma.sync
//     -- cluster barrier --
//     each block sums its strip of 64 / cluster rows                  distributed shared memory
//     writes the strip to global memory                               and whether all of it is finite
//     writes (max, argmax, sum, moment) of the strip's rows and columns
//   -- grid barrier --
//   HINGE_SUM only, whose thresholds are the diagonal of S: the statistics here, then -- grid barrier --
//   each block merges the statistics of all anchors; the last one writes the loss
//   for each 64 x 64 tile of d_images and d_captions, a block each:
//     float16 only: the largest entry of each of the tile's rows of G, for a gain that keeps it from
//     underflow for each chunk of 64 (float32: 32) rows of the other side:
//       G from S into shared memory, rounded to the embeddings' type; multiply by the rows
//     subtract the positives' part in float32, write float32
//
// small_loss_backward: each thread multiplies one entry of d_images, then of d_captions, by the upstream
// gradient, rounds it to the embeddings' type, and moves on by the grid.
//
// Everything is summed in an order that the shapes alone decide: the result has the same bits every time.
//
// Resources: 256 threads; 88 KiB of shared memory, 64 KiB of it stages; at most 128 registers, so that two
// blocks fit a multiprocessor of Hopper, one of Ampere; no stack. The launch is cooperative: all of its
// blocks run at the same time.
#include <array>
#include <map>
#include <mutex>
#include <tuple>

#include "launch.h"
#include "small_loss.cuh"

namespace fused_vse {
namespace {

namespace cg = cooperative_groups;
using namespace small;

static_assert(sizeof(Shared) <= 99 << 10, "more shared memory than a block may have on sm_86 and sm_89");
static_assert(2 * (sizeof(Shared) + 1024) <= 227 << 10, "two blocks must fit a multiprocessor of Hopper");

template <typename T>
__global__ void __launch_bounds__(THREADS, 2) small_loss_kernel(const __grid_constant__ Problem<T> x) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int cluster = x.plan.cluster;
  const Block<Shared> block{reinterpret_cast<Shared*>(memory), int(blockIdx.x), int(gridDim.x),
                            int(blockIdx.x) % cluster, cluster};
  const auto cluster_sync = [&] {
#if __CUDA_ARCH__ >= 900
    if (cluster > 1) return cg::this_cluster().sync();
#endif
    __syncthreads();
  };
  const int first = block.rank / cluster, clusters = block.grid / cluster;
  for (int tile = first; tile < x.plan.tiles(); tile += clusters) {
    if (tile != first) cluster_sync();  // the peers have read `partial`
    multiply_slice(block, x, tile);
    cluster_sync();
    sum_strip(block, x, tile);
    if (x.kind != HINGE_SUM) strip_statistics(block, x, tile);
  }
  cg::this_grid().sync();
  if (x.kind == HINGE_SUM) {
    for (int tile = first; tile < x.plan.tiles(); tile += clusters) {
      recall_strip(block, x, tile);
      strip_statistics(block, x, tile);
    }
    cg::this_grid().sync();
  }
  const bool poisoned = merge_statistics(block, x, block.rank == block.grid - 1);
  for (int job = block.rank; job < x.plan.jobs(); job += block.grid)
    multiply_gradient(block, x, job, poisoned);
}

template <typename T>
struct Scaled {
  const float* from;
  T* to;
  int64_t size;
};

template <typename T>
__global__ void __launch_bounds__(THREADS)
    small_loss_backward_kernel(const float* upstream, Scaled<T> images, Scaled<T> captions,
                               Scaled<float> scale) {
  const float factor = *upstream;
  const int64_t start = int64_t(blockIdx.x) * THREADS + threadIdx.x, step = int64_t(gridDim.x) * THREADS;
  const auto multiply = [&](const auto& x) {
    for (int64_t i = start; i < x.size; i += step) x.to[i] = x.from[i] * factor;
  };
  multiply(images);
  multiply(captions);
  multiply(scale);
}

cudaLaunchConfig_t launch_config(const Launch& launch, int grid, int cluster,
                                 cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = launch.stream();
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return config;
}

// How many blocks the device runs at the same time, by the cluster's size; 0 where it has no such clusters.
using Resident = std::array<int, MAX_CLUSTER + 1>;

template <typename T>
const Resident& resident_blocks(const Launch& launch) {
  static std::mutex mutex;
  static std::map<int, Resident> devices;
  const std::lock_guard lock(mutex);
  if (const auto found = devices.find(launch.device()); found != devices.end()) return found->second;
  Resident resident{};
  const auto kernel = small_loss_kernel<T>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared))));
  int major = 0, multiprocessors = 0, blocks = 0;
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, launch.device()));
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, launch.device()));
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, THREADS, sizeof(Shared)));
  resident[1] = blocks * multiprocessors;
  // Newer GPUs run the code for sm_80, which knows no clusters.
  for (int cluster = 2; major == 9 && cluster <= MAX_CLUSTER; cluster *= 2) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launch_config(launch, cluster, cluster, attributes);
    config.attrs = attributes + 1;  // the query is about clusters, whatever the launch
    config.numAttrs = 1;
    int clusters = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    resident[cluster] = clusters * cluster;
  }
  return devices[launch.device()] = resident;  // only now: nothing of a call that failed stays
}

bool is_aligned(const Tensor& x, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.size(1) * element_size % 16 == 0;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> small_loss(
    const Tensor& images, const Tensor& captions, const OptionalTensor& image_ids,
    const OptionalTensor& caption_ids, int64_t num_pairs, int64_t kind, double scale,
    const OptionalTensor& scale_tensor, double margin, double image_weight, double caption_weight, bool mean,
    bool need_images, bool need_captions) {
  check_batch({images, captions, image_ids, caption_ids, num_pairs, num_pairs, 0, 0, num_pairs, 0});
  if (scale_tensor) check_floats("scale_tensor", *scale_tensor, images, 1);
  const int64_t n = images.size(0), m = captions.size(0), d = images.size(1);
  const std::string why = obstacle(n, m, d, num_pairs, kind);
  STD_TORCH_CHECK(why.empty(), why);
  return dispatch_embeddings(images, [&](auto zero) {
    using T = decltype(zero);
    const Launch launch(images);
    const Tensor rows = torch::stable::contiguous(images), cols = torch::stable::contiguous(captions);
    const OptionalTensor row_ids = contiguous(image_ids), col_ids = contiguous(caption_ids);
    const Resident& resident = resident_blocks<T>(launch);
    int cluster = preferred_cluster(int(std::max(n, m)), int(d), int(sizeof(T)));
    while (cluster > 1 && resident[cluster] < cluster) cluster /= 2;
    const Plan plan =
        make_plan(int(n), int(m), int(d), need_images, need_captions, cluster, resident[cluster]);
    const Workspace at = workspace_of(plan, int(n), int(m));

    const auto floats = [&](std::initializer_list<int64_t> shape) {
      return empty_on(images, shape, ScalarType::Float);
    };
    const Tensor d_images = need_images ? floats({n, d}) : floats({0});
    const Tensor d_captions = need_captions ? floats({m, d}) : floats({0});
    const Tensor loss = floats({}), d_scale = floats({}), positive = floats({num_pairs});
    const Tensor score = floats({2 * num_pairs}), index = empty_on(images, {2 * num_pairs}, ScalarType::Long);
    const Tensor memory = empty_on(images, {at.bytes}, ScalarType::Byte);
    char* workspace = data<char>(memory);

    const double largest = std::max(image_weight, caption_weight), unit = largest > 0 ? largest : 1;
    const Problem<T> problem{
        {data<T>(rows), int(n), int(d), is_aligned(rows, sizeof(T))},
        {data<T>(cols), int(m), int(d), is_aligned(cols, sizeof(T))},
        data<int64_t>(row_ids),
        data<int64_t>(col_ids),
        int(num_pairs),
        Loss(kind),
        float(scale),
        float(margin),
        data<float>(scale_tensor),
        {float(image_weight / unit), float(caption_weight / unit)},
        float(mean ? unit / double(num_pairs) : unit),
        plan,
        reinterpret_cast<float*>(workspace + at.scores),
        reinterpret_cast<Statistic*>(workspace + at.of_rows),
        reinterpret_cast<Statistic*>(workspace + at.of_columns),
        reinterpret_cast<int*>(workspace + at.not_finite),
        data<float>(d_images),
        data<float>(d_captions),
        data<float>(loss),
        data<float>(d_scale),
        data<float>(positive),
        data<float>(score),
        data<int64_t>(index),
    };
    cudaLaunchAttribute attributes[2];
    const cudaLaunchConfig_t config = launch_config(launch, plan.grid, cluster, attributes);
    check_cuda(cudaLaunchKernelEx(&config, small_loss_kernel<T>, problem));
    return std::make_tuple(loss, positive, score, index, d_scale, d_images, d_captions);
  });
}

// Of what small_loss left, the kernel takes the unit gradients alone: saved_one and saved_two.
std::tuple<Tensor, Tensor, Tensor> small_loss_backward(const Tensor& images, const Tensor& captions,
                                                       const Tensor&, const Tensor& d_scale,
                                                       const Tensor& saved_one, const Tensor& saved_two,
                                                       const Tensor& upstream, bool need_images,
                                                       bool need_captions) {
  check_embeddings(images, captions);
  check_floats("upstream", upstream, images, 1);
  check_floats("d_scale", d_scale, images, 1);
  if (need_images) check_floats("saved_one", saved_one, images, images.numel());
  if (need_captions) check_floats("saved_two", saved_two, images, captions.numel());
  return dispatch_embeddings(images, [&](auto zero) {
    using T = decltype(zero);
    const Launch launch(images);
    // small_loss made them contiguous, but a compiler may have come between.
    const Tensor d_images = torch::stable::contiguous(saved_one);
    const Tensor d_captions = torch::stable::contiguous(saved_two);
    const auto result = [](const Tensor& x, bool needed) {
      return needed ? empty_on(x, {x.size(0), x.size(1)}, x.scalar_type())
                    : empty_on(x, {0}, x.scalar_type());
    };
    const Tensor to_images = result(images, need_images), to_captions = result(captions, need_captions);
    const Tensor to_scale = torch::stable::empty_like(d_scale);
    const int64_t most = std::max({to_images.numel(), to_captions.numel(), int64_t{1}});
    constexpr int64_t MAX_BLOCKS = 1024;
    const int64_t blocks = std::min((most + THREADS - 1) / THREADS, MAX_BLOCKS);
    small_loss_backward_kernel<T><<<unsigned(blocks), THREADS, 0, launch.stream()>>>(
        data<float>(upstream), Scaled<T>{data<float>(d_images), data<T>(to_images), to_images.numel()},
        Scaled<T>{data<float>(d_captions), data<T>(to_captions), to_captions.numel()},
        Scaled<float>{data<float>(d_scale), data<float>(to_scale), 1});
    check_launch();
    return std::make_tuple(to_images, to_captions, to_scale);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cuda, CUDA, m) {
  m.impl("small_loss", TORCH_BOX(&small_loss));
  m.impl("small_loss_backward", TORCH_BOX(&small_loss_backward));
}

}  // namespace fused_vse
