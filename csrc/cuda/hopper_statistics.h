// What one thread does with its scores of a tile, for each statistic; how partial results merge.
//
// A statistic is an associative merge of items of at most 8 bytes:
//   prepare(acc)        once, before the reductions
//   over_columns(...)   the item of one of the thread's rows, over the columns that it holds
//   over_rows(...)      the item of one of the thread's columns, over the rows that it holds
//   merge(a, b)         of two items of the same anchor
// Scores that belong to no negative are -inf by then (Walk::leave_out).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hopper_walk.h"

namespace fused_vse::hopper {

FUSED_VSE_HD float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

constexpr float INFINITE = HUGE_VALF;

template <typename To, typename From>
FUSED_VSE_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// hardest: one 64-bit key orders by score, then by smaller index; 0 is "no negative". Its maximum does not
// depend on the order in which tiles arrive, so an integer atomic maximum in memory is deterministic and
// there are no partial results to write and to merge. Within a thread the score and the place, a constant,
// are apart: three instructions a score. The place in the score's last bits would take two, but has to
// rescore the runner-up to stay exact. Chosen for these counts; the alternative was not measured.
struct Hardest {
  using Item = uint64_t;

  FUSED_VSE_HD static Item key(float score, int index) {
    // -0 equals 0 but has other bits; adding 0 leaves one zero.
    const uint32_t bits = bits_as<uint32_t>(score + 0.0f);
    const uint32_t ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    return uint64_t{ordered} << 32 | (0xffffffffu - static_cast<uint32_t>(index));
  }
  FUSED_VSE_HD static float score(Item key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    return key ? bits_as<float>(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu)) : -INFINITE;
  }
  FUSED_VSE_HD static int64_t index(Item key) {
    return key ? int64_t{0xffffffffu - static_cast<uint32_t>(key)} : -1;
  }

  FUSED_VSE_HD void prepare(Fragment&) const {}
  // `first` is the number of the thread's first row or column.
  FUSED_VSE_HD Item over_columns(const Fragment& acc, int slot, int, int first) const {
    float best = -INFINITE;
    int where = -1;
    FUSED_VSE_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      FUSED_VSE_UNROLL
      for (int item = 0; item < LANE_COLS; ++item) {
        const float s = acc[slot / 2][accumulator(slot, chunk, item)];
        where = s > best ? item_column(chunk, item) : where;
        best = s > best ? s : best;
      }
    }
    return where < 0 ? 0 : key(best, first + where);
  }
  FUSED_VSE_HD Item over_rows(const Fragment& acc, int chunk, int item, int, int first) const {
    float best = -INFINITE;
    int where = -1;
    FUSED_VSE_UNROLL
    for (int slot = 0; slot < LANE_ROWS; ++slot) {
      const float s = acc[slot / 2][accumulator(slot, chunk, item)];
      where = s > best ? slot_row(slot) : where;
      best = s > best ? s : best;
    }
    return where < 0 ? 0 : key(best, first + where);
  }
  FUSED_VSE_HD static Item merge(Item a, Item b) { return a > b ? a : b; }
};

// What the rows' survey knows of the input (hopper_rows.cuh): maxima of |I|, |T|, |I_i|^2 and |T_j|^2, as the
// bits of a float, which order like |x| with infinity and then NaN at the top.
struct Bounds {
  uint32_t bits[4];

  // Whether any embedding is not finite, or |score| <= D max|I| max|T| might overflow.
  FUSED_VSE_HD bool poisoned(int64_t dimensions) const {
    const float bound = bits_as<float>(bits[0]) * bits_as<float>(bits[1]) * static_cast<float>(dimensions);
    return !(bound < 3.0e38f);  // NaN compares false; 0 times infinity is NaN
  }
};

