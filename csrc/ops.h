// Every op of the library, documented once. A backend registers them under torch.ops.fused_vse_<name>
// with the schemas below; fused_vse/statistics.py differentiates through them and
// fused_vse/backends/fakes.py tells torch.compile the shapes of their results.
//
//   images   [N, D]  I, float16 | bfloat16 | float32 | float64, any strides
//   captions [M, D]  T, same dtype
//   image_ids [N], caption_ids [M]  int64, or both None for the row numbers: column j is a negative of
//            row i iff caption_ids[j] != image_ids[i]
//   num_pairs  K: row k and column k are a pair for k < K; later rows and columns are never anchors
//
// S = I T^t is never stored as a whole, unless it is small (see `scores`). A score s_ij, the results and
// all sums are in the accumulation type: double for float64, float for everything else. Statistics have two
// rows: row 0 for image anchors (over the columns j < M), row 1 for caption anchors (over the rows i < N).
// If any embedding is NaN or infinite, or so large that a score could overflow, every statistic is NaN,
// and so are the gradients. Results are bitwise reproducible and do not depend on the number of threads.
//
//   positive [K]      p_k = <I_k, T_k>
//   scores [N * M]    S itself, row by row, kept for the backward pass if save_scores and
//                     N * M <= MAX_SAVED_SCORES (tiles.h); else [0]
//   d_images [N, D], d_captions [M, D]  in the embeddings' dtype; [0] if not need_images / need_captions
#pragma once

// hardest: score = max of the negatives, -inf if there are none; index = the smallest that attains it,
// -1 if there is none. The backward pass is a gather and a scatter: only the indexed entries of S have a
// gradient.
#define HARDEST_NEGATIVES_ARGUMENTS                                                             \
  "(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, SymInt num_pairs) " \
  "-> (Tensor positive, Tensor score, Tensor index)"
#define HARDEST_NEGATIVES_SCHEMA "hardest_negatives" HARDEST_NEGATIVES_ARGUMENTS
#define HARDEST_NEGATIVES_BACKWARD_SCHEMA                                                \
  "hardest_negatives_backward(Tensor d_positive, Tensor d_score, Tensor positive, "      \
  "Tensor index, Tensor images, Tensor captions, bool need_images, bool need_captions) " \
  "-> (Tensor d_images, Tensor d_captions)"

// logsumexp = log sum exp(a s) over the negatives, a = scale * (scale_tensor [] or 1), -inf if there are
// none; always double: at a = 100 the rounding of a float32 sum of 60 would be most of the gradient's error.
// G_ij = exp(a s_ij - lse_i) g_i + exp(a s_ij - lse_j) g_j for a negative, else 0;
// d_images = a G T, d_captions = a G^t I, d_scale [] = scale sum_ij G_ij s_ij, for
// scale_tensor.
#define NEGATIVE_LOGSUMEXP_SCHEMA                                                               \
  "negative_logsumexp(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, " \
  "SymInt num_pairs, float scale, Tensor? scale_tensor, bool save_scores) "                     \
  "-> (Tensor positive, Tensor logsumexp, Tensor scores)"
#define NEGATIVE_LOGSUMEXP_BACKWARD_SCHEMA                                                  \
  "negative_logsumexp_backward(Tensor d_positive, Tensor d_logsumexp, Tensor logsumexp, "   \
  "Tensor scores, Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, " \
  "float scale, Tensor? scale_tensor, bool need_images, bool need_captions) "               \
  "-> (Tensor d_images, Tensor d_captions, Tensor d_scale)"

// hinge_sum = sum [s - (p - margin)]+ over the negatives; active = how many of them are above 0 (int64).
// G_ij = [s_ij > p_i - margin] g_i + [s_ij > p_j - margin] g_j for a negative, else 0; d_images = G T,
// d_captions = G^t I, and the positive receives -active * g from its own anchors.
#define HINGE_SUM_SCHEMA                                                               \
  "hinge_sum(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, " \
  "SymInt num_pairs, float margin, bool save_scores) "                                 \
  "-> (Tensor positive, Tensor hinge_sum, Tensor active, Tensor scores)"
#define HINGE_SUM_BACKWARD_SCHEMA                                                              \
  "hinge_sum_backward(Tensor d_positive, Tensor d_hinge_sum, Tensor positive, Tensor active, " \
  "Tensor scores, Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, "    \
  "float margin, bool need_images, bool need_captions) -> (Tensor d_images, Tensor d_captions)"

// normalized [N, D] = rows / max(|rows|_2, 1e-12), inverse_norm [N] in the accumulation type.
#define L2_NORMALIZE_SCHEMA "l2_normalize(Tensor rows) -> (Tensor normalized, Tensor inverse_norm)"
#define L2_NORMALIZE_BACKWARD_SCHEMA \
  "l2_normalize_backward(Tensor d_normalized, Tensor normalized, Tensor inverse_norm) -> Tensor"

