"""Whether the fused losses train like the reference formulas: the verdict behind --validate.

Two training runs that differ in one rounding drift apart: a last bit becomes another hardest
negative, that becomes another gradient, and after some hundred steps the losses differ in the
second digit, although nothing is wrong. So two questions are asked separately:

- In lock step: the reference trains, and at each of its steps the fused loss is computed on the
  very same embeddings. Here float32 rounding bounds everything. Scores of unit vectors carry an
  error of a few eps, the formulas multiply it by their slope α (1/τ, or 1 for the hinges), so loss
  and gradients must agree within ROUNDING * eps * (1 + α) times their own size. A near tie decided
  the other way moves up to three gradient rows by more than that, about once in a thousand steps;
  a share of FLIPPED_ROWS is allowed.
- On its own: the fused loss trains a second model from the same seed. Its final recalls must lie
  within the sampling error of the reference's: STANDARD_ERRORS of the difference of proportions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_vse.retrieval import Retrieval

from .objective import Objective

EPS = torch.finfo(torch.float32).eps
ROUNDING = 16
FLIPPED_ROWS, FEW_ROWS = 1e-3, 8
STANDARD_ERRORS = 3
STEPS_SHOWN = 24


class LockStep:
    """An objective that trains with the reference and compares the fused loss at every step."""

    def __init__(self) -> None:
        self.fused_losses: list[float] = []
        self.worst_loss = 0.0  # the largest difference in units of what rounding explains
        self.rows = 0
        self.rows_apart = 0

    def compare(self, reference: Objective, fused: Objective) -> "_Compared":
        return _Compared(self, reference, fused)

    def failures(self) -> list[str]:
        """What rounding does not explain, in words."""
        found = []
        if not self.worst_loss <= 1:  # NaN fails too
            found.append(f"a step's loss differs by {self.worst_loss:.3g} x what rounding explains")
        if self.rows_apart > FEW_ROWS + FLIPPED_ROWS * self.rows:
            found.append(
                f"{self.rows_apart} of {self.rows} gradient rows differ by more than rounding"
                " explains"
            )
        return found

    def summary(self) -> str:
        return (
            f"{len(self.fused_losses)} steps, largest loss difference {self.worst_loss:.2g} x what"
            f" rounding explains, {self.rows_apart} of {self.rows} gradient rows beyond it"
        )


class _Compared(NamedTuple):
    log: LockStep
    reference: Objective
    fused: Objective

    def __call__(self, images: Tensor, captions: Tensor, ids: Tensor) -> tuple[Tensor, object]:
        expected, expected_gradients = _loss_and_gradients(self.reference, images, captions, ids)
        actual, gradients = _loss_and_gradients(self.fused, images, captions, ids)
        log, alpha = self.log, self.reference.slope
        bound = ROUNDING * EPS * (1 + alpha)
        log.fused_losses.append(actual)
        difference = abs(actual - expected) / (bound * (1 + abs(expected)))
        log.worst_loss = max(log.worst_loss, difference if math.isfinite(difference) else math.inf)
        for theirs, ours in zip(expected_gradients, gradients, strict=True):
            # One anchor alone has a gradient of up to α / K.
            size = theirs.norm(dim=1).max() + alpha / len(theirs)
            apart = ~((ours - theirs).norm(dim=1) <= bound * size)
            log.rows += len(apart)
            log.rows_apart += apart.sum().item()
        return self.reference(images, captions, ids)


def _loss_and_gradients(
    objective: Objective, images: Tensor, captions: Tensor, ids: Tensor
) -> tuple[float, tuple[Tensor, Tensor]]:
    leaves = images.detach().requires_grad_(), captions.detach().requires_grad_()
    loss, _ = objective(*leaves, ids)
    return loss.item(), torch.autograd.grad(loss, leaves)


def recall_failures(reference: Retrieval, fused: Retrieval) -> list[str]:
    """The recalls that differ by more than two equally good models would, in words."""
    found = []
    for direction, expected, actual in zip(reference._fields, reference, fused, strict=True):
        for k, recall in expected.recalls.items():
            share = (recall + actual.recalls[k]) / 200
            queries = len(expected.ranks)
            # With all or no queries right, one query's worth of doubt remains.
            error = 100 * max(math.sqrt(2 * share * (1 - share) / queries), 1 / queries)
            if abs(actual.recalls[k] - recall) > STANDARD_ERRORS * error:
                found.append(
                    f"{direction} R@{k} is {actual.recalls[k]:.1f}, {recall:.1f} with the"
                    f" reference; sampling explains {STANDARD_ERRORS * error:.1f}"
                )
    return found


def step_table(reference: list[float], lock_step: list[float], on_its_own: list[float]) -> str:
    """Losses side by side: the first steps, then steps evenly spread over the run."""
    steps = len(reference)
    spread = torch.linspace(0, steps - 1, min(steps, STEPS_SHOWN)).long().tolist()
    lines = [f"{'step':>6}{'reference':>12}{'fused, same':>14}{'difference':>12}{'fused, own':>14}"]
    lines += [f"{'':18}{'weights':>14}{'':12}{'weights':>14}"]
    for step in sorted({*range(min(4, steps)), *spread}):
        difference = lock_step[step] - reference[step]
        lines.append(
            f"{step + 1:6}{reference[step]:12.6f}{lock_step[step]:14.6f}{difference:12.1e}"
            f"{on_its_own[step]:14.6f}"
        )
    return "\n".join(lines)
