"""What every rank of test_ranks_use.py does: losses over ranks where users have them."""

import collections
import itertools
import os
import re
import signal

import ranks_cases
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_vse.distributed.exchange
import fused_vse.distributed.statistics
from fused_vse import all_negatives_loss

BATCH, FEATURES, DIM = 12, 5, 8


class Encoders(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.images, self.captions = (
            nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, DIM)).to(dtype)
            for _ in range(2)
        )

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        return self.images(images), self.captions(captions)


def inputs(rank: int, size: int, dtype: torch.dtype = torch.float64) -> tuple[list, list]:
    """Of all ranks, and of this one."""
    generator = torch.Generator().manual_seed(7)
    whole = [torch.randn(BATCH, FEATURES, generator=generator).to(dtype) for _ in range(2)]
    return whole, [x[rank * BATCH // size : (rank + 1) * BATCH // size] for x in whole]


def every_use(rank: int, size: int) -> None:
    for name in ("all_negatives", "hardest", "hinge_sum"):
        autocast(rank, size, name)
        sharded(rank, size, name)


def autocast(rank: int, size: int, name: str) -> None:
    """Embeddings in bfloat16 by autocast: the loss and the gradients of one process under autocast."""
    loss, (whole, own) = ranks_cases.LOSSES[name], inputs(rank, size, torch.float32)
    alone, shared = Encoders(torch.float32), Encoders(torch.float32)
    parallel = nn.parallel.DistributedDataParallel(shared)
    values = []
    for model, batch, group in (alone, whole, None), (parallel, own, distributed.group.WORLD):
        with torch.autocast("cpu", torch.bfloat16):
            pair = model(*batch)
            assert all(x.dtype == torch.bfloat16 for x in pair)
            value = loss(*pair, normalize=True, group=group)
        assert value.dtype == torch.float32
        value.backward()
        values.append(value.item())
    assert abs(values[0] - values[1]) <= 1e-5 * abs(values[0])
    for mine, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        # Each gradient of a bfloat16 embedding is rounded once, the sums of them in another order.
        assert (mine.grad - theirs.grad).norm() <= 0.01 * theirs.grad.norm()


def sharded(rank: int, size: int, name: str) -> None:
    """FSDP2: weights and gradients are sharded; after some steps they are those of one process."""
    loss, (whole, own) = ranks_cases.LOSSES[name], inputs(rank, size)
    alone, model = Encoders(), Encoders()
    mesh = init_device_mesh("cpu", (size,))
    for side in (model.images, model.captions):
        fully_shard(side, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = (alone, whole, None), (model, own, mesh.get_group())
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x, _, _ in batches]
    for _ in range(3):
        values = []
        for (encoders, batch, group), optimizer in zip(batches, optimizers, strict=True):
            value = loss(*encoders(*batch), normalize=True, group=group)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            values.append(value.item())
        assert abs(values[0] - values[1]) <= 1e-12 * abs(values[0])
    for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(mine.full_tensor(), theirs, rtol=1e-10, atol=1e-12)


class Counted:
    """An object whose functions are noted in `calls`, name and arguments, before they are called."""

    def __init__(self, target: object, calls: list):
        self._target, self._calls = target, calls

    def __getattr__(self, name: str):
        def called(*args, **kwargs):
            self._calls.append((name, args))
            return getattr(self._target, name)(*args, **kwargs)

        return called


def costs(rank: int, size: int, name: str) -> dict[str, int]:
    """Scores that the ops look at, and bytes that the collectives take: of rows [., D], and others."""
    sent, called = [], []
    exchange, statistics = fused_vse.distributed.exchange, fused_vse.distributed.statistics
    collectives = Counted(distributed, sent)
    names = (
        "all_gather_single",
        "reduce_scatter_single",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
    )
    for function in names:
        if not hasattr(distributed, function):
            continue
        for module in (exchange, fused_vse.distributed.peers, fused_vse.distributed.reduction):
            for attribute in ("all_gather", "reduce_scatter"):
                if getattr(module, attribute, None) is getattr(distributed, function):
                    setattr(module, attribute, getattr(collectives, function))
    exchange.distributed = collectives
    ops_of = statistics.ops_of
    statistics.ops_of = lambda backend: Counted(ops_of(backend), called)
    own = BATCH // size
    pair = [torch.randn(own, DIM).requires_grad_() for _ in range(2)]
    ranks_cases.LOSSES[name](*pair, group=distributed.group.WORLD, backend="cpu").backward()
    found = collections.Counter()
    for function, arguments in sent:
        taken = arguments[1]
        wide = "rows" if taken.dim() == 2 and taken.shape[1] == DIM else "numbers"
        collective = re.sub("_single|_into_tensor|_tensor", "", function)
        found[f"{collective}: {wide}"] += taken.numel() * taken.element_size()
    for function, arguments in called:
        if function != "positive_scores":
            found[function] += arguments[0].shape[0] * arguments[1].shape[0]
    return dict(found)


def chunked(rank: int, size: int) -> int:
    """Captions in chunks of three of each rank, kept or gathered twice; returns how many cases there were."""
    three = 3 * size * 6 * 8
    fused_vse.distributed.exchange.CHUNK_BYTES = three
    count = 0
    layouts = "queues", "uneven", "a rank without pairs"
    for kept, (number, name), layout, with_ids in itertools.product(
        (True, False), enumerate(ranks_cases.LOSSES), layouts, (True, False)
    ):
        if number >= 5 and layout != layouts[0]:  # options of a loss
            continue
        fused_vse.distributed.set_gather_bytes(2 << 30 if kept else 2 * three)
        ranks_cases.compare(
            rank, size, name, layout, backend="cpu", with_ids=with_ids, integers=with_ids
        )
        count += 1
    return count


def death(rank: int, size: int, backward: bool) -> str:
    """The last rank kills itself within a loss; what the others say."""
    pair = [torch.randn(4, 5).requires_grad_() for _ in range(2)]
    exchange = fused_vse.distributed.exchange.Exchange
    if rank == size - 1:
        method = "reduce" if backward else "to_owners"
        setattr(exchange, method, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    try:
        all_negatives_loss(*pair, group=distributed.group.WORLD).backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def compiled(rank: int, size: int, backend: str, names: list[str], batches: list[int]) -> list:
    """How far torch.compile(fullgraph=True) is from eager: values and gradients of several batches."""
    differences = []
    for name in names:
        temperature = () if name.startswith("hinge") else (torch.tensor(0.3).requires_grad_(),)

        def loss(images, captions, ids, *temperature, name=name):
            options = {"temperature": temperature[0]} if temperature else {}
            return ranks_cases.LOSSES[name](
                images, captions, image_ids=ids, caption_ids=ids, normalize=True,
                group=distributed.group.WORLD, **options,
            )  # fmt: skip

        both = loss, torch.compile(loss, fullgraph=True, backend=backend)
        for batch in batches:
            torch.manual_seed(100 * rank + batch)
            leaves = [torch.randn(batch, DIM).requires_grad_() for _ in range(2)]
            ids = torch.arange(batch) // 2 + rank
            results = []
            for function in both:
                value = function(*leaves, ids, *temperature)
                results.append([value, *torch.autograd.grad(value, [*leaves, *temperature])])
            for one, other in zip(*results, strict=True):
                differences.append((one - other).abs().max().item() / one.abs().max().item())
    return differences
