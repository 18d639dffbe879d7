"""PyTorch Metric Learning: `losses.NTXentLoss` (arXiv 2002.05709), for paired modalities or views."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..arguments import INTEGER
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
        if (
            indices_tuple is not None
            or any(ids is None or ids.dtype not in INTEGER for ids in (labels, ref_labels))
            or type(self.distance) not in (CosineSimilarity, DotProductSimilarity)
            or self.distance.power != 1
        ):
            return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        anchor, other = _equal_pairs(labels.long(), ref_labels.long())
        num_negatives = labels.numel() * ref_labels.numel() - anchor.numel()
        if ref_labels is labels:
            apart = anchor != other
            anchor, other = anchor[apart], other[apart]
        if min(anchor.numel(), num_negatives) == 0 or max(anchor.numel(), num_negatives) == 1:
            return self.zero_losses()  # as the library does

        rows, columns = map(self.distance.maybe_normalize, (embeddings, ref_emb))
        # There are at most M anchors in a call.
        negatives = torch.cat(
            [
                negative_logsumexp(
                    block,
                    columns,
                    temperature=self.temperature,
                    image_ids=ids,
                    caption_ids=ref_labels,
                    num_pairs=block.shape[0],
                ).logsumexp[0]
                for block, ids in zip(
                    rows.split(columns.shape[0]), labels.split(columns.shape[0]), strict=True
                )
            ]
        )
        pairs = rows[anchor].to(negatives.dtype) * columns[other].to(negatives.dtype)
        positive = pairs.sum(1) / self.temperature
        return {
            "loss": {
                "losses": -logsigmoid(positive - negatives[anchor]),
                "indices": (anchor, other),
                "reduction_type": "pos_pair",
            }
        }


def _equal_pairs(labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every (i, j) with labels[i] == ref_labels[j], without comparing all pairs."""
    ordered, order = ref_labels.sort(stable=True)
    begin = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - begin
    i = torch.arange(labels.numel(), device=labels.device).repeat_interleave(count)
    start = count.cumsum(0) - count
    j = order[begin[i] + torch.arange(i.numel(), device=i.device) - start[i]]
    return i, j
