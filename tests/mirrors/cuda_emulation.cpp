// Runs the small-batch loss of csrc/cuda on the CPU, block by block, with the machine of simt_on_cpu.h;
// tests/test_cuda_small.py calls this through ctypes. Memory that nobody wrote reads as NaN.
#include <algorithm>
#include <memory>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/batch.h"
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
  float *d_images, *d_captions, *loss, *d_scale, *positive, *hardest;
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
      a.d_images,
      a.d_captions,
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
    const bool poisoned = merge_statistics(block, problem, block.rank == block.grid - 1);
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

// `numbers`: the fields of BatchShape.
extern "C" void batch_mistake(const int64_t* numbers, char* text, int room) {
  BatchShape shape;
  static_assert(sizeof shape == 11 * sizeof *numbers);
  std::memcpy(&shape, numbers, sizeof shape);
  std::strncpy(text, mistake(shape).c_str(), room - 1);
}

extern "C" void small_obstacle(const int64_t* x, char* text, int room) {
  std::strncpy(text, obstacle(x[0], x[1], x[2], x[3], x[4]).c_str(), room - 1);
}

extern "C" int preferred_cluster_of(int n, int d, int element_size) {
  return preferred_cluster(n, d, element_size);
}

namespace {

template <typename T>
bool is_each_element_accumulated_once() {
  std::set<std::pair<int, int>> seen;
  for (int thread = 0; thread < THREADS; ++thread)
    for (int r = 0; r < PER_THREAD; ++r) {
      const Coordinate at = coordinate<T>(thread, r);
      if (at.row < 0 || at.row >= TILE || at.col < 0 || at.col >= TILE) return false;
      seen.insert({at.row, at.col});
    }
  return seen.size() == size_t(TILE * TILE);
}

// A permutation of the tile's bytes by pieces of 16, and eight rows' pieces in eight groups of four banks.
template <int ROW_BYTES>
bool is_swizzle_sound() {
  constexpr int ROWS = TILE * CHUNK_BYTES / ROW_BYTES;
  std::set<int> seen;
  for (int row = 0; row < ROWS; ++row)
    for (int byte = 0; byte < ROW_BYTES; ++byte) {
      const int at = swizzled<ROW_BYTES>(row, byte);
      if (at / ROW_BYTES != row || at % 16 != byte % 16) return false;
      seen.insert(at);
    }
  for (int row = 0; row < ROWS; row += 8)
    for (int byte = 0; byte < ROW_BYTES; byte += 16) {
      std::set<int> banks;
      for (int r = row; r < row + 8; ++r) banks.insert(swizzled<ROW_BYTES>(r, byte) % 128 / 16);
      if (banks.size() != 8) return false;
    }
  return seen.size() == size_t(TILE * CHUNK_BYTES);
}

bool are_slices_a_partition() {
  for (int chunks = 1; chunks <= 2048; ++chunks)
    for (int size = 1; size <= MAX_CLUSTER; size *= 2)
      for (int rank = 0, next = 0; rank < size; ++rank) {
        const Slice slice = slice_of(chunks, rank, size);
        if (slice.begin != next || slice.end < slice.begin) return false;
        next = slice.end;
        if (rank == size - 1 && next != chunks) return false;
      }
  return true;
}

bool is_plan_sound(int n, int m, int d, int cluster, int resident) {
  const Plan plan = make_plan(n, m, d, true, true, cluster, resident);
  if (plan.grid < cluster || plan.grid % cluster || plan.grid > std::max(resident, cluster)) return false;
  if (plan.strips() * plan.strip_rows() != plan.row_tiles * TILE) return false;
  std::set<std::tuple<bool, int, int>> jobs;
  for (int job = 0; job < plan.jobs(); ++job) {
    const Job place = job_of(plan, job);
    if (place.row >= (place.of_images ? n : m) || place.first >= d) return false;
    jobs.insert({place.of_images, place.row, place.first});
  }
  const int wanted = (ceil_div(n, TILE) + ceil_div(m, TILE)) * ceil_div(d, TILE);
  const Workspace at = workspace_of(plan, n, m);
  const bool is_disjoint = int64_t(n) * m * 4 <= at.of_rows &&
                           at.of_rows + 16 * plan.col_tiles * n <= at.of_columns &&
                           at.of_columns + 16 * plan.strips() * m <= at.not_finite &&
                           at.not_finite + 4 * plan.tiles() * plan.cluster <= at.bytes;
  const bool is_aligned = at.of_rows % 16 == 0 && at.of_columns % 16 == 0 && at.not_finite % 16 == 0;
  return int(jobs.size()) == wanted && plan.jobs() == wanted && is_disjoint && is_aligned;
}

}  // namespace

// What does not hold, or null.
extern "C" const char* index_arithmetic_error() {
  if (!is_each_element_accumulated_once<float>()) return "coordinate<float>";
  if (!is_each_element_accumulated_once<Half>()) return "coordinate<Half>";
  if (!is_swizzle_sound<CHUNK_BYTES>() || !is_swizzle_sound<2 * CHUNK_BYTES>()) return "swizzled";
  if (!are_slices_a_partition()) return "slice_of";
  for (int n = 1; n <= MAX_ROWS; n += 21)
    for (int m = 1; m <= MAX_ROWS; m += 21)
      for (int d : {1, 63, 64, 65, 1024})
        for (int cluster = 1; cluster <= MAX_CLUSTER; cluster *= 2)
          for (int resident : {8, 20, 132})
            if (!is_plan_sound(n, m, d, cluster, resident)) return "make_plan, job_of or workspace_of";
  return nullptr;
}