// The same statistics of a given score matrix, under torch.ops.fused_vse_<name>_scores:
//   scores [N, M]  S, float16 | bfloat16 | float32 | float64, any strides; d_scores likewise, contiguous
// positive [K] is its diagonal. Rows and columns that are no anchors do not look at each other: those
// scores are not read and have gradient 0.
#define SCORES_HARDEST_NEGATIVES_SCHEMA                                       \
  "hardest_negatives(Tensor scores, Tensor? image_ids, Tensor? caption_ids, " \
  "SymInt num_pairs) -> (Tensor positive, Tensor score, Tensor index)"
#define SCORES_HARDEST_NEGATIVES_BACKWARD_SCHEMA                                    \
  "hardest_negatives_backward(Tensor d_positive, Tensor d_score, Tensor positive, " \
  "Tensor index, Tensor scores) -> Tensor d_scores"
#define SCORES_NEGATIVE_LOGSUMEXP_SCHEMA                                       \
  "negative_logsumexp(Tensor scores, Tensor? image_ids, Tensor? caption_ids, " \
  "SymInt num_pairs, float scale, Tensor? scale_tensor) "                      \
  "-> (Tensor positive, Tensor logsumexp)"
#define SCORES_NEGATIVE_LOGSUMEXP_BACKWARD_SCHEMA                                         \
  "negative_logsumexp_backward(Tensor d_positive, Tensor d_logsumexp, Tensor logsumexp, " \
  "Tensor scores, Tensor? image_ids, Tensor? caption_ids, float scale, "                  \
  "Tensor? scale_tensor) -> (Tensor d_scores, Tensor d_scale)"
#define SCORES_HINGE_SUM_SCHEMA                                                         \
  "hinge_sum(Tensor scores, Tensor? image_ids, Tensor? caption_ids, SymInt num_pairs, " \
  "float margin) -> (Tensor positive, Tensor hinge_sum, Tensor active)"
#define SCORES_HINGE_SUM_BACKWARD_SCHEMA                                                 \
  "hinge_sum_backward(Tensor d_positive, Tensor d_hinge_sum, Tensor positive, "          \
  "Tensor active, Tensor scores, Tensor? image_ids, Tensor? caption_ids, float margin) " \
  "-> Tensor d_scores"

// With the order similarity s_ij = -|max(0, T_j - I_i)|_2 (arXiv 1511.06361) in place of the dot product,
// under torch.ops.fused_vse_<name>_order: hardest_negatives, negative_logsumexp, hinge_sum and their
// backward ops, with the schemas above. Where a difference has no positive part the gradient is 0.

// A whole loss of a small batch:
//   kind  0 all negatives, 1 hardest negative, 2 its smooth form, 3 sum of hinges
//   loss [] = the sum over both rows of the anchors' losses, times image_weight or caption_weight, divided by
//     K if mean; alpha = scale * (scale_tensor [] or 1) is 1 / temperature, 1 for the hinge of the hardest
//   d_scale []  the loss's derivative, for scale_tensor
//   positive, score, index  as of hardest_negatives
#define LOSS_ARGUMENTS                                                            \
  "(Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, "     \
  "SymInt num_pairs, int kind, float scale, Tensor? scale_tensor, float margin, " \
  "float image_weight, float caption_weight, bool mean"
// of fused_vse_cuda, for float16, bfloat16 and float32 and N, M <= 512: one launch, gradients included,
//   d_images [N, D], d_captions [M, D]  the loss's derivatives; float32 for every dtype: an upstream that
//     saves them from underflow in float16 comes later
#define SMALL_LOSS_SCHEMA                                                                         \
  "small_loss" LOSS_ARGUMENTS                                                                     \
  ", bool need_images, bool need_captions) -> (Tensor loss, Tensor d_images, Tensor d_captions, " \
  "Tensor d_scale, Tensor positive, Tensor score, Tensor index)"
// and its backward pass: the gradients times upstream [] float32, d_images and d_captions then rounded, once,
// to the dtype of `like`: the embeddings', of which nothing else is looked at.
#define SCALE_GRADIENTS_SCHEMA                                                            \
  "scale_gradients(Tensor upstream, Tensor d_images, Tensor d_captions, Tensor d_scale, " \
  "Tensor like) -> (Tensor d_images, Tensor d_captions, Tensor d_scale)"
// of fused_vse_cpu, for N and M so small that S may be stored:
//   d_scores [N, M]  the loss's derivatives by all scores, for kinds 0 and 3; else [0, 0]
//   d_positive [K], d_score [2, K]  those that hardest_negatives_backward takes, for kinds 1 and 2; else [0],
//     [2, 0]
#define ONE_TILE_LOSS_SCHEMA                                                \
  "one_tile_loss" LOSS_ARGUMENTS                                            \
  ") -> (Tensor loss, Tensor d_scores, Tensor d_positive, Tensor d_score, " \
  "Tensor d_scale, Tensor positive, Tensor score, Tensor index)"
// and its backward pass for kinds 0 and 3: d_images = upstream G T, d_captions = upstream G^t I, with G =
// d_scores and upstream [].
#define ONE_TILE_LOSS_BACKWARD_SCHEMA                                        \
  "one_tile_loss_backward(Tensor upstream, Tensor d_scores, Tensor images, " \
  "Tensor captions, bool need_images, bool need_captions) "                  \
  "-> (Tensor d_images, Tensor d_captions)"
