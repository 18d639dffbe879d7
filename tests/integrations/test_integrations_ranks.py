"""The stand-ins for packages on two ranks: the gradients that DDP averages are those of one process."""

import importlib.util
import os

import pytest
import torch
from rank_processes import context, free_port
from test_integrations import B, random_batch, run

MODES = [(False, False), (True, False), (False, True), (True, True)]
RANKS = 2
SCALE = 20.0
STRENGTHS = (0.0, 5.0)  # of the hardness weighting
IMPLEMENTATIONS = ["bidir", "shift", "reduce", "gather"]
PACKAGES = {"clip": "open_clip", "siglip": "open_clip", "ranking": "sentence_transformers"}


def clip_losses() -> dict:
    from open_clip import ClipLoss as Theirs

    from fused_vse.integrations.open_clip import ClipLoss

    return {"ours": ClipLoss, "theirs": Theirs}


def siglip_losses() -> dict:
    from open_clip.loss import SigLipLoss as Theirs

    from fused_vse.integrations.open_clip import SigLipLoss

    return {"ours": SigLipLoss, "theirs": Theirs}


def ranking_losses() -> dict:
    from fused_vse.integrations.sentence_transformers import MultipleNegativesRankingLoss as Ours

    return {"ours": Ours, "theirs": Ours.__base__}


def ranking(make, **options):
    directions = ["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]
    loss = make(None, scale=SCALE, directions=directions, partition_mode="joint", **options)
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


def _answer(loss, inputs) -> list:
    """The value and the gradients, as arrays: a tensor would travel by shared memory."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    return [x.detach().numpy() for x in (value, *torch.autograd.grad(value, leaves))]


def _check_mistake(rank: int, inputs: list) -> None:
    """What one rank passes wrongly is an error of all."""
    loss = clip_losses()["ours"](world_size=RANKS)
    expected = (
        (RuntimeError, "rank 1 of the group refused") if rank == 0 else (TypeError, "logit_bias")
    )
    with pytest.raises(expected[0], match=expected[1]):
        loss(*inputs, logit_bias="wrong" if rank == 1 else None)


def _rank(project: str, rank: int, port: int, result) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    own = slice(rank * B // RANKS, (rank + 1) * B // RANKS)
    inputs = [x[own] for x in random_batch()]
    answers = {}
    if project == "clip":
        inputs.append(torch.tensor(SCALE, dtype=torch.float64))
        for name, make in clip_losses().items():
            for mode in MODES:
                loss = make(*mode, rank=rank, world_size=RANKS)
                answers[name, mode] = _answer(loss, inputs)
        _check_mistake(rank, inputs)
    elif project == "siglip":
        inputs += [torch.tensor(x, dtype=torch.float64) for x in (SCALE, -SCALE)]
        for name, make in siglip_losses().items():
            for implementation in IMPLEMENTATIONS:
                loss = make(rank=rank, world_size=RANKS, dist_impl=implementation)
                answers[name, implementation] = _answer(loss, inputs)
    else:
        for name, make in ranking_losses().items():
            for strength in STRENGTHS:
                options = {"hardness_mode": "in_batch_negatives", "hardness_strength": strength}
                loss = ranking(make, gather_across_devices=True, **options)
                answers[name, strength] = _answer(loss, inputs)
    result.put((rank, answers))
    torch.distributed.destroy_process_group()


def on_two_ranks(project: str) -> dict:
    """What each rank computed, as a list of RANKS lists."""
    if not importlib.util.find_spec(PACKAGES[project]):
        pytest.skip(f"{PACKAGES[project]} is not installed: pip install '.[peers]'")
    port, queue = free_port(), context.Queue()
    processes = [
        context.Process(target=_rank, args=(project, rank, port, queue)) for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    ranks = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    return {
        key: [[torch.from_numpy(x) for x in ranks[rank][key]] for rank in range(RANKS)]
        for key in ranks[0]
    }


def assert_average(ranks: list, expected: list) -> None:
    """DDP averages over the ranks: features get half of what a rank's backward pass gives them."""
    (first, *first_gradients), (second, *second_gradients) = ranks
    value, *gradients = expected
    assert torch.isclose((first + second) / 2, value, rtol=1e-12)
    for mine, other, whole in zip(first_gradients, second_gradients, gradients, strict=True):
        averaged = torch.cat([mine, other]) / 2 if mine.dim() else (mine + other) / 2
        assert torch.allclose(averaged, whole, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def clip():
    answers = on_two_ranks("clip")
    inputs = (*random_batch(), torch.tensor(SCALE))
    return answers, run(clip_losses()["theirs"](), inputs, torch.float64)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_clip_loss_has_the_gradient_of_one_process(clip, mode):
    answers, expected = clip
    assert_average(answers["ours", mode], expected)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_clip_loss_has_the_projects_value(clip, mode):
    """The value of the whole batch on every rank: with local_loss, the mean of the project's values."""
    answers, _ = clip
    values = torch.stack([theirs[0] for theirs in answers["theirs", mode]])
    for ours, theirs in zip(answers["ours", mode], answers["theirs", mode], strict=True):
        assert torch.isclose(ours[0], values.mean(), rtol=1e-12)
        if mode[1]:  # the modes in which the project's gradient is right
            for x, y in zip(ours[1:3], theirs[1:3], strict=True):
                assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def siglip():
    answers = on_two_ranks("siglip")
    inputs = (*random_batch(), torch.tensor(SCALE), torch.tensor(-SCALE))
    return answers, run(siglip_losses()["theirs"](), inputs, torch.float64)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_siglip_loss_has_the_projects_value_and_gradient(siglip, implementation):
    answers, expected = siglip
    assert_average(answers["ours", implementation], expected)
    both = zip(answers["ours", implementation], answers["theirs", implementation], strict=True)
    for ours, theirs in both:
        for x, y in zip(ours[:3], theirs[:3], strict=True):
            assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)


def test_ranking_loss_gathers_with_gradient():
    answers = on_two_ranks("ranking")
    whole = run(ranking(ranking_losses()["theirs"]), random_batch(), torch.float64)
    assert_average(answers["ours", 0.0], whole)
    both = [
        pair
        for strength in STRENGTHS
        for pair in zip(answers["ours", strength], answers["theirs", strength], strict=True)
    ]
    for ours, theirs in both:
        for x, y in zip(ours, theirs, strict=True):
            assert torch.allclose(x, y, rtol=1e-9, atol=1e-12)
