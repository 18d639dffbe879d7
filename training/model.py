"""The encoders of a visual-semantic embedding: a linear image projection, a GRU for captions."""

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize, pad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from .ranks import Part
from .vocabulary import PADDING


class VSEModel(nn.Module):
    """Maps images and captions to unit vectors of one space, where a dot product compares them.

    The square root and the standardisation of the image features are worth having: pooled
    activations and pixels are skewed, and their scales differ.

    Args:
        features: F, size of an image's feature vector.
        words: size of the vocabulary.
        word_size, hidden_size, joint_size: sizes of a word vector, of the GRU in each of its two
            directions, and of the joint space.
        image_dropout, word_dropout: share of the features and of the word vectors' entries to drop.
    """

    def __init__(
        self,
        *,
        features: int,
        words: int,
        word_size: int,
        hidden_size: int,
        joint_size: int,
        image_dropout: float,
        word_dropout: float,
    ) -> None:
        super().__init__()
        self.image_dropout, self.word_dropout = image_dropout, word_dropout
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.image_projection = nn.Linear(features, joint_size)
        self.word_vectors = nn.Embedding(words, word_size, padding_idx=PADDING)
        self.gru = nn.GRU(word_size, hidden_size, batch_first=True, bidirectional=True)
        self.caption_projection = nn.Linear(2 * hidden_size, joint_size)
        nn.init.xavier_uniform_(self.image_projection.weight)
        nn.init.zeros_(self.image_projection.bias)
        nn.init.normal_(self.word_vectors.weight, std=0.1)

    def fit_standardisation(self, features: Tensor) -> None:
        """Takes mean and deviation of the training features [N, F]."""
        roots = _signed_root(features)
        self.mean.copy_(roots.mean(0))
        deviation = roots.std(0, correction=0)
        # A feature that hardly ever varies must not explode when it does in the test set.
        least = (0.1 * deviation.mean()).clamp(min=1e-6)
        self.deviation.copy_(deviation.maximum(least))

    def forward(
        self, features: Tensor, captions: list[Tensor], part: Part | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both encoders, of a batch or of a rank's part of one."""
        return self.encode_images(features, part), self.encode_captions(captions, part)

    def encode_images(self, features: Tensor, part: Part | None = None) -> Tensor:
        """[B, F] to unit vectors [B, D]."""
        standardised = (_signed_root(features) - self.mean) / self.deviation
        dropped = self._dropped(standardised, self.image_dropout, part)
        return normalize(self.image_projection(dropped), dim=1)

    def encode_captions(self, captions: list[Tensor], part: Part | None = None) -> Tensor:
        """B sequences of word numbers to unit vectors [B, D]: the GRU's states, max-pooled."""
        lengths = torch.tensor([len(caption) for caption in captions])
        words = pad_sequence(captions, batch_first=True, padding_value=PADDING)  # [B, L]
        if part is not None:
            words = pad(words, (0, part.longest - words.shape[1]), value=PADDING)
        vectors = self.word_vectors(words.to(self.mean.device))
        vectors = self._dropped(vectors, self.word_dropout, part)
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(
            self.gru(packed)[0], batch_first=True, padding_value=-torch.inf
        )  # [B, L, 2H]
        return normalize(self.caption_projection(states.amax(1)), dim=1)

    def _dropped(self, x: Tensor, share: float, part: Part | None) -> Tensor:
        """Dropout; of a part of a batch, what the whole batch would get there."""
        if part is None:
            return dropout(x, share, self.training)
        whole = dropout(x.new_ones(part.batch, *x.shape[1:]), share, self.training)
        return x * whole[part.rows]


def _signed_root(features: Tensor) -> Tensor:
    return features.sign() * features.abs().sqrt()
