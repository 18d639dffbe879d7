"""What the ranks send to each other for one statistic, and how columns and rows are addressed.

Numbers of columns and rows: the pairs of rank 0, of rank 1, .., then the extra negatives of rank 0, of
rank 1, .. Each extra negative belongs to exactly one rank: a queue is split among them.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from ..ops import Batch
from .collectives import all_gather, reduce_scatter, start
from .peers import Peers

_gather_bytes = 2 << 30
CHUNK_BYTES = 256 << 20  # of captions that are gathered at a time: tens of thousands of columns


def set_gather_bytes(num_bytes: int) -> None:
    """Sets up to how many bytes the captions of all ranks are kept from the forward to the backward pass.

    The default is 2 GiB. Beyond, they are gathered again, in chunks that take no more than half of it.
    """
    if isinstance(num_bytes, bool) or not isinstance(num_bytes, int):
        raise TypeError(f"num_bytes must be an int, got {num_bytes!r}")
    if num_bytes <= 0:
        raise ValueError(f"num_bytes must be positive, got {num_bytes}")
    global _gather_bytes
    _gather_bytes = num_bytes


class Chunk(NamedTuple):
    """Captions [begin, end) of every rank, as far as it has them: of pairs, or extra negatives."""

    begin: int
    lengths: list[int]  # of every rank's part
    first: list[int]  # the number of each part's first column
    are_pairs: bool

    @property
    def columns(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)


def chunks_of(peers: Peers, rows: int) -> Iterator[Chunk]:
    """All columns, at most `rows` of each rank at a time."""
    offset = 0
    for are_pairs in (True, False):
        counts = peers.pairs
        if not are_pairs:
            counts = [m - k for m, k in zip(peers.captions, peers.pairs, strict=True)]
        starts = [offset + sum(counts[:q]) for q in range(peers.size)]
        for begin in range(0, max(counts), rows):
            lengths = [max(0, min(begin + rows, n) - begin) for n in counts]
            first = [start + begin for start in starts]
            yield Chunk(begin, lengths, first, are_pairs)
        offset += sum(counts)


class _Columns(NamedTuple):
    """The captions of a chunk, or their ids, on their way to this rank."""

    gathered: Tensor  # [W * longest, ..]
    finish: Callable[[], object]
    chunk: Chunk

    def wait(self) -> Tensor:
        """[C, ..], in the order of their numbers."""
        self.finish()
        if min(self.chunk.lengths) == self.chunk.longest:
            return self.gathered
        parts = self.gathered.unflatten(0, (-1, self.chunk.longest))
        return torch.cat([part[:n] for part, n in zip(parts, self.chunk.lengths, strict=True)])


class Exchange:
    """What the ranks send to each other for one statistic, and how it is addressed."""

    def __init__(self, peers: Peers, captions: Tensor):
        self.peers, self.pairs = peers, peers.pairs[peers.rank]
        row_bytes = peers.size * captions.shape[1] * captions.element_size()
        self.kept = max(peers.captions) * row_bytes <= _gather_bytes
        at_once = CHUNK_BYTES if self.kept else min(CHUNK_BYTES, _gather_bytes // 2)
        self.chunks = list(chunks_of(peers, max(1, at_once // row_bytes)))
        self.row_numbers = _row_numbers(peers, captions.device)

    def calls(
        self, own: Batch, vectors: list[Tensor | None]
    ) -> Iterator[tuple[Chunk, Batch, list[Tensor | None]]]:
        """Every chunk with the batch of its op and the op's vectors [R + C]."""
        k, ids = self.pairs, [None] * len(self.chunks)
        if own.caption_ids is not None:
            ids = self.columns(own.caption_ids)
        of_pairs = [None if x is None else self.of_pairs(x[k:]) for x in vectors]
        # Both iterators talk to the other ranks, here in the same order on all of them.
        for chunk, caption_ids, captions in zip(
            self.chunks, ids, self.columns(own.captions), strict=True
        ):
            batch = self.batch(chunk, own, captions, caption_ids)
            of_chunk = [
                x if x is None else self.anchors(chunk, x[:k], parts)
                for x, parts in zip(vectors, of_pairs, strict=True)
            ]
            yield chunk, batch, of_chunk

    def own(self, chunk: Chunk) -> slice:
        """This rank's captions in the chunk."""
        begin = chunk.begin + (0 if chunk.are_pairs else self.pairs)
        return slice(begin, begin + chunk.lengths[self.peers.rank])

    def gather(self, chunk: Chunk, rows: Tensor) -> _Columns:
        """Of rows [M, ..] of every rank; nobody waits yet."""
        own = padded(rows[self.own(chunk)], chunk.longest)
        gathered = own.new_empty(self.peers.size * chunk.longest, *own.shape[1:])
        # As bytes: not every backend moves every 16-bit type.
        views = [x.view(torch.uint8) if x.itemsize == 2 else x for x in (gathered, own)]
        return _Columns(gathered, start(all_gather, *views, self.peers.group), chunk)

    def columns(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows [M, ..] of every rank, chunk by chunk, the next one under way."""
        ahead = self.gather(self.chunks[0], rows)
        for following in self.chunks[1:]:
            columns, ahead = ahead, self.gather(following, rows)
            yield columns.wait()
        yield ahead.wait()

    def of_pairs(self, own: Tensor) -> list[Tensor]:
        """[K], one number for each own pair, to those of every rank."""
        longest = max(self.peers.pairs)
        gathered = own.new_empty(self.peers.size * longest)
        all_gather(gathered, padded(own, longest), self.peers.group)
        parts = gathered.unflatten(0, (-1, longest))
        return [part[:n] for part, n in zip(parts, self.peers.pairs, strict=True)]

    def to_owners(self, of_columns: list[Tensor]) -> list[Tensor]:
        """[C], one number for each column, of all chunks of pairs, to W times [K]."""
        chunks = [chunk for chunk in self.chunks if chunk.are_pairs]
        parts = [x.split(c.lengths) for x, c in zip(of_columns, chunks, strict=True)]
        sent = torch.cat([part[q] for q in range(self.peers.size) for part in parts])
        received = sent.new_empty(self.peers.size, self.pairs)
        sizes = [self.pairs] * self.peers.size, self.peers.pairs
        distributed.all_to_all_single(received.view(-1), sent, *sizes, self.peers.group)
        return list(received)

    def reduce(self, chunk: Chunk, part: Tensor, total: Tensor) -> Callable[[], None]:
        """Sums a part of the gradients of all columns [C, D] into their owners' [M, D], when waited for."""
        sent = torch.cat([padded(x, chunk.longest) for x in part.split(chunk.lengths)])
        received = part.new_empty(chunk.longest, *part.shape[1:])
        finish = start(reduce_scatter, received, sent, self.peers.group)

        def wait() -> None:
            finish()
            own = self.own(chunk)
            total[own] = received[: own.stop - own.start]

        return wait

    def anchors(self, chunk: Chunk, own: Tensor, of_pairs: list[Tensor]) -> Tensor:
        """A number for each own row anchor [K] and for the column anchors of every rank, to [R + C]."""
        if not chunk.are_pairs:
            return own
        stops = [chunk.begin + n for n in chunk.lengths]
        parts = [x[chunk.begin : stop] for x, stop in zip(of_pairs, stops, strict=True)]
        return torch.cat([own, *parts])

    def batch(
        self, chunk: Chunk, own: Batch, captions: Tensor, caption_ids: Tensor | None
    ) -> Batch:
        before, count = sum(chunk.lengths[: self.peers.rank]), chunk.lengths[self.peers.rank]
        pairs = (chunk.begin, before, count) if chunk.are_pairs and count else (0, 0, 0)
        anchors = self.pairs, chunk.columns if chunk.are_pairs else 0
        return Batch(
            own.images, captions, own.image_ids, caption_ids, *anchors, *pairs, own.similarity
        )

    def to_numbers(self, chunk: Chunk, index: Tensor) -> Tensor:
        """Indices [R + C] of hardest negatives in the chunk and in the own rows, to numbers; -1 stays."""
        both = _column_numbers(chunk, index.device), self.row_numbers
        sides = zip((index[: self.pairs], index[self.pairs :]), both, strict=True)
        return torch.cat([torch.where(x >= 0, numbers[x.clamp(min=0)], -1) for x, numbers in sides])

    def to_positions(self, chunk: Chunk, number: Tensor) -> Tensor:
        """The inverse; -1 for what is in another chunk or of another rank."""
        both = _column_numbers(chunk, number.device), self.row_numbers
        sides = zip((number[: self.pairs], number[self.pairs :]), both, strict=True)
        return torch.cat([_positions(x, numbers) for x, numbers in sides])


def _column_numbers(chunk: Chunk, device: torch.device) -> Tensor:
    """[C], ascending"""
    parts = zip(chunk.first, chunk.lengths, strict=True)
    return torch.cat([torch.arange(first, first + n, device=device) for first, n in parts])


def _row_numbers(peers: Peers, device: torch.device) -> Tensor:
    """[N], ascending"""
    counts, rank = peers.pairs, peers.rank
    extras = [n - k for n, k in zip(peers.images, counts, strict=True)]
    firsts = sum(counts[:rank]), sum(counts) + sum(extras[:rank])
    sides = zip(firsts, (counts[rank], extras[rank]), strict=True)
    return torch.cat([torch.arange(first, first + n, device=device) for first, n in sides])


def _positions(number: Tensor, numbers: Tensor) -> Tensor:
    at = torch.searchsorted(numbers, number.contiguous()).clamp(max=len(numbers) - 1)
    return torch.where(numbers[at] == number, at, -1)


def padded(rows: Tensor, length: int) -> Tensor:
    missing = length - rows.shape[0]
    if not missing:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
