// Host side of the Hopper statistics: checks, tensor maps, workspace, launches.
//
//   hopper_takes(Tensor images, Tensor captions) -> bool    whether the ops below take them; else they raise
//   hopper_hardest_negatives, hopper_negative_logsumexp, hopper_hinge_sum
//       the forward ops of ops.h for 16-bit embeddings as the copy engine needs them, without saved scores
//
// fused_vse/backends/cuda_statistics.py makes the ops of ops.h out of these.
#include <cuda_runtime.h>

#include <string>
#include <tuple>

#include "../ops.h"
#include "hopper_kernel.cuh"
#include "hopper_plan.h"
#include "hopper_problems.cuh"
#include "hopper_rows.cuh"
#include "launch.h"

namespace fused_vse {
namespace hopper {
namespace {

// As in the Triton backend: partial results of one piece of S.
constexpr int64_t WORKSPACE_BYTES = int64_t{256} << 20;

Layout layout(const Tensor& x) {
  const bool is_16_bit = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  return {x.size(0), x.size(1), x.stride(0), x.stride(1), reinterpret_cast<uint64_t>(x.data_ptr()),
          is_16_bit};
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

std::string obstacle(const Tensor& images, const Tensor& captions) {
  const int device = images.get_device_index();
  return obstacle(attribute(cudaDevAttrComputeCapabilityMajor, device),
                  attribute(cudaDevAttrComputeCapabilityMinor, device), layout(images), layout(captions));
}

// The driver's function without linking to the driver.
auto encoder() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                                &result));
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
    STD_TORCH_CHECK(found && result == cudaDriverEntryPointSuccess,
                    "the driver has no cuTensorMapEncodeTiled; it needs to be of CUDA 12.0 or newer");
    return reinterpret_cast<Encode>(found);
  }();
  return encode;
}

