"""Retrieval metrics against a brute-force oracle that sorts the whole of S."""

import re
import statistics
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_vse import retrieval
from fused_vse.retrieval import evaluate_retrieval


def oracle(images, captions, image_ids, caption_ids):
    """Ranks of both directions, one query at a time, in float64."""
    scores = images.double() @ captions.double().T
    right = image_ids[:, None] == caption_ids
    image_ranks = [
        1 + sum(s >= max(row[r]) for s in row[~r]).item() if (~r).any() else 1
        for row, r in zip(scores, right, strict=True)
    ]
    caption_ranks = [
        1 + sum(s >= max(column[r]) for s in column[~r]).item() if (~r).any() else 1
        for column, r in zip(scores.T, right.T, strict=True)
    ]
    return image_ranks, caption_ranks


@st.composite
def problems(draw):
    """Small integers, so that scores are exact and ties are frequent; ids shuffled."""
    N = draw(st.integers(1, 6))
    owners = list(range(N)) + draw(st.lists(st.integers(0, N - 1), max_size=8))
    owners = torch.tensor(draw(st.permutations(owners)))
    names = torch.tensor(draw(st.lists(st.integers(-99, 99), min_size=N, max_size=N, unique=True)))
    D = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    images = torch.randint(-2, 3, (N, D), generator=generator).float()
    captions = torch.randint(-2, 3, (len(owners), D), generator=generator).float()
    return images, captions, names, names[owners]


