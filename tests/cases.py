"""One table of shapes and ids for every backend, each with the reason why it is here."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    reason: str
    rows: int  # N
    columns: int  # M
    pairs: int  # K
    dim: int  # D
    ids: str | None = None  # None: the row numbers

    def __str__(self) -> str:
        return self.reason.replace(" ", "_")


CASES = [
    Case("one pair has no negative", 1, 1, 1, 5),
    Case("two pairs", 2, 2, 2, 8),
    Case("odd square", 37, 37, 37, 19),
    Case("one dimension", 9, 9, 9, 1),
    Case("dimension beyond every register", 12, 12, 12, 1025),
    Case("more captions than images", 21, 67, 21, 16),
    Case("more images than captions", 67, 21, 21, 16),
    Case("extra negatives on both sides", 45, 50, 33, 24),
    Case("one pair among many extras", 30, 40, 1, 8),
    Case("captions share images", 40, 40, 40, 12, "groups of five"),
    Case("shared images and extras", 50, 61, 34, 12, "groups of five"),
    Case("everything is one image", 17, 17, 17, 6, "all equal"),
    Case("no id occurs twice", 26, 26, 26, 10, "all different"),
    Case("a pair is its own negative", 18, 18, 18, 10, "unrelated"),
    Case("ids of any size and sign", 33, 40, 20, 7, "extreme"),
    Case("several strips of rows", 131, 70, 70, 33),
    Case("several tiles", 1061, 45, 45, 9),
    Case("several tiles of columns", 40, 4133, 40, 5, "groups of five"),
    Case("one image", 1, 70, 1, 40),
    Case("one number", 1, 1, 1, 1),
]


def ids_of(case: Case) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """image_ids [N] and caption_ids [M], or None twice."""
    n, m = case.rows, case.columns
    if case.ids is None:
        return None, None
    if case.ids == "groups of five":
        return torch.arange(n) // 5, torch.arange(m) // 5
    if case.ids == "all equal":
        return torch.full((n,), 7), torch.full((m,), 7)
    if case.ids == "all different":
        return torch.arange(n) * 3, torch.arange(m) * 3
    if case.ids == "unrelated":
        generator = torch.Generator().manual_seed(5)
        return (
            torch.randint(4, (n,), generator=generator),
            torch.randint(4, (m,), generator=generator),
        )
    assert case.ids == "extreme"
    values = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 2**40])
    return values[torch.arange(n) % 5], values[torch.arange(m) % 5]


def embeddings(
    case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, normalize: bool = True
):
    """images [N, D] and captions [M, D]; pair k resembles itself, as in training."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(case.rows, case.dim, generator=generator, dtype=torch.float64)
    captions = torch.randn(case.columns, case.dim, generator=generator, dtype=torch.float64)
    captions[: case.pairs] += images[: case.pairs]
    if normalize:
        images = torch.nn.functional.normalize(images)
        captions = torch.nn.functional.normalize(captions)
    return odd_strides(images.to(dtype)), odd_strides(captions.to(dtype))


def odd_strides(x: Tensor) -> Tensor:
    """The same elements. Where a dimension has size 1 its stride means nothing, and PyTorch leaves anything
    there: less than a row, or so much that the next one would lie outside of the memory."""
    strides = [
        stride if n > 1 else odd
        for n, stride, odd in zip(x.shape, x.stride(), (3, 2**40), strict=True)
    ]
    return x.as_strided(x.shape, strides)


TRAINED = Case("pairs far above their negatives", 128, 128, 128, 64)
UPSTREAMS = (65536.0, 0.3, 1e-3)  # a gradient scaler's first one, one that rounds, a tiny one


def trained_embeddings(dtype: torch.dtype):
    """Embeddings of TRAINED: at temperature 0.03 most entries of the mean loss's gradient are below 1e-8, and
    the smallest float16 is 6e-8."""
    images, noise = embeddings(TRAINED._replace(pairs=0))
    captions = torch.nn.functional.normalize(images + 0.1 * noise)
    return images.to(dtype), captions.to(dtype)


def integer_embeddings(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Small integers: every score is exact in every dtype and order of summation, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-2, 3, (case.rows, case.dim), generator=generator)
    captions = torch.randint(-2, 3, (case.columns, case.dim), generator=generator)
    return odd_strides(images.to(dtype)), odd_strides(captions.to(dtype))
