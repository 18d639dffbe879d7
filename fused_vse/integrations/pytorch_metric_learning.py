"""PyTorch Metric Learning: `losses.NTXentLoss` (arXiv 2002.05709) and `losses.SupConLoss` (arXiv
2004.11362), for paired modalities or views."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..arguments import INTEGER
from ..equal import count_equal, equal_sums
from ..ops import DOT, Batch, accumulation_dtype
from ..statistics import negative_logsumexp

try:
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity
except ImportError as error:
    raise ImportError(
        "fused_vse.integrations.pytorch_metric_learning needs the library itself"
        f" ({error}): pip install pytorch-metric-learning"
    ) from error


class NTXentLoss(losses.NTXentLoss):
    """The library's loss in memory linear in the batch and in the number of positive pairs.

    For images and captions: `loss(images, labels, ref_emb=captions, ref_labels=caption_labels)`. The
    arguments, reducers, regularizers and wrappers are the library's. Given an `indices_tuple` (miners
    and `CrossBatchMemory` give one), labels that are no integers, or another distance than a dot
    product, the library's own code runs without a word, and takes its memory.
    """

    def compute_loss(
        self,
        embeddings: Tensor,  # [N, D]
        labels: Tensor,  # [N]
        indices_tuple: tuple | None,
        ref_emb: Tensor,  # [M, D]
        ref_labels: Tensor,  # [M]
    ) -> dict:
        """The losses of all positive pairs in the library's form."""
        if not _is_ours(self.distance, labels, indices_tuple, ref_labels):
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        anchor, other = _equal_pairs(labels.long(), ref_labels.long())
        num_negatives = labels.numel() * ref_labels.numel() - anchor.numel()
        if ref_labels is labels:
            apart = anchor != other
            anchor, other = anchor[apart], other[apart]
        if min(anchor.numel(), num_negatives) == 0 or max(anchor.numel(), num_negatives) == 1:
            return self.zero_losses()  # as the library does

        rows, columns = map(self.distance.maybe_normalize, (embeddings, ref_emb))
        negatives = _logsumexp(rows, columns, labels, ref_labels, self.temperature)
        pairs = rows[anchor].to(negatives.dtype) * columns[other].to(negatives.dtype)
        positive = pairs.sum(1) / self.temperature
        return {
            "loss": {
                "losses": -logsigmoid(positive - negatives[anchor]),
                "indices": (anchor, other),
                "reduction_type": "pos_pair",
            }
        }


class SupConLoss(losses.SupConLoss):
    """The library's loss in memory linear in the batch, under the conditions of `NTXentLoss`.

    16-bit embeddings are converted to float32: the gradient is what two large terms leave.
    """

    def compute_loss(
        self,
        embeddings: Tensor,  # [N, D]
        labels: Tensor,  # [N]
        indices_tuple: tuple | None,
        ref_emb: Tensor,  # [M, D]
        ref_labels: Tensor,  # [M]
    ) -> dict:
        """The losses of all anchors in the library's form; 0 for one without positives."""
        if not _is_ours(self.distance, labels, indices_tuple, ref_labels):
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        with_themselves = ref_labels is labels
        labels, ref_labels = labels.long(), ref_labels.long()
        count = count_equal(ref_labels, labels)
        num_negatives = labels.numel() * ref_labels.numel() - count.sum()
        num_positives = (count - int(with_themselves)).sum()
        if min(num_positives, num_negatives) == 0 or max(num_positives, num_negatives) == 1:
            return self.zero_losses()  # as the library does

        rows, columns = map(self.distance.maybe_normalize, (embeddings, ref_emb))
        rows, columns = (x.to(accumulation_dtype(x.dtype)) for x in (rows, columns))
        total, count = equal_sums(
            Batch(rows, columns, labels, ref_labels, len(rows), 0, 0, 0, 0, DOT)
        )
        number = torch.arange(len(rows), device=labels.device)
        others = number if with_themselves else torch.full_like(ref_labels, -1)
        everything = _logsumexp(rows, columns, number, others, self.temperature)
        if with_themselves:
            total, count = total - (rows * columns).sum(1), count - 1
        mean = total / count.clamp(min=1)
        return {
            "loss": {
                "losses": (everything - mean / self.temperature).where(count > 0, 0),
                "indices": number,
                "reduction_type": "element",
            }
        }


def _is_ours(distance, labels: Tensor, indices_tuple: tuple | None, ref_labels: Tensor) -> bool:
    return (
        indices_tuple is None
        and all(ids is not None and ids.dtype in INTEGER for ids in (labels, ref_labels))
        and type(distance) in (CosineSimilarity, DotProductSimilarity)
        and distance.power == 1
    )


def _logsumexp(
    rows: Tensor, columns: Tensor, ids: Tensor, column_ids: Tensor, temperature: float
) -> Tensor:
    """log Σ exp(s / temperature) [N] over the columns of another id."""
    # There are at most M anchors in a call.
    blocks = zip(rows.split(columns.shape[0]), ids.split(columns.shape[0]), strict=True)
    return torch.cat(
        [
            negative_logsumexp(
                block,
                columns,
                temperature=temperature,
                image_ids=block_ids,
                caption_ids=column_ids,
                num_pairs=block.shape[0],
            ).logsumexp[0]
            for block, block_ids in blocks
        ]
    )


def _equal_pairs(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every (i, j) with labels[i] == ref_labels[j], without comparing all pairs."""
    ordered, order = ref_labels.sort(stable=True)
    begin = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - begin
    i = torch.arange(labels.numel(), device=labels.device).repeat_interleave(count)
    start = count.cumsum(0) - count
    j = order[begin[i] + torch.arange(i.numel(), device=i.device) - start[i]]
    return i, j
