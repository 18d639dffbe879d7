// The phases of the small-batch loss (formula, walk and budget: small_loss.cu). Each is a function of one
// thread block; what lies between two of them is a barrier of the cluster or of the grid.
#pragma once

#include <limits>

#include "small_statistics.cuh"
#include "small_tiles.cuh"

namespace fused_vse::small {

struct Shared {
  union {
    Stage stages[STAGES];
    struct {
      float partial[TILE][TILE + 1];  // over this block's slice of D; read by the whole cluster
      float strip[TILE][TILE + 1];    // its rows of the sum
    } scores;
  };
  Statistic segments[2 * TILE * TILE / SEGMENT];
  int64_t row_ids[TILE], col_ids[TILE];
  // Of all anchors, row 0 for images; see struct Anchor.
  float reference[2][MAX_ROWS], weight[2][MAX_ROWS], pull[2][MAX_ROWS];
  float loss[THREADS], d_alpha[THREADS];
  float largest[THREADS], gain[TILE];  // see find_gains
};

template <typename T>
struct Problem {
  Rows<T> images, captions;                // [N, D], [M, D]
  const int64_t *image_ids, *caption_ids;  // [N], [M], or null for the row numbers
  int k;
  Loss kind;
  float scale, margin;
  const float* scale_tensor;  // [] in place of scale, or null
  float direction_weight[2];  // the larger one is 1; the rest of it is in `reduction`
  float reduction;            // factor of the sum over the anchors
  Plan plan;
  float* scores;                    // [N, M]
  Statistic *of_rows, *of_columns;  // [col_tiles, N], [strips, M]
  int* not_finite;                  // [tiles, cluster]
  float *d_images, *d_captions;     // [N, D], [M, D]; null if not needed
  float *loss, *d_scale;            // []
  float *positive, *hardest;        // [K], [2 K]
  int64_t* index;                   // [2 K]

