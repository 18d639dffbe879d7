"""What every rank of tests/test_ranks.py does: its part of a batch through a loss with `group=`, against one
process with the whole batch. Run by torch.multiprocessing."""

import datetime
import os
import time
import traceback
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from fused_vse import (
    AllNegativesLoss,
    all_negatives_loss,
    hardest_negative_loss,
    hinge_loss,
    sigmoid_loss,
)
from fused_vse.distributed import gather_rows, set_gather_bytes

LOSSES = {
    "all_negatives": all_negatives_loss,
    "hardest": hardest_negative_loss,
    "smooth": lambda *x, **k: hardest_negative_loss(*x, smooth=True, **k),
    "hinge_sum": hinge_loss,
    "hinge_max": lambda *x, **k: hinge_loss(*x, hardest=True, **k),
    "positives": lambda *x, **k: all_negatives_loss(*x, equal_ids="positive", **k),
    "hardness": lambda *x, **k: all_negatives_loss(*x, hardness=3.0, **k),
    "false": lambda *x, **k: all_negatives_loss(*x, false_negative_margin=-0.1, **k),
    "select": lambda *x, **k: hardest_negative_loss(*x, select=0.2, **k),
    "semi_hard": lambda *x, **k: hardest_negative_loss(*x, false_negative_margin=1e-3, **k),
    "hinge_false": lambda *x, **k: hinge_loss(*x, false_negative_margin=0.1, **k),
    "sigmoid": lambda *x, **k: sigmoid_loss(*x, bias=-2.0, **k),
    "sigmoid_positives": lambda *x, **k: sigmoid_loss(*x, equal_ids="positive", **k),
}
# What a loss does not take is left out of a case.
WITHOUT = {
    "positives": {"margin"},
    "sigmoid": {"margin", "direction_weights"},
    "sigmoid_positives": {"margin", "direction_weights"},
}


class Layout(NamedTuple):
    """How many pairs, extra images and extra captions each rank has."""

    pairs: list[int]
    images: list[int]
    captions: list[int]

    @classmethod
    def of(cls, name: str, size: int) -> "Layout":
        ranks = range(size)
        if name == "even":
            return cls([7] * size, [0] * size, [0] * size)
        if name == "uneven":
            return cls([3 + 4 * r for r in ranks], [0] * size, [0] * size)
        if name == "queues":
            return cls([5 + r for r in ranks], [2 * r + 1 for r in ranks], [6 - r for r in ranks])
        assert name == "a rank without pairs"
        last = [r == size - 1 for r in ranks]
        return cls([0 if x else 6 for x in last], [1] * size, [2] * size)

    def own(self, rank: int) -> tuple[Tensor, Tensor]:
        """Rows of the whole batch that are this rank's: pairs of all ranks first, then extras of all."""
        k, start = self.pairs[rank], sum(self.pairs[:rank])
        rows = []
        for extras in (self.images, self.captions):
            first = sum(self.pairs) + sum(extras[:rank])
            rows.append(
                torch.cat(
                    [torch.arange(start, start + k), torch.arange(first, first + extras[rank])]
                )
            )
        return rows[0], rows[1]


def whole_batch(layout: Layout, dtype: torch.dtype, integers: bool, dim: int = 6):
    generator = torch.Generator().manual_seed(3)
    rows = [sum(layout.pairs) + sum(extras) for extras in (layout.images, layout.captions)]
    if integers:
        return [torch.randint(-2, 3, (n, dim), generator=generator).to(dtype) for n in rows]
    pair = [torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in rows]
    return [torch.nn.functional.normalize(x).to(dtype) for x in pair]


def one_process(loss, pair, ids, layout, temperature, **options):
    """Value, gradients of both sides and of the temperature."""
    leaves = [x.detach().clone().requires_grad_() for x in pair]
    tau = {}
    if temperature is not None:
        temperature = temperature.detach().clone().requires_grad_()
        tau = {"temperature": temperature}
    value = loss(
        *leaves, image_ids=ids[0], caption_ids=ids[1], num_pairs=sum(layout.pairs), **tau, **options
    )
    value.sum().backward()
    return [value.detach(), *(x.grad for x in leaves), temperature.grad if tau else None]


