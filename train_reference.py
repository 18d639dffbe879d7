"""Trains a visual-semantic embedding: linear image projection, GRU over captions, joint space.

    python train_reference.py                   # scenes of handwritten digits, nothing to download
    python train_reference.py --data DIR        # {train,dev,test}_{ims.npy,caps.txt}, as vsepp's
    python train_reference.py --loss all_negatives --output runs/mine
    python train_reference.py --output runs/mine --resume
    python train_reference.py --validate --epochs 2
    torchrun --nproc-per-node=2 train_reference.py    # data-parallel: --batch-size is that of all ranks

A run directory holds checkpoint.pt, best.pt (the weights of the best dev rsum and the vocabulary),
metrics.jsonl, curves.png and retrieved.png, or retrieved.txt where images are no pictures. On the
CPU, the same seed gives the same numbers, to the last bit, also when the run was killed on the way
and resumed. On several ranks they are the same to rounding, and any number of ranks resumes the run.
"""

import os

# By default the threads of GNU OpenMP spin while they wait for each other. Where other programs want
# the processors, too, that takes the time of the thread waited for: steps took up to ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import contextlib
import dataclasses
import itertools
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from training import comparison, report, retrieved
from training.checkpoint import (
    BEST,
    CHECKPOINT,
    CHECKPOINT_KEYS,
    METRICS,
    load_best,
    read_checkpoint,
    write_atomically,
    write_checkpoint,
    write_metrics,
)
from training.data import Dataset, InputError
from training.digits import load_digit_scenes
from training.lock import locked
from training.objective import HARDEST_LOSSES, Objective
from training.options import Command, Options, new_options, parse_command, resumed_options
from training.precomp import load_precomp
from training.ranks import LostRank, Ranks, joined, launcher, losing_none, say, speaks
from training.restore import restore
from training.trainer import Diverged, Trainer, embed, evaluate
from training.vocabulary import Vocabulary

CHECKPOINT_SECONDS = 120  # what a killed run loses at most
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def progress_bar(total: int, done: int = 0) -> tqdm:
    # In a log file, a bar redrawn ten times a second is a nuisance.
    interval = 0.2 if sys.stderr.isatty() else 10
    look = {"unit": "step", "mininterval": interval, "leave": False, "disable": not speaks()}
    return tqdm(total=total, initial=done, **look)


def run_epoch(trainer: Trainer, objective: Objective, bar: tqdm) -> Iterator[float]:
    """The steps of an epoch on the progress bar."""
    for loss in trainer.epoch(objective):
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()
        yield loss


# ------------------------------------------------------------------------------------- training
def train(
    options: Options,
    data: Dataset,
    vocabulary: Vocabulary,
    output: Path,
    saved: dict | None,
    ranks: Ranks,
) -> int:
    """Trains from the start, or from a checkpoint's content; the first rank shows the test results."""
    trainer = Trainer(options, data, vocabulary, ranks)
    about = {
        "options": dataclasses.asdict(options),
        "fingerprint": data.fingerprint(),
        "sizes": trainer.sizes,
        "words": vocabulary.words,
    }
    if saved is None:
        history, best_model = [], trainer.model.state_dict()
        if ranks.first:
            save(output, about, trainer, history, best_model)
    else:
        restore(trainer, saved, output / CHECKPOINT)
        history, best_model = saved["history"], saved["best_model"]
        if ranks.first:
            save_results(output, about, options, history, best_model)

    if ranks.first:
        print(f"run directory: {output}")
        print(report.EPOCH_HEADER, *map(report.epoch_line, history), sep="\n")
    saved_at = time.monotonic()
    with progress_bar(options.epochs * trainer.steps_per_epoch, trainer.steps_done) as bar:
        for epoch in range(len(history), options.epochs):
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}")
            objective = options.objective(epoch)._replace(group=ranks.group)
            learning_rate = trainer.learning_rate(epoch * trainer.steps_per_epoch)
            for _ in run_epoch(trainer, objective, bar):
                # After the last step comes the line of the history, and then the checkpoint.
                due = time.monotonic() - saved_at >= CHECKPOINT_SECONDS
                if due and ranks.first and not trainer.between_epochs:
                    save_state(output, about, trainer, history, best_model)
                    saved_at = time.monotonic()
            if not ranks.first:
                continue
            sums, captions = trainer.sums, len(trainer.captions)
            on_plateau = objective.on_plateau(sums.gap / captions)
            start = time.monotonic()
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
                    "loss": sums.loss / captions,
                    "active_share": sums.active / captions
                    if objective.name in HARDEST_LOSSES
                    else None,
                    "on_plateau": on_plateau,
                    "learning_rate": learning_rate,
                    "dev": report.as_json(dev),
                    "best": best,
                    "seconds": sums.seconds + time.monotonic() - start,
                }
            )
            bar.write(report.epoch_line(history[-1]))
            if on_plateau:
                bar.write(plateau_warning(objective, history[-1]["loss"], sums.gap / captions))
            save(output, about, trainer, history, best_model)
            saved_at = time.monotonic()

    if ranks.first:
        show_test_results(output, data, history)
    return 0