// logsumexp, in units of log 2: exp(a s) = exp2(c s). If `one` shift suits all of S, e = exp2(c s - shift) is
// the same for the row and the column of an entry and the sums are plain sums.
//
// |c s| <= reach = c max|I_i| max|T_j| leaves exponents in [-2 reach + top, top]. `top` lifts them to normal
// numbers, and is safe while the sum of `anchors` of them stays below the overflow.
struct Exponent {
  float c, shift;
  bool one;

  // Explicitly fused: the compiler would otherwise keep 192 products c s for the columns.
  FUSED_VSE_HD float of(float s, float reference) const { return exp2_fast(fmaf(s, c, -reference)); }

  FUSED_VSE_HD static Exponent make(double scale, const Bounds& bounds, float anchors) {
    constexpr float LARGEST = 120.0f;  // exp2 of +-LARGEST is a normal float
    const float c = static_cast<float>(scale * 1.4426950408889634);
    const float norms = sqrtf(bits_as<float>(bounds.bits[2])) * sqrtf(bits_as<float>(bounds.bits[3]));
    const float reach = fabsf(c) * norms * 1.01f;
    const float top = fmaxf(2 * reach - LARGEST, 0.0f);
    return {c, reach - top, top + log2f(anchors) <= LARGEST};
  }
};

struct LogsumexpOneExp {
  using Item = float;
  Exponent exponent;

  FUSED_VSE_HD void prepare(Fragment& acc) const {
    FUSED_VSE_UNROLL
    for (int b = 0; b < BLOCKS; ++b) {
      FUSED_VSE_UNROLL
      for (int i = 0; i < ACCUMULATORS; ++i) acc[b][i] = exponent.of(acc[b][i], exponent.shift);
    }
  }
  FUSED_VSE_HD Item over_columns(const Fragment& acc, int slot, int, int) const {
    float total = 0;
    FUSED_VSE_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      FUSED_VSE_UNROLL
      for (int item = 0; item < LANE_COLS; ++item) total += acc[slot / 2][accumulator(slot, chunk, item)];
    }
    return total;
  }
  FUSED_VSE_HD Item over_rows(const Fragment& acc, int chunk, int item, int, int) const {
    float total = 0;
    FUSED_VSE_UNROLL
    for (int slot = 0; slot < LANE_ROWS; ++slot) total += acc[slot / 2][accumulator(slot, chunk, item)];
    return total;
  }
  FUSED_VSE_HD static Item merge(Item a, Item b) { return a + b; }
};

// total * exp2(reference); nothing: 0 * exp2(-inf). In the order of the planes of partial results.
template <typename Total>
struct ScaledSum {
  Total total;
  float reference;

  FUSED_VSE_HD static float finite(float reference) { return reference == -INFINITE ? 0.0f : reference; }
  FUSED_VSE_HD ScaledSum plus(Total other_total, float other_reference) const {
    const float top = fmaxf(reference, other_reference);
    return {
        total * exp2_fast(reference - finite(top)) + other_total * exp2_fast(other_reference - finite(top)),
        top};
  }
  // Of nothing: -inf. A NaN, from a scale that is one, stays.
  FUSED_VSE_HD double logsumexp() const {
    return total == 0 ? -HUGE_VAL : (reference + log2(static_cast<double>(total))) * 0.6931471805599453;
  }
};

// A thread's own maximum is its reference: no shuffles before the exponentials, and two more per merge.
struct LogsumexpTwoExp {
  using Item = ScaledSum<float>;
  Exponent exponent;

