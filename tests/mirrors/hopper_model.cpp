// The Hopper statistics kernel in plain C++, one lane after the other: the kernel's own arithmetic
// (csrc/cuda/hopper_{tile,walk,statistics,plan}.h) around loops that stand for its hardware.
//
// What stands for the hardware is written from the PTX manual, not with the functions under test: where
// wgmma leaves a score, and what a shuffle does.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "../csrc/cuda/hopper_plan.h"
#include "../csrc/cuda/hopper_statistics.h"

using namespace fused_vse::hopper;

namespace {

struct Scores {
  float at[TILE_ROWS][TILE_COLS];
};

// The embeddings' product over the rows and columns of a tile, zeros outside as the copy engine fills in.
void multiply(Scores& scores, const float* images, int64_t n, const float* captions, int64_t m, int64_t d,
              int row, int column) {
  for (int r = 0; r < TILE_ROWS; ++r)
    for (int c = 0; c < TILE_COLS; ++c) {
      double sum = 0;
      if (row + r < n && column + c < m)
        for (int64_t k = 0; k < d; ++k)
          sum += double(images[(row + r) * d + k]) * double(captions[(column + c) * d + k]);
      scores.at[r][c] = float(sum);
    }
}

// PTX manual, "Register Fragments for wgmma.mma_async.m64nNk16", matrix D: for thread t of the warpgroup,
// row = 16 (t / 32) + (t % 32) / 4 + 8 ((i / 2) % 2), column = 8 (i / 4) + 2 (t % 4) + i % 2.
int wgmma_row(int thread, int i) { return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2); }
int wgmma_column(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

template <int STRIDE, int COUNT, typename Statistic, typename Item, size_t LENGTH>
void swap_reduce(const Statistic& statistic, Item (&items)[32][LENGTH]) {
  if constexpr (COUNT > 1) {
    constexpr int HALF = COUNT / 2, BIT = STRIDE * HALF;
    Item outgoing[32][HALF];
    for (int lane = 0; lane < 32; ++lane) swap_halves<HALF>(items[lane], outgoing[lane], (lane & BIT) != 0);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < HALF; ++i)
        items[lane][i] = statistic.merge(items[lane][i], outgoing[lane ^ BIT][i]);
    swap_reduce<STRIDE, HALF>(statistic, items);
  }
}

template <typename Statistic, typename Sink>
void reduce(const Scores& scores, const Statistic& statistic, const Sink& sink, const Walk& walk, Tile tile) {
  using Item = typename Statistic::Item;
  const int row0 = tile.row(walk.rectangle), column0 = tile.column();
  static Item exchanged[WARPS][TILE_COLS];
  for (int warp = 0; warp < WARPS; ++warp) {
    static Fragment acc[32];
    Item rows[32][LANE_ROWS];
    for (int lane = 0; lane < 32; ++lane) {
      const int thread = 32 * warp + lane;
      for (int b = 0; b < BLOCKS; ++b)
        for (int i = 0; i < ACCUMULATORS; ++i)
          acc[lane][b][i] = scores.at[64 * b + wgmma_row(thread, i)][wgmma_column(thread, i)];
      if (walk.may_hold_excluded(tile)) walk.leave_out(acc[lane], tile, warp, lane);
      statistic.prepare(acc[lane]);
      for (int slot = 0; slot < LANE_ROWS; ++slot)
        rows[lane][slot] = statistic.over(RowScores{acc[lane], slot}, row0 + lane_row(warp, lane, slot),
                                          column0 + lane_column(lane, 0, 0));
    }
    swap_reduce<ROW_STRIDE, LANE_ROWS>(statistic, rows);
    for (int lane = 0; lane < 32; ++lane) {
      const int row = row0 + lane_row(warp, lane, slot_of_lane(lane));
      if (walk.stores_row(row)) sink.store_row(tile, row, rows[lane][0]);
    }
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Item items[32][LANE_COLS];
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < LANE_COLS; ++i)
          items[lane][i] = statistic.over(ColumnScores{acc[lane], chunk, i},
                                          walk.row_anchors + column0 + lane_column(lane, chunk, i),
                                          row0 + lane_row(warp, lane, 0));
      swap_reduce<COLUMN_STRIDE, LANE_COLS>(statistic, items);
      for (int lane = 0; lane < 32; ++lane)
        exchanged[warp][lane_column(lane, chunk, item_of_lane(lane))] = items[lane][0];
    }
  }
  for (int c = 0; c < TILE_COLS; ++c) {
    Item total = exchanged[0][c];
    for (int w = 1; w < WARPS; ++w) total = statistic.merge(total, exchanged[w][c]);
    if (walk.stores_column(tile, column0 + c)) sink.store_column(tile, column0 + c, total);
  }
}

