// The small-batch loss without any arithmetic: sizes, tiles, who does what, and where everything lies.
// Plain functions, tested exhaustively on the CPU (tests/plain/test_cuda_plan.py).
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "host_device.h"

namespace fused_vse::small {

constexpr int THREADS = 256, LANES = 32;
constexpr int MAX_ROWS = 512;     // images, and captions
constexpr int MAX_DIM = 1 << 16;  // so that offsets inside a row fit into an int
constexpr int TILE = 64;          // rows and columns of a tile of S, and of a gradient
constexpr int CHUNK_BYTES = 128;  // of a row, in one stage: 64 16-bit elements or 32 floats
constexpr int STAGES = 4;         // 64 KiB in flight: what it takes to hide the latency of global memory
constexpr int SEGMENT = 16;       // scores that one thread looks at, one after the other
constexpr int MAX_CLUSTER = 8;    // the largest that every Hopper GPU can schedule
constexpr int MAX_STRIPS = 16;    // of rows; every block merges as many partial results of each column
constexpr int PER_THREAD = TILE * TILE / THREADS;

enum Loss : int { ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM };

// Why the kernel does not take a batch, or "".
inline std::string obstacle(int64_t n, int64_t m, int64_t d, int64_t num_pairs, int64_t kind) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  if (n > MAX_ROWS || m > MAX_ROWS || d > MAX_DIM)
    return "small_loss takes at most " + text(MAX_ROWS) + " images and captions of at most " + text(MAX_DIM) +
           " dimensions, got " + text(n) + ", " + text(m) + " and " + text(d);
  if (num_pairs < 1) return "num_pairs must be at least 1, got " + text(num_pairs);
  if (kind < ALL_NEGATIVES || kind > HINGE_SUM) return "unknown kind of loss: " + text(kind);
  return "";
}

HOST_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Elements of a chunk.
template <typename T>
constexpr int CHUNK = CHUNK_BYTES / int(sizeof(T));

// Where byte `byte` of a row lies in a tile with rows of 128 or 256 bytes: the 16-byte pieces of eight
// consecutive rows are permuted, so that eight lanes reading one column of pieces meet all banks.
template <int ROW_BYTES>
HOST_DEVICE constexpr int swizzled(int row, int byte) {
  return row * ROW_BYTES + ((byte / 16) ^ (row & 7)) * 16 + byte % 16;
}

struct Coordinate {
  int row, col;
};

// The element of a 64 x 64 product that register r of a thread accumulates. Tensor cores: 8 warps of 32 x 16,
// each 2 x 2 products of m16n8k16. float32: every 16th row and column.
template <typename T>
HOST_DEVICE constexpr Coordinate coordinate(int thread, int r) {
  if (sizeof(T) == 4) return {thread / 16 + 16 * (r / 4), thread % 16 + 16 * (r % 4)};
  const int warp = thread / LANES, lane = thread % LANES;
  return {warp / 4 * 32 + r / 8 * 16 + lane / 4 + r % 4 / 2 * 8,
          warp % 4 * 16 + r / 4 % 2 * 8 + lane % 4 * 2 + r % 2};
}

// Which part of the launch does what. A cluster computes a tile of S, each of its blocks a slice of D; then
// each sums one strip of the tile's rows. Later each block computes tiles of the gradients.
struct Plan {
  int row_tiles, col_tiles, cluster, grid;
  int image_jobs, caption_jobs;  // tiles of the gradients
  HOST_DEVICE int tiles() const { return row_tiles * col_tiles; }
  HOST_DEVICE int strips() const { return row_tiles * cluster; }
  HOST_DEVICE int strip_rows() const { return TILE / cluster; }
  HOST_DEVICE int jobs() const { return image_jobs + caption_jobs; }
};

// As many blocks as give MAX_STRIPS strips, but each with at least one chunk of D; a power of two.
inline int preferred_cluster(int n, int d, int element_size) {
  int cluster = 1;
  while (2 * cluster <= MAX_CLUSTER && 2 * cluster * ceil_div(n, TILE) <= MAX_STRIPS &&
         2 * cluster * CHUNK_BYTES <= d * element_size)
    cluster *= 2;
  return cluster;
}

// `resident`: how many blocks, in such clusters, the GPU can run at the same time.
inline Plan make_plan(int n, int m, int d, bool need_images, bool need_captions, int cluster, int resident) {
  Plan plan{ceil_div(n, TILE), ceil_div(m, TILE), cluster, 0, 0, 0};
  if (need_images) plan.image_jobs = plan.row_tiles * ceil_div(d, TILE);
  if (need_captions) plan.caption_jobs = plan.col_tiles * ceil_div(d, TILE);
  const int wanted = std::max(plan.tiles(), ceil_div(plan.jobs(), cluster));
  plan.grid = std::max(std::min(wanted, resident / cluster), 1) * cluster;
  return plan;
}

// Columns of a tile of a gradient: [first, first + 64) of D, and its rows.
struct Job {
  bool of_images;
  int row, first;
};

HOST_DEVICE Job job_of(const Plan& plan, int job) {
  const bool of_images = job < plan.image_jobs;
  if (!of_images) job -= plan.image_jobs;
  const int row_tiles = of_images ? plan.row_tiles : plan.col_tiles;
  return {of_images, job % row_tiles * TILE, job / row_tiles * TILE};
}

// The chunks of D that a block of a cluster multiplies.
struct Slice {
  int begin, end;
};

HOST_DEVICE Slice slice_of(int chunks, int cluster_rank, int cluster_size) {
  const int each = ceil_div(chunks, cluster_size);
  return {std::min(cluster_rank * each, chunks), std::min((cluster_rank + 1) * each, chunks)};
}

// What is known of some of an anchor's negatives.
struct alignas(16) Statistic {
  float max;     // the largest score, -inf if there is none
  int index;     // the smallest where it is, -1 if there is none
  float sum;     // ALL_NEGATIVES: sum of e = exp(a (s - max)); HINGE_SUM: of the hinges
  float moment;  // ALL_NEGATIVES: sum of e (s - max); HINGE_SUM: the number of active hinges
};

// Byte offsets of the workspace.
struct Workspace {
  int64_t scores;      // float [N, M]
  int64_t of_rows;     // Statistic [col_tiles, N]
  int64_t of_columns;  // Statistic [strips, M]
  int64_t not_finite;  // int [tiles, cluster]
  int64_t bytes;
};

inline Workspace workspace_of(const Plan& plan, int n, int m) {
  const auto aligned = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
  Workspace w{};
  w.of_rows = aligned(int64_t(n) * m * 4);
  w.of_columns = w.of_rows + int64_t(plan.col_tiles) * n * int64_t(sizeof(Statistic));
  w.not_finite = w.of_columns + int64_t(plan.strips()) * m * int64_t(sizeof(Statistic));
  w.bytes = w.not_finite + aligned(int64_t(plan.tiles()) * plan.cluster * 4);
  return w;
}

}  // namespace fused_vse::small
