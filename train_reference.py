"""Trains a visual-semantic embedding: linear image projection, GRU over captions, joint space.

    python train_reference.py                   # scenes of handwritten digits, nothing to download
    python train_reference.py --data DIR        # {train,dev,test}_{ims.npy,caps.txt}, as vsepp's
    python train_reference.py --loss all_negatives --output runs/mine
    python train_reference.py --output runs/mine --resume
    python train_reference.py --validate --epochs 2

A run directory holds checkpoint.pt, best.pt (the weights of the best dev rsum), vocabulary.json,
metrics.jsonl, curves.png and, for the digits, retrieved.png. On the CPU, the same seed gives the
same numbers, to the last bit, also when the run was killed on the way and resumed.
"""

import dataclasses
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fused_vse import LossStatistics, backends
from fused_vse.retrieval import Retrieval, evaluate_retrieval
from training import comparison, report
from training.checkpoint import (
    BEST,
    CHECKPOINT,
    CHECKPOINT_KEYS,
    METRICS,
    VOCABULARY,
    load_best,
    load_weights,
    read_checkpoint,
    write_atomically,
    write_checkpoint,
    write_metrics,
)
from training.data import Dataset, InputError, Split
from training.digits import load_digit_scenes
from training.model import VSEModel
from training.objective import Objective
from training.options import Command, Options, new_options, parse_command, resumed_options
from training.precomp import load_precomp
from training.vocabulary import Vocabulary

EVALUATION_BATCH = 500
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

BatchLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, LossStatistics | None]]


class Diverged(Exception):
    """The loss is not finite."""


class EpochResult(NamedTuple):
    losses: list[float]  # of each step
    loss: float  # mean over the captions
    gap: float  # mean |h - p|, where the loss comes with statistics


class Trainer:
    """A model, its optimiser, and the loop over the training captions."""

    def __init__(self, options: Options, data: Dataset, vocabulary: Vocabulary) -> None:
        torch.manual_seed(options.seed)
        self.options = options
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
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)

        self.features = data.train.features.to(options.device)  # [N, F]
        self.owners = data.train.owners  # [M]
        self.captions = encode_words(data.train, vocabulary)
        self.steps_per_epoch = math.ceil(len(self.captions) / options.batch_size)

    def train_epoch(self, epoch: int, objective: BatchLoss, bar: tqdm) -> EpochResult:
        """One pass over the captions, each with its image.

        It depends on nothing but the weights, the optimiser's state, the seed and the epoch's
        number (from 0), so that a resumed run can redo it to the last bit.
        """
        torch.manual_seed(random.Random(f"{self.options.seed}/{epoch}").getrandbits(63))
        self.model.train()
        losses, total, gap = [], 0.0, 0.0
        order = torch.randperm(len(self.captions))
        for step, batch in enumerate(order.split(self.options.batch_size)):
            self._set_learning_rate(epoch * self.steps_per_epoch + step)
            ids = self.owners[batch].to(self.features.device)
            images = self.model.encode_images(self.features[ids])
            captions = self.model.encode_captions([self.captions[j] for j in batch])
            loss, statistics = objective(images, captions, ids)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise Diverged(f"the loss is {losses[-1]} in step {step + 1} of epoch {epoch + 1}")
            total += losses[-1] * len(batch)
            if statistics is not None:
                gap += _gap(statistics) * len(batch)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            bar.update()
        return EpochResult(losses, total / len(order), gap / len(order))

    def _set_learning_rate(self, step: int) -> None:
        """Half a cosine from --lr to 0."""
        done = step / (self.options.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * 0.5 * (1 + math.cos(math.pi * done))


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
        ks=report.KS,
    )


def _gap(statistics: LossStatistics) -> float:
    gaps = (statistics.hardest_scores - statistics.positive_scores).abs()
    return gaps.where(gaps.isfinite(), 0).mean().item()  # -inf: an anchor without negatives


def objective_of(options: Options, epoch: int, backend: str) -> Objective:
    """All negatives during the warm-up, then --loss."""
    if epoch < options.warmup_epochs:
        return Objective("all_negatives", options.temperature, 0.0, False, backend)
    return Objective(options.loss, options.temperature, options.margin, options.smooth, backend)


