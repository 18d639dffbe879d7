"""fused_vse.training: what a curriculum calls when, what a queue gives, and how both are restarted."""

import io

import pytest
import torch
from cases import Case, embeddings
from conftest import assert_close

from fused_vse import (
    AllNegativesLoss,
    HardestNegativeLoss,
    all_negatives_loss,
    hardest_negative_loss,
    hinge_loss,
)
from fused_vse.training import Curriculum, EmbeddingQueue, Phase

PAIR = embeddings(Case("pair", 12, 12, 12, 6))


def through_a_file(module: torch.nn.Module, other: torch.nn.Module) -> torch.nn.Module:
    """As a checkpoint that nothing is unpickled of."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def test_a_curriculum_is_its_losses_one_after_the_other():
    first, last = all_negatives_loss(*PAIR), hardest_negative_loss(*PAIR)

    def make():
        return Curriculum(
            Phase(AllNegativesLoss(), 2), Phase(hinge_loss, 1), Phase(HardestNegativeLoss())
        )

    curriculum = make()
    for number, expected in enumerate([first, first, hinge_loss(*PAIR), last, last]):
        assert_close(curriculum(*PAIR), expected, 1e-12)
        assert curriculum.current == max(0, min(number - 1, 2))
        curriculum = through_a_file(curriculum, make())
        curriculum.advance()


def test_losses_fade_and_margins_grow():
    hinges = Phase(hinge_loss, 3, margin=(0.0, 0.4))
    curriculum = Curriculum(hinges, Phase(HardestNegativeLoss(), fade=3))
    sums = [hinge_loss(*PAIR, margin=x) for x in (0.0, 0.2, 0.4)]
    hardest = hardest_negative_loss(*PAIR)
    mixtures = [(1 - w) * sums[2] + w * hardest for w in (0.25, 0.5, 0.75)]
    for expected in [*sums, *mixtures, hardest, hardest]:
        assert_close(curriculum(*PAIR), expected, 1e-12)
        curriculum.advance()


def test_a_curriculum_has_the_parameters_of_its_losses():
    learnable = AllNegativesLoss(learnable_temperature=True)
    curriculum = Curriculum(Phase(learnable, 1), Phase(hinge_loss))
    assert list(curriculum.parameters()) == [learnable.log_temperature]
    assert "phase 0 of 2" in repr(curriculum)


@pytest.mark.parametrize(
    ("phases", "error", "message"),
    [
        ([], ValueError, "needs a phase"),
        ([hinge_loss], TypeError, "phase 0 must be a Phase"),
        ([Phase("hinge")], TypeError, "phase 0 must be a Phase with a loss"),
        ([Phase(hinge_loss), Phase(hinge_loss)], ValueError, "phase 0 needs a length"),
        ([Phase(hinge_loss, 3)], ValueError, "phase 0 has a length, but does not end"),
        ([Phase(hinge_loss, 0), Phase(hinge_loss)], ValueError, "phase 0: length .*got 0"),
        ([Phase(hinge_loss, 2.0), Phase(hinge_loss)], ValueError, "length must be an int.*2.0"),
        ([Phase(hinge_loss, fade=1)], ValueError, "no loss before it"),
        ([Phase(hinge_loss, margin=(0, 1))], ValueError, "a margin grows over a length"),
    ],
)
def test_phases_that_are_none(phases, error, message):
    with pytest.raises(error, match=message):
        Curriculum(*phases)


def batches(count, size=4, dim=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        pair = [torch.randn(size, dim, generator=generator, dtype=dtype) for _ in range(2)]
        yield *pair, torch.arange(size) + size * number, torch.arange(size) + size * number


def test_a_queue_gives_the_last_pairs():
    """Whatever is in which place of the ring, before and after it is full, and after a restart."""
    size = 10
    queue = EmbeddingQueue(size, 6).double()
    seen = []
    for images, captions, image_ids, caption_ids in batches(6):
        given = queue(images, captions, image_ids, caption_ids)
        assert given["num_pairs"] == 4 and torch.equal(given["images"][:4], images)
        held = given["image_ids"][4:].tolist()
        assert sorted(held) == seen[-size:]
        for row, number in enumerate(held, 4):  # both sides of a pair, and its ids
            past = list(batches(6))[number // 4]
            assert given["caption_ids"][row] == number
            assert torch.equal(given["images"][row], past[0][number % 4])
            assert torch.equal(given["captions"][row], past[1][number % 4])
        seen += image_ids.tolist()
        queue = through_a_file(queue, EmbeddingQueue(size, 6).double())
    assert "10 of 10 pairs" in repr(queue)


def test_a_queue_shorter_than_a_batch():
    queue = EmbeddingQueue(3, 6)
    for number, batch in enumerate(batches(3, dtype=torch.float32)):
        held = queue(*batch)["image_ids"][4:].tolist()
        assert sorted(held) == [4 * number - 3 + i for i in range(3)] * (number > 0)


def test_negatives_of_a_queue_have_no_gradient_and_their_ids_count():
    queue, loss = EmbeddingQueue(8, 6), AllNegativesLoss()
    first, second = ([x.bfloat16() for x in batch[:2]] for batch in batches(2))
    ids = torch.tensor([0, 1, 2, 3])
    queue(*first, ids, ids)
    images = second[0].requires_grad_()
    arguments = queue(images, second[1], ids, ids)  # the same images again
    assert arguments["images"].dtype == torch.bfloat16
    value = loss(**arguments)
    value.backward()
    assert images.grad.shape == (4, 6)
    both = [torch.cat(pair) for pair in zip(second, first, strict=True)]
    everything = torch.cat([ids, ids])
    expected = loss(*both, image_ids=everything, caption_ids=everything, num_pairs=4)
    assert_close(value, expected, 1e-6)


def test_evaluation_leaves_a_queue_as_it_is():
    queue = EmbeddingQueue(8, 6).eval()
    for batch in batches(2, dtype=torch.float32):
        assert queue(*batch)["images"].shape == (4, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(images=torch.zeros(3, 6)), ValueError, r"pairs \[K, 6\], got \[3, 6\] and \[4, 6\]"),
        (dict(images=torch.zeros(4, 5), captions=torch.zeros(4, 5)), ValueError, r"\[K, 6\]"),
        (dict(image_ids=None), TypeError, "image_ids must hold one integer"),
        (dict(caption_ids=torch.zeros(3).long()), ValueError, "caption_ids .*4 in all"),
        (dict(images=[1.0]), TypeError, "images must be a floating-point tensor"),
    ],
)
def test_what_a_queue_refuses(change, error, message):
    names = ("images", "captions", "image_ids", "caption_ids")
    batch = dict(zip(names, next(batches(1, dtype=torch.float32)), strict=True))
    with pytest.raises(error, match=message):
        EmbeddingQueue(8, 6)(**(batch | change))


@pytest.mark.parametrize("arguments", [(0, 6), (8, 0), (8.0, 6), (True, 6)])
def test_sizes_that_are_none(arguments):
    with pytest.raises(ValueError, match="must be an int >= 1"):
        EmbeddingQueue(*arguments)
