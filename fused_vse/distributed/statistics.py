"""The statistics over the batch of all ranks of a process group, exact, each score computed once.

Every rank compares its own rows with the captions of all ranks; images stay where they are:

    for chunk c of the captions of every rank:        gathered while the chunk before is computed
        row[c], column[c] = op(own images, captions[c])           [K + C], a statistic of ops.py
    own rows' statistic    = merge of row[c] over the chunks
    own columns' statistic = merge of column[.] over the ranks, in their order

Backward, the merged statistics of all columns come back (16 bytes a column), and the op's backward pass
gives d_images of the own rows and a part of d_captions of all columns, which a reduce-scatter sums in the
accumulation type. So B images and captions a rank cost B * W B scores, and the captions travel once
forward and once back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..definitions import Hardest, parameters_of
from ..dispatch import REFERENCE, choose
from ..first_order import first_order_only
from ..ops import Batch, accumulation_dtype, ops_of
from .exchange import Exchange
from .peers import Peers
from .plain import statistic_of_rows


class _OverRanks(torch.autograd.Function):
    """The positive scores [K] of the own pairs, and a statistic [2 K] of them over the batch of all ranks."""

    @staticmethod
    def forward(ctx, statistic, peers, ops, scale_tensor, bias, *fields):
        # The tensors of the statistic are arguments, too, for autograd to see.
        own = Batch(*fields)
        ctx.statistic, ctx.ops = statistic, ops
        ctx.exchange = exchange = Exchange(peers, own.captions)
        positive = ops.positive_scores(*own)
        ctx.vectors = statistic.vectors(positive)
        calls = exchange.calls(own, ctx.vectors)
        if exchange.kept:
            ctx.calls = calls = list(calls)
        k, rows, columns = exchange.pairs, [], []
        for chunk, batch, vectors in calls:
            one, other, _ = statistic.forward(ops, batch, vectors, False)
            if isinstance(statistic, Hardest):
                other = exchange.to_numbers(chunk, other)
            rows.append((one[:k], other[:k]))
            if chunk.are_pairs:
                columns.append((one[k:], other[k:]))
        received = [exchange.to_owners(x) for x in zip(*columns, strict=True)]
        of_rows = statistic.merge(rows)
        of_columns = statistic.merge(list(zip(*received, strict=True)))
        merged = [torch.cat(x) for x in zip(of_rows, of_columns, strict=True)]
        ctx.mark_non_differentiable(merged[1 - statistic.differentiable])
        ctx.anchors = fields[4:]
        ctx.save_for_backward(*fields[:4], *merged)
        return positive, *merged

    @staticmethod
    def backward(ctx, d_positive, *d_results):
        *tensors, one, other = ctx.saved_tensors
        own, statistic, exchange = Batch(*tensors, *ctx.anchors), ctx.statistic, ctx.exchange
        k, merged, d = exchange.pairs, (one, other), d_results[statistic.differentiable]
        d_positive, d_bias = statistic.of_parameters(merged, d, d_positive)
        nothing = d_positive.new_empty(0)
        vectors = *merged, d
        of_pairs = [exchange.of_pairs(x[k:]) for x in vectors]
        needs = ctx.needs_input_grad[5:7]
        dtype = accumulation_dtype(own.images.dtype)
        d_images, d_captions = (torch.zeros_like(x, dtype=dtype) for x in own[:2])
        d_scale, finish = 0, lambda: None
        calls = getattr(ctx, "calls", None) or exchange.calls(own, ctx.vectors)
        for chunk, batch, of_anchors in calls:
            one, other, d = (
                exchange.anchors(chunk, x[:k], parts)
                for x, parts in zip(vectors, of_pairs, strict=True)
            )
            if isinstance(statistic, Hardest):
                other = exchange.to_positions(chunk, other)
            of_chunk = d_positive[batch.pair_row : batch.pair_row + batch.pair_count]
            to_images, to_captions, to_scale = statistic.backward(
                ctx.ops, batch, of_anchors, (one, other), nothing, of_chunk, d, (*needs, True)
            )
            if needs[0]:
                d_images += to_images
            if needs[1]:
                started = exchange.reduce(chunk, to_captions, d_captions)
                finish()  # of the chunk before, whose memory is free then
                finish = started
            if to_scale is not None:
                d_scale = d_scale + to_scale
        finish()
        gradients = first_order_only(
            d_images.to(own.images.dtype), d_captions.to(own.captions.dtype), d_scale, d_bias,
            needed=(*needs, *ctx.needs_input_grad[3:5]),
        )  # fmt: skip
        d_images, d_captions, d_scale, d_bias = gradients
        return None, None, None, d_scale, d_bias, d_images, d_captions, *(None,) * 8


def statistic_over_ranks(
    statistic: NamedTuple, batch: Batch, peers: Peers, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive scores [K] of the own pairs, and a statistic [2 K] of them over the batch of all ranks."""
    backend = choose(backend, statistic.op, batch)
    if backend == REFERENCE:
        return statistic_of_rows(statistic, batch, peers)
    tensors = parameters_of(statistic)
    return _OverRanks.apply(statistic, peers, ops_of(backend), *tensors, *batch)
