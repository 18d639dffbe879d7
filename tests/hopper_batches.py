"""Batches for the Hopper kernels: every kind of anchors and pairs, in several tiles."""

from typing import NamedTuple

import torch
from cases import CASES, Case, embeddings, ids_of
from ops_oracle import scores_of

from fused_vse.ops import DOT, Batch


class Anchored(NamedTuple):
    case: Case
    # row_anchors, column_anchors, pair_row, pair_column, pair_count; None: the case's pairs
    anchors: tuple[int, int, int, int, int] | None = None

    def __str__(self) -> str:
        return str(self.case)

    def batch(self, make=embeddings, dtype=torch.float32, device="cpu") -> Batch:
        k = self.case.pairs
        ids = [x if x is None else x.to(device) for x in ids_of(self.case)]
        pair = [x.to(device) for x in make(self.case, dtype)]
        return Batch(*pair, *ids, *(self.anchors or (k, k, 0, 0, k)), DOT)


def _anchored(reason: str, n: int, m: int, d: int, *anchors: int, ids: str | None = None):
    return Anchored(Case(reason, n, m, min(n, m), d, ids), anchors)


SEVERAL_TILES = [
    Anchored(Case("several cluster tiles", 700, 900, 650, 24)),
    Anchored(Case("several cluster tiles with ids", 700, 420, 400, 24, "groups of five")),
    Anchored(Case("ids meet in every tile", 300, 400, 280, 16, "unrelated")),
    _anchored("own rows, columns of all ranks", 300, 700, 24, 290, 650, 0, 260, 290),
    _anchored("a chunk with some of the pairs", 300, 500, 16, 300, 420, 170, 0, 130),
    _anchored("pairs inside of tiles", 400, 500, 8, 390, 480, 37, 211, 150),
    _anchored("pairs in one column tile", 600, 190, 8, 600, 190, 500, 100, 90),
    _anchored("a chunk without a pair", 260, 300, 16, 260, 300, 0, 0, 0),
    _anchored("a chunk of extra columns", 260, 300, 16, 260, 0, 0, 0, 0),
    _anchored("a rank without a pair", 130, 420, 16, 0, 400, 0, 0, 0),
    _anchored("nothing is an anchor", 130, 200, 16, 0, 0, 0, 0, 0),
    _anchored("shifted with ids", 300, 500, 16, 280, 420, 3, 9, 130, ids="groups of five"),
    _anchored("no row is an anchor, ids", 300, 500, 16, 0, 420, 0, 0, 0, ids="unrelated"),
]
BATCHES = [*map(Anchored, CASES), *SEVERAL_TILES]


def in_float64(batch: Batch) -> Batch:
    return batch._replace(images=batch.images.double(), captions=batch.captions.double())


def thresholds(batch: Batch, seed: int = 3) -> torch.Tensor:
    """One number an anchor, about as large as the scores; of quarters, so that sums of integers are exact."""
    generator = torch.Generator().manual_seed(seed)
    scores = scores_of(in_float64(batch)).s
    noise = torch.randn(batch.row_anchors + batch.column_anchors, generator=generator)
    threshold = scores.mean().cpu() + scores.std(correction=0).cpu() * noise
    return ((4 * threshold).round() / 4).float().to(batch.images.device)
