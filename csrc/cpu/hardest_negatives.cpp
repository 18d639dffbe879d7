// hardest_negatives on the CPU (ops.py): the certified search, or every score where it does not apply.
//
// Backward: a gather and a scatter, written as one sum per output row, so that no two threads write one
// row: image i receives its own positive and hardest caption, and every caption whose hardest image it is.
#include "hardest.h"

#include "sources.h"

namespace fused_vse {
namespace {

template <typename T, typename Source>
bool search_everything(const Pass<T>& pass, Source& source, BestOfSides<T>* best) {
  std::vector<Best<T>> group_cols(GROUPS, Best<T>(pass.batch.m()));
  std::vector<Best<T>> panel_rows(TILE_PANELS, Best<T>(TILE_ROWS));
  const int64_t num_rows = pass.batch.row_anchors;

  const auto task = [&](const Strip<T>& strip) {
    const StripScores<T>& s = strip.scores;
    T row_max[STRIP_ROWS], col_max[PANEL];
    T* const score = &group_cols[strip.group].score[strip.col()];
    int64_t* const index = &group_cols[strip.group].index[strip.col()];
    std::copy_n(score, s.cols, col_max);
    kernels<T>().maxima(s, row_max, col_max);
    for (int64_t c = 0; c < s.cols; ++c) {
      if (col_max[c] == score[c]) continue;
      int64_t r = 0;
      while (s.row(r)[c] != col_max[c]) ++r;
      score[c] = col_max[c];
      index[c] = strip.row() + r;
    }
    for (int64_t r = 0; r < s.rows && strip.row() + r < num_rows; ++r)
      if (row_max[r] > best->rows.score[strip.row() + r])
        panel_rows[strip.panel].offer(
            strip.row_in_tile + r, row_max[r],
            strip.col() + (std::find(s.row(r), s.row(r) + s.cols, row_max[r]) - s.row(r)));
  };
  const auto finish = [&](const Tile& tile) {
    for (int64_t panel = 0; panel < tile.panels(); ++panel) {
      for (int64_t r = 0; r < std::min(tile.rows, num_rows - tile.row); ++r)
        best->rows.offer(tile.row + r, panel_rows[panel], r);
      panel_rows[panel] = Best<T>(TILE_ROWS);
    }
  };
  if (!pass.run(source, task, finish)) return false;
  for (const Best<T>& group : group_cols)
    for (int64_t c = 0; c < pass.batch.column_anchors; ++c) best->cols.offer(c, group, c);
  return true;
}

enum class Search { AUTO, EXACT, IN_FLOAT32, IN_BFLOAT16 };

template <Search search>
bool certified(const Batch& batch, const Embeddings<float>& embeddings, BestOfSides<float>* best) {
  if (search == Search::EXACT) return false;
  if (search == Search::AUTO)
    return batch.n() * batch.m() >= MIN_SEARCHED_SCORES &&
           search_certified(batch, embeddings, std::nullopt, best);
  const auto precision = search == Search::IN_FLOAT32 ? ScalarType::Float : ScalarType::BFloat16;
  STD_TORCH_CHECK(search_certified(batch, embeddings, precision, best),
                  "the certified search is not available");
  return true;
}

template <Search search, typename T>
bool find(const Batch& batch, const OptionalTensor& ceiling, BestOfSides<T>* best) {
  const auto among_all = [&](auto& source) {
    return source.is_bounded() && search_everything(Pass<T>(batch, ceiling), source, best);
  };
  if (!batch.captions || batch.similarity != DOT) return with_source<T>(batch, {}, among_all);
  Dots<T> source(batch);
  if constexpr (std::is_same_v<T, float>)
    if (!ceiling && source.is_bounded() && certified<search>(batch, source.e, best)) return true;
  return among_all(source);
}

template <Search search>
std::tuple<Tensor, Tensor> hardest_negatives(const Batch& batch, const OptionalTensor& ceiling) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    const Tensor score = empty({batch.anchors()}, SCALAR_TYPE<T>);
    const Tensor index = empty({batch.anchors()}, ScalarType::Long);
    BestOfSides<T> best(batch);
    if (find<search>(batch, ceiling, &best)) {
      best.report(data<T>(score), data<int64_t>(index));
    } else {
      fill(score, NOT_A_NUMBER<T>);
      fill(index, int64_t{-1});
    }
    return std::make_tuple(score, index);
  });
}

