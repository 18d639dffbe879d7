"""What a training loop puts around a loss: a curriculum of losses, and a queue of earlier embeddings."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .arguments import check_embeddings, check_ids, describe


class Phase(NamedTuple):
    """A part of a `Curriculum`.

    Args:
        loss: any callable, such as `fused_vse.AllNegativesLoss(0.05)`; a module's parameters are the
            curriculum's.
        length: how many calls of `advance` it lasts; None for the last phase, which does not end.
        fade: over the first so many of these the loss of the phase before fades out, in a mixture
            (1 - w) before + w this whose w grows linearly.
        margin: (first, last), passed to the loss as `margin`, growing linearly over `length`.
    """

    loss: Callable
    length: int | None = None
    fade: int = 0
    margin: tuple[float, float] | None = None


class Curriculum(nn.Module):
    """Losses one after the other, such as all negatives first and the hardest then, as VSE∞ trains.

        criterion = Curriculum(Phase(AllNegativesLoss(0.05), 2), Phase(HardestNegativeLoss(0.05)))
        for epoch in range(8):
            ...  # loss = criterion(images, captions, image_ids=ids, caption_ids=ids)
            criterion.advance()

    It is called like its losses. `advance` is for the end of an epoch, or of a step: lengths count its calls.
    Where it stands is part of `state_dict`. A hardest-negative loss that is trained from scratch can stick
    at the plateau where all scores are equal; after a phase with all negatives it does not.

    Raises:
        TypeError, ValueError: a phase that is none, a length that is no positive int, one that is missing or
            one of the last phase.
    """

    def __init__(self, *phases: Phase):
        super().__init__()
        if not phases:
            raise ValueError("a curriculum needs a phase: Curriculum(Phase(loss))")
        for number, phase in enumerate(phases):
            self._check(number, phase, is_last=number == len(phases) - 1)
        self.phases = phases
        self.losses = nn.ModuleList([p.loss for p in phases if isinstance(p.loss, nn.Module)])
        self.advanced = 0

    @staticmethod
    def _check(number: int, phase: object, is_last: bool) -> None:
        if not isinstance(phase, Phase) or not callable(phase.loss):
            raise TypeError(f"phase {number} must be a Phase with a loss, got {describe(phase)}")
        for name, least in (("length", 1), ("fade", 0)):
            value = getattr(phase, name)
            if value is None and name == "length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"phase {number}: {name} must be an int >= {least}, got {value!r}")
        if (phase.length is None) != is_last:
            what = "has a length, but does not end; leave it out" if is_last else "needs a length"
            raise ValueError(f"phase {number} {what}")
        if phase.fade and number == 0:
            raise ValueError("phase 0: there is no loss before it to fade out; leave fade 0")
        if phase.margin is not None and is_last:
            raise ValueError(
                f"phase {number}: a margin grows over a length, which the last phase has not; give the loss"
                " its margin"
            )

    @property
    def current(self) -> int:
        """The number of the phase that it is in."""
        return self._place()[0]

    def _place(self) -> tuple[int, int]:
        """The phase, and how many calls of `advance` ago it began."""
        left = self.advanced
        for number, phase in enumerate(self.phases):
            if phase.length is None or left < phase.length:
                return number, left
            left -= phase.length
        raise AssertionError("the last phase does not end")

    def advance(self) -> None:
        self.advanced += 1

    def forward(self, *args, **kwargs):
        """The loss of the phase; in a mixture of two, both must return tensors."""
        number, since = self._place()
        phase = self.phases[number]
        value = self._call(number, since, args, kwargs)
        if since >= phase.fade:
            return value
        weight = (since + 1) / (phase.fade + 1)
        before = self._call(number - 1, self.phases[number - 1].length - 1, args, kwargs)
        return (1 - weight) * before + weight * value

    def _call(self, number: int, since: int, args: tuple, kwargs: dict):
        phase = self.phases[number]
        if phase.margin is not None:
            first, last = phase.margin
            share = since / max(phase.length - 1, 1)
            kwargs = kwargs | {"margin": first + (last - first) * share}
        return phase.loss(*args, **kwargs)

    def get_extra_state(self) -> dict[str, int]:
        return {"advanced": self.advanced}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.advanced = state["advanced"]

    def extra_repr(self) -> str:
        return f"phase {self.current} of {len(self.phases)}, advanced {self.advanced} times"


class EmbeddingQueue(nn.Module):
    """The pairs of earlier batches as extra negatives: cross-batch memory (arXiv 1912.06798).

        queue = EmbeddingQueue(4096, dim=512)
        loss = criterion(**queue(images, captions, image_ids, caption_ids))

    In training mode a call appends the batch after it has read the queue, and the oldest pairs leave. With
    `group=` every rank has a queue of its own pairs, and all are everybody's negatives. Embeddings of earlier
    weights mislead where these change fast: begin after the first epochs.

    Args:
        size: Q, how many pairs it holds.
        dim: D.

    It holds float32 (`.half()` and the like change that, as of any module) and gives the dtype of the batch.

    State:
        images, captions [Q, D], image_ids, caption_ids [Q]: buffers, used as rings.
        pushed: how many pairs were ever appended.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        self.size, self.pushed = size, 0
        for name in ("images", "captions"):
            self.register_buffer(name, torch.zeros(size, dim))
            self.register_buffer(f"{name[:-1]}_ids", torch.zeros(size, dtype=torch.int64))

    def forward(
        self, images: Tensor, captions: Tensor, image_ids: Tensor, caption_ids: Tensor
    ) -> dict[str, Tensor | int]:
        """Keyword arguments of a loss: the batch [K, D] and [K], then what is in the queue.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
        """
        images, captions = check_embeddings(images, captions)
        if images.shape != captions.shape or images.shape[1] != self.images.shape[1]:
            raise ValueError(
                f"images and captions must be pairs [K, {self.images.shape[1]}], got"
                f" {list(images.shape)} and {list(captions.shape)}"
            )
        batch = {
            "images": images,
            "captions": captions,
            "image_ids": check_ids("image_ids", image_ids, "images", images),
            "caption_ids": check_ids("caption_ids", caption_ids, "captions", captions),
        }
        count = min(self.pushed, self.size)
        arguments = {
            name: torch.cat([rows, getattr(self, name)[:count].to(rows)])
            for name, rows in batch.items()
        }
        if self.training:
            self._push(batch)
        return {**arguments, "num_pairs": images.shape[0]}

    @torch.no_grad()
    def _push(self, batch: dict[str, Tensor]) -> None:
        """The newest pairs in the place of the oldest."""
        count = batch["images"].shape[0]
        newest = min(count, self.size)
        begin = (self.pushed + count - newest) % self.size
        place = torch.arange(begin, begin + newest, device=self.images.device) % self.size
        for name, rows in batch.items():
            held = getattr(self, name)
            held[place] = rows.detach()[count - newest :].to(held)
        self.pushed += count

    def get_extra_state(self) -> dict[str, int]:
        return {"pushed": self.pushed}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.pushed = state["pushed"]

    def extra_repr(self) -> str:
        return f"{min(self.pushed, self.size)} of {self.size} pairs"
