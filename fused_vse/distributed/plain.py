"""The reference over ranks: both sides are gathered, and the plain formulas do the rest."""

import torch
from torch import Tensor

from .. import reference
from ..ops import Batch
from .collectives import all_gather, reduce_scatter
from .exchange import padded
from .peers import Peers


class _GatherRows(torch.autograd.Function):
    """[n_r, ..] of every rank to the pairs of all ranks and then their extra negatives, with gradients."""

    @staticmethod
    def forward(ctx, rows, peers, counts):
        longest = max(counts)
        gathered = rows.new_empty(peers.size * longest, *rows.shape[1:])
        all_gather(gathered, padded(rows, longest), peers.group)
        parts = gathered.unflatten(0, (-1, longest))
        sides = list(zip(parts, peers.pairs, counts, strict=True))
        ctx.peers, ctx.counts = peers, counts
        return torch.cat(
            [*(part[:k] for part, k, _ in sides), *(part[k:n] for part, k, n in sides)]
        )

    @staticmethod
    def backward(ctx, gradient):
        peers, counts, longest = ctx.peers, ctx.counts, max(ctx.counts)
        extras = [n - k for n, k in zip(counts, peers.pairs, strict=True)]
        parts = gradient.split([*peers.pairs, *extras])
        sent = [
            padded(torch.cat(x), longest)
            for x in zip(parts[: peers.size], parts[peers.size :], strict=True)
        ]
        received = gradient.new_empty(longest, *gradient.shape[1:])
        reduce_scatter(received, torch.cat(sent), group=peers.group)
        return received[: counts[peers.rank]], None, None


gather_side = _GatherRows.apply


def statistic_of_rows(statistic, batch: Batch, peers: Peers) -> tuple[Tensor, Tensor, Tensor]:
    """Own rows with all columns, and own columns with all rows: twice the scores, by the plain formulas."""
    batch, k = reference.widened(batch), batch.pair_count
    before = sum(peers.pairs[: peers.rank])
    captions, images = (
        gather_side(x, peers, counts)
        for x, counts in ((batch.captions, peers.captions), (batch.images, peers.images))
    )
    caption_ids = image_ids = None
    if batch.image_ids is not None:
        caption_ids = gather_side(batch.caption_ids, peers, peers.captions)
        image_ids = gather_side(batch.image_ids, peers, peers.images)
    of_rows = batch._replace(
        captions=captions, caption_ids=caption_ids, column_anchors=0, pair_column=before
    )
    of_columns = batch._replace(images=images, image_ids=image_ids, row_anchors=0, pair_row=before)
    if statistic.counts_once:  # what no row anchor has seen
        pairs = sum(peers.pairs)
        rest = None if image_ids is None else image_ids[pairs:]
        of_columns = of_columns._replace(
            images=images[pairs:], image_ids=rest, pair_row=0, pair_count=0
        )
    positive = reference.positive_scores(*batch)
    vectors = statistic.vectors(positive)
    results = [
        statistic.plain(*part, *(x if x is None else x[own] for x in vectors))
        for part, own in ((of_rows, slice(k)), (of_columns, slice(k, None)))
    ]
    return positive, *(torch.cat(x) for x in zip(*results, strict=True))
