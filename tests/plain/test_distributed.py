"""Two ranks that gather their rows have, on average, the value and the gradients of one process."""

import os
import warnings

import pytest
import torch
from rank_processes import context, free_port
from torch.nn.functional import normalize

from fused_vse import all_negatives_loss, hardest_negative_loss, hinge_loss
from fused_vse.distributed import gather_rows

RANKS, B, D = 3, 8, 8
LOSSES = {
    "all negatives": all_negatives_loss,
    "hardest": hardest_negative_loss,
    "hinges": lambda *x, **options: hinge_loss(*x, reduction="mean", **options),
}


def batch():
    generator = torch.Generator().manual_seed(0)
    pair = [normalize(torch.randn(RANKS * B, D, generator=generator).double()) for _ in range(2)]
    return *pair, torch.randint(0, 2 * B, (RANKS * B,), generator=generator)


def answers(images, captions, ids, gather=lambda x: x):
    """Per loss, without and with ids: the value and the gradients, as arrays."""
    results = {}
    for name, loss in LOSSES.items():
        for with_ids in (False, True):
            leaves = images.clone().requires_grad_(), captions.clone().requires_grad_()
            options = {"image_ids": gather(ids), "caption_ids": gather(ids)} if with_ids else {}
            value = loss(*map(gather, leaves), num_pairs=len(images), **options)
            gradients = torch.autograd.grad(value, leaves)
            results[name, with_ids] = [x.detach().numpy() for x in (value, *gradients)]
    return results


def _rank(rank: int, port: int, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    own = slice(rank * B, (rank + 1) * B)
    gathered = gather_rows(torch.arange(RANKS * B)[own])
    assert gathered.tolist() == torch.arange(RANKS * B).roll(-rank * B).tolist()
    queue.put((rank, answers(*(x[own] for x in batch()), gather_rows)))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks():
    port, queue = free_port(), context.Queue()
    processes = [context.Process(target=_rank, args=(rank, port, queue)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return results


@pytest.mark.parametrize("with_ids", [False, True], ids=["rows", "ids"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_average_is_that_of_one_process(ranks, loss, with_ids):
    value, *gradients = (torch.as_tensor(x) for x in answers(*batch())[loss, with_ids])
    of_ranks = [[torch.as_tensor(x) for x in ranks[rank][loss, with_ids]] for rank in range(RANKS)]
    torch.testing.assert_close(sum(each[0] for each in of_ranks) / RANKS, value)
    for side, expected in enumerate(gradients, 1):
        averaged = torch.cat([each[side] for each in of_ranks]) / RANKS
        torch.testing.assert_close(averaged, expected, rtol=1e-10, atol=1e-12)


def test_without_a_process_group():
    rows = torch.ones(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows
    with pytest.raises(TypeError, match="rows must be a tensor"):
        gather_rows(torch.tensor(1.0))
