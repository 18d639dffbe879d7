// Host side of the Hopper statistics: checks, tensor maps, workspace, launches.
//
//   hopper_takes(Tensor images, Tensor captions) -> bool    whether the ops below take them; else they raise
//   hopper_hardest_negatives, hopper_negative_logsumexp, hopper_hinge_sum
//       the forward ops of fused_vse/ops.py for 16-bit embeddings as the copy engine needs them, without
//       ceilings and saved scores
//
// fused_vse/backends/cuda_statistics.py makes the ops without a prefix out of these.
#include <cuda_runtime.h>

#include <string>
#include <tuple>

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

// Calls f(Element{}) with the embeddings' type as the kernels know it.
template <typename F>
void with_element(const Tensor& x, const F& f) {
  x.scalar_type() == ScalarType::BFloat16 ? f(__nv_bfloat16{}) : f(__half{});
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  return unsigned((items + per_block - 1) / per_block);
}

// One call: the survey of its embeddings, then passes over pieces of S.
class Pass {
 public:
  explicit Pass(const Batch& batch)
      : batch_(checked(batch)),
        n(batch.images.size(0)),
        m(batch.captions->size(0)),
        d(batch.images.size(1)),
        anchors(batch.row_anchors + batch.column_anchors),
        launch_(batch.images) {
    if (batch.image_ids) {
      image_ids_ = with_room(*batch.image_ids, CLUSTER * TILE_ROWS);
      caption_ids_ = with_room(*batch.caption_ids, TILE_COLS);
    }
    bounds_ = zeros(sizeof(Bounds));
    with_element(batch.images, [&](auto zero) {
      using Element = decltype(zero);
      const auto rows = [](const Tensor& x) {
        return Rows<Element>{data<Element>(x), x.size(0), x.stride(0)};
      };
      // As many blocks as fit on the GPU, each with 8 rows at a time.
      const dim3 grid(std::min(blocks_for(std::max(n, m), ROW_THREADS / 32), unsigned(4 * multiprocessors())),
                      2);
      survey_kernel<<<grid, ROW_THREADS, 0, stream()>>>(rows(batch.images), rows(*batch.captions), d,
                                                        bounds());
      check_launch();
    });
  }

  template <typename Problem>
  void run(const Rectangle& rectangle, const Problem& problem) {
    const Batch& x = batch_;
    Walk walk{rectangle,       Raster::of(rectangle), int(x.row_anchors), int(x.column_anchors),
              int(x.pair_row), int(x.pair_column),    int(x.pair_count),  int(blocks_for(d, TILE_DEPTH))};
    Tensor ranges;
    if (image_ids_) {
      const int tiles = rectangle.row_tiles() + rectangle.column_tiles();
      ranges = bytes(tiles * sizeof(IdRange));
      walk.image_ids = data<int64_t>(image_ids_);
      walk.caption_ids = data<int64_t>(caption_ids_);
      walk.row_ranges = data<IdRange>(ranges);
      walk.column_ranges = walk.row_ranges + rectangle.row_tiles();
      id_ranges_kernel<<<tiles, 32, 0, stream()>>>(walk.image_ids, walk.caption_ids, rectangle,
                                                   data<IdRange>(ranges));
      check_launch();
    }
    with_element(batch_.images, [&](auto zero) {
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
      check_cuda(cudaLaunchKernelEx(&config, kernel, tensor_map(batch_.images, TILE_ROWS),
                                    tensor_map(*batch_.captions, SHARE_COLS), walk, problem));
    });
  }

  // For the statistics with partial results: run(piece, make(partials)), then merge(grid, arguments), for
  // every piece.
  template <typename MakeProblem, typename MergePiece>
  void run_in_pieces(const MakeProblem& make, const MergePiece& merge) {
    const int64_t columns = batch_.column_anchors;
    const auto pieces = in_pieces(piece_height(WORKSPACE_BYTES, partial_bytes_per_row(m, columns)));
    const PartialSizes sizes = partial_sizes(pieces, columns);
    const Tensor of_rows = bytes(sizes.rows), of_columns = bytes(sizes.columns);
    bool first = true;
    for (const Rectangle& piece : pieces) {
      const Partials partials{of_rows.data_ptr(), of_columns.data_ptr(), piece, batch_.row_anchors, columns};
      run(piece, make(partials));
      merge(dim3(blocks_for(std::max<int64_t>(columns, piece.rows()), ROW_THREADS), 2),
            Merge{bounds(), d, partials, first});
      check_launch();
      first = false;
    }
  }

