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

template <typename Statistic, int STRIDE, int COUNT, typename Item, size_t LENGTH>
void swap_reduce(Item (&items)[32][LENGTH]) {
  if constexpr (COUNT > 1) {
    constexpr int HALF = COUNT / 2, BIT = STRIDE * HALF;
    Item outgoing[32][HALF];
    for (int lane = 0; lane < 32; ++lane) swap_halves<HALF>(items[lane], outgoing[lane], (lane & BIT) != 0);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < HALF; ++i)
        items[lane][i] = Statistic::merge(items[lane][i], outgoing[lane ^ BIT][i]);
    swap_reduce<Statistic, STRIDE, HALF>(items);
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
        rows[lane][slot] = statistic.over_columns(acc[lane], slot, row0 + lane_row(warp, lane, slot),
                                                  column0 + lane_column(lane, 0, 0));
    }
    swap_reduce<Statistic, ROW_STRIDE, LANE_ROWS>(rows);
    for (int lane = 0; lane < 32; ++lane) {
      const int row = row0 + lane_row(warp, lane, slot_of_lane(lane));
      if (walk.is_row_anchor(row)) sink.store_row(tile, row, rows[lane][0]);
    }
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      Item items[32][LANE_COLS];
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < LANE_COLS; ++i)
          items[lane][i] = statistic.over_rows(acc[lane], chunk, i, column0 + lane_column(lane, chunk, i),
                                               row0 + lane_row(warp, lane, 0));
      swap_reduce<Statistic, COLUMN_STRIDE, LANE_COLS>(items);
      for (int lane = 0; lane < 32; ++lane)
        exchanged[warp][lane_column(lane, chunk, item_of_lane(lane))] = items[lane][0];
    }
  }
  for (int c = 0; c < TILE_COLS; ++c) {
    Item total = exchanged[0][c];
    for (int w = 1; w < WARPS; ++w) total = Statistic::merge(total, exchanged[w][c]);
    if (walk.is_column_anchor(tile, column0 + c)) sink.store_column(tile, column0 + c, total);
  }
}

struct Keys {
  uint64_t* best;
  int64_t num_pairs;
  void store_row(Tile, int row, uint64_t key) const { best[row] = std::max(best[row], key); }
  void store_column(Tile, int column, uint64_t key) const {
    best[num_pairs + column] = std::max(best[num_pairs + column], key);
  }
};

struct Partials {
  float *rows, *columns;
  Rectangle rectangle;
  int64_t num_pairs;

  template <typename Item>
  void store(float* partial, int slot, int64_t anchors, int64_t anchor, const Item& item) const {
    float words[sizeof(Item) / 4];
    memcpy(words, &item, sizeof item);
    for (int plane = 0; plane < int(sizeof(Item) / 4); ++plane)
      partial[partial_at(slot, plane, anchors, anchor)] = words[plane];
  }
  template <typename Item>
  void store_row(Tile tile, int row, const Item& item) const {
    store(rows, tile.column_tile, rectangle.rows(), row - rectangle.row_start, item);
  }
  template <typename Item>
  void store_column(Tile tile, int column, const Item& item) const {
    store(columns, tile.row_tile + 1, num_pairs, column, item);
  }
};

struct Batch {
  const float *images, *captions;
  int64_t n, m, d, k;
  std::vector<int64_t> image_ids, caption_ids;  // with room, or empty

  // reduce_tile(scores, walk, tile) for every tile of the rectangle, by `clusters` clusters in some order.
  template <typename F>
  void walk(const Rectangle& rectangle, int clusters, const F& reduce_tile) const {
    Walk walk{};
    walk.rectangle = rectangle;
    walk.raster = Raster::of(rectangle);
    walk.num_pairs = int(k);
    std::vector<IdRange> ranges;
    if (!image_ids.empty()) {
      walk.image_ids = image_ids.data();
      walk.caption_ids = caption_ids.data();
      const auto range = [&](const std::vector<int64_t>& ids, int begin, int end) {
        const auto [low, high] = std::minmax_element(ids.begin() + begin, ids.begin() + end);
        ranges.push_back({*low, *high});
      };
      for (int t = 0; t < rectangle.row_tiles(); ++t) {
        const int begin = Tile{t, 0}.row(rectangle);
        range(image_ids, begin, std::min(begin + TILE_ROWS, rectangle.row_stop));
      }
      for (int t = 0; t < rectangle.column_tiles(); ++t) {
        const int begin = Tile{0, t}.column();
        range(caption_ids, begin, std::min(begin + TILE_COLS, rectangle.num_columns));
      }
      walk.row_ranges = ranges.data();
      walk.column_ranges = ranges.data() + rectangle.row_tiles();
    }
    const auto scores = std::make_unique<Scores>();
    for (int cluster = clusters - 1; cluster >= 0; --cluster)
      for (int number = cluster; number < walk.raster.cluster_tiles; number += clusters)
        for (int rank = 0; rank < CLUSTER; ++rank) {
          const Tile tile = walk.raster.tile(number, rank);
          multiply(*scores, images, n, captions, m, d, tile.row(rectangle), tile.column());
          reduce_tile(*scores, walk, tile);
        }
  }