// Boxes of `box_rows` rows and TILE_DEPTH elements of x [rows, D], swizzled as wgmma reads them; zeros
// outside.
CUtensorMap tensor_map(const Tensor& x, int box_rows) {
  const Layout rows = layout(x);
  const auto type = x.scalar_type() == ScalarType::BFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t sizes[] = {cuuint64_t(rows.dimensions), cuuint64_t(rows.rows)};
  // One row's stride may be anything.
  const cuuint64_t pitch[] = {cuuint64_t(rows.rows > 1 ? rows.row_stride : rows.dimensions) * 2};
  const cuuint32_t box[] = {TILE_DEPTH, cuuint32_t(box_rows)}, steps[] = {1, 1};
  CUtensorMap map{};
  const CUresult result = encoder()(&map, type, 2, x.data_ptr(), sizes, pitch, box, steps,
                                    CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", int(result));
  return map;
}

template <typename T>
T* data_or_null(const OptionalTensor& x) {
  return x ? data<T>(*x) : nullptr;
}

// Calls f(Element{}) with the embeddings' type as the kernels know it.
template <typename F>
void with_element(const Tensor& x, const F& f) {
  x.scalar_type() == ScalarType::BFloat16 ? f(__nv_bfloat16{}) : f(__half{});
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

// One call: the survey of its embeddings, then passes over pieces of S.
class Pass {
 public:
  Pass(const Tensor& images, const Tensor& captions, const OptionalTensor& image_ids,
       const OptionalTensor& caption_ids, int64_t num_pairs)
      : n(images.size(0)),
        m(captions.size(0)),
        d(images.size(1)),
        k(num_pairs),
        images_(images),
        captions_(captions),
        launch_(images) {
    check_batch(images, captions, image_ids, caption_ids, num_pairs);
    const std::string why = obstacle(images, captions);
    STD_TORCH_CHECK(why.empty(), "fused_vse's Hopper kernels do not take these embeddings: ", why);
    if (image_ids) {
      image_ids_ = with_room(*image_ids, CLUSTER * TILE_ROWS);
      caption_ids_ = with_room(*caption_ids, TILE_COLS);
    }
    positive = floats({k});
    bounds_ = bytes(sizeof(Bounds));
    check_cuda(cudaMemsetAsync(bounds_.data_ptr(), 0, sizeof(Bounds), stream()));
    with_element(images, [&](auto zero) {
      using Element = decltype(zero);
      // As many blocks as fit on the GPU, each with 8 rows at a time.
      const unsigned blocks =
          std::min(blocks_for(std::max(n, m), ROW_THREADS / 32), unsigned(8 * multiprocessors()));
      survey_kernel<<<blocks, ROW_THREADS, 0, stream()>>>(data<Element>(images_), images_.stride(0), n,
                                                          data<Element>(captions_), captions_.stride(0), m, d,
                                                          k, data<float>(positive), bounds());
      check_launch();
    });
  }

  template <typename Problem>
  void run(const Rectangle& rectangle, const Problem& problem) {
    Walk walk{};
    walk.rectangle = rectangle;
    walk.raster = Raster::of(rectangle);
    walk.num_pairs = static_cast<int>(k);
    walk.depth_steps = static_cast<int>((d + TILE_DEPTH - 1) / TILE_DEPTH);
    Tensor ranges;
    if (image_ids_) {
      const int tiles = rectangle.row_tiles() + rectangle.column_tiles();
      ranges = bytes(tiles * sizeof(IdRange));
      walk.image_ids = data<int64_t>(*image_ids_);
      walk.caption_ids = data<int64_t>(*caption_ids_);
      walk.row_ranges = data<IdRange>(ranges);
      walk.column_ranges = walk.row_ranges + rectangle.row_tiles();
      id_ranges_kernel<<<tiles, 32, 0, stream()>>>(walk.image_ids, walk.caption_ids, rectangle,
                                                   data<IdRange>(ranges));
      check_launch();
    }
    with_element(images_, [&](auto zero) {
      const auto kernel = statistics_kernel<decltype(zero), Problem>;
      check_cuda(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES<Problem>));
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {CLUSTER, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = CLUSTER * std::min(walk.raster.cluster_tiles, multiprocessors() / CLUSTER);
      config.blockDim = THREADS;
      config.dynamicSmemBytes = SHARED_BYTES<Problem>;
      config.stream = stream();
      config.attrs = &cluster;
      config.numAttrs = 1;
      check_cuda(cudaLaunchKernelEx(&config, kernel, tensor_map(images_, TILE_ROWS),
                                    tensor_map(captions_, SHARE_COLS), walk, problem));
    });
  }

  // For the statistics with partial results: run(piece, make(partials)), then merge(grid, arguments), for
  // every piece.
  template <typename MakeProblem, typename MergePiece>
  void run_in_pieces(const MakeProblem& make, const MergePiece& merge) {
    const auto pieces = rectangles(n, m, k, piece_height(WORKSPACE_BYTES, partial_bytes_per_row(m, k)));
    const PartialSizes sizes = partial_sizes(pieces, k);
    const Tensor rows = floats({sizes.rows}), columns = floats({sizes.columns});
    bool first = true;
    for (const Rectangle& piece : pieces) {
      run(piece, make(Partials{data<float>(rows), data<float>(columns), piece, k}));
      const dim3 grid(blocks_for(std::max<int64_t>(k, piece.rows()), ROW_THREADS), 2);
      merge(grid, Merge{bounds(), d, k, piece, first, data<float>(rows), data<float>(columns),
                        data<float>(positive)});
      check_launch();
      first = false;
    }
  }

  Tensor floats(std::initializer_list<int64_t> shape) const {
    return empty_on(images_, shape, ScalarType::Float);
  }
  Tensor bytes(int64_t count) const { return empty_on(images_, {count}, ScalarType::Byte); }
  Bounds* bounds() const { return data<Bounds>(bounds_); }
  cudaStream_t stream() const { return launch_.stream(); }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, launch_.device()); }

  const int64_t n, m, d, k;
  Tensor positive;  // [K]

 private:
  // A copy that may be read up to `room` elements beyond its end: they belong to no score that counts.
  Tensor with_room(const Tensor& ids, int64_t room) const {
    const Tensor from = torch::stable::contiguous(ids);
    const Tensor to = empty_on(ids, {ids.numel() + room}, ScalarType::Long);
    check_cuda(cudaMemcpyAsync(to.data_ptr(), from.data_ptr(), ids.numel() * sizeof(int64_t),
                               cudaMemcpyDeviceToDevice, stream()));
    return to;
  }

  const Tensor images_, captions_;
  OptionalTensor image_ids_, caption_ids_;
  Tensor bounds_;
  const Launch launch_;
};

bool hopper_takes(const Tensor& images, const Tensor& captions) { return obstacle(images, captions).empty(); }

