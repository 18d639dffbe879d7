// Which source a batch has, and the backward pass of the dense statistics.
#pragma once

#include "gemm.h"
#include "given.h"
#include "order.h"

namespace fused_vse {

// f(source)
template <typename T, typename F>
auto with_source(const Batch& batch, const KeptScores& kept, const F& f) {
  if (!batch.captions) {
    Given<T> source(batch);
    return f(source);
  }
  if (batch.similarity == ORDER) {
    Order<T> source(batch, kept);
    return f(source);
  }
  Gemm<T> source(batch, kept);
  return f(source);
}

// S again (or kept), in its place G by write(strip, g), the pairs' d_positive added, and what follows of it.
template <typename T, typename Write>
Gradients dense_gradients(const Pass<T>& pass, const Tensor& scores, const Tensor& d_positive,
                          const Needs& needs, const Write& write) {
  const Batch& batch = pass.batch;
  const int64_t kept = scores.numel();
  STD_TORCH_CHECK(scores.scalar_type() == SCALAR_TYPE<T>, "scores has the wrong dtype");
  STD_TORCH_CHECK(kept == 0 || (batch.captions && kept == batch.n() * batch.m()),
                  "scores must have N * M elements or none");
  STD_TORCH_CHECK(batch.pair_count == 0 || batch.pair_row + batch.pair_count <= batch.row_anchors ||
                      batch.pair_column + batch.pair_count <= batch.column_anchors,
                  "pair_count: there are pairs without an anchor");
  const std::vector<T> direct = upstream_of<T>(d_positive, "d_positive", batch.pair_count);
  return with_source<T>(batch, {scores, true}, [&](auto& source) {
    typename std::decay_t<decltype(source)>::Sink sink(source, batch, direct.data(), needs);
    const auto task = [&](const Strip<T>& strip) {
      const GradientStrip<T> g = sink.at(strip);
      write(strip, g);
      sink.complete(strip, g);
    };
    const bool done = pass.run(source, task, [&](const Tile& tile) { sink.finish(tile); });
    return done ? sink.result() : nan_gradients(batch, needs);
  });
}

}  // namespace fused_vse
