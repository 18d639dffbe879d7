// What one thread does with its scores of a tile, for each statistic; how partial results merge.
//
// A statistic is an associative merge of items of at most 8 bytes:
//   prepare(acc)                 once, before the reductions
//   over(scores, anchor, first)  the item of what the thread has of one row or column: RowScores or
//                                ColumnScores; its number as an anchor, if it is one (else the item is not
//                                used); the number of the first of them
//   merge(a, b)                  of two items of the same anchor
// Scores that belong to no negative are -inf by then (Walk::leave_out).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "hopper_walk.h"

namespace fused_vse::hopper {

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float INFINITE = HUGE_VALF;

template <typename To, typename From>
DEVICE To bits_as(From from) {
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

  DEVICE static Item key(float score, int index) {
    // -0 equals 0 but has other bits; adding 0 leaves one zero.
    const uint32_t bits = bits_as<uint32_t>(score + 0.0f);
    const uint32_t ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
    return uint64_t{ordered} << 32 | (0xffffffffu - static_cast<uint32_t>(index));
  }
  DEVICE static float score(Item key) {
    const uint32_t ordered = static_cast<uint32_t>(key >> 32);
    return key ? bits_as<float>(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu)) : -INFINITE;
  }
  DEVICE static int64_t index(Item key) {
    return key ? int64_t{0xffffffffu - static_cast<uint32_t>(key)} : -1;
  }

  DEVICE void prepare(Fragment&) const {}
  template <typename Scores>
  DEVICE Item over(const Scores& scores, int, int first) const {
    float best = -INFINITE;
    int where = -1;
#pragma unroll
    for (int i = 0; i < Scores::COUNT; ++i) {
      where = scores[i] > best ? Scores::place(i) : where;
      best = scores[i] > best ? scores[i] : best;
    }
    return where < 0 ? 0 : key(best, first + where);
  }
  DEVICE static Item merge(Item a, Item b) { return a > b ? a : b; }
};

// What the rows' survey knows of the input (hopper_rows.cuh): maxima of |I|, |T|, |I_i|^2 and |T_j|^2, as the
// bits of a float, which order like |x| with infinity and then NaN at the top.
struct Bounds {
  uint32_t bits[4];

  // Whether any embedding is not finite, or |score| <= D max|I| max|T| might overflow.
  DEVICE bool poisoned(int64_t dimensions) const {
    const float bound = bits_as<float>(bits[0]) * bits_as<float>(bits[1]) * static_cast<float>(dimensions);
    return !(bound < 3.0e38f);  // NaN compares false; 0 times infinity is NaN
  }
};

// logsumexp = a reference + log_sum, by exp(a s) = exp2(c s). If `one` shift suits all of S, exp2(c s -
// shift) is the same for the row and the column of an entry and the sums are plain sums.
//
// |c s| <= reach = c max|I_i| max|T_j| leaves exponents in [-2 reach + top, top]. `top` lifts them to normal
// numbers, and is safe while the sum of `anchors` of them stays below the overflow.
struct Exponent {
  float c, shift;
  bool one;

  DEVICE static Exponent make(double scale, const Bounds& bounds, float anchors) {
    constexpr float LARGEST = 120.0f;  // exp2 of +-LARGEST is a normal float
    const float c = static_cast<float>(scale * 1.4426950408889634);
    const float norms = sqrtf(bits_as<float>(bounds.bits[2])) * sqrtf(bits_as<float>(bounds.bits[3]));
    const float reach = fabsf(c) * norms * 1.01f;
    const float top = fmaxf(2 * reach - LARGEST, 0.0f);
    return {c, reach - top, top + log2f(anchors) <= LARGEST};
  }
  DEVICE bool valid() const { return c > 0 && c < INFINITE; }

  // Explicitly fused: the compiler would otherwise keep 192 products c s for the columns.
  DEVICE float shifted(float s) const { return exp2_fast(fmaf(s, c, -shift)); }
  // The difference first: c times a score may have lost it (a s = 1e10, where a float's steps are 1024).
  DEVICE float relative(float s, float reference) const { return exp2_fast((s - reference) * c); }
};

struct LogsumexpOneExp {
  using Item = float;
  Exponent exponent;

