"""Recall@K and ranks of a retrieval test, exact and in bounded memory: S is walked in tiles.

The rank of an image is that of its best caption, as in the protocol of VSE++ (arXiv 1707.05612).
"""

import itertools
import numbers
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .arguments import check_comparable, check_flag, check_ids, shorten

# A tile of S is 2048 x 4096 float64 scores, 64 MiB: large enough for the GEMM's full speed.
IMAGE_BLOCK = 2048
CAPTION_BLOCK = 4096
# Longer norms could overflow float64 in a product of two rows.
LARGEST_NORM = 1e150
PROGRESS_DELAY = 2.0  # seconds
LARGEST_K = torch.iinfo(torch.int64).max


class Ranking(NamedTuple):
    """How well the queries of one direction find their own."""

    recalls: dict[int, float]  # K -> percentage of queries of rank <= K
    median_rank: float  # 1 is best; the mean of the middle two for an even number of queries
    mean_rank: float
    ranks: Tensor  # [queries] int64, on the CPU

    def __repr__(self) -> str:
        recalls = ", ".join(f"{k}: {recall:.1f}" for k, recall in self.recalls.items())
        return (
            f"Ranking(recalls={{{recalls}}}, median_rank={self.median_rank:.1f},"
            f" mean_rank={self.mean_rank:.1f}, ranks=<{len(self.ranks)}>)"
        )


class Retrieval(NamedTuple):
    """Both directions of a retrieval test."""

    image_to_text: Ranking
    text_to_image: Ranking

    @property
    def rsum(self) -> float:
        """The sum of all recalls in percent; 600 is perfect for the usual three values of K."""
        return sum(sum(ranking.recalls.values()) for ranking in self)


def evaluate_retrieval(
    images: Tensor,
    captions: Tensor,
    *,
    image_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    progress: bool = True,
) -> Retrieval:
    """Ranks every caption for every image and every image for every caption.

    The rank of a query is 1 + the number of wrong items that score at least as high as its best
    right one: a tie counts against the model, so that equal embeddings do not look like perfect
    ones. Scores are dot products in float64, and two scores tie when float64 cannot tell them
    apart. With few enough items that S fits, and without ties, the ranks equal

        S = images.double() @ captions.double().T
        right = image_ids[:, None] == caption_ids
        best = S.masked_fill(~right, -inf)
        image_ranks = 1 + (~right & (S >= best.amax(1, keepdim=True))).sum(1)
        caption_ranks = 1 + (~right & (S >= best.amax(0))).sum(0)

    Args:
        images: [N, D] embeddings, float16, bfloat16, float32 or float64; L2-normalise them for
            the cosine.
        captions: [M, D] embeddings, on the same device.
        image_ids: [N] integers, each once, and
        caption_ids: [M] integers: caption j is right for image i iff their ids are equal. Default
            for both: captions of one image follow each other, M / N of them for every image.
        ks: the values of K, positive and increasing.
        progress: show a progress bar (on stderr) if this takes longer than 2 seconds.

    Returns:
        A `Retrieval` with a `Ranking` for each direction: recalls in percent, ranks from 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value; NaN or
            infinity in an embedding; an image without a caption or a caption without its image.
    """
    _check_embeddings(images, captions)
    ks = _check_ks(ks)
    progress = check_flag("progress", progress)
    owner = _owners(images, captions, image_ids, caption_ids)
    image_norms, caption_norms = _norms("images", images), _norms("captions", captions)

    # A float64 dot product is off by less than slack * |a| * |b| (Higham 2002, section 3.1).
    slack = images.shape[1] * torch.finfo(torch.float64).eps
    caption_bar, image_bar = _bars(images, captions, owner, image_norms, caption_norms, slack)

    image_ranks = torch.ones(len(images), dtype=torch.int64, device=images.device)
    caption_ranks = torch.ones(len(captions), dtype=torch.int64, device=images.device)
    rows = torch.arange(len(images), device=images.device)
    tiles = [
        (slice(i, i + IMAGE_BLOCK), slice(j, j + CAPTION_BLOCK))
        for j in range(0, len(captions), CAPTION_BLOCK)
        for i in range(0, len(images), IMAGE_BLOCK)
    ]
    bar = tqdm(
        tiles, "ranking", unit="tile", delay=PROGRESS_DELAY, leave=False, disable=not progress
    )
    for i, j in bar:
        scores = images[i].double() @ captions[j].double().T
        scores.addr_(image_norms[i], caption_norms[j], alpha=slack)
        # A right caption is never its own image's rival, in either direction.
        scores.masked_fill_(rows[i, None] == owner[j], -torch.inf)
        image_ranks[i] += (scores >= image_bar[i, None]).sum(1)
        caption_ranks[j] += (scores >= caption_bar[j]).sum(0)
    return Retrieval(_ranking(image_ranks, ks), _ranking(caption_ranks, ks))