// d_scores: an entry's summands are added up in the accumulation type, and rounded once.
template <typename T>
void scatter(const Choice<T>& rows, const Choice<T>& cols, const T* d_positive, int64_t pair_count,
             Tensor& d_scores) {
  torch::stable::zero_(d_scores);
  with_elements(d_scores, [&](auto* g) {
    using Element = std::remove_pointer_t<decltype(g)>;
    gather(rows, cols, d_positive, pair_count,
           [&](int64_t i, const std::vector<T>& weights, const std::vector<int64_t>& columns) {
             std::vector<std::pair<int64_t, T>> entries;
             for (size_t a = 0; a < columns.size(); ++a) entries.emplace_back(columns[a], weights[a]);
             std::sort(entries.begin(), entries.end());
             T sum = 0;
             for (size_t a = 0; a < entries.size(); ++a) {
               const int64_t column = entries[a].first;
               sum += entries[a].second;
               if (a + 1 < entries.size() && entries[a + 1].first == column) continue;
               g[i * cols.size + column] = static_cast<Element>(sum);
               sum = 0;
             }
           });
  });
}

// The gradient of one side's embeddings.
template <typename T>
Tensor gather_embeddings(const Batch& batch, bool of_images, const Choice<T>& own, const Choice<T>& theirs,
                         const T* d_positive) {
  const Tensor others = contiguous_as(of_images ? *batch.captions : batch.images, SCALAR_TYPE<T>);
  const Tensor result = empty({own.size, others.size(1)}, SCALAR_TYPE<T>);
  if (batch.similarity == DOT) {
    gather_rows(own, theirs, d_positive, batch.pair_count, others, data<T>(result));
    return result;
  }
  const Tensor self = contiguous_as(of_images ? batch.images : *batch.captions, SCALAR_TYPE<T>);
  const int64_t d = others.size(1);
  fill(result, T(0));
  const auto add = of_images ? kernels<T>().order_sums_of_images : kernels<T>().order_sums_of_captions;
  gather(own, theirs, d_positive, batch.pair_count,
         [&](int64_t i, const std::vector<T>& weights, const std::vector<int64_t>& chosen) {
           std::vector<T> w(weights.size());
           std::vector<const T*> sources(weights.size());
           const T* const row = data<T>(self) + i * d;
           for (size_t a = 0; a < w.size(); ++a) {
             sources[a] = data<T>(others) + chosen[a] * d;
             const T s =
                 of_images ? Order<T>::score(row, sources[a], d) : Order<T>::score(sources[a], row, d);
             w[a] = Order<T>::over_distance(weights[a], s);
           }
           add(row, 1, sources.data(), w.size(), d, w.data(), 0, 1, data<T>(result) + i * d);
         });
  return result;
}

Gradients hardest_negatives_backward(const Batch& batch, const Tensor& score, const Tensor& index,
                                     const Tensor& d_positive, const Tensor& d_score, bool need_images,
                                     bool need_captions, bool accumulate_captions) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    const Needs needs{need_images, need_captions, accumulate_captions};
    if (is_poisoned<T>(batch, vector(score, "score", batch.anchors(), SCALAR_TYPE<T>)))
      return nan_gradients(batch, needs);
    const Tensor chosen = vector(index, "index", batch.anchors(), ScalarType::Long);
    const Tensor direct = upstream(d_positive, "d_positive", batch.pair_count, SCALAR_TYPE<T>);
    const Tensor g = upstream(d_score, "d_score", batch.anchors(), SCALAR_TYPE<T>);
    const int64_t num_rows = batch.row_anchors, n = batch.n(), m = batch.m();
    const Choice<T> rows{n, num_rows, batch.pair_row, data<T>(g), data<int64_t>(chosen)};
    const Choice<T> cols{m, batch.column_anchors, batch.pair_column, data<T>(g) + num_rows,
                         data<int64_t>(chosen) + num_rows};
    rows.check(m);
    cols.check(n);
    auto [d_images, d_captions] = empty_gradients(batch, needs);
    if (!batch.captions) {
      if (need_images) scatter(rows, cols, data<T>(direct), batch.pair_count, d_images);
      return Gradients(d_images, d_captions);
    }
    if (need_images)
      d_images =
          converted(gather_embeddings(batch, true, rows, cols, data<T>(direct)), d_images.scalar_type());
    if (need_captions)
      d_captions =
          converted(gather_embeddings(batch, false, cols, rows, data<T>(direct)), d_captions.scalar_type());
    return Gradients(d_images, d_captions);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_vse_cpu, CPU, m) {
  m.impl("hardest_negatives", TORCH_BOX(&WithBatch<&hardest_negatives<Search::AUTO>>::call));
  m.impl("hardest_negatives_backward", TORCH_BOX(&WithBatch<&hardest_negatives_backward>::call));
  // For tests and benchmarks: the searches by themselves.
  m.impl("exact_hardest_negatives", TORCH_BOX(&WithBatch<&hardest_negatives<Search::EXACT>>::call));
  m.impl("float32_hardest_negatives", TORCH_BOX(&WithBatch<&hardest_negatives<Search::IN_FLOAT32>>::call));
  m.impl("bfloat16_hardest_negatives", TORCH_BOX(&WithBatch<&hardest_negatives<Search::IN_BFLOAT16>>::call));
}

}  // namespace fused_vse