def plateau_warning(objective: Objective, loss: float, gap: float) -> str:
    return (
        f"warning: the loss sits at {loss:.3f}, by the plateau {objective.plateau:.3f} of"
        f" {objective.name} where all similarities are equal (in one direction, positive and"
        f" hardest negative differ by {gap:.3f}): --select 0.05 leaves it, or start with more"
        " --warmup-epochs, or lower --lr or --margin"
    )


def save(
    output: Path, about: dict, trainer: Trainer, history: list[dict], best_model: dict
) -> None:
    """The checkpoint first: whatever else is missing or old after a kill follows from it."""
    save_state(output, about, trainer, history, best_model)
    save_results(output, about, trainer.options, history, best_model)


def save_state(
    output: Path, about: dict, trainer: Trainer, history: list[dict], best_model: dict
) -> None:
    state = {"history": history, "best_model": best_model, **trainer.state()}
    write_checkpoint(output / CHECKPOINT, about | state)


def save_results(
    output: Path, about: dict, options: Options, history: list[dict], best_model: dict
) -> None:
    best = {"sizes": about["sizes"], "words": about["words"], "model": best_model}
    write_checkpoint(output / BEST, best)
    if history:
        objectives = [options.objective(epoch) for epoch in range(len(history))]
        plateaus = {objective.name: objective.plateau for objective in objectives}
        write_metrics(output / METRICS, history)
        write_atomically(output / "curves.png", report.curves(history, plateaus))


def show_test_results(output: Path, data: Dataset, history: list[dict]) -> None:
    """The table of the best model on the test set, its line in the metrics, and what it retrieves."""
    model, vocabulary = load_best(output)
    images, captions = embed(model, data.test, vocabulary)
    test = report.as_json(evaluate(data.test, images, captions))
    true = retrieved.true_at_1(data.test, images, captions)
    best = [line for line in history if line["best"]][-1]
    last = {"best_epoch": best["epoch"], "test": test, "true_at_1": true}
    write_metrics(output / METRICS, [*history, last])
    found = retrieved.retrieve(data.test, images, captions)
    if data.picture_shape:
        picture = retrieved.as_picture(data.test, data.picture_shape, found)
        write_atomically(output / "retrieved.png", picture)
    else:
        text = retrieved.as_text(data.test, found)
        write_atomically(output / "retrieved.txt", text.encode())
    print(f"\nbest epoch {best['epoch']} by dev rsum; see {output}")
    print(report.final_table({"dev": best["dev"], "test": test}))
    print(
        f"test answers in first place that are true of the query, its own or not:"
        f" image to text {true['image_to_text']:.1f} %, text to image {true['text_to_image']:.1f} %"
    )


# ----------------------------------------------------------------------------------- validation
def validate(options: Options, data: Dataset, vocabulary: Vocabulary) -> int:
    """Trains with the reference and with --backend, shows both; see training/comparison.py."""
    if options.backend == "reference":
        raise InputError("--validate compares the reference with a fused --backend; choose another")
    for epoch in (0, options.epochs - 1):
        refuse_fallback(options.objective(epoch), options.device)
    log = comparison.LockStep()
    reference, fused = (Trainer(options, data, vocabulary) for _ in range(2))
    reference_losses, fused_losses = [], []
    with progress_bar(2 * options.epochs * reference.steps_per_epoch) as bar:
        for epoch in range(options.epochs):
            kernels = options.objective(epoch)
            both = log.compare(options.objective(epoch, "reference"), kernels)
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}, reference")
            reference_losses += run_epoch(reference, both, bar)
            bar.set_description(f"epoch {epoch + 1}/{options.epochs}, {options.backend}")
            try:
                fused_losses += run_epoch(fused, kernels, bar)
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


def refuse_fallback(objective: Objective, device: str) -> None:
    """Raises InputError where auto would compare the reference with itself; it says so itself."""
    probe = torch.zeros(2, 1, device=device)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "no fused backend")
            objective(probe, probe, torch.arange(2, device=device))
    except Warning as warning:
        raise InputError(f"--validate: {warning}") from None


def verdict(failures: list[str], log: comparison.LockStep) -> int:
    for failure in failures:
        print(f"DIFFERENT: {failure}")
    if not failures:
        print(f"SAME within rounding: {log.summary()}")
    return EXIT_FAILED if failures else 0