def progress_bar(total: int, done: int = 0) -> tqdm:
    # In a log file, a bar redrawn ten times a second is a nuisance.
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(total=total, initial=done, unit="step", mininterval=interval, leave=False)


# ------------------------------------------------------------------------------------- training
def train(
    options: Options, data: Dataset, vocabulary: Vocabulary, output: Path, saved: dict | None
) -> int:
    """Trains from the start, or from a checkpoint's content, and shows the test results."""
    trainer = Trainer(options, data, vocabulary)
    about = {
        "options": dataclasses.asdict(options),
        "fingerprint": data.fingerprint(),
        "sizes": trainer.sizes,
    }
    if saved is None:
        history, best_model = [], trainer.model.state_dict()
        start_directory(output, vocabulary)
        save(output, about, trainer, history, best_model)
    else:
        load_weights(trainer.model, saved["model"], output / CHECKPOINT)
        trainer.optimizer.load_state_dict(saved["optimizer"])
        history, best_model = saved["history"], saved["best_model"]
        save_best(output, trainer, best_model)

    steps = trainer.steps_per_epoch
    print(f"run directory: {output}")
    print(report.EPOCH_HEADER)
    for line in history:
        print(report.epoch_line(line))
    with progress_bar(options.epochs * steps, len(history) * steps) as bar:
        for epoch in range(len(history), options.epochs):
            start = time.monotonic()
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}")
            objective = objective_of(options, epoch, options.backend)
            result = trainer.train_epoch(epoch, objective, bar)
            dev = evaluate(data.dev, *embed(trainer.model, data.dev, vocabulary))
            best = all(dev.rsum > line["dev"]["rsum"] for line in history)
            if best:
                best_model = {
                    name: value.clone() for name, value in trainer.model.state_dict().items()
                }
            history.append(
                {
                    "epoch": epoch + 1,
                    "phase": objective.name,
                    "loss": result.loss,
                    "dev": report.as_json(dev),
                    "best": best,
                    "seconds": time.monotonic() - start,
                }
            )
            bar.write(report.epoch_line(history[-1]))
            if objective.on_plateau(result.gap):
                bar.write(plateau_warning(objective, result))
            save(output, about, trainer, history, best_model)

    show_test_results(output, data, history)
    return 0


def plateau_warning(objective: Objective, result: EpochResult) -> str:
    return (
        f"warning: the loss sits at {result.loss:.3f}, by the plateau {objective.plateau:.3f} of"
        f" {objective.name} where all similarities are equal (positive and hardest negative"
        f" differ by {result.gap:.3f}): start with more --warmup-epochs, or lower --lr or --margin"
    )


def start_directory(output: Path, vocabulary: Vocabulary) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / VOCABULARY, vocabulary.to_json())
    except OSError as error:
        raise InputError(f"--output {output}: cannot write there: {error.strerror}") from None


def save(
    output: Path, about: dict, trainer: Trainer, history: list[dict], best_model: dict
) -> None:
    """The checkpoint first: whatever else is missing or old after a kill follows from it."""
    state = {
        "history": history,
        "model": trainer.model.state_dict(),
        "best_model": best_model,
        "optimizer": trainer.optimizer.state_dict(),
    }
    write_checkpoint(output / CHECKPOINT, about | state)
    save_best(output, trainer, best_model)
    if history:
        write_metrics(output / METRICS, history)
        write_atomically(output / "curves.png", report.curves(history))


def save_best(output: Path, trainer: Trainer, best_model: dict) -> None:
    write_checkpoint(output / BEST, {"sizes": trainer.sizes, "model": best_model})


def show_test_results(output: Path, data: Dataset, history: list[dict]) -> None:
    """The table of the best model on the test set, its line in the metrics, and the picture."""
    model, vocabulary = load_best(output)
    images, captions = embed(model, data.test, vocabulary)
    test = report.as_json(evaluate(data.test, images, captions))
    best = [line for line in history if line["best"]][-1]
    write_metrics(output / METRICS, [*history, {"best_epoch": best["epoch"], "test": test}])
    if data.picture_shape:
        picture = report.retrieved_captions(data.test, data.picture_shape, images, captions)
        write_atomically(output / "retrieved.png", picture)
    print(f"\nbest epoch {best['epoch']} by dev rsum; see {output}")
    print(report.final_table({"dev": best["dev"], "test": test}))


