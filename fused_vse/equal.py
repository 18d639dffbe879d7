"""What is known of equal ids without a pass over S: how many there are, and the sum of their scores."""

import torch
from torch import Tensor
from torch.nn.functional import embedding, embedding_bag

from . import reference
from .first_order import first_order_only
from .ops import DOT, Batch, accumulation_dtype


def count_equal(ids: Tensor, of_ids: Tensor) -> Tensor:
    """For each of `of_ids`, how many of `ids` are equal to it."""
    ids = ids.sort().values
    begin, end = (torch.searchsorted(ids, of_ids.contiguous(), right=x) for x in (False, True))
    return end - begin


def equal_sums(batch: Batch) -> tuple[Tensor, Tensor]:
    """The sum of an anchor's scores with what has its id [R + C], differentiable, and how many those
    are. The batch has ids.

    Of embeddings and their dot product in O((N + M) D): <I_i, sum of T_j>. Otherwise P scores are looked at
    one by one, where P pairs have equal ids; for the order similarity in O(P D) of memory.
    """
    if batch.captions is not None and batch.similarity == DOT:
        return _EqualSums.apply(*batch[:6]), _equal_counts(batch)
    return _sums_one_by_one(batch), _equal_counts(batch)


def equal_sums_backward(batch: Batch, d_sums: Tensor) -> tuple[Tensor, Tensor]:
    """d_images and d_captions of embeddings, in the accumulation type."""
    if batch.similarity != DOT:
        with torch.enable_grad():
            wide = reference.widened(batch)
            leaves = [x.detach().requires_grad_() for x in wide[:2]]
            sums = _sums_one_by_one(batch._replace(images=leaves[0], captions=leaves[1]))
        return torch.autograd.grad(sums, leaves, d_sums)
    image_ids, caption_ids, rows, columns = batch[2:6]
    images, captions = (x.to(accumulation_dtype(x.dtype)) for x in batch[:2])
    of_rows, of_columns = d_sums[:rows, None], d_sums[rows:, None]
    d_images = _sums(captions[:columns] * of_columns, caption_ids[:columns], image_ids)
    d_captions = _sums(images[:rows] * of_rows, image_ids[:rows], caption_ids)
    d_images[:rows] += of_rows * _sums(captions, caption_ids, image_ids[:rows])
    d_captions[:columns] += of_columns * _sums(images, image_ids, caption_ids[:columns])
    return d_images, d_captions


class _EqualSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, captions, image_ids, caption_ids, rows, columns):
        ctx.save_for_backward(images, captions, image_ids, caption_ids)
        ctx.anchors = rows, columns
        images, captions = (x.to(accumulation_dtype(x.dtype)) for x in (images, captions))
        of_rows = images[:rows] * _sums(captions, caption_ids, image_ids[:rows])
        of_columns = captions[:columns] * _sums(images, image_ids, caption_ids[:columns])
        return torch.cat([of_rows.sum(1), of_columns.sum(1)])

    @staticmethod
    def backward(ctx, d_sums):
        batch = Batch(*ctx.saved_tensors, *ctx.anchors, 0, 0, 0, DOT)
        both = zip(equal_sums_backward(batch, d_sums), batch[:2], strict=True)
        gradients = [gradient.to(x.dtype) for gradient, x in both]
        return *first_order_only(*gradients, needed=ctx.needs_input_grad[:2]), *(None,) * 4


def _equal_counts(batch: Batch) -> Tensor:
    """[R + C]"""
    image_ids, caption_ids, rows, columns = batch[2:6]
    return torch.cat(
        [count_equal(caption_ids, image_ids[:rows]), count_equal(image_ids, caption_ids[:columns])]
    )


def _sums(rows: Tensor, ids: Tensor, of_ids: Tensor) -> Tensor:
    """[len(of_ids), D]: the sums of the rows with these ids, in the order of the rows."""
    if not len(rows):
        return rows.new_zeros(len(of_ids), rows.shape[1])
    ids, order = ids.sort(stable=True)
    starts = torch.cat([torch.ones_like(ids[:1], dtype=torch.bool), ids[1:] != ids[:-1]])
    segment = starts.cumsum(0) - 1
    # As many segments as rows, the last ones empty: how many there are nobody has to wait for.
    offsets = torch.searchsorted(segment, torch.arange(len(ids), device=ids.device))
    sums = embedding_bag(order, rows, offsets, mode="sum")
    at = torch.searchsorted(ids, of_ids.contiguous()).clamp(max=len(ids) - 1)
    return sums[segment[at]].where((ids[at] == of_ids)[:, None], 0)


def _sums_one_by_one(batch: Batch) -> Tensor:
    sums = []
    ids, counts = batch[2:4], _equal_counts(batch).split(batch[4:6])
    for side, count in enumerate(counts):
        others, order = ids[1 - side].sort(stable=True)
        first = torch.searchsorted(others, ids[side][: len(count)].contiguous())
        anchor = torch.arange(len(count), device=count.device).repeat_interleave(count)
        begin = count.cumsum(0) - count
        place = torch.arange(len(anchor), device=count.device) - begin[anchor]
        other = order[first[anchor] + place]
        row, column = (anchor, other) if side == 0 else (other, anchor)
        scores = _scores(batch, row, column)
        # Not index_add, whose order of summation varies on a GPU.
        everything = torch.arange(len(anchor), device=count.device)
        sums.append(embedding_bag(everything, scores[:, None], begin, mode="sum")[:, 0])
    return torch.cat(sums)


def _scores(batch: Batch, row: Tensor, column: Tensor) -> Tensor:
    dtype = accumulation_dtype(batch.images.dtype)
    if batch.captions is None:
        width = batch.images.shape[1]
        return embedding(row * width + column, batch.images.reshape(-1, 1))[:, 0].to(dtype)
    images, captions = embedding(row, batch.images), embedding(column, batch.captions)
    pairs = images, captions, None, None, 0, 0, 0, 0, len(row), batch.similarity
    return reference.positive_scores(*pairs)