# ----------------------------------------------------------------------------------------- main
def load_data(options: Options) -> Dataset:
    return load_precomp(Path(options.data)) if options.data else load_digit_scenes()


def make_directory(output: Path | None, options: Options) -> Path:
    """Makes --output, or the first of runs/<data>-<loss>-1, -2, ... that does not exist."""
    try:
        if output:
            output.mkdir(parents=True, exist_ok=True)
            return output
        name = f"{Path(options.data).resolve().name if options.data else 'digits'}-{options.loss}"
        runs = Path("runs")
        runs.mkdir(exist_ok=True)
        for number in itertools.count(1):
            path = runs / f"{name}-{number}"
            with contextlib.suppress(FileExistsError):  # perhaps of a run that starts just now
                path.mkdir()
                return path
    except OSError as error:
        raise InputError(
            f"--output {output or 'runs'}: cannot write there: {error.strerror}"
        ) from None


def refuse_run(output: Path) -> None:
    """Raises InputError where there is a run already."""
    for name in (CHECKPOINT, BEST, METRICS):
        if os.path.lexists(output / name):
            raise InputError(
                f"{output / name}: there is a run already; add --resume to continue it, or"
                " choose another --output"
            )


def run(command: Command, ranks: Ranks) -> int:
    if command.resume:
        return resume(command.output, command, ranks)

    def prepared() -> tuple[Options, Dataset, Vocabulary]:
        if command.output and ranks.first:
            refuse_run(command.output)
        if command.validate and ranks.size > 1:
            raise InputError("--validate runs in one process; start it without torchrun")
        options = new_options(command)
        torch.set_num_threads(options.threads)
        data = load_data(options)
        ranks.check(options.device, len(data.train.captions), options.batch_size)
        return options, data, Vocabulary.build(data.train.captions)

    options, data, vocabulary = ranks.agreed(prepared)
    if command.validate:
        return validate(options, data, vocabulary)
    with contextlib.ExitStack() as stack:

        def opened() -> Path:
            output = make_directory(command.output, options)
            stack.enter_context(locked(output))
            refuse_run(output)  # of another process, since
            return output

        output = ranks.from_first(opened)
        with resumable(output):
            return train(options, data, vocabulary, output, None, ranks)


def resume(output: Path, command: Command, ranks: Ranks) -> int:
    path = output / CHECKPOINT
    with contextlib.ExitStack() as stack:

        def opened() -> dict:
            if not os.path.lexists(path):
                raise InputError(f"{path}: no checkpoint to resume from; start without --resume")
            stack.enter_context(locked(output))
            return read_checkpoint(path, CHECKPOINT_KEYS)

        saved = ranks.from_first(opened)

        def prepared() -> tuple[Options, Dataset]:
            options = resumed_options(command, saved["options"], path)
            data = load_data(options)
            if data.fingerprint() != saved["fingerprint"]:
                raise InputError(
                    f"{path}: trained on other data than {options.data or 'the digits'}"
                )
            ranks.check(options.device, len(data.train.captions), options.batch_size)
            return options, data

        options, data = ranks.agreed(prepared)
        torch.set_num_threads(options.threads)
        vocabulary = Vocabulary.build(data.train.captions)
        with resumable(output):
            return train(options, data, vocabulary, output, saved, ranks)


@contextlib.contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Adds to ^C, and to the loss of a rank, how to go on."""
    try:
        with losing_none():
            yield
    except (KeyboardInterrupt, LostRank) as end:
        if not os.path.lexists(output / CHECKPOINT):
            raise
        command = [*launcher(), sys.argv[0], "--output", str(output), "--resume"]
        raise type(end)(f"{end}; this continues: {shlex.join(command)}") from None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0, 1 (failed), 2 (bad input), 130 (^C)."""
    of_all = True  # an end that all ranks come to, about which the first one speaks
    try:
        command = parse_command(argv, __doc__)
        with losing_none(), joined() as ranks:
            return run(command, ranks)
    except InputError as error:
        message, code = f"error: {error}", EXIT_BAD_INPUT
    except Diverged as error:
        message, code = f"failed: {error}; lower --lr or raise --temperature", EXIT_FAILED
    except KeyboardInterrupt as interrupt:
        message, code = f"interrupted{interrupt}", EXIT_INTERRUPTED
    except LostRank as error:
        message, code, of_all = f"failed: {error}", EXIT_FAILED, False
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error):
            raise  # PyTorch has no type of its own for memory that is exhausted on the CPU
        message, code = f"failed: {(str(error) or 'out of memory').splitlines()[0]}", EXIT_FAILED
        of_all = False
    say(message.replace("\n", "\\n"), of_all)
    return code


if __name__ == "__main__":
    sys.exit(main())