def _bars(
    images: Tensor,
    captions: Tensor,
    owner: Tensor,  # [M]
    image_norms: Tensor,  # [N]
    caption_norms: Tensor,  # [M]
    slack: float,
) -> tuple[Tensor, Tensor]:
    """The least score that counts as a rival of each caption [M] and of each image [N]."""
    right = torch.cat(
        [
            (images[of].double() * block.double()).sum(1)
            for of, block in zip(
                owner.split(CAPTION_BLOCK), captions.split(CAPTION_BLOCK), strict=True
            )
        ]
    )
    caption_bar = right - slack * image_norms[owner] * caption_norms
    image_bar = caption_bar.new_full((len(images),), -torch.inf)
    image_bar.scatter_reduce_(0, owner, caption_bar, "amax")
    return caption_bar, image_bar


def _ranking(ranks: Tensor, ks: tuple[int, ...]) -> Ranking:
    ranks = ranks.cpu()
    ordered = ranks.sort().values
    middle = ordered[(len(ranks) - 1) // 2] + ordered[len(ranks) // 2]
    return Ranking(
        recalls={k: 100 * (ranks <= k).sum().item() / len(ranks) for k in ks},
        median_rank=middle.item() / 2,
        mean_rank=ranks.double().mean().item(),
        ranks=ranks,
    )


def _check_embeddings(images: object, captions: object) -> None:
    check_comparable(images, captions)
    if images.is_meta:
        raise ValueError("images and captions are on meta, where tensors hold no data")


def _check_ks(ks: object) -> tuple[int, ...]:
    expected = f"ks must be positive, increasing ints such as (1, 5, 10), got {shorten(ks)}"
    if not isinstance(ks, (tuple, list)):
        raise TypeError(expected)
    if any(isinstance(k, bool) or not isinstance(k, numbers.Integral) for k in ks):
        raise TypeError(expected)
    if not ks or ks[0] < 1 or any(a >= b for a, b in itertools.pairwise(ks)):
        raise ValueError(expected)
    if ks[-1] > LARGEST_K:
        raise ValueError(f"{expected}; the largest possible rank is {LARGEST_K}")
    return tuple(int(k) for k in ks)


def _norms(name: str, embeddings: Tensor) -> Tensor:
    """L2 norms [rows] in float64; raises for a row that cannot be ranked."""
    norms = torch.cat(
        [
            torch.linalg.vector_norm(block.double(), dim=1)
            for block in embeddings.split(CAPTION_BLOCK)
        ]
    )
    bad = (~(norms < LARGEST_NORM)).nonzero()
    if len(bad):
        row = bad[0].item()
        raise ValueError(
            f"{name}: row {row} holds NaN, infinity or values beyond {LARGEST_NORM:g}"
            f" ({len(bad)} such rows); look for a diverged model or a corrupt feature"
        )
    return norms


def _owners(images: Tensor, captions: Tensor, image_ids: object, caption_ids: object) -> Tensor:
    """The row of the image of each caption [M]."""
    N, M = len(images), len(captions)
    if image_ids is None and caption_ids is None:
        if M % N:
            raise ValueError(
                f"image_ids and caption_ids must be given when the number of captions ({M}) is not"
                f" a multiple of the number of images ({N})"
            )
        return torch.arange(M, device=images.device) // (M // N)
    if image_ids is None or caption_ids is None:
        missing = "image_ids" if image_ids is None else "caption_ids"
        raise ValueError(f"{missing} is missing: pass ids for both sides or for neither")
    image_ids = _check_ids("image_ids", image_ids, "images", images)
    caption_ids = _check_ids("caption_ids", caption_ids, "captions", captions)

    ordered, order = image_ids.sort()
    repeated = (ordered[1:] == ordered[:-1]).nonzero()
    if len(repeated):
        raise ValueError(
            f"image_ids must differ, but {ordered[repeated[0]].item()} occurs more than once; pass"
            " each image once, with all its captions"
        )
    position = torch.searchsorted(ordered, caption_ids).clamp(max=N - 1)
    orphans = (ordered[position] != caption_ids).nonzero()
    if len(orphans):
        j = orphans[0].item()
        raise ValueError(
            f"caption_ids[{j}] is {caption_ids[j].item()}, which is not in image_ids; leave out"
            " captions without an image"
        )
    owner = order[position]
    childless = (torch.bincount(owner, minlength=N) == 0).nonzero()
    if len(childless):
        i = childless[0].item()
        raise ValueError(
            f"image_ids[{i}] is {image_ids[i].item()}, which is not in caption_ids; leave out"
            " images without a caption"
        )
    return owner


def _check_ids(name: str, ids: object, rows_name: str, rows: Tensor) -> Tensor:
    if isinstance(ids, Tensor) and not ids.is_meta:
        ids = ids.to(rows.device)
    return check_ids(name, ids, rows_name, rows)
