"""Losses over ranks where users have them: autocast, FSDP2; what they cost; a rank that dies."""

import pytest
import ranks_use
from ranks_use import BATCH, DIM
from test_ranks import on_ranks

import fused_vse

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
@pytest.mark.parametrize("backward", [False, True])
def test_a_rank_that_dies_is_an_error_of_the_others(backward):
    for message in on_ranks(3, ranks_use.death, backward, lost=(2,), timeout=120):
        assert "no error" not in message and "gloo" in message.lower(), message
