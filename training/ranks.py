"""Training on several ranks, as torchrun starts them: each takes a part of every batch.

Losses, weights and recalls are those of one process with the same batches, to rounding: the loss is that of
all ranks' pairs (`group=`), DistributedDataParallel averages its gradients, and every rank draws the dropout
of the whole batch, of which it takes its own rows. So a checkpoint does not depend on the number of ranks.
Rank 0 alone evaluates, writes and prints.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn, TypeVar

import torch
from torch import distributed, nn

from .data import InputError

Result = TypeVar("Result")


class LostRank(Exception):
    """Another rank ended, or does not answer."""


class Part(NamedTuple):
    """A rank's rows of a batch."""

    rows: slice
    batch: int  # pairs of all ranks
    longest: int  # words of the longest caption of all ranks


class Ranks(NamedTuple):
    group: distributed.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """Neighbours, in the order of the ranks."""
        return slice(self.rank * batch // self.size, (self.rank + 1) * batch // self.size)

    def parallel(self, model: nn.Module) -> nn.Module:
        return model if self.group is None else nn.parallel.DistributedDataParallel(model)

    def sum(self, *numbers: float) -> list[float]:
        """Over the ranks."""
        if self.group is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(total, group=self.group)
        return total.tolist()

    def agreed(self, function: Callable[[], Result]) -> Result:
        """What function() returns; an InputError of one rank is that of all, which would wait for it."""
        if self.group is None:
            return function()
        result, problem = None, None
        try:
            result = function()
        except InputError as error:
            problem = str(error)
        problems = [None] * self.size
        distributed.all_gather_object(problems, problem, self.group)
        for rank, found in enumerate(problems):
            if found is not None:
                raise InputError(found if rank == 0 else f"rank {rank}: {found}")
        return result

    def from_first(self, function: Callable[[], Result]) -> Result:
        """What function() returns on rank 0, on all; likewise."""
        result = [self.agreed(lambda: function() if self.first else None)]
        if self.group is not None:
            distributed.broadcast_object_list(result, 0, self.group)
        return result[0]

    def check(self, device: str, captions: int, batch_size: int) -> None:
        """Raises InputError for what these ranks cannot do."""
        smallest = captions % batch_size or batch_size
        if smallest < self.size:
            raise InputError(
                f"--batch-size {batch_size}: of {captions} captions, {smallest} are left for the last"
                f" batch, fewer than the {self.size} ranks; choose another, or fewer ranks"
            )
        if self.group is None or not device.startswith("cuda"):
            return
        if device != "cuda":
            raise InputError(f"--device {device}: each rank takes a GPU of its own; say cuda")
        if _of_torchrun("LOCAL_WORLD_SIZE", 1) > torch.cuda.device_count():
            raise InputError(f"--device cuda: {torch.cuda.device_count()} GPUs are too few here")


def _of_torchrun(name: str, default: int) -> int:
    return int(os.environ.get(name, default)) if "TORCHELASTIC_RUN_ID" in os.environ else default


def speaks() -> bool:
    """Whether this process is the one that says what concerns all ranks."""
    return _of_torchrun("RANK", 0) == 0


def launcher() -> list[str]:
    """The command that starts as many processes as there are: Python, or torchrun."""
    if _of_torchrun("WORLD_SIZE", 1) == 1:
        return [sys.executable]
    processes = f"--nproc-per-node={_of_torchrun('LOCAL_WORLD_SIZE', 1)}"
    return [sys.executable, "-m", "torch.distributed.run", processes]


def say(message: str, of_all: bool) -> None:
    """Prints an error: once for all ranks, or that of this one."""
    if speaks() or not of_all:
        whose = "" if speaks() else f"rank {_of_torchrun('RANK', 0)}: "
        print(whose + message, file=sys.stderr)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, or this process alone."""
    size = _of_torchrun("WORLD_SIZE", 1)
    if size == 1:
        yield Ranks()
        return
    signal.signal(signal.SIGTERM, _interrupt)  # from torchrun, when another rank failed
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_of_torchrun("LOCAL_RANK", 0) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend)
    yield Ranks(distributed.group.WORLD, distributed.get_rank(), size)
    distributed.barrier()  # Gloo may abort where a rank leaves while another one still talks
    distributed.destroy_process_group()


@contextlib.contextmanager
def losing_none() -> Iterator[None]:
    """Raises LostRank for what the backend says when another rank ended."""
    try:
        yield
    except RuntimeError as error:
        of_backend = isinstance(error, distributed.DistError) or "gloo" in str(error).lower()
        if not of_backend:
            raise
        first_line = (str(error).splitlines() or [""])[0]
        raise LostRank(f"another rank ended, or does not answer: {first_line}") from None


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
