"""What every rank of tests/test_ranks.py does: its part of a batch through a loss with `group=`, against one
process with the whole batch. Run by torch.multiprocessing."""

import datetime
import os
import time
import traceback
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss

LOSSES = {
    "all_negatives": all_negatives_loss,
    "hardest": hardest_negative_loss,
    "smooth": lambda *x, **k: hardest_negative_loss(*x, smooth=True, **k),
    "hinge_sum": hinge_loss,
    "hinge_max": lambda *x, **k: hinge_loss(*x, hardest=True, **k),
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
        expected[0] = expected[0][:, start : start + layout.pairs[rank]]
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
        "gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
    )
    try:
        results[rank] = ("ok", job(rank, size, *arguments))
    except Exception:  # noqa: BLE001 - the parent shows it
        results[rank] = ("failed", traceback.format_exc())
    distributed.destroy_process_group()


def every_case(rank: int, size: int, backend: str) -> int:
    """All losses, layouts and options in one group of processes; returns how many cases there were."""
    count = 0
    for name in LOSSES:
        for layout in ("even", "uneven", "queues", "a rank without pairs"):
            if size == 1 and layout == "a rank without pairs":
                continue
            for options in (
                {},
                {"with_ids": True, "reduction": "sum"},
                {"integers": True, "direction_weights": (0.5, 2.0)},
                {"with_ids": True, "integers": True, "reduction": "none", "margin": 0.3},
                {"similarity": "order", "normalize": True},
            ):
                compare(rank, size, name, layout, backend=backend, **options)
                count += 1
    return count
