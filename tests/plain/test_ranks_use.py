"""Losses over ranks: autocast, FSDP2, torch.compile; what they cost; a rank that dies."""

from pathlib import Path

import pytest
import ranks_use
import torch
from ranks_use import BATCH, DIM
from test_ranks import on_ranks

import fused_vse
from benchmarks import ranks_model

LOSSES = ("all_negatives", "hardest", "hinge_sum")
RANKS = 2
cpu = pytest.mark.skipif(
    fused_vse.backends()["cpu"] != "available", reason=fused_vse.backends()["cpu"]
)


def test_autocast_and_fully_shard():
    on_ranks(RANKS, ranks_use.every_use)


@cpu
@pytest.mark.parametrize("name", LOSSES)
def test_every_score_is_computed_once_and_captions_travel_once_forward_and_once_back(name):
    size, own = 3, BATCH // 3
    op = {"all_negatives": "negative_logsumexp", "hardest": "hardest_negatives"}.get(name, name)
    for found in on_ranks(size, ranks_use.costs, name):
        assert found.pop(op) == found.pop(f"{op}_backward") == own * size * own
        assert found.pop("all_gather: rows") == own * DIM * 4  # the own captions
        assert found.pop("reduce_scatter: rows") == size * own * DIM * 4  # all captions' gradients


@cpu
def test_chunks_of_the_captions():
    assert on_ranks(3, ranks_use.chunked) == [2 * (5 * 3 + 8) * 2] * 3


@cpu
@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_dies_is_an_error_of_the_others(backward):
    for message in on_ranks(3, ranks_use.death, backward, lost=(2,), timeout=120):
        assert "no error" not in message and "gloo" in message.lower(), message


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="the compiler of torch 2.10 breaks the graph"
)
def test_compiled_without_graph_breaks():
    """aot_eager: dynamo and autograd trace the collectives, what the compiler makes of them is PyTorch's."""
    for differences in on_ranks(RANKS, ranks_use.compiled, "aot_eager", LOSSES, [4, 6]):
        assert len(differences) == 2 * (4 + 4 + 3) and max(differences) <= 1e-6


def test_the_table_on_paper_is_that_of_the_script():
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    shown = page.read_text().split("<!-- model:ranks -->\n")[1].split("\n<!-- /model:ranks -->")[0]
    assert shown == ranks_model.main([])
