"""Every op of the library, once: its schema, what it computes, and the shapes of its results.

A backend implements them under `torch.ops.fused_vse_<name>`: the libraries of csrc and the functions of
backends/triton hold implementations only. statistics.py differentiates through them.

The batch, their first arguments:
    images [N, D], captions [M, D]  I and T; float16 | bfloat16 | float32 | float64, one dtype, any strides.
        captions None: images is S [N, M] itself, a given score matrix.
    image_ids [N], caption_ids [M]  int64, or both None. Column j is a negative of row i iff
        caption_ids[j] != image_ids[i]; without ids, iff they are no pair.
    row_anchors R, column_anchors C  The rows i < R are anchors and see all columns; the columns j < C are
        anchors and see all rows. The other rows and columns do not look at each other: those scores are
        neither computed nor read.
    pair_row, pair_column, pair_count  Row pair_row + k and column pair_column + k are a pair, for
        k < pair_count. One process with K pairs has (R, C, pair_row, pair_column, pair_count) =
        (K, K, 0, 0, K); a chunk of the columns of all ranks has others.
    similarity  DOT: s_ij = <I_i, T_j>; ORDER: s_ij = -|max(0, T_j - I_i)|_2 (arXiv 1511.06361), whose
        gradient is 0 where the difference has no positive part. Of no meaning where S is given.

S is never stored as a whole, unless it is small (see `scores`). Scores, statistics and sums are in the
accumulation type: float64 for float64, float32 for everything else. A statistic has R + C elements: one for
each row anchor, then one for each column anchor. If an embedding is NaN or infinite, or so large that a score
could overflow, or a given score that an anchor sees is, then every statistic is NaN. Results are bitwise
reproducible, and do not depend on the number of threads where no library's GEMM decides.

Options of several ops:
    ceiling [R + C] or None  Only negatives with s <= ceiling of the anchor count for that anchor.
    save_scores  The result `scores` is then S [N * M], row by row, kept for the backward pass, if N * M <=
        MAX_SAVED_SCORES; else it is [0], as for a given S.

Backward ops take the batch and the options, what the forward pass gave (which may have been merged from
several parts of the columns), and the derivatives of the objective:
    d_positive [pair_count]  by the scores of the pairs
    d_images [N, D], d_captions [M, D]  in the embeddings' dtype; [0] if not needed. Where S is given,
        d_images is its gradient [N, M], and d_captions [0].
    accumulate  Both gradients of embeddings come in the accumulation type, to be summed with others.
Where the statistic of the first row anchor or of the first column anchor is NaN, all gradients are.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

DOT, ORDER = range(2)
# Kinds of small_loss.
ALL_NEGATIVES, HARDEST, HARDEST_SMOOTH, HINGE_SUM = range(4)

# S is kept from the forward to the backward pass when it has at most this many entries: that saves one
# GEMM of four and stays a fixed workspace (16 MiB in float32). csrc/cpu/tiles.h has the same number.
MAX_SAVED_SCORES = 1 << 22


class Batch(NamedTuple):
    """What every statistic is taken of, as the ops take it; the module's docstring explains the fields."""

    images: Tensor  # [N, D], or S [N, M]
    captions: Tensor | None  # [M, D]
    image_ids: Tensor | None  # [N] int64
    caption_ids: Tensor | None  # [M] int64
    row_anchors: int
    column_anchors: int
    pair_row: int
    pair_column: int
    pair_count: int
    similarity: int


class Op(NamedTuple):
    arguments: str
    results: str
    fake: Callable

    def schema(self, name: str) -> str:
        return f"{name}({self.arguments}) -> ({self.results})"


OPS: dict[str, Op] = {}
_BATCH = (
    "Tensor images, Tensor? captions, Tensor? image_ids, Tensor? caption_ids, SymInt row_anchors,"
    " SymInt column_anchors, SymInt pair_row, SymInt pair_column, SymInt pair_count, int similarity"
)
_NEEDS = "bool need_images, bool need_captions, bool accumulate"
_GRADIENTS = "Tensor d_images, Tensor d_captions"