def ids_of(pair, with_ids: bool):
    return [torch.arange(len(x)) // 3 if with_ids else None for x in pair]


def compare(rank, size, name, layout_name, *, backend, dtype=torch.float64, with_ids=False,
            integers=False, tolerance=1e-12, delay=False, **options):  # fmt: skip
    """One case; returns the bits of value and gradients, for comparisons of runs."""
    layout, loss = Layout.of(layout_name, size), LOSSES[name]
    options = {k: x for k, x in options.items() if k not in WITHOUT.get(name, ())}
    pair = whole_batch(layout, dtype, integers)
    ids = ids_of(pair, with_ids)
    temperature = None if name.startswith("hinge") else torch.tensor(0.2, dtype=torch.float64)
    expected = one_process(loss, pair, ids, layout, temperature, backend=backend, **options)

    rows = layout.own(rank)
    if delay:
        time.sleep(0.05 * ((rank * 7 + len(name)) % 3))
    leaves = [x[r].requires_grad_() for x, r in zip(pair, rows, strict=True)]
    own_ids = [None if x is None else x[r] for x, r in zip(ids, rows, strict=True)]
    tau = {}
    if temperature is not None:
        temperature = temperature.clone().requires_grad_()
        tau = {"temperature": temperature}
    value = loss(
        *leaves, image_ids=own_ids[0], caption_ids=own_ids[1], num_pairs=layout.pairs[rank],
        backend=backend, group=distributed.group.WORLD, **tau, **options,
    )  # fmt: skip
    # The average over the ranks is what DistributedDataParallel makes of a model's gradients.
    if options.get("reduction") == "none":
        (value.sum() * size).backward()
        start = sum(layout.pairs[:rank])
        expected[0] = expected[0][..., start : start + layout.pairs[rank]]
    else:
        value.backward()
    results = [value.detach(), *(x.grad / size for x in leaves)]
    wanted = [expected[0], *(x[r] for x, r in zip(expected[1:3], rows, strict=True))]
    if tau:
        results.append(temperature.grad)
        wanted.append(expected[3])
    for what, got, want in zip(
        ("value", "d_images", "d_captions", "d_tau"), results, wanted, strict=False
    ):
        assert got.shape == want.shape, what
        error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        assert error <= tolerance * scale, f"{what} on rank {rank}: off by {error:.3g}"
    return [x.tolist() for x in results]


def run(rank: int, size: int, port: int, job, arguments: tuple, results) -> None:
    """One rank: job(rank, size, *arguments), whose result or traceback goes into `results`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=240)
    )
    try:
        results[rank] = ("ok", job(rank, size, *arguments))
    except Exception:  # noqa: BLE001 - the parent shows it
        results[rank] = ("failed", traceback.format_exc())
    distributed.destroy_process_group()


OPTIONS = (
    {},
    {"with_ids": True, "reduction": "sum"},
    {"integers": True, "direction_weights": (0.5, 2.0)},
    {"with_ids": True, "integers": True, "reduction": "none", "margin": 0.3},
    {"similarity": "order", "normalize": True, "with_ids": True},
)


def every_case(rank: int, size: int, backend: str) -> int:
    """All losses, layouts and options in one group of processes; returns how many cases there were. Options
    of a loss have two of the options each in turn."""
    count = 0
    for number, name in enumerate(LOSSES):
        for layout in ("even", "uneven", "queues", "a rank without pairs"):
            if size == 1 and layout == "a rank without pairs":
                continue
            chosen = OPTIONS if number < 5 else (OPTIONS[count % 5], OPTIONS[(count + 2) % 5])
            for options in chosen:
                compare(rank, size, name, layout, backend=backend, **options)
                count += 1
    return count


def gather_mistakes(rank: int, size: int) -> list[str]:
    """What `gather_rows` says where the ranks pass different things."""
    different = [
        torch.zeros(4 + rank, 3),
        torch.zeros(4, 3, dtype=(torch.float32, torch.int32)[rank]),
        torch.zeros(((4, 6), (6, 4))[rank]),
    ]
    messages = []
    for rows in different:
        try:
            gather_rows(rows)
        except ValueError as error:  # noqa: PERF203
            messages.append(str(error))
    return messages


def gather_anything(rank: int, size: int) -> None:
    """Every dtype arrives; so does the second derivative."""
    for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64):
        rows = (torch.arange(6).view(3, 2) % 2 + rank).to(dtype)
        others = torch.cat([(torch.arange(6).view(3, 2) % 2 + r).to(dtype) for r in range(size)])
        assert torch.equal(gather_rows(rows), others.roll(-3 * rank, 0))
    rows = torch.full((2, 2), 2.0 + rank, dtype=torch.float64, requires_grad=True)
    # Each rank's objective is the sum of cubes of all rows, and the sum over the ranks is differentiated.
    (first,) = torch.autograd.grad(gather_rows(rows).pow(3).sum(), rows, create_graph=True)
    assert torch.allclose(first, size * 3 * rows**2)
    (second,) = torch.autograd.grad(first.sum(), rows)
    assert torch.allclose(second, size * 6 * rows)


MISTAKES = {
    "margin": lambda rank: dict(margin=0.1 + rank),
    "D": lambda rank: dict(dim=5 + rank),
    "dtype": lambda rank: dict(dtype=(torch.float32, torch.float64)[rank]),
    "ids": lambda rank: dict(with_ids=rank == 1),
    "frozen": lambda rank: dict(frozen=rank == 1),
    "reduction": lambda rank: dict(reduction=("mean", "sum")[rank]),
    "temperature": lambda rank: dict(temperature=0.1 + rank),
    "one rank's own mistake": lambda rank: dict(margin="0.1" if rank == 1 else 0.1),
    "no pair anywhere": lambda rank: dict(num_pairs=0),
}


def disagreement(rank: int, size: int, mistake: str) -> str:
    """The error on this rank."""
    options = {"dim": 5, "dtype": torch.float32, "with_ids": False, "frozen": False}
    options |= MISTAKES[mistake](rank)
    dim, dtype, with_ids, frozen = (options.pop(name) for name in list(options)[:4])
    pair = [torch.randn(4, dim, dtype=dtype).requires_grad_() for _ in range(2)]
    if frozen:
        pair[1].requires_grad_(False)
    if with_ids:
        options |= {"image_ids": torch.arange(4), "caption_ids": torch.arange(4)}
    try:
        all_negatives_loss(*pair, group=distributed.group.WORLD, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def poison(rank: int, size: int) -> bool:
    """NaN in one rank's images, or captions: NaN on all ranks, gradients included."""
    for side in range(2):
        pair = [torch.randn(4, 5) for _ in range(2)]
        if rank == size - 1:
            pair[side][1, 2] = torch.nan
        for loss in LOSSES.values():
            leaves = [x.clone().requires_grad_() for x in pair]
            value = loss(*leaves, group=distributed.group.WORLD)
            value.backward()
            assert value.isnan()
            assert all(x.grad.isnan().all() for x in leaves)
    return True


def sixteen_bits(rank: int, size: int) -> None:
    """Many chunks, whose gradients in bfloat16 are rounded once, as a sum."""
    set_gather_bytes(400)  # a few captions at a time
    layout = Layout([40] * size, [0] * size, [0] * size)
    pair = whole_batch(layout, torch.bfloat16, False)
    exact = [x.double().requires_grad_() for x in pair]
    all_negatives_loss(*exact, temperature=0.5).backward()
    rows, _ = layout.own(rank)
    leaves = [x[rows].requires_grad_() for x in pair]
    all_negatives_loss(*leaves, temperature=0.5, group=distributed.group.WORLD).backward()
    for x, whole in zip(leaves, exact, strict=True):
        error = x.grad.double() / size - whole.grad[rows]
        assert error.norm() <= 2**-9 * whole.grad[rows].norm(), error.norm() / whole.grad.norm()


def bits(rank: int, size: int, delays: bool) -> list:
    """Values and gradients of one float32 batch of 12 pairs a group, for comparisons to the last bit."""
    layout = Layout([12 // size] * size, [0] * size, [0] * size)
    pair = whole_batch(layout, torch.float32, False)
    rows, _ = layout.own(rank)
    results = []
    for name, loss in LOSSES.items():
        leaves = [x[rows].requires_grad_() for x in pair]
        if delays:
            time.sleep(0.03 * ((rank + len(name)) % 3))
        value = loss(*leaves, group=distributed.group.WORLD)
        value.backward()
        results.append([name, value.item(), [(x.grad / size).tolist() for x in leaves]])
    return results


def data_parallel(rank: int, size: int) -> None:
    """DistributedDataParallel, with and without accumulation, a temperature inside and outside of it; the
    parameters of one process with the whole batch."""
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(2, 12, 5, generator=generator).double() for _ in range(2)]
    weights = [torch.randn(4, 5, generator=generator).double() for _ in range(2)]

    class Model(torch.nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.sides = torch.nn.ParameterList([w.clone() for w in weights])
            self.loss = loss

        def forward(self, images, captions, **options):
            pair = [x @ w.T for x, w in zip((images, captions), self.sides, strict=True)]
            return self.loss(*pair, normalize=True, **options)

    def loss():
        return AllNegativesLoss(0.2, learnable_temperature=True).double()

    alone = Model(loss())
    for batch in zip(*inputs, strict=True):
        alone(*batch).backward()
    inside = torch.nn.parallel.DistributedDataParallel(Model(loss()))
    outside = loss()
    bare = torch.nn.parallel.DistributedDataParallel(Model(lambda *x, **k: outside(*x, **k)))
    own, group = slice(rank * 12 // size, (rank + 1) * 12 // size), distributed.group.WORLD
    for model in (inside, bare):
        with model.no_sync():
            model(*(x[0][own] for x in inputs), group=group).backward()
        model(*(x[1][own] for x in inputs), group=group).backward()
        for parameter, expected in zip(model.module.sides, alone.sides, strict=True):
            assert torch.allclose(parameter.grad, expected.grad, rtol=1e-10)
    expected = alone.loss.log_temperature.grad
    for temperature in (inside.module.loss, outside):
        assert torch.allclose(temperature.log_temperature.grad, expected, rtol=1e-10)


def groups_of_two(rank: int, size: int) -> None:
    """2 x 2: each group is a batch of its own."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    group, first = groups[rank // 2], rank // 2 * 2
    pair = [
        torch.randn(16, 5, generator=torch.Generator().manual_seed(1)).double() for _ in range(2)
    ]
    batch = [x[first * 4 : first * 4 + 8].requires_grad_() for x in pair]
    all_negatives_loss(*batch).backward()
    own = slice(rank % 2 * 4, rank % 2 * 4 + 4)
    leaves = [x.detach()[own].requires_grad_() for x in batch]
    all_negatives_loss(*leaves, group=group).backward()
    for x, whole in zip(leaves, batch, strict=True):
        assert torch.allclose(x.grad / 2, whole.grad[own], rtol=1e-12)
