"""What both loops share: the embedded digit scenes as tensors, and recall@1 on the test scenes."""

import functools

import torch
from torch import Tensor, nn

from training.digits import load_digit_scenes
from training.vocabulary import PADDING, Vocabulary


@functools.cache
def scenes() -> dict[str, Tensor]:
    """Pictures [N, F] and captions [5 N, L] (numbers of words, padded) of train and test."""
    dataset = load_digit_scenes()
    vocabulary = Vocabulary.build(dataset.train.captions)
    tensors = {"words": torch.tensor(len(vocabulary))}
    for name in ("train", "test"):
        split = getattr(dataset, name)
        captions = [torch.tensor(vocabulary.encode(caption)) for caption in split.captions]
        tensors[f"{name}_pictures"] = split.features / split.features.max()
        tensors[f"{name}_captions"] = nn.utils.rnn.pad_sequence(
            captions, batch_first=True, padding_value=PADDING
        )
    return tensors


def batches(steps: int, batch_size: int, dtype: torch.dtype):
    """Pictures and one of their captions each, without repeats in a batch, the same in every call."""
    data, generator = scenes(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        picked = torch.randperm(len(data["train_pictures"]), generator=generator)[:batch_size]
        which = torch.randint(5, (batch_size,), generator=generator)
        yield data["train_pictures"][picked].to(dtype), data["train_captions"][5 * picked + which]


class BagOfWords(nn.Module):
    """The mean of word vectors, and a layer."""

    def __init__(self, words: int, size: int):
        super().__init__()
        self.words = nn.EmbeddingBag(words, size, mode="mean", padding_idx=PADDING)
        self.layers = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, size))

    def forward(self, captions: Tensor) -> Tensor:
        return self.layers(self.words(captions))


@torch.no_grad()
def recall_at_1(encode_pictures, encode_captions, dtype) -> tuple[float, float]:
    """Test recall@1, pictures to captions and back, with the first caption of every scene.

    Some scenes' captions are the same bag of words; retrieving any of them is right.
    """
    captions = scenes()["test_captions"][::5]
    bags = captions.sort(1).values
    scores = encode_pictures(scenes()["test_pictures"].to(dtype)) @ encode_captions(captions).T
    right = (bags[:, None] == bags[None]).all(2)
    rows = torch.arange(len(scores))
    return tuple(right[rows, s.argmax(1)].double().mean().item() for s in (scores, scores.T))


class LockStep(nn.Module):
    """A training run's loss that also asks another one, in every step, and keeps how far apart they are.

    Args:
        original: what the run is trained with.
        other: gets the same embeddings (the tensors among the arguments).
    """

    def __init__(self, original, other):
        super().__init__()
        self.original, self.other = original, other
        self.max_violation = False
        self.value_error = 0.0  # relative
        self.gradient_errors = torch.empty(0)  # of the embeddings, in each step, relative

    def forward(self, *args, **kwargs):
        answers = []
        for loss in (self.original, self.other):
            loss.max_violation = self.max_violation
            leaves = [x.detach().requires_grad_() for x in args]
            named = {
                name: x.detach().requires_grad_() if isinstance(x, Tensor) else x
                for name, x in kwargs.items()
            }
            value = loss(*leaves, **named)
            value = sum(value.values()) if isinstance(value, dict) else value
            leaves += [x for x in named.values() if isinstance(x, Tensor) and x.dim() == 2]
            answers.append((value.detach(), *torch.autograd.grad(value, leaves)))
        errors = [
            ((x - y).double().norm() / x.double().norm().clamp(min=1e-30)).item()
            for x, y in zip(*answers, strict=True)
        ]
        self.value_error = max(self.value_error, errors[0])
        worst = torch.tensor([max(errors[1:])])
        self.gradient_errors = torch.cat([self.gradient_errors, worst])
        return self.original(*args, **kwargs)