struct Keys {
  uint64_t* best;
  int64_t row_anchors;
  void store_row(Tile, int row, uint64_t key) const { best[row] = std::max(best[row], key); }
  void store_column(Tile, int column, uint64_t key) const {
    best[row_anchors + column] = std::max(best[row_anchors + column], key);
  }
};

// Everything of an op's arguments that does not depend on the statistic.
struct Batch {
  const float *images, *captions;
  const int64_t *image_ids, *caption_ids;  // or null
  int64_t n, m, d, row_anchors, column_anchors, pair_row, pair_column, pair_count;
  int64_t workspace_bytes, clusters;

  int64_t anchors() const { return row_anchors + column_anchors; }

  // reduce_tile(scores, walk, tile) for every tile of the rectangle, by `clusters` clusters in some order.
  template <typename F>
  void walk(const Rectangle& rectangle, const F& reduce_tile) const {
    Walk walk{};
    walk.rectangle = rectangle;
    walk.raster = Raster::of(rectangle);
    walk.row_anchors = int(row_anchors);
    walk.column_anchors = int(column_anchors);
    walk.pair_row = int(pair_row);
    walk.pair_column = int(pair_column);
    walk.pair_count = int(pair_count);
    std::vector<IdRange> ranges;
    std::vector<int64_t> rows, columns;  // with room
    if (image_ids) {
      rows.assign(image_ids, image_ids + n);
      columns.assign(caption_ids, caption_ids + m);
      const auto range = [&](const std::vector<int64_t>& ids, int begin, int end) {
        const auto [low, high] = std::minmax_element(ids.begin() + begin, ids.begin() + end);
        ranges.push_back({*low, *high});
      };
      for (int t = 0; t < rectangle.row_tiles(); ++t) {
        const int begin = Tile{t, 0}.row(rectangle);
        range(rows, begin, std::min(begin + TILE_ROWS, rectangle.row_stop));
      }
      for (int t = 0; t < rectangle.column_tiles(); ++t) {
        const int begin = Tile{0, t}.column();
        range(columns, begin, std::min(begin + TILE_COLS, rectangle.num_columns));
      }
      rows.resize(n + CLUSTER * TILE_ROWS, image_ids[0]);
      columns.resize(m + TILE_COLS, caption_ids[0]);
      walk.image_ids = rows.data();
      walk.caption_ids = columns.data();
      walk.row_ranges = ranges.data();
      walk.column_ranges = ranges.data() + rectangle.row_tiles();
    }
    const auto scores = std::make_unique<Scores>();
    for (int64_t cluster = clusters - 1; cluster >= 0; --cluster)
      for (int number = int(cluster); number < walk.raster.cluster_tiles; number += int(clusters))
        for (int rank = 0; rank < CLUSTER; ++rank) {
          const Tile tile = walk.raster.tile(number, rank);
          multiply(*scores, images, n, captions, m, d, tile.row(rectangle), tile.column());
          reduce_tile(*scores, walk, tile);
        }
  }

  std::vector<Rectangle> in_pieces(int64_t height) const {
    return rectangles(n, m, row_anchors, column_anchors, height);
  }

