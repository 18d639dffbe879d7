"""The command line of train_reference.py, and what a resumed run takes from its checkpoint."""

import argparse
import dataclasses
import math
import warnings
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from fused_vse import backends, hinge_loss

from .data import InputError
from .objective import DEFAULT_MARGINS, HARDEST_LOSSES, LOSSES, OPTIONS, Objective

WARMUP_SHARE = 0.3  # of the epochs, for the losses that need a warm-up


@dataclasses.dataclass
class Options:
    """What determines the numbers of a run; it is stored in the checkpoint."""

    data: str | None = None
    loss: str = "hardest_negative"
    backend: str = "auto"
    warmup_epochs: int | None = None
    temperature: float = 0.05
    margin: float | None = None
    smooth: bool = False
    select: float | None = None
    hardness: float = 0.0
    false_negative_margin: float | None = None
    bias: float = -10.0
    epochs: int = 8
    batch_size: int = 128
    lr: float = 1e-3
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    word_size: int = 300
    hidden_size: int = 256
    joint_size: int = 512
    image_dropout: float = 0.5
    word_dropout: float = 0.3

    def complete(self) -> None:
        """Fills in defaults that depend on other options; raises InputError for a conflict."""
        if self.margin is None:
            self.margin = DEFAULT_MARGINS[self.loss]
        if self.warmup_epochs is None:
            needed = self.loss in HARDEST_LOSSES and self.select is None
            self.warmup_epochs = math.ceil(WARMUP_SHARE * self.epochs) if needed else 0
        if self.threads is None:
            self.threads = torch.get_num_threads()
        if self.warmup_epochs > self.epochs:
            raise InputError(
                f"--warmup-epochs {self.warmup_epochs} exceeds --epochs {self.epochs}; lower it"
            )
        for name in self._special():
            losses = OPTIONS[name]
            if self.loss not in losses:
                owners = " or ".join(losses)
                raise InputError(f"{_flag(name)} belongs to --loss {owners}, not to {self.loss}")
        if self.loss == "sigmoid" and self.margin:
            raise InputError(f"--margin {self.margin}: the sigmoid loss has none; leave it out")
        if self.select is not None and (self.smooth or self.false_negative_margin is not None):
            raise InputError(
                "--select takes the mean of hinges over all negatives; leave it out, or --smooth and"
                " --false-negative-margin"
            )

    def _special(self) -> dict[str, object]:
        """Those of OPTIONS that are not their defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def objective(self, epoch: int, backend: str | None = None) -> Objective:
        """All negatives during the warm-up, then --loss."""
        backend = backend or self.backend
        if epoch < self.warmup_epochs:
            return Objective("all_negatives", self.temperature, 0.0, {}, backend)
        return Objective(self.loss, self.temperature, self.margin, self._special(), backend)


class Command(NamedTuple):
    """The command line as given."""

    options: dict[str, object]  # only those given
    output: Path | None
    resume: bool
    validate: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")


def _number(kind: type, least: float, below: float = math.inf, *, open_end: bool = False) -> object:
    """A parser of numbers from `least` (or above it, if `open_end`) to under `below`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < below or (open_end and value == least):
            low = f"above {least:g}" if open_end else f"of at least {least:g}"
            high = f" and below {below:g}" if below < math.inf else ""
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {low}{high}")
        return value

    return parse