  // reduce_tile as above, with a sink; then merge(partial, slots, is_column) for every anchor of each piece,
  // which returns the two planes to carry over.
  template <typename F, typename G>
  void walk_in_pieces(int64_t workspace_bytes, int clusters, const F& reduce_tile, const G& merge) const {
    const auto pieces = rectangles(n, m, k, piece_height(workspace_bytes, partial_bytes_per_row(m, k)));
    const PartialSizes sizes = partial_sizes(pieces, k);
    std::vector<float> rows(sizes.rows, NAN), columns(sizes.columns, NAN);
    bool first = true;
    for (const Rectangle& piece : pieces) {
      const Partials sink{rows.data(), columns.data(), piece, k};
      walk(piece, clusters,
           [&](const Scores& scores, const Walk& w, Tile tile) { reduce_tile(scores, w, tile, sink); });
      for (const bool is_column : {false, true})
        for (int64_t anchor = 0; anchor < std::max<int64_t>(k, piece.rows()); ++anchor) {
          const Slots slots = slots_of(piece, k, first, is_column, anchor);
          if (!slots.exists) continue;
          const auto planes = merge(is_column ? columns.data() : rows.data(), slots, is_column);
          if (is_column)
            for (int plane = 0; plane < PLANES; ++plane)
              columns[partial_at(0, plane, k, anchor)] = planes[plane];
        }
      first = false;
    }
  }
};

Batch make_batch(const float* images, int64_t n, const float* captions, int64_t m, int64_t d, int64_t k,
                 const int64_t* image_ids, const int64_t* caption_ids) {
  Batch batch{images, captions, n, m, d, k, {}, {}};
  if (image_ids) {
    batch.image_ids.assign(image_ids, image_ids + n);
    batch.caption_ids.assign(caption_ids, caption_ids + m);
    batch.image_ids.resize(n + CLUSTER * TILE_ROWS, image_ids[0]);
    batch.caption_ids.resize(m + TILE_COLS, caption_ids[0]);
  }
  return batch;
}

}  // namespace

#define BATCH                                                                             \
  const float *images, int64_t n, const float *captions, int64_t m, int64_t d, int64_t k, \
      const int64_t *image_ids, const int64_t *caption_ids, int64_t workspace_bytes, int clusters
#define MAKE_BATCH make_batch(images, n, captions, m, d, k, image_ids, caption_ids)

extern "C" {

// score, index [2, K]
void model_hardest(BATCH, float* score, int64_t* index) {
  (void)workspace_bytes;
  const Batch batch = MAKE_BATCH;
  std::vector<uint64_t> best(2 * k, 0);
  for (const Rectangle& piece : rectangles(n, m, k, n))
    batch.walk(piece, clusters, [&](const Scores& scores, const Walk& walk, Tile tile) {
      reduce(scores, Hardest{}, Keys{best.data(), k}, walk, tile);
    });
  for (int64_t a = 0; a < 2 * k; ++a) {
    score[a] = Hardest::score(best[a]);
    index[a] = Hardest::index(best[a]);
  }
}

// logsumexp [2, K]; returns whether one exponential served both directions.
int model_logsumexp(BATCH, double scale, float max_image_square, float max_caption_square,
                    double* logsumexp) {
  const Bounds bounds{{0, 0, bits_as<uint32_t>(max_image_square), bits_as<uint32_t>(max_caption_square)}};
  const Exponent exponent = Exponent::make(scale, bounds, float(std::max(n, m)));
  MAKE_BATCH.walk_in_pieces(
      workspace_bytes, clusters,
      [&](const Scores& scores, const Walk& walk, Tile tile, const Partials& sink) {
        if (exponent.one)
          reduce(scores, LogsumexpOneExp{exponent}, sink, walk, tile);
        else
          reduce(scores, LogsumexpTwoExp{exponent}, sink, walk, tile);
      },
      [&](const float* partial, const Slots& slots, bool is_column) {
        const ScaledSum<double> sum = merge_logsumexp(partial, slots, exponent);
        logsumexp[is_column * k + slots.pair] = sum.logsumexp();
        return std::vector<float>{float(sum.total), sum.reference};
      });
  return exponent.one;
}

// total, active [2, K]
void model_hinge(BATCH, const float* positive, float margin, float* total, int64_t* active) {
  const Hinge hinge{positive, margin, int(k)};
  MAKE_BATCH.walk_in_pieces(
      workspace_bytes, clusters,
      [&](const Scores& scores, const Walk& walk, Tile tile, const Partials& sink) {
        reduce(scores, hinge, sink, walk, tile);
      },
      [&](const float* partial, const Slots& slots, bool is_column) {
        const HingeTotal sum = merge_hinge(partial, slots);
        total[is_column * k + slots.pair] = float(sum.total);
        active[is_column * k + slots.pair] = sum.active;
        return std::vector<float>{float(sum.total), bits_as<float>(int(sum.active))};
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
  swap_reduce<Sum, COLUMN_STRIDE, LANE_COLS>(items);
  for (int lane = 0; lane < 32; ++lane) totals[lane] = items[lane][0];
}
// values [32, 4]
void swap_rows(const int64_t* values, int64_t* totals) {
  int64_t items[32][LANE_ROWS];
  memcpy(items, values, sizeof items);
  swap_reduce<Sum, ROW_STRIDE, LANE_ROWS>(items);
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

// pieces [*, 3] and the floats of partial results for rows and for columns; returns how many pieces.
int pieces(int64_t n, int64_t m, int64_t k, int64_t workspace_bytes, int* out, int64_t* floats) {
  const auto all = rectangles(n, m, k, piece_height(workspace_bytes, partial_bytes_per_row(m, k)));
  int* at = out;
  for (const Rectangle& piece : all) {
    *at++ = piece.row_start;
    *at++ = piece.row_stop;
    *at++ = piece.num_columns;
  }
  const PartialSizes sizes = partial_sizes(all, k);
  floats[0] = sizes.rows;
  floats[1] = sizes.columns;
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
