"""What a checkpoint must hold to be resumed: nothing is taken on trust that the run itself decides."""

import dataclasses
from pathlib import Path

import torch

from fused_vse.retrieval import evaluate_retrieval

from .checkpoint import check_like
from .data import InputError
from .objective import HARDEST_LOSSES
from .options import Options
from .report import as_json
from .trainer import Sums, Trainer, generator_states, set_generator_states


def restore(trainer: Trainer, saved: dict, path: Path) -> None:
    """Loads the content of the checkpoint at `path`; raises InputError naming what is wrong with it."""
    for name, value in (("sizes", trainer.sizes), ("words", trainer.vocabulary.words)):
        check_like(saved[name], value, name, path)
        if saved[name] != value:
            raise InputError(f"{path}: checkpoint of another run: its {name} are not this run's")
    steps, per_epoch = saved["steps"], trainer.steps_per_epoch
    if type(steps) is not int or not 0 <= steps <= trainer.options.epochs * per_epoch:
        raise InputError(f"{path}: steps is {steps}, of {trainer.options.epochs} x {per_epoch}")
    fresh = trainer.state()
    moments = {
        i: {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}
        for i, weight in enumerate(trainer.model.parameters())
    }
    expected = {
        "model": fresh["model"],
        "best_model": fresh["model"],
        "optimizer": moments if steps else {},
        "sums": dataclasses.asdict(Sums()),
        "random": generator_states(trainer.options.device) if steps % per_epoch else [],
    }
    for name, value in expected.items():
        check_like(saved[name], value, name, path)
    if any(moment["step"] != steps for moment in saved["optimizer"].values()):
        raise InputError(f"{path}: optimizer: not that of step {steps}")
    if saved["random"]:
        try:
            set_generator_states(trainer.options.device, saved["random"])
        except RuntimeError as error:
            raise InputError(f"{path}: random: {str(error).splitlines()[0]}") from None
    _check_history(saved["history"], trainer.options, steps // per_epoch, path)
    trainer.load_state(saved)


def _check_history(history: object, options: Options, epochs: int, path: Path) -> None:
    if not isinstance(history, list) or len(history) != epochs:
        lines = len(history) if isinstance(history, list) else "no"
        raise InputError(f"{path}: history has {lines} lines, but {epochs} epochs are done")
    one = torch.ones(1, 1)
    dev, best_rsum = as_json(evaluate_retrieval(one, one)), -1.0
    for epoch, line in enumerate(history):
        name, phase = f"history.{epoch}", options.objective(epoch).name
        expected = {
            "epoch": epoch + 1,
            "phase": phase,
            "loss": 0.0,
            "active_share": 0.0 if phase in HARDEST_LOSSES else None,
            "on_plateau": False,
            "learning_rate": 0.0,
            "dev": dev,
            "best": True,
            "seconds": 0.0,
        }
        check_like(line, expected, name, path)
        rsum = line["dev"]["rsum"]
        expected |= {"best": rsum > best_rsum}
        for key in ("epoch", "phase", "best"):
            if line[key] != expected[key]:
                raise InputError(f"{path}: {name}.{key} is {line[key]}, expected {expected[key]}")
        best_rsum = max(best_rsum, rsum)