def _op(arguments: str, results: str):
    """The decorated function is the op's fake. One that has the batch takes it as a `Batch`."""

    def add(function):
        fake = function
        if arguments.startswith(_BATCH):
            width = len(Batch._fields)
            fake = lambda *values: function(Batch(*values[:width]), *values[width:])  # noqa: E731
        OPS[function.__name__] = Op(arguments, results, fake)
        return function

    return add


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: of the scores, the sums and the loss."""
    # Not torch.promote_types, which torch 2.10 cannot trace in torch.compile.
    return torch.float64 if dtype is torch.float64 else torch.float32


@_op(_BATCH, "Tensor positive")
def positive_scores(batch):
    """positive [pair_count], the score of each pair."""
    return _new(batch, batch.pair_count)


@_op(f"{_BATCH}, Tensor? ceiling", "Tensor score, Tensor index")
def hardest_negatives(batch, ceiling):
    """score = the largest of the negatives, -inf if there are none; index int64 = the smallest column, or
    row, that attains it, -1 if there is none."""
    return _statistic(batch), _statistic(batch, torch.int64)


@_op(
    f"{_BATCH}, Tensor score, Tensor index, Tensor d_positive, Tensor d_score, {_NEEDS}", _GRADIENTS
)
def hardest_negatives_backward(batch, score, index, d_positive, d_score, *needs):
    """A gather and a scatter: only the indexed entries of S have a gradient, and where index is -1 none."""
    return new_gradients(batch, *needs)


@_op(
    f"{_BATCH}, Tensor? ceiling, float scale, Tensor? scale_tensor, bool save_scores",
    "Tensor reference, Tensor log_sum, Tensor scores",
)
def negative_logsumexp(batch, ceiling, scale, scale_tensor, save_scores):
    """log sum exp(a s) over the negatives = a reference + log_sum, where a is scale_tensor [] if given, else
    scale.

    `reference` is a score (not a multiple of a) near the largest one, in the accumulation type, and log_sum
    float64 what it leaves: their sum would absorb the logarithm where logits are large. An anchor without
    negatives has reference 0 and log_sum -inf.
    """
    return _statistic(batch), _statistic(batch, torch.float64), _saved_scores(batch, save_scores)


@_op(
    f"{_BATCH}, Tensor? ceiling, float scale, Tensor? scale_tensor, Tensor reference, Tensor log_sum,"
    f" Tensor scores, Tensor d_positive, Tensor d_log_sum, {_NEEDS}",
    f"{_GRADIENTS}, Tensor d_scale",
)
def negative_logsumexp_backward(
    batch, ceiling, scale, scale_tensor, reference, log_sum, scores, d_positive, d_log_sum, *needs
):
    """With q_ij = exp(a (s_ij - reference_i) - log_sum_i) g_i, g = d_log_sum, over the negatives of row
    anchor i, r_ij likewise of column anchor j, and G = q + r: the gradient by S is a G, and d_positive at the
    pairs.

    d_scale [] = sum_ij q_ij (s_ij - reference_i) + r_ij (s_ij - reference_j), the derivative of the
    log_sums by a. (The reference is a constant: what a user adds as a reference has its own derivative.)
    """
    return *new_gradients(batch, *needs), _new(batch, ())


@_op(
    f"{_BATCH}, Tensor? ceiling, Tensor threshold, bool save_scores",
    "Tensor hinge_sum, Tensor active, Tensor scores",
)
def hinge_sum(batch, ceiling, threshold, save_scores):
    """hinge_sum = sum [s - threshold]+ over the negatives; active int64 = how many of them are above 0.
    threshold [R + C], in the accumulation type."""
    return _statistic(batch), _statistic(batch, torch.int64), _saved_scores(batch, save_scores)


@_op(
    f"{_BATCH}, Tensor? ceiling, Tensor threshold, Tensor hinge_sum, Tensor scores, Tensor d_positive,"
    f" Tensor d_hinge_sum, {_NEEDS}",
    _GRADIENTS,
)
def hinge_sum_backward(
    batch, ceiling, threshold, hinge_sum, scores, d_positive, d_hinge_sum, *needs
):
    """The gradient by S is [s_ij > threshold_i] g_i + [s_ij > threshold_j] g_j for the negatives, with
    g = d_hinge_sum, and d_positive at the pairs. (That by a threshold is -active g.)"""
    return new_gradients(batch, *needs)


_OF_ENTRIES = "float scale, Tensor? scale_tensor, Tensor bias, bool equal_positive"


@_op(
    f"{_BATCH}, {_OF_ENTRIES}, bool save_scores",
    "Tensor softplus_sum, Tensor sigmoid_sum, Tensor scores",
)
def softplus_sum(batch, scale, scale_tensor, bias, equal_positive, save_scores):
    """softplus_sum = sum log(1 + exp(x)) with x = a s + bias [] over the negatives; sigmoid_sum likewise of
    1 / (1 + exp(-x)), its derivative by the bias. a as of negative_logsumexp.

    Every entry of S counts once: for its row anchor, and where its row is none for its column anchor.
    equal_positive: given ids, the entries of equal ids count as well, pairs too, with x = -(a s + bias) and,
    in sigmoid_sum, a minus.
    """
    return _statistic(batch), _statistic(batch), _saved_scores(batch, save_scores)


@_op(
    f"{_BATCH}, {_OF_ENTRIES}, Tensor softplus_sum, Tensor scores, Tensor d_positive,"
    f" Tensor d_softplus_sum, {_NEEDS}",
    f"{_GRADIENTS}, Tensor d_scale",
)
def softplus_sum_backward(
    batch, scale, scale_tensor, bias, equal_positive, softplus_sum, scores, d_positive,
    d_softplus_sum, *needs,
):  # fmt: skip
    """With q_ij = +-sigmoid(x) g of the entry's anchor, g = d_softplus_sum, the gradient by S is a q, and
    d_positive at the pairs. d_scale [] = sum q s. (That by the bias is sum sigmoid_sum g.)"""
    return *new_gradients(batch, *needs), _new(batch, ())


@_op(
    "Tensor images, Tensor captions, Tensor? image_ids, Tensor? caption_ids, SymInt num_pairs, int kind,"
    " float scale, Tensor? scale_tensor, float margin, float image_weight, float caption_weight, bool mean,"
    " bool need_images, bool need_captions",
    "Tensor loss, Tensor positive, Tensor score, Tensor index, Tensor d_scale, Tensor saved_one,"
    " Tensor saved_two",
)
def small_loss(images, captions, image_ids, caption_ids, num_pairs, kind, scale, scale_tensor, margin,
               image_weight, caption_weight, mean, need_images, need_captions):  # fmt: skip
    """A whole loss of a small batch with the dot product: one call in place of many.

    loss [] = the sum over both directions of the anchors' losses of `kind`, times image_weight or
    caption_weight, divided by K if mean; alpha = scale_tensor [] if given, else scale, is 1 / temperature (1
    for the hinge of the hardest). d_scale [], the loss's derivative by alpha. positive [K]; score and index
    [2 K] as of hardest_negatives. saved_one and saved_two: what the backend's backward op needs,
        cpu: S's gradient [N, M] and [0], for ALL_NEGATIVES and HINGE_SUM; else the derivatives by positive
            [K] and by score [2 K]
        cuda: d_images [N, D] and d_captions [M, D], in float32 for every dtype: an upstream that saves them
            from underflow in float16 comes later
    """
    batch = Batch(
        images, captions, image_ids, caption_ids, num_pairs, num_pairs, 0, 0, num_pairs, DOT
    )
    dtype, hardest = accumulation_dtype(images.dtype), kind in (HARDEST, HARDEST_SMOOTH)
    if images.device.type == "cpu":
        saved = (num_pairs, 2 * num_pairs) if hardest else ((images.shape[0], captions.shape[0]), 0)
        saved = [_new(batch, shape) for shape in saved]
    else:
        saved = [x.to(dtype) for x in new_gradients(batch, need_images, need_captions, False)]
    scalar, statistic = _new(batch, ()), _statistic(batch)
    positive, index = _new(batch, num_pairs), _statistic(batch, torch.int64)
    return scalar, positive, statistic, index, _new(batch, ()), *saved


@_op(
    "Tensor images, Tensor captions, Tensor index, Tensor d_scale, Tensor saved_one, Tensor saved_two,"
    " Tensor upstream, bool need_images, bool need_captions",
    f"{_GRADIENTS}, Tensor d_scale",
)
def small_loss_backward(images, captions, index, d_scale, saved_one, saved_two, upstream,
                        need_images, need_captions):  # fmt: skip
    """The gradients times upstream [], rounded once to the embeddings' dtype."""
    batch = Batch(images, captions, None, None, 0, 0, 0, 0, 0, DOT)
    return *new_gradients(batch, need_images, need_captions, False), d_scale.new_empty(())


