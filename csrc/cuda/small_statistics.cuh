// Statistics of an anchor's negatives: of one segment, merged, and what loss and gradient follow from them.
//
// alpha = 1 / temperature, p the positive's score, m the margin, h = max, w the weight of the direction:
//   ALL_NEGATIVES   z = alpha (h + m - p) + log(sum)   loss = log(1 + exp z)
//                   dloss/ds = alpha sigmoid(z) exp(alpha (s - h)) / sum, dloss/dp = -alpha sigmoid(z)
//   HARDEST         v = h + m - p                      loss = alpha [v]+
//   HARDEST_SMOOTH                                     loss = log(1 + exp(alpha v))
//   HINGE_SUM       loss = sum [s - (p - m)]+,         dloss/ds = [s > p - m], dloss/dp = -active
// Sums are relative to the maximum, so that nothing overflows and no digits of a large logarithm are lost.
#pragma once

#include <cmath>
#include <limits>

#include "small_plan.h"

namespace fused_vse::small {

constexpr float NONE = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// score(i) of the entries [begin, end) of a row or column, negative(i) whether it is a negative, first + i
// its index; threshold = p - m, for HINGE_SUM.
template <typename Score, typename Negative>
DEVICE Statistic statistic_of(Loss loss, int begin, int end, int first, float alpha, float threshold,
                              const Score& score, const Negative& negative) {
  Statistic x{-NONE, -1, 0, 0};
  for (int i = begin; i < end; ++i)
    if (negative(i) && (score(i) > x.max || x.index < 0)) {
      x.max = score(i);
      x.index = first + i;
    }
  if (loss != ALL_NEGATIVES && loss != HINGE_SUM) return x;
  for (int i = begin; i < end; ++i) {
    if (!negative(i)) continue;
    if (loss == HINGE_SUM) {
      const float hinge = score(i) - threshold;
      if (hinge > 0) {
        x.sum += hinge;
        x.moment += 1;
      }
    } else {
      const float below = score(i) - x.max, e = expf(alpha * below);
      x.sum += e;
      x.moment += e * below;
    }
  }
  return x;
}

// Of `count` parts in ascending order of their indices: first the maximum, then what is relative to it, so
// that no load and no exponential waits for another.
template <typename Part>
DEVICE Statistic merged(Loss loss, float alpha, int count, const Part& part) {
  Statistic x{-NONE, -1, 0, 0};
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const Statistic y = part(i);
    if (y.index >= 0 && (y.max > x.max || x.index < 0)) {
      x.max = y.max;
      x.index = y.index;
    }
  }
  if (loss != ALL_NEGATIVES && loss != HINGE_SUM) return x;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const Statistic y = part(i);
    if (y.index < 0) continue;
    const float below = loss == ALL_NEGATIVES ? y.max - x.max : 0, scale = expf(alpha * below);
    x.sum += scale * y.sum;
    x.moment += scale * (y.moment + y.sum * below);
  }
  return x;
}

// An entry s of S at place `index` of the anchor's row or column receives
//   ALL_NEGATIVES  exp(alpha (s - reference)) weight      HINGE_SUM  [s > reference] weight
//   HARDEST*       [index == reference] weight
// and the anchor's positive -pull; all without the factor alpha and the reduction's.
struct Anchor {
  float reference, weight, pull;
  float loss, d_alpha;
};

// What gives no gradient to any score.
HOST_DEVICE constexpr Anchor no_anchor() { return {std::numeric_limits<float>::max(), 0, 0, 0, 0}; }

DEVICE Anchor anchor_of(Loss loss, const Statistic& x, float positive, float alpha, float margin,
                        float weight) {
  Anchor anchor = no_anchor();
  if (x.index < 0) return anchor;
  const float v = (x.max - positive) + margin;
  if (loss == HINGE_SUM) {
    anchor.reference = positive - margin;
    anchor.weight = weight;
    anchor.pull = x.moment * weight;
    anchor.loss = x.sum * weight;
    return anchor;
  }
  float slope = v > 0 ? 1 : 0;  // of the loss by z, or by alpha v
  anchor.reference = float(x.index);
  if (loss == HARDEST) {
    anchor.loss = alpha * v * slope * weight;
    anchor.d_alpha = v * slope * weight;
  } else {
    const float z = alpha * v + (loss == ALL_NEGATIVES ? logf(x.sum) : 0);
    slope = 1 / (1 + expf(-z));
    anchor.loss = (fmaxf(z, 0) + log1pf(expf(-fabsf(z)))) * weight;
    anchor.d_alpha = slope * weight * (loss == ALL_NEGATIVES ? v + x.moment / x.sum : v);
  }
  anchor.pull = slope * weight;
  anchor.weight = anchor.pull;
  if (loss == ALL_NEGATIVES) {
    anchor.reference = x.max;
    anchor.weight = anchor.pull / x.sum;
  }
  return anchor;
}

// The gradient of a score with respect to one of its two anchors.
DEVICE float gradient_of(Loss loss, float alpha, float s, int index, float reference, float weight) {
  if (loss == ALL_NEGATIVES) return expf(alpha * (s - reference)) * weight;
  if (loss == HINGE_SUM) return s > reference ? weight : 0;
  return float(index) == reference ? weight : 0;
}

// A power of two that lifts `largest` to [2^14, 2^15), for float16.
DEVICE float gain_of(float largest) {
  return largest > 0 ? ldexpf(1, min(14 - ilogbf(largest), 126)) : 1;  // its inverse is a normal number
}

}  // namespace fused_vse::small