std::tuple<Tensor, Tensor, Tensor> hopper_hardest_negatives(const Tensor& images, const Tensor& captions,
                                                            const OptionalTensor& image_ids,
                                                            const OptionalTensor& caption_ids,
                                                            int64_t num_pairs) {
  Pass pass(images, captions, image_ids, caption_ids, num_pairs);
  const int64_t k = num_pairs;
  const Tensor best = pass.bytes(2 * k * sizeof(unsigned long long));
  check_cuda(cudaMemsetAsync(best.data_ptr(), 0, best.numel(), pass.stream()));
  const HardestProblem problem{data<unsigned long long>(best), k};
  for (const Rectangle& piece : rectangles(pass.n, pass.m, k, pass.n)) pass.run(piece, problem);
  const Tensor score = pass.floats({2, k}), index = empty_on(images, {2, k}, ScalarType::Long);
  hardest_finish_kernel<<<blocks_for(2 * k, ROW_THREADS), ROW_THREADS, 0, pass.stream()>>>(
      problem.best, pass.bounds(), pass.d, k, data<float>(pass.positive), data<float>(score),
      data<int64_t>(index));
  check_launch();
  return std::make_tuple(pass.positive, score, index);
}

std::tuple<Tensor, Tensor> hopper_negative_logsumexp(const Tensor& images, const Tensor& captions,
                                                     const OptionalTensor& image_ids,
                                                     const OptionalTensor& caption_ids, int64_t num_pairs,
                                                     double scale, const OptionalTensor& scale_tensor) {
  Pass pass(images, captions, image_ids, caption_ids, num_pairs);
  check_scale(scale_tensor, images);
  OptionalTensor exact_scale;
  if (scale_tensor) exact_scale = torch::stable::to(*scale_tensor, ScalarType::Double);
  const double* scale_pointer = data_or_null<double>(exact_scale);
  const float anchors = static_cast<float>(std::max(pass.n, pass.m));
  const Tensor exponent = pass.bytes(sizeof(Exponent));
  const Tensor logsumexp = empty_on(images, {2, num_pairs}, ScalarType::Double);
  pass.run_in_pieces(
      [&](const Partials& partials) {
        return LogsumexpProblem{partials,      pass.bounds(), scale,
                                scale_pointer, anchors,       data<Exponent>(exponent)};
      },
      [&](dim3 grid, const Merge& merge) {
        logsumexp_merge_kernel<<<grid, ROW_THREADS, 0, pass.stream()>>>(merge, data<Exponent>(exponent),
                                                                        data<double>(logsumexp));
      });
  return std::make_tuple(pass.positive, logsumexp);
}

std::tuple<Tensor, Tensor, Tensor> hopper_hinge_sum(const Tensor& images, const Tensor& captions,
                                                    const OptionalTensor& image_ids,
                                                    const OptionalTensor& caption_ids, int64_t num_pairs,
                                                    double margin) {
  Pass pass(images, captions, image_ids, caption_ids, num_pairs);
  const Tensor total = pass.floats({2, num_pairs});
  const Tensor active = empty_on(images, {2, num_pairs}, ScalarType::Long);
  pass.run_in_pieces(
      [&](const Partials& partials) {
        return HingeProblem{partials, data<float>(pass.positive), static_cast<float>(margin)};
      },
      [&](dim3 grid, const Merge& merge) {
        hinge_merge_kernel<<<grid, ROW_THREADS, 0, pass.stream()>>>(merge, data<float>(total),
                                                                    data<int64_t>(active));
      });
  return std::make_tuple(pass.positive, total, active);
}

}  // namespace
}  // namespace hopper

STABLE_TORCH_LIBRARY_FRAGMENT(fused_vse_cuda, m) {
  m.def("hopper_takes(Tensor images, Tensor captions) -> bool");
  m.def("hopper_" HARDEST_NEGATIVES_SCHEMA);
  m.def(
      "hopper_negative_logsumexp(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, "
      "SymInt num_pairs, float scale, Tensor? scale_tensor) -> (Tensor positive, Tensor logsumexp)");
  m.def(
      "hopper_hinge_sum(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, "
      "SymInt num_pairs, float margin) -> (Tensor positive, Tensor hinge_sum, Tensor active)");
}

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cuda, CUDA, m) {
  m.impl("hopper_takes", TORCH_BOX(&hopper::hopper_takes));
  m.impl("hopper_hardest_negatives", TORCH_BOX(&hopper::hopper_hardest_negatives));
  m.impl("hopper_negative_logsumexp", TORCH_BOX(&hopper::hopper_negative_logsumexp));
  m.impl("hopper_hinge_sum", TORCH_BOX(&hopper::hopper_hinge_sum));
}

}  // namespace fused_vse