@given(problems(), st.sampled_from([(1, 1), (2, 3), (100, 100)]))
@settings(deadline=None, max_examples=150)
def test_ranks_equal_brute_force(problem, blocks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "IMAGE_BLOCK", blocks[0])
        patch.setattr(retrieval, "CAPTION_BLOCK", blocks[1])
        result = evaluate_retrieval(*problem[:2], image_ids=problem[2], caption_ids=problem[3])
    for ranking, expected in zip(result, oracle(*problem), strict=True):
        assert ranking.ranks.tolist() == expected
        assert ranking.median_rank == statistics.median(expected)
        assert ranking.mean_rank == pytest.approx(statistics.mean(expected))
        for k, recall in ranking.recalls.items():
            assert recall == pytest.approx(100 * sum(r <= k for r in expected) / len(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_real_valued_embeddings(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 17, generator=generator).to(dtype)
    captions = (images.repeat_interleave(5, 0) + torch.randn(200, 17, generator=generator)).to(
        dtype
    )
    result = evaluate_retrieval(images, captions, ks=(1, 3))
    expected = oracle(images, captions, torch.arange(40), torch.arange(200) // 5)
    assert [ranking.ranks.tolist() for ranking in result] == list(expected)
    assert list(result.image_to_text.recalls) == [1, 3]
    assert result.rsum == sum(sum(ranking.recalls.values()) for ranking in result)


def test_equal_embeddings_are_not_perfect():
    # The products of 1/3 are rounded, differently in different places of a GEMM.
    result = evaluate_retrieval(torch.full((70, 33), 1 / 3), torch.full((350, 33), 1 / 3))
    assert result.image_to_text.ranks.eq(1 + 345).all()
    assert result.text_to_image.ranks.eq(70).all()
    assert result.rsum == 0


def test_perfect_embeddings():
    result = evaluate_retrieval(torch.eye(20), torch.eye(20).repeat_interleave(5, 0))
    assert result.rsum == 600
    assert result.text_to_image.median_rank == result.image_to_text.mean_rank == 1


def test_printed_without_the_rank_of_every_query():
    eye = torch.eye(1000)
    assert repr(evaluate_retrieval(eye, eye, ks=(1, 10))) == (
        "Retrieval(image_to_text=Ranking(recalls={1: 100.0, 10: 100.0}, median_rank=1.0,"
        " mean_rank=1.0, ranks=<1000>), text_to_image=Ranking(recalls={1: 100.0, 10: 100.0},"
        " median_rank=1.0, mean_rank=1.0, ranks=<1000>))"
    )


def test_one_image():
    assert evaluate_retrieval(torch.ones(1, 3), -torch.ones(5, 3)).rsum == 600


def test_a_tie_with_another_caption_of_the_image_is_none():
    images, captions = torch.eye(2), torch.eye(2).repeat_interleave(2, 0)
    assert evaluate_retrieval(images, captions).rsum == 600


def test_strided_input_and_a_graph():
    images = torch.randn(6, 8, requires_grad=True)
    captions = torch.randn(8, 30).T[:, :8]
    result = evaluate_retrieval(images, captions)
    assert not any(ranking.ranks.requires_grad for ranking in result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["images", "captions"])
def test_non_finite_embeddings_raise(side, value):
    arguments = {"images": torch.ones(3, 4), "captions": torch.ones(6, 4)}
    arguments[side][2, 1] = value
    with pytest.raises(ValueError, match=f"{side}: row 2 holds NaN"):
        evaluate_retrieval(**arguments)


def ids(*values):
    return torch.tensor(values)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "prototype stage", once
    NESTED = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
GOOD = {"images": torch.ones(2, 3), "captions": torch.ones(4, 3)}
BAD = [
    ({"images": [[1.0]]}, TypeError, r"images must be a floating-point tensor .* \(list\); wrap"),
    ({"captions": torch.ones(4, 3).long()}, TypeError, "captions .* int64 tensor .*; convert it"),
    ({"images": torch.ones(3)}, ValueError, r"images .* of shape \[3\]"),
    ({"images": torch.ones(0, 3)}, ValueError, "images is empty"),
    ({"captions": torch.ones(4, 2)}, ValueError, r"share D, got \[2, 3\] and \[4, 2\]"),
    ({"captions": torch.ones(4, 3, device="meta")}, ValueError, "images are on cpu but captions"),
    ({"captions": torch.ones(5, 3)}, ValueError, r"must be given when .* \(5\) is not a multiple"),
    ({"image_ids": ids(0, 1)}, ValueError, "caption_ids is missing"),
    ({"caption_ids": ids(0, 0, 1, 1)}, ValueError, "image_ids is missing"),
    (
        {"image_ids": [0, 1], "caption_ids": ids(0, 0, 1, 1)},
        TypeError,
        r"image_ids .* \(list\); wrap",
    ),
    ({"image_ids": ids(0.0, 1), "caption_ids": ids(0, 0, 1, 1)}, TypeError, "got a float32"),
    ({"image_ids": ids(0, 1), "caption_ids": ids(0, 1)}, ValueError, r"caption_ids .* shape \[2\]"),
    (
        {"image_ids": ids(7, 7), "caption_ids": ids(7, 7, 7, 7)},
        ValueError,
        "7 occurs more than",
    ),
    (
        {"image_ids": ids(0, 1), "caption_ids": ids(0, 1, 1, 2)},
        ValueError,
        r"caption_ids\[3\] is 2",
    ),
    ({"image_ids": ids(0, 5), "caption_ids": ids(0, 0, 0, 0)}, ValueError, r"image_ids\[1\] is 5"),
    ({"images": NESTED}, TypeError, "images .* got a nested tensor"),
    ({"images": torch.eye(3).to_sparse()}, TypeError, r"images .*sparse.*to_dense"),
    ({"images": torch.eye(3).numpy()}, TypeError, "images .*numpy array of shape"),
    ({name: torch.ones(2, 3).to("meta") for name in GOOD}, ValueError, "images and .* no data"),
    (
        {"image_ids": ids(0, 1).to_sparse(), "caption_ids": ids(0, 0, 1, 1)},
        TypeError,
        "image_ids .*sparse",
    ),
    ({"image_ids": NESTED, "caption_ids": ids(0, 0, 1, 1)}, TypeError, "image_ids .* nested"),
    (
        {"image_ids": ids(0, 1), "caption_ids": ids(0, 0, 1, 1).to("meta")},
        ValueError,
        "caption_ids is on",
    ),
    ({"progress": "no"}, TypeError, "progress must be True or False, got 'no'"),
    ({"ks": (1, 2**63)}, ValueError, "ks must be .*largest possible rank"),
    ({"ks": (1, 10**5000)}, ValueError, "ks must be positive"),
    ({"ks": (True, 2)}, TypeError, "ks must be positive"),
    ({"ks": tuple(range(1000, 0, -1))}, ValueError, "ks must be positive.{,200}$"),
    ({"ks": 5}, TypeError, "ks must be positive"),
    ({"ks": (1.0,)}, TypeError, "ks must be positive"),
    ({"ks": ()}, ValueError, "ks must be positive"),
    ({"ks": (0, 1)}, ValueError, "ks must be positive"),
    ({"ks": (5, 5)}, ValueError, "ks must be positive"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        evaluate_retrieval(**(GOOD | change))


def test_ks_of_other_integers():
    ks = (np.int64(1), np.uint8(5))
    recalls = evaluate_retrieval(**GOOD, ks=ks).image_to_text.recalls
    assert recalls == evaluate_retrieval(**GOOD, ks=(1, 5)).image_to_text.recalls


def test_progress_bar_only_when_it_takes_long(capsys, monkeypatch):
    images, captions = torch.eye(4), torch.eye(4).repeat_interleave(5, 0)
    evaluate_retrieval(images, captions)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(retrieval, "PROGRESS_DELAY", 0)
    monkeypatch.setattr(retrieval, "IMAGE_BLOCK", 1)
    evaluate_retrieval(images, captions)
    assert "ranking" in capsys.readouterr().err
    evaluate_retrieval(images, captions, progress=False)
    assert capsys.readouterr().err == ""


def test_memory_is_bounded():
    # S would take 1.2 GB; two tiles of float64 scores and a mask take less than 200 MB.
    images, captions = torch.randn(3000, 2), torch.randn(51000, 2)
    with torch.profiler.profile(profile_memory=True) as profile:
        evaluate_retrieval(images, captions, progress=False)
    allocations = [
        event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
    ]
    assert max(allocations) <= 8 * retrieval.IMAGE_BLOCK * retrieval.CAPTION_BLOCK
