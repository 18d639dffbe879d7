"""A whole run: what it writes and shows, the warm-up, the plateau, and --validate."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_data import TINY, train, write_tiny_data

import fused_vse
from training import comparison, objective, report, retrieved, trainer
from training.checkpoint import load_best
from training.model import VSEModel
from training.objective import HARDEST_LOSSES, LOSSES, Objective
from training.precomp import load_precomp

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_tiny_data(tmp_path_factory.mktemp("tiny") / "data"))


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(loss, data, tmp_path, capsys):
    run = tmp_path / "run"
    flags = ("--epochs", "5", "--loss", loss, "--backend", "reference")
    assert train(*TINY, *flags, "--data", data, "--output", str(run)) == 0
    *epochs, last = lines_of(run)
    assert len(epochs) == 5
    warmup = 2 if "hardest" in loss else 0  # 30 % of 5 epochs, rounded up
    assert [line["phase"] for line in epochs] == ["all_negatives"] * warmup + [loss] * (5 - warmup)
    best = [line for line in epochs if line["best"]][-1]
    assert last["best_epoch"] == best["epoch"]
    assert best["dev"]["rsum"] == max(line["dev"]["rsum"] for line in epochs)
    # Chance is 2 * (1 + 5 + 10) / 16 = 200 % at the most; 16 images share 32 descriptions.
    assert last["test"]["rsum"] > 350

    shown = capsys.readouterr()
    assert re.search(r"epoch 5/5: .*loss=\d", shown.err)
    assert len(re.findall(rf"^ +\d  (?:{loss}|all_negatives) ", shown.out, re.MULTILINE)) == 5
    assert "test text to image" in shown.out
    assert f"{last['test']['rsum']:.1f}" in shown.out
    assert (run / "curves.png").read_bytes().startswith(PNG)
    assert f"text to image {last['true_at_1']['text_to_image']:.1f} %" in shown.out
    assert (run / "retrieved.txt").read_text().count("right") > 6


def test_the_best_model_can_be_used(data, tmp_path):
    run = tmp_path / "run"
    assert train(*TINY, "--data", data, "--output", str(run)) == 0
    model, vocabulary = load_best(run)
    words = [
        torch.tensor(vocabulary.encode(text)) for text in ("a dog on a beach", "unheard-of words")
    ]
    assert model.encode_captions(words).shape == (2, 16)
    assert model.encode_images(torch.ones(3, 24)).shape == (3, 16)


def test_digits_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.digits.SCENES", {"train": 60, "dev": 20, "test": 20})
    for number in (1, 2):  # without --output, every run gets its own directory
        assert train(*TINY, "--epochs", "1", "--loss", "all_negatives") == 0
        run = tmp_path / "runs" / f"digits-all_negatives-{number}"
        assert (run / "retrieved.png").read_bytes().startswith(PNG)
        assert str(run.relative_to(tmp_path)) in capsys.readouterr().out


def test_what_is_retrieved_is_told_apart(tmp_path):
    """Own, true of the query although not its own, or neither; README.md counts the second too."""
    test = load_precomp(write_tiny_data(tmp_path / "data")).test
    captions = torch.eye(80)
    images = torch.zeros(16, 80)
    (i, j), *_ = (
        (i, j)
        for j in range(80)
        for i in range(16)
        if test.is_true(j, i) and test.owners[j] != i and test.owners[j] == 0
    )
    wrong = next(k for k in range(80) if not test.is_true(k, 0))
    images[0, [0, wrong]] = torch.tensor([0.5, 0.7])
    images[i, j] = 0.9  # caption j, of image 0, finds image i
    images[0, j] = 0.4
    found = retrieved.retrieve(test, images, captions)
    assert [(a.caption, a.verdict) for a in found.captions[0][:2]] == [
        (wrong, "wrong"),
        (0, "right"),
    ]
    assert found.captions[0][0].score == pytest.approx(0.7)
    shown = retrieved.as_text(test, found)
    assert f"   0.700  wrong      {test.captions[wrong]}" in shown
    shares = retrieved.true_at_1(test, images, captions)
    best = (captions @ images.T).argmax(1).tolist()
    right = [test.is_true(caption, image) for caption, image in enumerate(best)]
    assert best[j] == i and right[j]
    assert shares["text_to_image"] == pytest.approx(100 * sum(right) / 80)


def history_line(epoch, phase, **changes):
    ranking = {"R@1": 10.0 * epoch, "R@5": 50.0, "R@10": 60.0}
    share = 1 / epoch if phase in HARDEST_LOSSES else None
    line = {"epoch": epoch, "phase": phase, "loss": 9 / epoch, "active_share": share}
    line |= {"learning_rate": 1 / epoch, "best": epoch < 4}
    return line | {"dev": {"image_to_text": ranking, "text_to_image": ranking, "rsum": 100.0}}


def test_curves(monkeypatch):
    """A panel for the loss of each phase, with its plateau, and no legend on the data."""
    figures = []
    monkeypatch.setattr(report, "png", lambda figure: figures.append(figure) or b"")
    phases = ["all_negatives", "all_negatives", "hardest_negative", "hardest_negative"]
    history = [history_line(epoch, phase) for epoch, phase in enumerate(phases, 1)]
    report.curves(history, {"all_negatives": None, "hardest_negative": 8.0})
    (figure,) = figures
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == [
        *("training loss: all_negatives", "training loss: hardest_negative", "dev rsum"),
        *("dev recall (%)", "active share (%): anchors with a violation"),
        "learning rate at the start",
    ]
    lines = panels["training loss: hardest_negative"].get_lines()
    assert lines[0].get_xydata().tolist() == [[3, 3], [4, 9 / 4]]
    assert list(lines[1].get_ydata()) == [8, 8]
    assert panels["dev rsum"].get_lines()[1].get_label() == "best epoch: 3"
    figure.canvas.draw()
    for axes in panels.values():
        if axes.get_legend():
            legend, data = axes.get_legend().get_window_extent(), axes.get_window_extent()
            assert not legend.overlaps(data)


def test_threads_that_wait_sleep():
    """Spinning ones take the processor from the thread that they wait for, on a loaded machine."""
    code = "import train_reference"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_DISPLAY_ENV": "true"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    policies = re.findall(r"OMP_WAIT_POLICY = '(\w+)'", shown)
    if not policies:
        pytest.skip("this torch has another OpenMP library than GNU's")
    assert set(policies) == {os.environ.get("OMP_WAIT_POLICY", "passive").upper()}


def test_ids_reach_the_loss(data, tmp_path, monkeypatch):
    seen = []

    def spy(images, captions, *, image_ids, caption_ids, **options):
        seen.append((image_ids, caption_ids))
        return fused_vse.all_negatives_loss(
            images, captions, image_ids=image_ids, caption_ids=caption_ids, **options
        )

    monkeypatch.setattr(objective, "all_negatives_loss", spy)
    flags = ("--epochs", "1", "--loss", "all_negatives")
    assert train(*TINY, *flags, "--data", data, "--output", str(tmp_path / "run")) == 0
    assert all(torch.equal(*ids) for ids in seen)
    every_id = torch.cat([ids for ids, _ in seen])
    assert every_id.bincount().eq(5).all()  # an epoch visits every caption of every image once


def test_divergence_is_one_line(data, tmp_path, capsys, monkeypatch):
    def diverged(images, captions, **options):
        return images.sum() * torch.nan

    monkeypatch.setattr(objective, "all_negatives_loss", diverged)
    assert train(*TINY, "--data", data, "--output", str(tmp_path / "run")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "failed: the loss is nan in step 1 of epoch 1; lower --lr or raise --temperature" in line


# ---------------------------------------------------------------------------------------- plateau
@pytest.mark.parametrize("name", ["hardest_negative", "hinge_hardest"])
@pytest.mark.parametrize("smooth", [False, True])
def test_plateau_is_the_loss_of_equal_similarities(name, smooth):
    options = {"smooth": True} if smooth and name == "hardest_negative" else {}
    loss = Objective(name, 0.1, 0.2, options, "reference")
    ones = torch.nn.functional.normalize(torch.ones(6, 4), dim=1)
    value, statistics = loss(ones, ones, torch.arange(6))
    assert value.item() == pytest.approx(loss.plateau, rel=1e-5)
    gap = (statistics.hardest_scores - statistics.positive_scores).abs().mean().item()
    assert loss.on_plateau(gap)
    assert not loss.on_plateau(0.06)


@pytest.mark.parametrize("collapsed", [0, 1])
def test_one_side_that_collapses_is_a_plateau(collapsed):
    """All captions alike: only image anchors see equal scores; and the other way round."""
    loss = Objective("hardest_negative", 0.1, 0.2, {}, "reference")
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.nn.functional.normalize(torch.randn(30, 8, generator=generator)) for _ in range(2)
    ]
    _, statistics = loss(*sides, torch.arange(30))
    assert not loss.on_plateau(trainer._gap(statistics))
    sides[collapsed] = sides[collapsed][:1].expand(30, -1)
    _, statistics = loss(*sides, torch.arange(30))
    assert loss.on_plateau(trainer._gap(statistics))


@pytest.mark.parametrize("name", ["all_negatives", "hinge"])
def test_no_plateau(name):
    loss = Objective(name, 0.1, 0.0, {}, "reference")
    assert loss.plateau is None
    assert not loss.on_plateau(0.0)


def test_plateau_warning_says_what_to_do(data, tmp_path, capsys, monkeypatch):
    # Not a function of its input: all similarities are equal.
    def collapsed(self, batch, part=None):
        rows = self.caption_projection.bias.expand(len(batch), -1)
        return torch.nn.functional.normalize(rows, dim=1)

    monkeypatch.setattr(VSEModel, "encode_images", collapsed)
    monkeypatch.setattr(VSEModel, "encode_captions", collapsed)
    flags = ("--loss", "hardest_negative", "--warmup-epochs", "0", "--lr", "1e-9")
    assert train(*TINY, *flags, "--data", data, "--output", str(tmp_path / "run")) == 0
    shown = capsys.readouterr().out
    assert "warning: the loss sits at 8.000, by the plateau 8.000 of hardest_negative" in shown
    assert "--select 0.05 leaves it, or start with more --warmup-epochs" in shown


# --------------------------------------------------------------------------------------- validate
def replace_fused(monkeypatch, name, broken):
    """Puts `broken` in the place of the fused loss; the reference stays."""
    exact = getattr(fused_vse, name)

    def replaced(images, captions, *, backend, **options):
        if backend == "reference":
            return exact(images, captions, backend=backend, **options)
        return broken(lambda i, c: exact(i, c, backend="reference", **options), images, captions)

    monkeypatch.setattr(objective, name, replaced)


def in_float64(loss, images, captions):
    result = loss(images.double(), captions.double())
    return (result[0].float(), result[1]) if isinstance(result, tuple) else result.float()


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, factor):
        ctx.factor = factor
        return rows.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor[: len(gradient)], None


def last_row_unscaled(loss, images, captions):
    factor = torch.ones(32, 1)
    factor[len(images) - 1] = 1.01
    return loss(ScaledGradient.apply(images, factor), captions)


def wrong_gradient(loss, images, captions):
    return loss(ScaledGradient.apply(images, torch.full((32, 1), 1.0005)), captions)


def wrong_value(loss, images, captions):
    value = loss(images, captions)
    if isinstance(value, tuple):
        return value[0] * 1.001, value[1]
    return value * 1.001


def not_a_number(loss, images, captions):
    factor = torch.ones(32, 1)
    factor[len(images) - 1] = torch.nan
    return loss(ScaledGradient.apply(images, factor), captions)


def validate(data, loss, *flags):
    # auto takes what is there; the replaced functions do not look at it.
    return train(*TINY, "--validate", "--data", data, "--loss", loss, *flags)


@pytest.mark.parametrize("loss", LOSSES)
def test_validate_accepts_another_rounding(loss, data, capsys, monkeypatch):
    for name in ("all_negatives_loss", "hardest_negative_loss", "hinge_loss"):
        replace_fused(monkeypatch, name, in_float64)
    assert validate(data, loss) == 0
    shown = capsys.readouterr().out
    assert "SAME within rounding: 24 steps" in shown
    assert shown.count("text to image") == 2
    assert (
        len(re.findall(r"^ +\d+ +\d+\.\d{6} +\d+\.\d{6} +\S+ +\d+\.\d{6}$", shown, re.MULTILINE))
        == 24
    )


@pytest.mark.parametrize("broken", [wrong_value, wrong_gradient, last_row_unscaled])
@pytest.mark.parametrize("loss", ["all_negatives", "hardest_negative"])
def test_validate_finds_a_broken_backend(loss, broken, data, capsys, monkeypatch):
    replace_fused(monkeypatch, f"{loss}_loss", broken)
    assert validate(data, loss, "--backend", "auto", "--warmup-epochs", "0") == 1
    assert "DIFFERENT: " in capsys.readouterr().out


def test_validate_finds_nan(data, capsys, monkeypatch):
    replace_fused(monkeypatch, "all_negatives_loss", not_a_number)
    assert validate(data, "all_negatives") == 1
    shown = capsys.readouterr().out
    assert "DIFFERENT: with auto, the loss is nan in step 2 of epoch 1" in shown


@pytest.mark.skipif(
    fused_vse.backends()["cpu"] != "available", reason=f"cpu: {fused_vse.backends()['cpu']}"
)
@pytest.mark.parametrize("loss", LOSSES)
def test_validate_the_cpu_backend(loss, data, capsys):
    assert validate(data, loss, "--backend", "cpu") == 0
    assert "SAME within rounding" in capsys.readouterr().out


def test_recalls_apart_are_named():
    eye = torch.eye(20)
    good = fused_vse.retrieval.evaluate_retrieval(eye, eye)
    bad = fused_vse.retrieval.evaluate_retrieval(eye, -eye)
    assert comparison.recall_failures(good, good) == []
    found = comparison.recall_failures(good, bad)
    assert "image_to_text R@1 is 0.0, 100.0 with the reference" in found[0]


# ------------------------------------------------------------------------------------------- help
def test_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        train("--help")
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--data", "--loss", "--backend", "--warmup-epochs", "--resume", "--validate"):
        assert flag in shown