  // reduce_tile as above, with a sink; then merge(slots) for every anchor of each piece.
  template <typename F, typename G>
  void walk_in_pieces(const F& reduce_tile, const G& merge) const {
    const auto pieces = in_pieces(piece_height(workspace_bytes, partial_bytes_per_row(m, column_anchors)));
    const PartialSizes sizes = partial_sizes(pieces, column_anchors);
    std::vector<float> rows(sizes.rows / 4, NAN), columns(sizes.columns / 4, NAN);
    bool first = true;
    for (const Rectangle& piece : pieces) {
      const Partials partials{rows.data(), columns.data(), piece, row_anchors, column_anchors};
      walk(piece,
           [&](const Scores& scores, const Walk& w, Tile tile) { reduce_tile(scores, w, tile, partials); });
      for (const bool of_columns : {false, true})
        for (int64_t at = 0; at < std::max<int64_t>(column_anchors, piece.rows()); ++at)
          if (const Slots slots = partials.slots(of_columns, first, at); slots.exists) merge(slots);
      first = false;
    }
  }
};

}  // namespace

extern "C" {

// score, index [R + C]
void model_hardest(const Batch* batch, float* score, int64_t* index) {
  std::vector<uint64_t> best(batch->anchors(), 0);
  for (const Rectangle& piece : batch->in_pieces(batch->n))
    batch->walk(piece, [&](const Scores& scores, const Walk& walk, Tile tile) {
      reduce(scores, Hardest{}, Keys{best.data(), batch->row_anchors}, walk, tile);
    });
  for (int64_t a = 0; a < batch->anchors(); ++a) {
    score[a] = Hardest::score(best[a]);
    index[a] = Hardest::index(best[a]);
  }
}

// reference, log_sum [R + C]; returns whether one exponential served both directions, or -1 for a scale that
// is none.
int model_logsumexp(const Batch* batch, double scale, float max_image_square, float max_caption_square,
                    float* reference, double* sums) {
  const Bounds bounds{{0, 0, bits_as<uint32_t>(max_image_square), bits_as<uint32_t>(max_caption_square)}};
  const Exponent exponent = Exponent::make(scale, bounds, float(std::max(batch->n, batch->m)));
  batch->walk_in_pieces(
      [&](const Scores& scores, const Walk& walk, Tile tile, const Partials& sink) {
        if (exponent.one)
          reduce(scores, LogsumexpOneExp{exponent}, sink, walk, tile);
        else
          reduce(scores, LogsumexpTwoExp{exponent}, sink, walk, tile);
      },
      [&](const Slots& slots) {
        const ScaledSum<double> sum = merge_logsumexp(slots, exponent);
        reference[slots.number] = finite(sum.reference);
        sums[slots.number] = log_sum(sum, exponent);
      });
  return exponent.valid() ? exponent.one : -1;
}

// total, active [R + C]
void model_hinge(const Batch* batch, const float* threshold, float* total, int64_t* active) {
  const Hinge hinge{threshold, int(batch->anchors()) - 1};
  batch->walk_in_pieces([&](const Scores& scores, const Walk& walk, Tile tile,
                            const Partials& sink) { reduce(scores, hinge, sink, walk, tile); },
                        [&](const Slots& slots) {
                          const HingeTotal sum = merge_hinge(slots);
                          total[slots.number] = float(sum.total);
                          active[slots.number] = sum.active;
                        });
}

// --- the parts, for tests by brute force

int constant(const char* name) {
  const std::pair<const char*, int> constants[] = {
      {"TILE_ROWS", TILE_ROWS}, {"TILE_COLS", TILE_COLS}, {"TILE_DEPTH", TILE_DEPTH},
      {"CLUSTER", CLUSTER},     {"STAGES", STAGES},       {"WARPS", WARPS},
      {"LANE_ROWS", LANE_ROWS}, {"CHUNKS", CHUNKS},       {"LANE_COLS", LANE_COLS}};
  for (const auto& [key, value] : constants)
    if (!strcmp(key, name)) return value;
  return -1;
}

// Of (warp, lane, slot, chunk, item): row and column by the kernel, and by the manual from where its score
// is.
void fragment(int warp, int lane, int slot, int chunk, int item, int* kernel, int* manual) {
  kernel[0] = lane_row(warp, lane, slot);
  kernel[1] = lane_column(lane, chunk, item);
  const int i = accumulator(slot, chunk, item);
  manual[0] = 64 * (slot / 2) + wgmma_row(32 * warp + lane, i);
  manual[1] = wgmma_column(32 * warp + lane, i);
}

struct Sum {
  static int64_t merge(int64_t a, int64_t b) { return a + b; }
};
// values [32, 8]: each lane's items. Returns in totals [32] what lane r holds in the end.
void swap_columns(const int64_t* values, int64_t* totals) {
  int64_t items[32][LANE_COLS];
  memcpy(items, values, sizeof items);
  swap_reduce<COLUMN_STRIDE, LANE_COLS>(Sum{}, items);
  for (int lane = 0; lane < 32; ++lane) totals[lane] = items[lane][0];
}
// values [32, 4]
void swap_rows(const int64_t* values, int64_t* totals) {
  int64_t items[32][LANE_ROWS];
  memcpy(items, values, sizeof items);
  swap_reduce<ROW_STRIDE, LANE_ROWS>(Sum{}, items);
  for (int lane = 0; lane < 32; ++lane) totals[lane] = items[lane][0];
}

// The tiles of cluster `cluster` of `clusters`: row tile, column tile, rank in `out`; returns how many.
int tiles(int row_start, int row_stop, int columns, int cluster, int clusters, int* out) {
  const Raster raster = Raster::of({row_start, row_stop, columns});
  int count = 0;
  for (int number = cluster; number < raster.cluster_tiles; number += clusters)
    for (int rank = 0; rank < CLUSTER; ++rank) {
      const Tile tile = raster.tile(number, rank);
      out[3 * count] = tile.row_tile;
      out[3 * count + 1] = tile.column_tile;
      out[3 * count++ + 2] = rank;
    }
  return count;
}

// stage and phase after `steps` steps from (stage, phase).
void advance(int* stage, int* phase, int steps) {
  RingPosition position{*stage, uint32_t(*phase)};
  position.advance(steps);
  *stage = position.stage;
  *phase = int(position.phase);
}

// pieces [*, 3] and the bytes of partial results for rows and for columns; returns how many pieces.
int pieces(int64_t n, int64_t m, int64_t row_anchors, int64_t column_anchors, int64_t workspace_bytes,
           int* out, int64_t* bytes) {
  const int64_t height = piece_height(workspace_bytes, partial_bytes_per_row(m, column_anchors));
  const auto all = rectangles(n, m, row_anchors, column_anchors, height);
  int* at = out;
  for (const Rectangle& piece : all) {
    *at++ = piece.row_start;
    *at++ = piece.row_stop;
    *at++ = piece.num_columns;
  }
  const PartialSizes sizes = partial_sizes(all, column_anchors);
  bytes[0] = sizes.rows;
  bytes[1] = sizes.columns;
  return int(all.size());
}

uint64_t key_of(float score, int index) { return Hardest::key(score, index); }
float key_score(uint64_t key) { return Hardest::score(key); }
int64_t key_index(uint64_t key) { return Hardest::index(key); }

int poisoned(float max_image, float max_caption, int64_t d) {
  return Bounds{{bits_as<uint32_t>(max_image), bits_as<uint32_t>(max_caption), 0, 0}}.poisoned(d);
}

// Each layout: rows, D, row stride, column stride, address, is 16 bit.
void obstacle_of(int major, int minor, const int64_t* images, const int64_t* captions, char* text, int room) {
  const auto layout = [](const int64_t* x) {
    return Layout{x[0], x[1], x[2], x[3], uint64_t(x[4]), x[5] != 0};
  };
  strncpy(text, obstacle(major, minor, layout(images), layout(captions)).c_str(), room - 1);
}

}  // extern "C"
