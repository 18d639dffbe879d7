"""Bugs in the C++ of the cpu backend."""

from . import Bug

LOGSUMEXP, HARDEST, SMALL = "negative_logsumexp.cpp", "hardest.h", "small_loss.cpp"
KERNELS, ORDER, SEARCH = "kernels.inl", "order.h", "certified_search.cpp"


def bug(name: str, file: str, old: str, new: str, equivalent: str = "") -> Bug:
    return Bug(name, f"csrc/cpu/{file}", old, new, equivalent=equivalent)


BUGS = [
    bug("sums are not rescaled when the maximum rises", LOGSUMEXP, "    if (sum_[i] > 0) sum_[i] *= std::exp(a_ * (double(maximum_[i]) - double(maximum)));\n", ""),
    bug("a sum merges as if its maximum were the same", LOGSUMEXP, "sum_[i] += distance == 0 ? sum : sum * std::exp(a_ * distance);", "sum_[i] += sum;"),
    bug("the groups' columns are not merged", LOGSUMEXP, "for (const RunningSums<T>& group : group_cols) cols.merge(c, group);", "cols.merge(c, group_cols[0]);"),
    bug("far log-sums overflow", LOGSUMEXP, "if (std::fabs(log_sum) > FAR) {", "if (false) {"),
    bug("the gradient lacks its scale", LOGSUMEXP, "T(a * g[i] * std::exp(-log_sum))", "T(g[i] * std::exp(-log_sum))"),
    bug("hinges: counts of the columns are lost", "anchor_sums.h", "double(col_first[c]), Second(col_second[c]));", "double(col_first[c]), 0);"),
    bug("hinges: the kink has a gradient", KERNELS, "(x > zero ? weight : zero) +", "(x >= zero ? weight : zero) +"),
    bug("hinges: columns against the rows' thresholds", KERNELS, "- access.load(col_threshold + c);\n        access.store(col_sum", "- threshold;\n        access.store(col_sum"),
    bug("tail of a row counts as exp(0 - lse)", KERNELS, "        // What lies beyond the row must vanish: with 0 its exponential may be infinite.\n        const Vec<T> s = access.load(row + c, EXCLUDED<T>);", "        const Vec<T> s = access.load(row + c);"),
    bug("the last excluded column of a panel", "pass.h", "strip.col() + strip.cols(),\n                         [&](int64_t j)", "strip.col() + strip.cols() - 1,\n                         [&](int64_t j)"),
    bug("ids: the last of equal columns stays", "batch.h", "return col_ids[c] <= row_ids[i]; });\n      ranges_[i] = {begin - first, end - first};", "return col_ids[c] <= row_ids[i]; });\n      ranges_[i] = {begin - first, end - first - 1};"),
    bug("pairs excluded without their offset", "batch.h", "const int64_t k = row - row_, column = column_ + k;", "const int64_t k = row - row_, column = k;"),
    bug("rows behind the anchors are not looked at", "tiles.h", "add_rows(batch.row_anchors, batch.n(), batch.column_anchors);", ""),
    bug("a second tile overwrites the gradient", "gemm.h", "matmul_add(out, g, others, is_first ? 0 : 1, 1);", "matmul_add(out, g, others, 0, 1);"),
    bug("the gradient starts from what was in memory", "gemm.h", "matmul_add(out, g, others, is_first ? 0 : 1, 1);", "matmul_add(out, g, others, 1, 1);"),
    bug("rows of no tile keep what was in memory", "gemm.h", "      torch::stable::zero_(rest);\n", ""),
    bug("ties go to the larger index", HARDEST, "(s == score[i] && where < index[i])", "(s == score[i] && where > index[i])"),
    bug("the panels' rows are not forgotten", HARDEST, "        panel_rows.forget(at);\n", ""),
    bug("an anchor chosen twice counts once", HARDEST, "            weights[a] += weight;\n            return;", "            return;"),
    bug("whole loss: gradient without upstream", SMALL, "d_score[a] = data<T>(saved_two)[a] * factor;", "d_score[a] = data<T>(saved_two)[a];"),
    bug("whole loss: the weight of the other direction", SMALL, "(a < k ? image_weight : caption_weight)", "(a < k ? caption_weight : image_weight)"),
    bug("whole loss: the temperature's gradient through the scores", SMALL, "      by_alpha += double(*data<T>(through_scores));\n", ""),
    bug("whole loss: input that may overflow", SMALL, "!source.e.has_bounded_dots() ||", ""),
    bug("order: the images' gradient has the captions' sign", KERNELS, "(IMAGES ? weight : -weight)", "weight"),
    bug("given scores that would overflow", "given.h", "< std::numeric_limits<T>::max() / 4;", "<= std::numeric_limits<T>::max();"),
    bug("given scores: what no anchor sees keeps memory", "given.h", "      torch::stable::zero_(unseen);\n", ""),
    bug("search: half of the error's bound", SEARCH, "rounding * std::fabs(top) - 2 * error;", "rounding * std::fabs(top) - 0.001 * error;"),
    bug("search: excluded pairs of the other side", SEARCH, "ExcludedPairs(batch, true), &found.cols", "ExcludedPairs(batch), &found.cols"),
    bug("search: candidates beyond the list are dropped", SEARCH, "      overflowed_[a] = 1;\n", ""),
    bug("softplus: half of the exponential", KERNELS, "value = max<T>(x, zero) + log1p(y);", "value = max<T>(x, zero) + log1p(y + 1) - log1p(broadcast<T>(1));"),
    bug("softplus: entries of two anchors count twice", "softplus_sum.cpp", "      std::fill_n(col_sum, strip.cols(), T(0));  // an entry counts once\n", ""),
    bug("softplus: positives without a minus in the bias's sum", "softplus_sum.cpp", "(of_rows ? row_slope[r] : col_slope[c]) -= T(sigmoid(-x));", "(of_rows ? row_slope[r] : col_slope[c]) += T(sigmoid(-x));"),
    bug("softplus: the score of a positive stays taken", "softplus_sum.cpp", "            strip.scores.s[r * strip.scores.ld + c] = score;\n", ""),
]  # fmt: skip
