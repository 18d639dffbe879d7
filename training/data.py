"""What every data set looks like to the trainer."""

import hashlib
from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

CAPTIONS_PER_IMAGE = 5


class InputError(Exception):
    """Bad input. The message is one line that names the file or flag, the place and the remedy."""


class Split(NamedTuple):
    """Images and their captions."""

    features: Tensor  # [N, F] float32
    captions: list[str]  # M of them
    owners: Tensor  # [M] int64, the row of each caption's image
    claims: list[Hashable]  # M: what each caption says, equal for captions that say the same
    facts: list[set[Hashable]]  # N: the claims known to be true of each image

    def is_true(self, caption: int, image: int) -> bool:
        return self.claims[caption] in self.facts[image]


class Dataset(NamedTuple):
    train: Split
    dev: Split
    test: Split
    picture_shape: tuple[int, int] | None = None  # set where a row of features is a grey picture

    def fingerprint(self) -> str:
        """A hash of everything in it, so that a run is never resumed on other data."""
        digest = hashlib.sha256()
        for split in (self.train, self.dev, self.test):
            digest.update(repr(tuple(split.features.shape)).encode())
            digest.update(split.features.contiguous().numpy())
            digest.update("\n".join(split.captions).encode())
        return digest.hexdigest()
