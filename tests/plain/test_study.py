"""benchmarks.study: what it runs, that it goes on where it was stopped, and what its table says."""

import json
import sys

import pytest

pytest.importorskip("matplotlib", reason="pip install '.[train]'")
from benchmarks import study


def result(rsum: float, stuck: bool = False) -> dict:
    recalls = {f"R@{k}": rsum / 6 for k in (1, 5, 10)}
    return {
        "test": {"image_to_text": recalls, "text_to_image": recalls, "rsum": rsum},
        "dev_rsum": rsum,
        "epochs_on_plateau": int(stuck),
        "ends_on_plateau": stuck,
        "seconds": 2.0,
    }


@pytest.fixture
def called(monkeypatch, tmp_path):
    """Runs main() with these arguments; returns what it ran."""

    def call(*arguments, broken=None):
        ran = []

        def run(flags, seed, data):
            if broken is not None and broken in flags:
                raise RuntimeError("the trainer failed")
            ran.append((flags, seed))
            return result(100.0 + seed, stuck="--select" not in flags)

        monkeypatch.setattr(study, "run", run)
        command = ["study", "--folder", str(tmp_path), "--processes", "1", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        assert study.main() == 0
        return ran

    return call


def test_every_configuration_once(called, tmp_path, capsys):
    ran = called("--seeds", "2")
    flags = {flags for part in study.PARTS.values() for flags in part.values()}
    assert sorted(ran) == sorted((f, seed) for f in flags for seed in (0, 1))
    shown = (tmp_path / "study_digits.md").read_text()
    assert shown in capsys.readouterr().out
    row = next(x for x in shown.splitlines() if x.startswith("| hardest, batch 32 |"))
    assert row.startswith("| hardest, batch 32 | 2 |")
    assert row.endswith("| 100.5 ± 0.7 | 2 of 2 | 2 |")
    assert (tmp_path / "study_digits.png").read_bytes()[1:4] == b"PNG"


def test_goes_on_where_it_was_stopped(called, tmp_path):
    with pytest.raises(RuntimeError, match="the trainer failed"):
        called("--part", "collapse", "--seeds", "1", broken="--select")
    done = json.loads((tmp_path / "study_digits.json").read_text())["runs"]
    rest = called("--part", "collapse", "--seeds", "1")
    assert len(done) + len(rest) == len(study.COLLAPSE)
    assert not called("--part", "collapse", "--seeds", "1")
    assert len(called("--part", "collapse", "--seeds", "2")) == len(study.COLLAPSE)


def test_a_run_of_the_trainer(tmp_path):
    """That fails says how."""
    with pytest.raises(RuntimeError, match="no such|not a directory|missing"):
        study.run("--epochs 1", 0, str(tmp_path / "nowhere"))