def _new(batch: Batch, shape, dtype: torch.dtype | None = None) -> Tensor:
    return batch.images.new_empty(shape, dtype=dtype or accumulation_dtype(batch.images.dtype))


def _statistic(batch: Batch, dtype: torch.dtype | None = None) -> Tensor:
    return _new(batch, batch.row_anchors + batch.column_anchors, dtype)


def _saved_scores(batch: Batch, save_scores: bool) -> Tensor:
    if batch.captions is None or not save_scores:
        return _new(batch, 0)
    numel = batch.images.shape[0] * batch.captions.shape[0]
    return _new(batch, numel if numel <= MAX_SAVED_SCORES else 0)


def new_gradients(batch: Batch, need_images: bool, need_captions: bool, accumulate: bool):
    """Room for d_images and d_captions."""
    images, captions = batch.images, batch.captions
    given, dtype = captions is None, images.dtype
    if accumulate and not given:
        dtype = accumulation_dtype(dtype)
    return (
        images.new_empty(images.shape if need_images else 0, dtype=dtype),
        images.new_empty(0 if given or not need_captions else captions.shape, dtype=dtype),
    )


def check(batch: Batch, **tensors: Tensor | None) -> None:
    """What a backend in Python asks of a direct call before a kernel runs: nothing is read out of bounds.

    Args:
        tensors: the other arguments of the op, by their names.

    Raises:
        RuntimeError: naming the argument, what it was and what was expected.
    """
    images, captions, image_ids, caption_ids = batch[:4]
    embeddings = {"images": images} | ({} if captions is None else {"captions": captions})
    for name, x in embeddings.items():
        _require(x.dim() == 2 and x.numel() > 0, name, x.shape, "two dimensions, not empty")
        _require(x.is_floating_point() and x.dtype == images.dtype, name, x.dtype, images.dtype)
    rows, columns = images.shape
    if captions is not None:
        _require(captions.shape[1] == columns, "captions", captions.shape, f"[M, {columns}]")
        columns = captions.shape[0]
    _require((image_ids is None) == (caption_ids is None), "ids", "one of two", "both or none")
    anchors, pairs = batch.row_anchors + batch.column_anchors, batch.pair_count
    for name, value, stop in (
        ("row_anchors", batch.row_anchors, rows),
        ("column_anchors", batch.column_anchors, columns),
        ("pair_count", pairs, min(rows, columns)),
        ("pair_row", batch.pair_row, rows - pairs),
        ("pair_column", batch.pair_column, columns - pairs),
        ("similarity", batch.similarity, max(DOT, ORDER)),
    ):
        _require(0 <= value <= stop, name, value, f"0 .. {stop}")
    accumulation = accumulation_dtype(images.dtype)
    of_anchors = {"image_ids": image_ids, "caption_ids": caption_ids} | tensors
    for name, x in of_anchors.items():
        if x is None:
            continue
        size, dtype = anchors, accumulation
        if name in ("image_ids", "caption_ids", "d_positive"):
            size = {"image_ids": rows, "caption_ids": columns, "d_positive": pairs}[name]
        elif name == "scores":
            size = rows * columns if x.numel() else 0
        elif name in ("scale_tensor", "bias"):
            size = None
        if name in ("image_ids", "caption_ids", "index"):
            dtype = torch.int64
        elif name == "log_sum":
            dtype = torch.float64
        elif name.startswith("d_") or name == "scale_tensor":
            dtype = x.dtype if x.is_floating_point() else accumulation
        expected = [] if size is None else [size]
        _require(list(x.shape) == expected, name, list(x.shape), expected)
        _require(x.dtype == dtype, name, x.dtype, dtype)
        _require(x.device == images.device, name, x.device, images.device)


def _require(condition: bool, name: str, got, expected) -> None:
    if not condition:
        raise RuntimeError(f"{name}: expected {expected}, got {got}")


# All but those of whole losses.
STATISTICS = tuple(name for name in OPS if not name.startswith("small_loss"))


def define(backend: str, names: Iterable[str] = OPS, prefix: str = "") -> torch.library.Library:
    """Defines ops of torch.ops.fused_vse_<backend>, called <prefix><name>, with their fakes.

    The returned library takes implementations, and must be kept alive.
    """
    namespace = f"fused_vse_{backend}"
    library = torch.library.Library(namespace, "FRAGMENT")
    for name in names:
        library.define(OPS[name].schema(prefix + name))
        torch.library.register_fake(f"{namespace}::{prefix}{name}", OPS[name].fake, lib=library)
    return library


def ops_of(backend: str):
    """The ops that `backend` implements."""
    return getattr(torch.ops, f"fused_vse_{backend}")
