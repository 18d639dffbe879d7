// hardest_negatives on the CPU (ops.py): the certified search, or every score where it does not apply.
//
// Backward: a gather and a scatter, written as one sum per output row, so that no two threads write one
// row: image i receives its own positive and hardest caption, and every caption whose hardest image it is.
#include "hardest.h"

#include "sources.h"

namespace fused_vse {
namespace {

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
  if (batch.captions && batch.similarity == DOT) {
    Pairwise<T> source(batch, {}, kernels<T>().dots);
    if (!source.e.has_bounded_dots()) return false;
    if constexpr (std::is_same_v<T, float>)
      if (!ceiling && certified<search>(batch, source.e, best)) return true;
    return search_everything(Pass<T>(batch, ceiling), source, best);
  }
  return with_source<T>(batch, {}, [&](auto& source) {
    return source.is_bounded() && search_everything(Pass<T>(batch, ceiling), source, best);
  });
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

// d_scores: an entry is the sum of what gather() found for it, in the accumulation type, rounded once.
template <typename T>
void scatter(const Choice<T>& rows, const Choice<T>& cols, const T* d_positive, int64_t pair_count,
             Tensor& d_scores) {
  torch::stable::zero_(d_scores);
  with_elements(d_scores, [&](auto* g) {
    using Element = std::remove_pointer_t<decltype(g)>;
    gather(rows, cols, d_positive, pair_count,
           [&](int64_t i, const std::vector<T>& weights, const std::vector<int64_t>& columns) {
             for (size_t a = 0; a < columns.size(); ++a)
               g[i * cols.size + columns[a]] = static_cast<Element>(weights[a]);
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
                                     bool need_captions, bool accumulate) {
  return dispatch(batch.images, [&](auto zero) {
    using T = decltype(zero);
    const Needs needs{need_images, need_captions, accumulate};
    if (is_poisoned(batch, vector_of<T>(score, "score", batch.anchors()))) return nan_gradients(batch, needs);
    const auto chosen = vector_of<int64_t>(index, "index", batch.anchors());
    const auto direct = upstream_of<T>(d_positive, "d_positive", batch.pair_count);
    const auto g = upstream_of<T>(d_score, "d_score", batch.anchors());
    const int64_t num_rows = batch.row_anchors, n = batch.n(), m = batch.m();
    const Choice<T> rows{n, num_rows, batch.pair_row, g.data(), chosen.data()};
    const Choice<T> cols{m, batch.column_anchors, batch.pair_column, g.data() + num_rows,
                         chosen.data() + num_rows};
    rows.check(m);
    cols.check(n);
    auto [d_images, d_captions] = empty_gradients(batch, needs);
    if (!batch.captions) {
      if (need_images) scatter(rows, cols, direct.data(), batch.pair_count, d_images);
      return Gradients(d_images, d_captions);
    }
    if (need_images)
      d_images = converted(gather_embeddings(batch, true, rows, cols, direct.data()), d_images.scalar_type());
    if (need_captions)
      d_captions =
          converted(gather_embeddings(batch, false, cols, rows, direct.data()), d_captions.scalar_type());
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