def parse_command(argv: list[str] | None, description: str) -> Command:
    """Returns the command line; raises InputError for a wrong one."""
    parser = _Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    defaults = Options()

    def add(flag: str, help: str, **kwargs: object) -> None:
        default = getattr(defaults, flag.removeprefix("--").replace("-", "_"), None)
        parser.add_argument(
            flag, help=help if default is None else f"{help} (default {default})", **kwargs
        )

    share = _number(float, 0, 1)
    size = {"type": _number(int, 1, 2**20), "metavar": "N"}
    add("--data", "directory in vsepp's layout (default: scenes of digits)", metavar="DIR")
    add("--loss", "the loss to train with", choices=LOSSES)
    add(
        "--backend", "what computes the loss: a backend of fused_vse", choices=("auto", *backends())
    )
    add(
        "--warmup-epochs",
        f"first epochs with all_negatives (default {WARMUP_SHARE} of them, rounded up, for the"
        " losses over the hardest negative; else 0)",
        type=_number(int, 0),
        metavar="N",
    )
    add(
        "--temperature",
        "τ, by which scores are divided",
        type=_number(float, 1e-10, 1e10),  # the limits of the losses
        metavar="T",
    )
    margins = ", ".join(f"{margin} for {loss}" for loss, margin in DEFAULT_MARGINS.items())
    add(
        "--margin",
        f"m, what negatives must stay below their positive (default {margins})",
        type=_number(float, 0, 1e30),
        metavar="M",
    )
    add("--smooth", "softplus in place of the hinge of hardest_negative", action="store_true")
    add(
        "--select",
        "where |p - h| of an anchor is smaller, hardest_negative takes the mean over its negatives: from"
        " scratch, without a warm-up",
        type=_number(float, 0, 1e30),
        metavar="E",
    )
    add(
        "--hardness",
        "weight of hard negatives in all_negatives, 0 for none",
        type=_number(float, 0, 1e30),
        metavar="B",
    )
    add(
        "--false-negative-margin",
        "negatives that score higher than their positive by more are left out",
        type=_number(float, -1e30, 1e30),
        metavar="D",
    )
    add("--bias", "b of the sigmoid loss", type=_number(float, -1e30, 1e30), metavar="B")
    add("--epochs", "passes over all captions", **size)
    add("--batch-size", "pairs in a batch", type=_number(int, 2, 2**31), metavar="N")
    add("--lr", "learning rate of Adam at the start", type=_number(float, 0, 1e10, open_end=True))
    add("--seed", "of weights, order and dropout", type=_number(int, 0, 2**63), metavar="N")
    add("--device", "torch device", metavar="NAME")
    add(
        "--threads",
        "of the CPU; they decide the last bits (default: torch's own choice)",
        type=_number(int, 1, 1025),
        metavar="N",
    )
    add("--word-size", "size of a word vector", **size)
    add("--hidden-size", "size of the GRU in each direction", **size)
    add("--joint-size", "D, size of the joint space", **size)
    add("--image-dropout", "share of image features dropped", type=share, metavar="P")
    add("--word-dropout", "share of word-vector entries dropped", type=share, metavar="P")
    parser.add_argument(
        "--output", help="run directory (default: a new one in runs/)", metavar="DIR"
    )
    parser.add_argument(
        "--resume", help="continue the run in --output with its options", action="store_true"
    )
    parser.add_argument(
        "--validate",
        help="train with the reference formulas and with --backend, and compare; writes no files",
        action="store_true",
    )

    given = vars(parser.parse_args(argv))
    output, resume = given.pop("output", None), given.pop("resume", False)
    validate = given.pop("validate", False)
    if resume and not output:
        raise InputError("--resume needs --output, the directory of the run to continue")
    if validate and output:
        raise InputError("--validate writes no files; leave out --output")
    return Command(given, Path(output) if output else None, resume, validate)


def new_options(command: Command) -> Options:
    """The options of a new run; raises InputError for a bad one."""
    options = Options(**command.options)
    options.complete()
    if options.data:  # a run is resumed from any working directory
        options.data = str(Path(options.data).resolve())
    _check_hardware(options)
    return options


def resumed_options(command: Command, stored: dict[str, object], path: Path) -> Options:
    """The options of the checkpoint at `path`. Given ones must agree, but the data may move."""
    options = _checked(stored, path)
    for name, value in command.options.items():
        if name != "data" and value != stored[name]:
            raise InputError(
                f"{_flag(name)} {value}: the run in {path} has {stored[name]}; leave it out"
            )
    options.data = command.options.get("data", options.data)
    _check_hardware(options)
    return options


def _checked(stored: object, path: Path) -> Options:
    """The options of a checkpoint, which must be what the command line could have given."""
    names = {field.name for field in dataclasses.fields(Options)}
    if not isinstance(stored, dict) or stored.keys() != names:
        odd = (
            ", ".join(sorted(map(str, names ^ set(stored)))) if isinstance(stored, dict) else stored
        )
        raise InputError(f"{path}: checkpoint of another version: other options: {odd}")
    argv = [
        _flag(name) if value is True else f"{_flag(name)}={value}"
        for name, value in stored.items()
        if value is not None and value is not False
    ]
    try:
        options = Options(**parse_command(argv, "").options)
        options.complete()
    except InputError as error:
        raise InputError(f"{path}: options: {error}") from None
    for name, value in stored.items():
        if getattr(options, name) != value:
            raise InputError(f"{path}: options: {_flag(name)} cannot be {value!r}")
    return options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_hardware(options: Options) -> None:
    """Raises InputError unless the device and the backend work here."""
    try:
        probe = torch.zeros(1, 1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what auto falls back to, the first step warns
            hinge_loss(probe, probe, backend=options.backend)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--backend {options.backend}: {error}") from None