# ----------------------------------------------------------------------------------- validation
def validate(options: Options, data: Dataset, vocabulary: Vocabulary) -> int:
    """Trains with the reference and with --backend, shows both; see training/comparison.py."""
    if options.backend == "reference":
        raise InputError("--validate compares the reference with a fused --backend; choose another")
    if [name for name, state in backends().items() if state == "available"] == ["reference"]:
        raise InputError(f"--validate: no fused backend is available: {backends()}")
    log = comparison.LockStep()
    reference, fused = (Trainer(options, data, vocabulary) for _ in range(2))
    reference_losses, fused_losses = [], []
    with progress_bar(2 * options.epochs * reference.steps_per_epoch) as bar:
        for epoch in range(options.epochs):
            kernels = objective_of(options, epoch, options.backend)
            both = log.compare(objective_of(options, epoch, "reference"), kernels)
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}, reference")
            reference_losses += reference.train_epoch(epoch, both, bar).losses
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}, {options.backend}")
            try:
                fused_losses += fused.train_epoch(epoch, kernels, bar).losses
            except Diverged as error:
                return verdict([*log.failures(), f"with {options.backend}, {error}"], log)
    print(comparison.step_table(reference_losses, log.fused_losses, fused_losses))

    results = [
        evaluate(data.test, *embed(trainer.model, data.test, vocabulary))
        for trainer in (reference, fused)
    ]
    names = ("reference", options.backend)
    tables = {name: report.as_json(result) for name, result in zip(names, results, strict=True)}
    print("\n" + report.final_table(tables))
    return verdict(log.failures() + comparison.recall_failures(*results), log)


def verdict(failures: list[str], log: comparison.LockStep) -> int:
    for failure in failures:
        print(f"DIFFERENT: {failure}")
    if not failures:
        print(f"SAME within rounding: {log.summary()}")
    return EXIT_FAILED if failures else 0


# ----------------------------------------------------------------------------------------- main
def new_directory(options: Options) -> Path:
    """The first of runs/<data>-<loss>-1, -2, ... that does not exist."""
    name = f"{Path(options.data).resolve().name if options.data else 'digits'}-{options.loss}"
    number = 1
    while (path := Path("runs", f"{name}-{number}")).exists():
        number += 1
    return path


def load_data(options: Options) -> Dataset:
    return load_precomp(Path(options.data)) if options.data else load_digit_scenes()


def run(command: Command) -> int:
    if command.resume:
        return resume(command.output, command)
    for name in (CHECKPOINT, BEST, METRICS):
        if command.output and (command.output / name).exists():
            raise InputError(
                f"{command.output / name}: there is a run already; add --resume to continue it, or"
                " choose another --output"
            )
    options = new_options(command)
    torch.set_num_threads(options.threads)
    data = load_data(options)
    vocabulary = Vocabulary.build(data.train.captions)
    if command.validate:
        return validate(options, data, vocabulary)
    return train(options, data, vocabulary, command.output or new_directory(options), None)


def resume(output: Path, command: Command) -> int:
    path = output / CHECKPOINT
    if not path.exists():
        raise InputError(f"{path}: no checkpoint to resume from; start without --resume")
    saved = read_checkpoint(path, CHECKPOINT_KEYS)
    options = resumed_options(command, saved["options"], path)
    data = load_data(options)
    if data.fingerprint() != saved["fingerprint"]:
        raise InputError(f"{path}: trained on other data than {options.data or 'the digits'}")
    torch.set_num_threads(options.threads)
    return train(options, data, Vocabulary.from_json(output / VOCABULARY), output, saved)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 1 (failed), 2 (bad input), 130 (^C)."""
    try:
        return run(parse_command(argv, __doc__))
    except InputError as error:
        message, code = f"error: {error}", EXIT_BAD_INPUT
    except Diverged as error:
        message, code = f"failed: {error}; lower --lr or raise --temperature", EXIT_FAILED
    except KeyboardInterrupt:
        message, code = (
            "interrupted; --resume continues after the last finished epoch",
            EXIT_INTERRUPTED,
        )
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