  FUSED_VSE_HD void prepare(Fragment&) const {}
  FUSED_VSE_HD Item over_columns(const Fragment& acc, int slot, int, int) const {
    float largest = -INFINITE, total = 0;
    FUSED_VSE_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      FUSED_VSE_UNROLL
      for (int item = 0; item < LANE_COLS; ++item)
        largest = fmaxf(largest, acc[slot / 2][accumulator(slot, chunk, item)]);
    }
    largest *= exponent.c;  // which is positive
    const float reference = Item::finite(largest);
    FUSED_VSE_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      FUSED_VSE_UNROLL
      for (int item = 0; item < LANE_COLS; ++item)
        total += exponent.of(acc[slot / 2][accumulator(slot, chunk, item)], reference);
    }
    return {total, largest};
  }
  FUSED_VSE_HD Item over_rows(const Fragment& acc, int chunk, int item, int, int) const {
    float largest = -INFINITE, total = 0;
    FUSED_VSE_UNROLL
    for (int slot = 0; slot < LANE_ROWS; ++slot)
      largest = fmaxf(largest, acc[slot / 2][accumulator(slot, chunk, item)]);
    largest *= exponent.c;
    const float reference = Item::finite(largest);
    FUSED_VSE_UNROLL
    for (int slot = 0; slot < LANE_ROWS; ++slot)
      total += exponent.of(acc[slot / 2][accumulator(slot, chunk, item)], reference);
    return {total, largest};
  }
  FUSED_VSE_HD static Item merge(Item a, Item b) { return a.plus(b.total, b.reference); }
};

// hinge_sum: sum of [s - threshold]+ and how many are above 0; threshold = p - margin of the anchor.
struct Hinge {
  struct Item {
    float total;
    int active;
  };
  const float* positive;  // [K]
  float margin;
  int num_pairs;

  FUSED_VSE_HD float threshold(int anchor) const {
    return anchor < num_pairs ? positive[anchor] - margin : INFINITE;
  }
  FUSED_VSE_HD static void add(Item& item, float score, float threshold) {
    const float excess = score - threshold;
    item.total += excess > 0 ? excess : 0.0f;
    item.active += excess > 0;
  }
  FUSED_VSE_HD void prepare(Fragment&) const {}
  FUSED_VSE_HD Item over_columns(const Fragment& acc, int slot, int anchor, int) const {
    Item item{0, 0};
    const float t = threshold(anchor);
    FUSED_VSE_UNROLL
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      FUSED_VSE_UNROLL
      for (int i = 0; i < LANE_COLS; ++i) add(item, acc[slot / 2][accumulator(slot, chunk, i)], t);
    }
    return item;
  }
  FUSED_VSE_HD Item over_rows(const Fragment& acc, int chunk, int i, int anchor, int) const {
    Item item{0, 0};
    const float t = threshold(anchor);
    FUSED_VSE_UNROLL
    for (int slot = 0; slot < LANE_ROWS; ++slot) add(item, acc[slot / 2][accumulator(slot, chunk, i)], t);
    return item;
  }
  FUSED_VSE_HD static Item merge(Item a, Item b) { return {a.total + b.total, a.active + b.active}; }
};

// The partial results of one anchor, in ascending order of the slots.
FUSED_VSE_HD ScaledSum<double> merge_logsumexp(const float* partial, const Slots& slots,
                                               const Exponent& exponent) {
  ScaledSum<double> sum{0.0, exponent.one ? exponent.shift : -INFINITE};
  FUSED_VSE_UNROLL_BY_8
  for (int slot = slots.begin; slot < slots.stop; ++slot) {
    const float total = partial[partial_at(slot, 0, slots.anchors, slots.anchor)];
    if (exponent.one)
      sum.total += total;
    else
      sum = sum.plus(total, partial[partial_at(slot, 1, slots.anchors, slots.anchor)]);
  }
  return sum;
}

struct HingeTotal {
  double total;
  int64_t active;
};

FUSED_VSE_HD HingeTotal merge_hinge(const float* partial, const Slots& slots) {
  HingeTotal sum{0.0, 0};
  FUSED_VSE_UNROLL_BY_8
  for (int slot = slots.begin; slot < slots.stop; ++slot) {
    sum.total += partial[partial_at(slot, 0, slots.anchors, slots.anchor)];
    sum.active += bits_as<int>(partial[partial_at(slot, 1, slots.anchors, slots.anchor)]);
  }
  return sum;
}

}  // namespace fused_vse::hopper