  DEVICE void prepare(Fragment& acc) const {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
      for (int i = 0; i < ACCUMULATORS; ++i) acc[b][i] = exponent.shifted(acc[b][i]);
    }
  }
  template <typename Scores>
  DEVICE Item over(const Scores& shifted, int, int) const {
    float total = 0;
#pragma unroll
    for (int i = 0; i < Scores::COUNT; ++i) total += shifted[i];
    return total;
  }
  DEVICE static Item merge(Item a, Item b) { return a + b; }
};

DEVICE float finite(float reference) { return reference == -INFINITE ? 0.0f : reference; }

// total exp(a reference), where the reference is the largest score; nothing: 0 and -inf.
template <typename Total>
struct alignas(8) ScaledSum {
  Total total;
  float reference;

  DEVICE ScaledSum plus(const ScaledSum<float>& other, const Exponent& exponent) const {
    const float top = fmaxf(reference, other.reference);
    return {total * exponent.relative(reference, finite(top)) +
                other.total * exponent.relative(other.reference, finite(top)),
            top};
  }
};

// A thread's own maximum is its reference: no shuffles before the exponentials, and two more per merge.
struct LogsumexpTwoExp {
  using Item = ScaledSum<float>;
  Exponent exponent;

  DEVICE void prepare(Fragment&) const {}
  template <typename Scores>
  DEVICE Item over(const Scores& scores, int, int) const {
    float largest = -INFINITE, total = 0;
#pragma unroll
    for (int i = 0; i < Scores::COUNT; ++i) largest = fmaxf(largest, scores[i]);
    const float reference = finite(largest);
#pragma unroll
    for (int i = 0; i < Scores::COUNT; ++i) total += exponent.relative(scores[i], reference);
    return {total, largest};
  }
  DEVICE Item merge(Item a, Item b) const { return a.plus(b, exponent); }
};

// hinge_sum: sum of [s - threshold]+ and how many are above 0.
struct Hinge {
  struct alignas(8) Item {
    float total;
    int active;
  };
  const float* threshold;  // [R + C]
  int last_anchor;

  DEVICE void prepare(Fragment&) const {}
  template <typename Scores>
  DEVICE Item over(const Scores& scores, int anchor, int) const {
    Item item{0, 0};
    const float t = threshold[anchor < last_anchor ? anchor : last_anchor];
#pragma unroll
    for (int i = 0; i < Scores::COUNT; ++i) {
      const float excess = scores[i] - t;
      item.total += excess > 0 ? excess : 0.0f;
      item.active += excess > 0;
    }
    return item;
  }
  DEVICE static Item merge(Item a, Item b) { return {a.total + b.total, a.active + b.active}; }
};

// The partial results of one anchor, in ascending order of the slots.
DEVICE ScaledSum<double> merge_logsumexp(const Slots& slots, const Exponent& exponent) {
  ScaledSum<double> sum{0.0, -INFINITE};
#pragma unroll 8
  for (int slot = slots.begin; slot < slots.stop; ++slot)
    if (exponent.one)
      sum.total += slots.item<LogsumexpOneExp::Item>(slot);
    else
      sum = sum.plus(slots.item<LogsumexpTwoExp::Item>(slot), exponent);
  if (exponent.one)
    slots.carry(static_cast<float>(sum.total));
  else
    slots.carry(ScaledSum<float>{static_cast<float>(sum.total), sum.reference});
  return sum;
}

// Where one shift suits all of S, |a s| <= 84, and 0 is near enough to any score.
DEVICE double log_sum(const ScaledSum<double>& sum, const Exponent& exponent) {
  return (log2(sum.total) + (exponent.one ? exponent.shift : 0.0f)) * 0.6931471805599453;
}

struct HingeTotal {
  double total;
  int64_t active;
};

DEVICE HingeTotal merge_hinge(const Slots& slots) {
  HingeTotal sum{0.0, 0};
#pragma unroll 8
  for (int slot = slots.begin; slot < slots.stop; ++slot) {
    const Hinge::Item item = slots.item<Hinge::Item>(slot);
    sum.total += item.total;
    sum.active += item.active;
  }
  slots.carry(Hinge::Item{static_cast<float>(sum.total), static_cast<int>(sum.active)});
  return sum;
}

}  // namespace fused_vse::hopper