  DEVICE float alpha() const { return scale_tensor ? *scale_tensor : scale; }
  DEVICE float weight_of(int side) const { return side ? direction_weight[1] : direction_weight[0]; }
  DEVICE int64_t id(int side, int i) const {
    const int64_t* ids = side ? caption_ids : image_ids;
    return ids ? ids[i] : i;
  }
  DEVICE float score(int i, int j) const { return scores[i * captions.count + j]; }
  DEVICE void report(int side, int i, float positive_score, float hardest_score, int hardest_index) const {
    if (side == 0) positive[i] = positive_score;
    hardest[side * k + i] = hardest_score;
    index[side * k + i] = hardest_index;
  }
  // Only float16 has too few powers of two for the entries of G.
  static constexpr bool HAS_GAINS = std::is_same_v<T, torch::headeronly::Half>;
};

// Place of a strip: rows [row, row + height) and columns [col, col + 64) of S.
struct Strip {
  int tile, row, col, height, index;
};

template <typename T>
DEVICE Strip strip_of(const Block<Shared>& block, const Problem<T>& x, int tile) {
  const int height = x.plan.strip_rows(), row_tile = tile % x.plan.row_tiles;
  return {tile, row_tile * TILE + block.cluster_rank * height, tile / x.plan.row_tiles * TILE, height,
          row_tile * x.plan.cluster + block.cluster_rank};
}

// This block's slice of D of a tile of S, left in `partial`.
template <typename T>
DEVICE void multiply_slice(const Block<Shared>& block, const Problem<T>& x, int tile) {
  Shared& shared = *block.shared;
  const int row = tile % x.plan.row_tiles * TILE, col = tile / x.plan.row_tiles * TILE;
  const Slice slice = slice_of(ceil_div(x.images.dim, CHUNK<T>), block.cluster_rank, block.cluster_size);
  const Accumulator acc = multiply_chunks<T, false>(
      shared.stages, slice.begin, slice.end,
      [&](Stage& stage, int chunk) {
        load_tile<T, CHUNK_BYTES>(stage.a, x.images, row, chunk * CHUNK<T>);
        load_tile<T, CHUNK_BYTES>(stage.b, x.captions, col, chunk * CHUNK<T>);
      },
      [](Stage&, int) {});
#pragma unroll
  for (int r = 0; r < PER_THREAD; ++r) {
    const Coordinate at = coordinate<T>(threadIdx.x, r);
    shared.scores.partial[at.row][at.col] = acc.at[r];
  }
}

// The sum of the cluster's slices, for this block's strip, in the order of their ranks.
template <typename T>
DEVICE void sum_strip(const Block<Shared>& block, const Problem<T>& x, int tile) {
  const Strip strip = strip_of(block, x, tile);
  bool not_finite = false;
  for (int e = threadIdx.x; e < strip.height * TILE; e += THREADS) {
    const int r = e / TILE, c = e % TILE;
    float sum = 0;
    for (int rank = 0; rank < block.cluster_size; ++rank)
      sum += block.peer(rank)->scores.partial[block.cluster_rank * strip.height + r][c];
    block.shared->scores.strip[r][c] = sum;
    const int i = strip.row + r, j = strip.col + c;
    if (i >= x.images.count || j >= x.captions.count) continue;
    x.scores[i * x.captions.count + j] = sum;
    // An entry that is not finite makes its whole row or column of S so: 0 * inf is NaN.
    if (!(fabsf(sum) <= std::numeric_limits<float>::max())) not_finite = true;
  }
  const bool any = __syncthreads_or(not_finite);
  if (threadIdx.x == 0) x.not_finite[tile * x.plan.cluster + block.cluster_rank] = any;
}

// For HINGE_SUM, whose thresholds are known only when all of S is: back into shared memory.
template <typename T>
DEVICE void recall_strip(const Block<Shared>& block, const Problem<T>& x, int tile) {
  const Strip strip = strip_of(block, x, tile);
  __syncthreads();
  for (int e = threadIdx.x; e < strip.height * TILE; e += THREADS) {
    const int i = strip.row + e / TILE, j = strip.col + e % TILE;
    if (i < x.images.count && j < x.captions.count)
      block.shared->scores.strip[e / TILE][e % TILE] = x.score(i, j);
  }
  __syncthreads();
}

// The strip's part of the statistics of its rows and columns. A thread takes at most SEGMENT scores of one.
template <typename T>
DEVICE void strip_statistics(const Block<Shared>& block, const Problem<T>& x, int tile) {
  Shared& shared = *block.shared;
  const Strip strip = strip_of(block, x, tile);
  const int height = min(strip.height, x.images.count - strip.row);
  const int width = min(TILE, x.captions.count - strip.col);
  const int col_segments = ceil_div(strip.height, SEGMENT), row_segments = TILE / SEGMENT;
  const float alpha = x.alpha();
  const int thread = threadIdx.x;
  __syncthreads();
  if (thread < height) shared.row_ids[thread] = x.id(0, strip.row + thread);
  if (thread < width) shared.col_ids[thread] = x.id(1, strip.col + thread);
  __syncthreads();
  const auto negative = [&](int r, int c) { return shared.row_ids[r] != shared.col_ids[c]; };
  const auto threshold = [&](int anchor) {
    return x.kind == HINGE_SUM && anchor < x.k ? x.score(anchor, anchor) - x.margin : 0;
  };
  for (int unit = thread; unit < TILE * col_segments + strip.height * row_segments; unit += THREADS) {
    if (unit < TILE * col_segments) {
      const int c = unit % TILE, begin = unit / TILE * SEGMENT;
      const int end = c < width ? min(begin + SEGMENT, height) : begin;
      shared.segments[unit] = statistic_of(
          x.kind, begin, end, strip.row, alpha, threshold(strip.col + c),
          [&](int r) { return shared.scores.strip[r][c]; }, [&](int r) { return negative(r, c); });
    } else {
      const int row_unit = unit - TILE * col_segments;
      const int r = row_unit % strip.height, begin = row_unit / strip.height * SEGMENT;
      const int end = r < height ? min(begin + SEGMENT, width) : begin;
      shared.segments[unit] = statistic_of(
          x.kind, begin, end, strip.col, alpha, threshold(strip.row + r),
          [&](int c) { return shared.scores.strip[r][c]; }, [&](int c) { return negative(r, c); });
    }
  }
  __syncthreads();
  const bool is_column = thread < TILE;
  const int line = is_column ? thread : thread - TILE;
  if (line >= (is_column ? width : height)) return;
  const int first = is_column ? line : TILE * col_segments + line;
  const int segments = is_column ? col_segments : row_segments, step = is_column ? TILE : strip.height;
  const Statistic sum =
      merged(x.kind, alpha, segments, [&](int s) { return shared.segments[first + s * step]; });
  if (is_column)
    x.of_columns[strip.index * x.captions.count + strip.col + line] = sum;
  else
    x.of_rows[tile / x.plan.row_tiles * x.images.count + strip.row + line] = sum;
}

// What follows from the statistics for every anchor, into shared memory; the block with `report` also writes
// the loss and the statistics. Returns whether all results are to be NaN.
template <typename T>
DEVICE bool merge_statistics(const Block<Shared>& block, const Problem<T>& x, bool report) {
  Shared& shared = *block.shared;
  const int n = x.images.count, m = x.captions.count;
  const float alpha = x.alpha();
  const int thread = threadIdx.x;
  bool bad = !(alpha > 0 && alpha <= std::numeric_limits<float>::max());
  for (int i = thread; i < x.plan.tiles() * x.plan.cluster; i += THREADS)
    if (x.not_finite[i]) bad = true;
  float loss = 0, d_alpha = 0;
#pragma unroll 1
  for (int a = thread; a < n + m; a += THREADS) {
    const int side = a >= n, i = side ? a - n : a;
    Anchor anchor = no_anchor();
    if (i < x.k) {
      const Statistic* parts = side ? x.of_columns : x.of_rows;
      const int count = side ? x.plan.strips() : x.plan.col_tiles, step = side ? m : n;
      const Statistic sum = merged(x.kind, alpha, count, [&](int part) { return parts[part * step + i]; });
      const float positive = x.score(i, i);
      anchor = anchor_of(x.kind, sum, positive, alpha, x.margin, x.weight_of(side));
      if (report) x.report(side, i, positive, sum.max, sum.index);
    }
    shared.reference[side][i] = anchor.reference;
    shared.weight[side][i] = anchor.weight;
    shared.pull[side][i] = anchor.pull;
    loss += anchor.loss;
    d_alpha += anchor.d_alpha;
  }
  shared.loss[thread] = loss;
  shared.d_alpha[thread] = d_alpha;
  const bool poisoned = __syncthreads_or(bad);
  if (!report) return poisoned;
  for (int width = THREADS / 2; width > 0; width /= 2) {
    if (thread < width) {
      shared.loss[thread] += shared.loss[thread + width];
      shared.d_alpha[thread] += shared.d_alpha[thread + width];
    }
    __syncthreads();
  }
  if (thread == 0) {
    *x.loss = poisoned ? NOT_A_NUMBER : shared.loss[0] * x.reduction;
    *x.d_scale = poisoned ? NOT_A_NUMBER : shared.d_alpha[0] * x.reduction;
  }
  // Over what the same thread wrote above.
#pragma unroll 1
  for (int a = thread; poisoned && a < n + m; a += THREADS)
    if (const int i = a < n ? a : a - n; i < x.k) x.report(a >= n, i, NOT_A_NUMBER, NOT_A_NUMBER, -1);
  return poisoned;
}

// G_ij for s = s_ij: what the two anchors give to a negative's score.
template <typename T>
DEVICE float gradient_at(const Shared& shared, const Problem<T>& x, float alpha, float s, int i, int j) {
  if (x.id(0, i) == x.id(1, j)) return 0;
  return gradient_of(x.kind, alpha, s, j, shared.reference[0][i], shared.weight[0][i]) +
         gradient_of(x.kind, alpha, s, i, shared.reference[1][j], shared.weight[1][j]);
}

// A power of two for each of the job's 64 rows of G, that lifts its largest entry to [2^14, 2^15): weights of
// an easy anchor, all of them, may lie below the smallest float16, and still be worth something once a
// gradient scaler has multiplied them. What is lost then is 2^-39 of the row's largest.
template <typename T>
DEVICE void find_gains(const Block<Shared>& block, const Problem<T>& x, const Job& job) {
  constexpr int EACH = THREADS / TILE;  // threads a row
  Shared& shared = *block.shared;
  const float alpha = x.alpha();
  const int rows = job.of_images ? x.images.count : x.captions.count;
  const int others = job.of_images ? x.captions.count : x.images.count;
  const int thread = threadIdx.x;
  const int own = job.row + thread / EACH;
  float largest = 0;
  if (own < rows) {
#pragma unroll 8
    for (int other = thread % EACH; other < others; other += EACH) {
      const int i = job.of_images ? own : other, j = job.of_images ? other : own;
      largest = fmaxf(largest, gradient_at(shared, x, alpha, x.score(i, j), i, j));
    }
  }
  shared.largest[thread] = largest;
  __syncthreads();
  if (thread >= TILE) return;
  largest = 0;
  for (int t = 0; t < EACH; ++t) largest = fmaxf(largest, shared.largest[thread * EACH + t]);
  shared.gain[thread] = gain_of(largest);
}

// G of 64 rows of one side by a chunk of rows of the other, into stage.a; for captions it is transposed.
template <typename T>
DEVICE void fill_gradient_of_scores(const Block<Shared>& block, const Problem<T>& x, const Job& job,
                                    int first, Stage& stage) {
  const Shared& shared = *block.shared;
  const float alpha = x.alpha();
  // Neighbouring threads take neighbouring columns of S.
  const auto row_of = [&](int e) { return job.of_images ? e / CHUNK<T> : e % TILE; };
  const auto place_of = [&](int e) {
    const int own = job.row + row_of(e), other = first + (job.of_images ? e % CHUNK<T> : e / TILE);
    return job.of_images ? Coordinate{own, other} : Coordinate{other, own};
  };
  constexpr int BATCH = 8;  // loads before the first use
#pragma unroll 1
  for (int first_e = threadIdx.x; first_e < TILE * CHUNK<T>; first_e += BATCH * THREADS) {
    float s[BATCH];
#pragma unroll
    for (int q = 0; q < BATCH; ++q) {
      const Coordinate at = place_of(first_e + q * THREADS);
      const bool inside = at.row < x.images.count && at.col < x.captions.count;
      s[q] = x.score(inside ? at.row : 0, inside ? at.col : 0);
    }
#pragma unroll
    for (int q = 0; q < BATCH; ++q) {
      const int e = first_e + q * THREADS;
      const auto [i, j] = place_of(e);
      const bool inside = i < x.images.count && j < x.captions.count;
      float g = inside ? gradient_at(shared, x, alpha, s[q], i, j) : 0;
      if (x.HAS_GAINS) g *= shared.gain[row_of(e)];
      at<T, CHUNK_BYTES>(stage.a, row_of(e), job.of_images ? e % CHUNK<T> : e / TILE) = T(g);
    }
  }
}

// One 64 x 64 tile of d_images = G T or d_captions = G^t I, with the positives' part in float32.
template <typename T>
DEVICE void multiply_gradient(const Block<Shared>& block, const Problem<T>& x, int number, bool poisoned) {
  const Job job = job_of(x.plan, number);
  const Rows<T>& others = job.of_images ? x.captions : x.images;
  const int rows = job.of_images ? x.images.count : x.captions.count;
  if (x.HAS_GAINS) find_gains(block, x, job);
  const Accumulator acc = multiply_chunks<T, true>(
      block.shared->stages, 0, ceil_div(others.count, CHUNK<T>),
      [&](Stage& stage, int chunk) {
        load_tile<T, TILE* int(sizeof(T))>(stage.b, others, chunk * CHUNK<T>, job.first);
      },
      [&](Stage& stage, int chunk) { fill_gradient_of_scores(block, x, job, chunk * CHUNK<T>, stage); });
  const float factor = x.kind == HINGE_SUM ? x.reduction : x.reduction * x.alpha();
#pragma unroll
  for (int r = 0; r < PER_THREAD; ++r) {
    const Coordinate at = coordinate<T>(threadIdx.x, r);
    const int i = job.row + at.row, d = job.first + at.col;
    if (i >= rows || d >= others.dim) continue;
    float sum = acc.at[r];
    if (x.HAS_GAINS) sum /= block.shared->gain[at.row];
    if (i < x.k)
      sum -= (block.shared->pull[0][i] + block.shared->pull[1][i]) *
             float(others.data[int64_t(i) * others.dim + d]);
    (job.of_images ? x.d_images : x.d_captions)[int64_t(i) * others.dim + d] =
        poisoned ? NOT_A_NUMBER : sum * factor;
  }
}

}  // namespace fused_vse::small