  std::vector<Rectangle> in_pieces(int64_t height) const {
    return rectangles(n, m, batch_.row_anchors, batch_.column_anchors, height);
  }
  Tensor floats(int64_t count) const { return empty_on(batch_.images, {count}, ScalarType::Float); }
  Tensor doubles(int64_t count) const { return empty_on(batch_.images, {count}, ScalarType::Double); }
  Tensor integers(int64_t count) const { return empty_on(batch_.images, {count}, ScalarType::Long); }
  Tensor bytes(int64_t count) const { return empty_on(batch_.images, {count}, ScalarType::Byte); }
  Tensor zeros(int64_t count) const {
    const Tensor x = bytes(count);
    check_cuda(cudaMemsetAsync(x.data_ptr(), 0, count, stream()));
    return x;
  }
  Bounds* bounds() const { return data<Bounds>(bounds_); }
  cudaStream_t stream() const { return launch_.stream(); }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, launch_.device()); }

 private:
  static const Batch& checked(const Batch& batch) {
    check_batch(batch);
    const std::string why = obstacle(batch.images, *batch.captions);
    STD_TORCH_CHECK(why.empty(), "fused_vse's Hopper kernels do not take these embeddings: ", why);
    return batch;
  }
  // A copy that may be read up to `room` elements beyond its end: they belong to no score that counts.
  Tensor with_room(const Tensor& ids, int64_t room) const {
    const Tensor from = torch::stable::contiguous(ids), to = integers(ids.numel() + room);
    check_cuda(cudaMemcpyAsync(to.data_ptr(), from.data_ptr(), ids.numel() * sizeof(int64_t),
                               cudaMemcpyDeviceToDevice, stream()));
    return to;
  }

  const Batch& batch_;

 public:
  const int64_t n, m, d, anchors;

 private:
  const Launch launch_;
  OptionalTensor image_ids_, caption_ids_;
  Tensor bounds_;
};

void refuse(const OptionalTensor& ceiling, bool save_scores) {
  STD_TORCH_CHECK(
      !ceiling && !save_scores,
      "fused_vse's Hopper kernels have no ceiling and no save_scores; use the op without a prefix");
}

bool hopper_takes(const Tensor& images, const Tensor& captions) { return obstacle(images, captions).empty(); }

std::tuple<Tensor, Tensor> hardest_negatives(const Batch& batch, OptionalTensor ceiling) {
  refuse(ceiling, false);
  Pass pass(batch);
  const Tensor best = pass.zeros(pass.anchors * sizeof(unsigned long long));
  const HardestProblem problem{data<unsigned long long>(best), batch.row_anchors};
  for (const Rectangle& piece : pass.in_pieces(pass.n)) pass.run(piece, problem);
  const Tensor score = pass.floats(pass.anchors), index = pass.integers(pass.anchors);
  if (pass.anchors > 0)
    hardest_finish_kernel<<<blocks_for(pass.anchors, ROW_THREADS), ROW_THREADS, 0, pass.stream()>>>(
        problem.best, pass.bounds(), pass.d, pass.anchors, data<float>(score), data<int64_t>(index));
  check_launch();
  return {score, index};
}

std::tuple<Tensor, Tensor, Tensor> negative_logsumexp(const Batch& batch, OptionalTensor ceiling,
                                                      double scale, OptionalTensor scale_tensor,
                                                      bool save_scores) {
  refuse(ceiling, save_scores);
  Pass pass(batch);
  OptionalTensor exact_scale;
  if (scale_tensor) {
    check_floats("scale_tensor", *scale_tensor, batch.images, 1);
    exact_scale = torch::stable::to(*scale_tensor, ScalarType::Double);
  }
  const Tensor exponent = pass.bytes(sizeof(Exponent));
  const Tensor reference = pass.floats(pass.anchors), log_sum = pass.doubles(pass.anchors);
  pass.run_in_pieces(
      [&](const Partials& partials) {
        return LogsumexpProblem{partials,
                                pass.bounds(),
                                scale,
                                data<double>(exact_scale),
                                float(std::max(pass.n, pass.m)),
                                data<Exponent>(exponent)};
      },
      [&](dim3 grid, const Merge& merge) {
        logsumexp_merge_kernel<<<grid, ROW_THREADS, 0, pass.stream()>>>(
            merge, data<Exponent>(exponent), data<float>(reference), data<double>(log_sum));
      });
  return {reference, log_sum, pass.floats(0)};
}

std::tuple<Tensor, Tensor, Tensor> hinge_sum(const Batch& batch, OptionalTensor ceiling, Tensor threshold,
                                             bool save_scores) {
  refuse(ceiling, save_scores);
  Pass pass(batch);
  check_floats("threshold", threshold, batch.images, pass.anchors);
  const Tensor thresholds = torch::stable::contiguous(threshold);
  const Hinge hinge{data<float>(thresholds), int(pass.anchors) - 1};
  const Tensor total = pass.floats(pass.anchors), active = pass.integers(pass.anchors);
  pass.run_in_pieces([&](const Partials& partials) { return HingeProblem{partials, hinge}; },
                     [&](dim3 grid, const Merge& merge) {
                       hinge_merge_kernel<<<grid, ROW_THREADS, 0, pass.stream()>>>(merge, data<float>(total),
                                                                                   data<int64_t>(active));
                     });
  return {total, active, pass.floats(0)};
}

}  // namespace
}  // namespace hopper

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cuda, CUDA, m) {
  m.impl("hopper_takes", TORCH_BOX(&hopper::hopper_takes));
  m.impl("hopper_hardest_negatives", TORCH_BOX(&WithBatch<&hopper::hardest_negatives>::run));
  m.impl("hopper_negative_logsumexp", TORCH_BOX(&WithBatch<&hopper::negative_logsumexp>::run));
  m.impl("hopper_hinge_sum", TORCH_BOX(&WithBatch<&hopper::hinge_sum>::run));
}

}  // namespace fused_vse
