"""Who takes part in a loss over ranks: one small exchange, after which all go on or all raise."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from ..ops import Batch
from .collectives import all_gather

SIZES = ("K", "N", "M")
HEADER_SIZE, TEXT_SIZE = 32, 80  # numbers; bytes


class Peers(NamedTuple):
    """The ranks of a group, and how many rows each of them has."""

    group: distributed.ProcessGroup
    rank: int
    size: int
    pairs: list[int]  # K of every rank
    images: list[int]  # N of every rank
    captions: list[int]  # M of every rank


def agree(
    group: distributed.ProcessGroup | None, check: Callable[[], tuple[Batch, NamedTuple]]
) -> tuple[Peers | None, Batch, NamedTuple]:
    """Who has how many rows (None without a group), and what `check` returned: the batch, and the options
    that all ranks must share.

    Raises:
        Whatever `check` raises, on its rank; then on the other ranks, too, a RuntimeError.
        ValueError: an option, D, the dtype or what requires grad differs; the same error on all ranks.
    """
    if group is None:
        return None, *check()
    if torch.compiler.is_compiling():  # by contract, all pass what this rank does
        batch, options = check()
        sizes = [[n] * group.size() for n in _sizes(batch)]
        return Peers(group, group.rank(), group.size(), *sizes), batch, options
    error, values = None, {}
    try:
        batch, options = check()
        values = _described(batch, options)
    except Exception as raised:  # noqa: BLE001 - the other ranks wait for a word
        error = raised
    numbers = [0 if error else 1, *(_number(name, value) for name, value in values.items())]
    ranks = _gather(group, torch.tensor(numbers + [0] * (HEADER_SIZE - len(numbers)))).tolist()
    if error is not None:
        raise error
    refused = [rank for rank, (accepted, *_) in enumerate(ranks) if not accepted]
    if refused:
        raise RuntimeError(
            f"rank {refused[0]} of the group refused its arguments; its own error says why"
        )
    for position, (name, value) in enumerate(values.items(), 1):
        if name not in SIZES and len({row[position] for row in ranks}) > 1:
            found = ", ".join(texts_of_ranks(group, str(value)))
            raise ValueError(f"{name} must be the same on all ranks of the group, got {found}")
    sizes = [[row[1 + i] for row in ranks] for i in range(len(SIZES))]
    if not sum(sizes[0]):
        raise ValueError("num_pairs is 0 on all ranks of the group; at least one needs a pair")
    return Peers(group, group.rank(), group.size(), *sizes), batch, options


def check_on_all(group: distributed.ProcessGroup | None, check: Callable[[], object]) -> object:
    """What `check` returned, before a loss over the group: its error is one of all ranks, as in `agree`."""
    try:
        return check()
    except (TypeError, ValueError):
        return agree(group, check)  # which raises it again: the other ranks wait in their loss


def _described(batch: Batch, options: NamedTuple) -> dict[str, object]:
    images, captions = batch[:2]
    return {
        **dict(zip(SIZES, _sizes(batch), strict=True)),
        "D": images.shape[1],
        "the dtype": images.dtype,
        "the similarity": batch.similarity,
        "whether there are ids": batch.image_ids is not None,
        "whether images require grad": images.requires_grad,
        "whether captions require grad": captions.requires_grad,
        # The value of a tensor is not looked at: a GPU would have to be waited for.
        **{k: "a tensor" if isinstance(x, Tensor) else x for k, x in options._asdict().items()},
    }


def _sizes(batch: Batch) -> tuple[int, int, int]:
    if batch.captions is None:
        raise ValueError("scores are those of one process; with group pass images and captions")
    return batch.pair_count, batch.images.shape[0], batch.captions.shape[0]


def _number(name: str, value: object) -> int:
    return value if name in SIZES else zlib.crc32(str(value).encode())


def texts_of_ranks(group: distributed.ProcessGroup, text: str) -> list[str]:
    """What every rank says, in at most TEXT_SIZE bytes."""
    encoded = list(text.encode()[:TEXT_SIZE].ljust(TEXT_SIZE))
    rows = _gather(group, torch.tensor(encoded, dtype=torch.uint8)).tolist()
    return [bytes(row).decode(errors="replace").rstrip() for row in rows]


def _gather(group: distributed.ProcessGroup, row: Tensor) -> Tensor:
    """[n] of every rank to [W, n], over the group's CPU backend if it has one: a GPU has to be waited for."""
    if "cpu:" not in distributed.get_backend_config(group):
        row = row.cuda()
    rows = row.new_empty(group.size() * len(row))
    all_gather(rows, row, group)
    return rows.view(group.size(), -1)
