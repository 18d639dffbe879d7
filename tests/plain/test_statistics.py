"""The public statistics, the logged statistics, and gradcheck."""

import formulas
import pytest
import torch
from cases import CASES, embeddings, ids_of, integer_embeddings
from conftest import assert_close

from fused_vse import (
    all_negatives_loss,
    hardest_negative_loss,
    hardest_negatives,
    hinge_loss,
    negative_logsumexp,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_hardest_negatives_and_ties(case, dtype, backend):
    ids = ids_of(case)
    images, captions = integer_embeddings(case, dtype)
    positive, scores, indices = hardest_negatives(
        images,
        captions,
        image_ids=ids[0],
        caption_ids=ids[1],
        num_pairs=case.pairs,
        backend=backend,
    )
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected_positive, expected_scores, expected_indices = [], [], []
    for p, row, is_negative in formulas.negatives_of(
        images.double(), captions.double(), *ids, case.pairs
    ):
        masked = row.masked_fill(~is_negative, -torch.inf)
        expected_positive.append(p)
        expected_scores.append(masked.max())
        first = (masked == masked.max()).nonzero()[0, 0]
        expected_indices.append(first if is_negative.any() else torch.tensor(-1))
    assert torch.equal(positive.double(), torch.stack(expected_positive)[: case.pairs])
    assert torch.equal(scores.double().flatten(), torch.stack(expected_scores))
    assert torch.equal(indices.flatten(), torch.stack(expected_indices))


def test_ties_send_the_gradient_to_the_smallest_index_alone(backend):
    images = torch.ones(4, 3, dtype=torch.float64)
    captions = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    hardest_negatives(images, captions, backend=backend).scores[0].sum().backward()
    # Captions 0 and 1 are the first negatives of images 1, 2, 3 and of image 0.
    assert captions.grad[:, 0].tolist() == [3, 1, 0, 0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_negative_logsumexp(case, backend):
    ids = ids_of(case)
    images, captions = embeddings(case)
    result = negative_logsumexp(
        images,
        captions,
        temperature=0.05,
        image_ids=ids[0],
        caption_ids=ids[1],
        num_pairs=case.pairs,
        backend=backend,
    )
    expected = [
        (row[is_negative] / 0.05).logsumexp(0)
        for _, row, is_negative in formulas.negatives_of(images, captions, *ids, case.pairs)
    ]
    assert_close(result.logsumexp.flatten(), torch.stack(expected), 1e-12)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 2, 4, 7, 8, 10, 11, 13)], ids=str)
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (all_negatives_loss, {"margin": 0.1}),
        (all_negatives_loss, {"normalize": True}),
        (hardest_negative_loss, {"smooth": True}),
        (hardest_negative_loss, {"margin": 3.0}),  # every hinge is active: no kink nearby
        (hinge_loss, {"margin": 3.0}),
    ],
)
def test_gradcheck(case, loss, options, backend):
    if case.dim > 100:
        case = case._replace(dim=35)
    ids = ids_of(case)
    tensors = [x.requires_grad_() for x in embeddings(case)]
    if loss is not hinge_loss:
        tensors.append(torch.tensor(0.3, dtype=torch.float64, requires_grad=True))

    def function(images, captions, *temperature):
        keywords = {"temperature": temperature[0]} if temperature else {}
        return loss(
            images,
            captions,
            image_ids=ids[0],
            caption_ids=ids[1],
            num_pairs=case.pairs,
            reduction="none",
            backend=backend,
            **options,
            **keywords,
        )

    torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_a_new_loss_in_three_lines(backend):
    """Soft margin on the two statistics together, as a user would write it."""
    results = []
    for name in (backend, "reference"):
        images, captions = (x.requires_grad_() for x in embeddings(CASES[7]))
        hard = hardest_negatives(images, captions, num_pairs=33, backend=name)
        soft = negative_logsumexp(images, captions, num_pairs=33, temperature=0.2, backend=name)
        loss = (0.5 * hard.scores + 0.1 * soft.logsumexp - hard.positive_scores).sum()
        loss.backward()
        results.append((loss, images.grad, captions.grad))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (all_negatives_loss, {"margin": 0.2}),
        (hardest_negative_loss, {}),
        (hinge_loss, {}),
        (hinge_loss, {"hardest": True}),
    ],
)
def test_return_statistics(case, loss, options, backend):
    ids = ids_of(case)
    images, captions = (x.requires_grad_() for x in embeddings(case))
    keywords = dict(image_ids=ids[0], caption_ids=ids[1], num_pairs=case.pairs, backend=backend)
    value, statistics = loss(images, captions, return_statistics=True, **keywords, **options)
    assert torch.equal(value, loss(images, captions, **keywords, **options))
    assert not any(x.requires_grad for x in statistics)

    hardest = [
        (row[is_negative].max() if is_negative.any() else torch.tensor(-torch.inf).double(), p)
        for p, row, is_negative in formulas.negatives_of(images, captions, *ids, case.pairs)
    ]
    h = torch.stack([h for h, _ in hardest]).view(2, -1)
    p = torch.stack([p for _, p in hardest]).view(2, -1)
    assert_close(statistics.positive_scores, p[0], 1e-12)
    assert_close(statistics.hardest_scores, h, 1e-12)
    expected = hardest_negatives(images, captions, **keywords).indices
    assert torch.equal(statistics.hardest_indices, expected)
    # Where a pair is its own negative, p and h are equal but for rounding: compare with those returned.
    p, h = statistics.positive_scores, statistics.hardest_scores
    assert_close(statistics.active_share, (0.2 + h - p > 0).double().mean(1), 1e-12)
    assert_close(statistics.recall_at_1, (p > h).double().mean(1), 1e-12)
