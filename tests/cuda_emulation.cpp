// Runs the small-batch loss of csrc/cuda on the CPU, block by block, with the machine that simt.h plays;
// tests/test_cuda_small.py calls this through ctypes. Memory that nobody wrote reads as NaN.
#include <cstdio>
#include <memory>
#include <vector>

#include "cuda/small_loss.h"

namespace {

using namespace fused_vse;
using namespace fused_vse::small;

struct Arguments {
  const void *images, *captions;
  const int64_t *image_ids, *caption_ids;
  int n, m, d, k, kind;
  float scale, margin;
  const float* scale_tensor;
  float image_weight, caption_weight, reduction;
  int need_images, need_captions, cluster, resident, aligned, backwards;
  void *d_images, *d_captions;
  float *loss, *d_scale, *positive, *hardest;
  int64_t* index;
};

// A grid's blocks with their shared memory, and the loops that a kernel's launch stands for.
class Grid {
 public:
  explicit Grid(const Plan& plan) : plan_(plan) {
    for (int rank = 0; rank < plan.grid; ++rank) {
      memory_.push_back(std::make_unique<Shared>());
      std::memset(static_cast<void*>(memory_.back().get()), 0xff, sizeof(Shared));
      pointers_.push_back(memory_.back().get());
    }
  }
  template <typename F>
  void each_block(const F& f) {
    for (int i = 0; i < plan_.grid; ++i) f(block(backwards ? plan_.grid - 1 - i : i));
  }
  // Calls f(block, tile) for every tile of S and every block of its cluster; phases are separated by barriers
  // of the cluster.
  template <typename... Phases>
  void each_tile(const Phases&... phases) {
    const int clusters = plan_.grid / plan_.cluster;
    for (int tile = 0; tile < plan_.tiles(); ++tile)
      (
          [&] {
            for (int i = 0; i < plan_.cluster; ++i) {
              const int rank = backwards ? plan_.cluster - 1 - i : i;
              phases(block(tile % clusters * plan_.cluster + rank), tile);
            }
          }(),
          ...);
  }

 private:
  Block<Shared> block(int rank) {
    const int first = rank / plan_.cluster * plan_.cluster;
    return {pointers_[rank], rank, plan_.grid, rank - first, plan_.cluster, &pointers_[first]};
  }
  Plan plan_;
  std::vector<std::unique_ptr<Shared>> memory_;
  std::vector<Shared*> pointers_;
};

template <typename T>
void run(const Arguments& a) {
  const Plan plan = make_plan(a.n, a.m, a.d, a.need_images, a.need_captions, a.cluster, a.resident);
  const Workspace at = workspace_of(plan, a.n, a.m);
  std::vector<unsigned char> workspace(at.bytes, 0xff);
  const bool aligned = a.aligned && a.d * sizeof(T) % 16 == 0;
  const Problem<T> problem{
      {static_cast<const T*>(a.images), a.n, a.d, aligned},
      {static_cast<const T*>(a.captions), a.m, a.d, aligned},
      a.image_ids,
      a.caption_ids,
      a.k,
      Loss(a.kind),
      a.scale,
      a.margin,
      a.scale_tensor,
      {a.image_weight, a.caption_weight},
      a.reduction,
      plan,
      reinterpret_cast<float*>(&workspace[at.scores]),
      reinterpret_cast<Statistic*>(&workspace[at.of_rows]),
      reinterpret_cast<Statistic*>(&workspace[at.of_columns]),
      reinterpret_cast<int*>(&workspace[at.not_finite]),
      static_cast<T*>(a.d_images),
      static_cast<T*>(a.d_captions),
      a.loss,
      a.d_scale,
      a.positive,
      a.hardest,
      a.index,
  };
  Grid grid(plan);
  grid.each_tile([&](const auto& block, int tile) { multiply_slice(block, problem, tile); },
                 [&](const auto& block, int tile) { sum_strip(block, problem, tile); },
                 [&](const auto& block, int tile) {
                   if (problem.kind != HINGE_SUM) strip_statistics(block, problem, tile);
                 });
  if (problem.kind == HINGE_SUM)
    grid.each_tile([&](const auto& block, int tile) {
      recall_strip(block, problem, tile);
      strip_statistics(block, problem, tile);
    });
  grid.each_block([&](const auto& block) {
    const bool poisoned = is_poisoned(problem);
    merge_statistics(block, problem, poisoned, block.rank == block.grid - 1);
    for (int job = block.rank; job < plan.jobs(); job += block.grid)
      multiply_gradient(block, problem, job, poisoned);
  });
}

}  // namespace

extern "C" void small_loss(const Arguments* a, int bits) {
  backwards = a->backwards;
  if (bits == 32)
    run<float>(*a);
  else if (bits == 16)
    run<Half>(*a);
  else
    run<BFloat16>(*a);
}

extern "C" int preferred_cluster_of(int n, int d, int element_size) {
  return preferred_cluster(n, d, element_size);
}
