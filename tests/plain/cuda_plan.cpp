// The host's part of csrc/cuda, which needs no nvcc, for test_cuda_plan.py: what is taken, in which pieces,
// who does what.
#include <cstring>
#include <set>
#include <tuple>
#include <utility>

#include "batch.h"
#include "hopper_plan.h"
#include "small_plan.h"

namespace {

using namespace fused_vse;
using namespace fused_vse::small;

void copy(const std::string& from, char* text, int room) { std::strncpy(text, from.c_str(), room - 1); }

template <int ELEMENT_SIZE>
struct Element {
  char bytes[ELEMENT_SIZE];
};

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

extern "C" {

// `numbers`: the fields of BatchShape.
void batch_mistake(const int64_t* numbers, char* text, int room) {
  BatchShape shape;
  static_assert(sizeof shape == 11 * sizeof *numbers);
  std::memcpy(&shape, numbers, sizeof shape);
  copy(mistake(shape), text, room);
}

// n, m, D, pairs, kind
void small_obstacle(const int64_t* x, char* text, int room) {
  copy(obstacle(x[0], x[1], x[2], x[3], x[4]), text, room);
}

int preferred_cluster_of(int n, int d, int element_size) { return preferred_cluster(n, d, element_size); }

// What does not hold of the small-batch loss, or null.
const char* index_arithmetic_error() {
  if (!is_each_element_accumulated_once<Element<4>>()) return "coordinate of 4 bytes";
  if (!is_each_element_accumulated_once<Element<2>>()) return "coordinate of 2 bytes";
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

// Each layout: rows, D, row stride, column stride, address, is 16 bit.
void hopper_obstacle(int major, int minor, const int64_t* images, const int64_t* captions, char* text,
                     int room) {
  const auto layout = [](const int64_t* x) {
    return hopper::Layout{x[0], x[1], x[2], x[3], uint64_t(x[4]), x[5] != 0};
  };
  copy(hopper::obstacle(major, minor, layout(images), layout(captions)), text, room);
}

// The tiles of cluster `cluster` of `clusters`: row tile, column tile in `out`; returns how many.
int hopper_tiles(int row_start, int row_stop, int columns, int cluster, int clusters, int* out) {
  const hopper::Raster raster = hopper::Raster::of({row_start, row_stop, columns});
  int* at = out;
  for (int number = cluster; number < raster.cluster_tiles; number += clusters)
    for (int rank = 0; rank < hopper::CLUSTER; ++rank) {
      const hopper::Tile tile = raster.tile(number, rank);
      *at++ = tile.row_tile;
      *at++ = tile.column_tile;
    }
  return int(at - out) / 2;
}

// pieces [*, 3] and the bytes of partial results for rows and for columns; returns how many pieces.
int hopper_pieces(int64_t n, int64_t m, int64_t row_anchors, int64_t column_anchors, int64_t workspace_bytes,
                  int* out, int64_t* bytes) {
  const int64_t height =
      hopper::piece_height(workspace_bytes, hopper::partial_bytes_per_row(m, column_anchors));
  const auto all = hopper::rectangles(n, m, row_anchors, column_anchors, height);
  int* at = out;
  for (const hopper::Rectangle& piece : all) {
    *at++ = piece.row_start;
    *at++ = piece.row_stop;
    *at++ = piece.num_columns;
  }
  const hopper::PartialSizes sizes = hopper::partial_sizes(all, column_anchors);
  bytes[0] = sizes.rows;
  bytes[1] = sizes.columns;
  return int(all.size());
}

}  // extern "C"
