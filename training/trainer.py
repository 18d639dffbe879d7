"""A model, its optimiser, and an epoch over the training captions that can stop at every step."""

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fused_vse import LossStatistics
from fused_vse.retrieval import Retrieval, evaluate_retrieval

from .data import Dataset, Split
from .model import VSEModel
from .options import Options
from .ranks import Part, Ranks
from .report import KS
from .vocabulary import Vocabulary

EVALUATION_BATCH = 500

ALONE = Ranks()

BatchLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, LossStatistics | None]]


class Diverged(Exception):
    """The loss is not finite."""


@dataclasses.dataclass
class Sums:
    """Over the captions of an epoch, up to the step it has come to."""

    loss: float = 0.0
    gap: float = (
        0.0  # |h - p| of the direction where it is smaller, if the loss comes with statistics
    )
    active: float = 0.0  # share of the anchors with margin + h - p > 0, likewise
    seconds: float = 0.0


class Trainer:
    """What a step depends on: weights, the optimiser's state, the seed, and how many were done."""

    def __init__(
        self, options: Options, data: Dataset, vocabulary: Vocabulary, ranks: Ranks = ALONE
    ) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.ranks = ranks
        self.vocabulary = vocabulary
        self.sizes = {
            "features": data.train.features.shape[1],
            "words": len(vocabulary),
            "word_size": options.word_size,
            "hidden_size": options.hidden_size,
            "joint_size": options.joint_size,
            "image_dropout": options.image_dropout,
            "word_dropout": options.word_dropout,
        }
        model = VSEModel(**self.sizes)
        model.fit_standardisation(data.train.features)
        self.model = model.to(options.device)
        self.parallel = ranks.parallel(self.model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)

        self.features = data.train.features.to(options.device)  # [N, F]
        self.owners = data.train.owners  # [M]
        self.captions = encode_words(data.train, vocabulary)
        self.steps_per_epoch = math.ceil(len(self.captions) / options.batch_size)
        self.steps_done = 0
        self.sums = Sums()
        self._generators: list[Tensor] = []  # to go on with, in the middle of an epoch

    def epoch(self, objective: BatchLoss) -> Iterator[float]:
        """One pass over the captions, each with its image, or the rest of one: the loss of each step.

        `state` may be called between any two steps.
        """
        epoch, start = divmod(self.steps_done, self.steps_per_epoch)
        torch.manual_seed(random.Random(f"{self.options.seed}/{epoch}").getrandbits(63))
        order = torch.randperm(len(self.captions))
        if start:
            set_generator_states(self.options.device, self._generators)
        else:
            self.sums = Sums()
        began = time.monotonic() - self.sums.seconds
        self.model.train()
        for batch in order.split(self.options.batch_size)[start:]:
            self._set_learning_rate()
            images, captions, ids = self._encode(batch)
            loss, statistics = objective(images, captions, ids)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

            value = loss.item()
            step = self.steps_done % self.steps_per_epoch + 1
            if not math.isfinite(value):
                raise Diverged(f"the loss is {value} in step {step} of epoch {epoch + 1}")
            self.sums.loss += value * len(batch)
            if statistics is not None:
                of_pair = _gap(statistics), statistics.active_share.mean().item()
                gap, active = self.ranks.sum(*(x * len(ids) for x in of_pair))
                self.sums.gap += gap
                self.sums.active += active
            self.sums.seconds = time.monotonic() - began
            self.steps_done += 1
            yield value

    def _encode(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The embeddings of this rank's pairs of a batch, and the rows of their images."""
        rows = self.ranks.rows(len(batch))
        ids = self.owners[batch[rows]].to(self.features.device)
        part = None
        if self.ranks.size > 1:
            part = Part(rows, len(batch), max(len(self.captions[j]) for j in batch))
        captions = [self.captions[j] for j in batch[rows]]
        return *self.parallel(self.features[ids], captions, part), ids

    @property
    def between_epochs(self) -> bool:
        return self.steps_done % self.steps_per_epoch == 0

    def state(self) -> dict:
        """What `load_state` goes on from, to the last bit; its keys are those of a checkpoint."""
        return {
            "steps": self.steps_done,
            "sums": dataclasses.asdict(Sums() if self.between_epochs else self.sums),
            "random": [] if self.between_epochs else generator_states(self.options.device),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],  # the rest follows from the options
        }

    def load_state(self, state: dict) -> None:
        self.steps_done = state["steps"]
        self.sums = Sums(**state["sums"])
        self._generators = state["random"]
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})

    def learning_rate(self, step: int) -> float:
        """Half a cosine from --lr to 0."""
        done = step / (self.options.epochs * self.steps_per_epoch)
        return self.options.lr * 0.5 * (1 + math.cos(math.pi * done))

    def _set_learning_rate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.steps_done)


def generator_states(device: str) -> list[Tensor]:
    """Of the generators that dropout draws from."""
    on_device = [torch.cuda.get_rng_state(device)] if device.startswith("cuda") else []
    return [torch.get_rng_state(), *on_device]


def set_generator_states(device: str, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.startswith("cuda"):
        torch.cuda.set_rng_state(states[1], device)


def encode_words(split: Split, vocabulary: Vocabulary) -> list[Tensor]:
    return [torch.tensor(vocabulary.encode(caption)) for caption in split.captions]


@torch.no_grad()
def embed(model: VSEModel, split: Split, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """The embeddings of all images [N, D] and of all captions [M, D], on the CPU."""
    model.eval()
    device = model.mean.device
    words = encode_words(split, vocabulary)
    images = [
        model.encode_images(block.to(device)).cpu()
        for block in split.features.split(EVALUATION_BATCH)
    ]
    captions = [
        model.encode_captions(words[j : j + EVALUATION_BATCH]).cpu()
        for j in range(0, len(words), EVALUATION_BATCH)
    ]
    embeddings = torch.cat(images), torch.cat(captions)
    if not all(rows.isfinite().all() for rows in embeddings):
        raise Diverged("the weights are not finite")
    return embeddings


def evaluate(split: Split, images: Tensor, captions: Tensor) -> Retrieval:
    return evaluate_retrieval(
        images,
        captions,
        image_ids=torch.arange(len(images)),
        caption_ids=split.owners,
        ks=KS,
    )


def _gap(statistics: LossStatistics) -> float:
    gaps = (statistics.hardest_scores - statistics.positive_scores).abs()
    return gaps.where(gaps.isfinite(), 0).mean(1).min().item()  # -inf: an anchor without negatives
