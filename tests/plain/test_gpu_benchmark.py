"""The logic of benchmarks.gpu without a GPU: cases, budget, report. The measurements need one."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

gpu = pytest.importorskip("benchmarks.gpu")
gpu_run = pytest.importorskip("benchmarks.gpu_run")
TINY = len(gpu.contenders.TINY_CASES)


def test_dry_run_writes_both_reports(tmp_path):
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["dry_run"] and result["state"] == "finished"
    assert not result["skipped"] and not result["failed"]
    losses = {(row["loss"], row["contender"]) for row in result["rows"]}
    assert ("hardest", "fused") in losses and ("hinge_sum", "torch.compile, graph") in losses
    for row in result["rows"]:
        assert row["forward_low"] <= row["forward"] <= row["forward_high"]
        assert ("step" in row) == (row["contender"] not in ("bare GEMM", "GEMM + one pass"))
    text = (tmp_path / "gpu.md").read_text()
    assert (
        "mean nothing" in text
        and "Not complete" not in text
        and "| hardest, 8, 4, float32 | fused |" in text
    )


def test_it_runs_the_gpu_tests_but_not_the_sanitizer():
    assert "test_gpu.py" in {test.name for test in gpu.TESTS}
    assert "test_cuda_sanitizer.py" not in {test.name for test in gpu.TESTS}


def test_a_spent_budget_skips_the_rest(tmp_path):
    assert gpu.main(["--dry-run", "--minutes", "0", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert not result["rows"] and {s["reason"] for s in result["skipped"]} == {"out of time"}


class Host(gpu.measure.HostMeter):
    """A GPU that is lost after an error, if `lost`."""

    lost, erred = False, False

    def is_alive(self):
        return not (self.lost and self.erred)


def dry_run(tmp_path, monkeypatch, fused, **attributes):
    """The exit code, the results and the text, where `fused(*inputs)` takes the place of the fused losses."""
    monkeypatch.setattr(gpu.contenders, "fused_loss", lambda case, backend: fused)
    monkeypatch.setattr(gpu.measure, "HostMeter", lambda: meter)
    meter = Host()
    for name, value in attributes.items():
        setattr(meter, name, value)
    code = gpu.main(["--dry-run", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}
    return code, json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()


def raising(error):
    def fused(*inputs):
        Host.erred = True
        raise error

    return fused


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Host, "erred", False)
    monkeypatch.setattr(gpu.measure, "MOST", gpu.measure.LEAST)  # quick
    monkeypatch.setattr(gc, "collect", lambda: 0)  # seconds among the objects of all tests


def test_a_contender_that_fails_leaves_the_others(tmp_path, monkeypatch):
    error = ValueError("PassManager::run failed\n and so on")
    code, result, text = dry_run(tmp_path, monkeypatch, raising(error))
    assert code == 1 and result["state"] == "finished"
    assert {entry["reason"] for entry in result["failed"]} == {
        "ValueError: PassManager::run failed"
    }
    assert "Failed:\n\n- hardest, 8, 4, float32, fused: ValueError: PassManager" in text
    contenders = {row["contender"] for row in result["rows"]}
    assert {"eager", "torch.compile"} <= contenders and "fused" not in contenders
    assert not result["skipped"]


@pytest.mark.parametrize("how", ["itself", "cause", "context"])
def test_out_of_memory_is_no_failure(how, tmp_path, monkeypatch):
    error = memory = torch.OutOfMemoryError("CUDA out of memory")
    if how != "itself":
        error = RuntimeError("operation failed due to a previous error during capture")
        setattr(error, f"__{how}__", memory)
    code, result, text = dry_run(tmp_path, monkeypatch, raising(error))
    assert code == 0 and not result["failed"]
    assert {entry["reason"] for entry in result["skipped"]} == {"out of memory"}
    assert "Skipped:\n\n- hardest, 8, 4, float32, fused: out of memory" in text


def test_a_lost_gpu_ends_the_run_with_a_report(tmp_path, monkeypatch):
    error = RuntimeError(
        "CUDA error: an illegal memory access was encountered\nCUDA kernel errors ..."
    )
    code, result, text = dry_run(tmp_path, monkeypatch, raising(error), lost=True)
    assert code == 1
    assert [row["contender"] for row in result["rows"]] == ["bare GEMM", "GEMM + one pass"]
    assert len(result["failed"]) == 1 and "illegal memory access" in result["failed"][0]["reason"]
    assert "Not complete: stopped: the GPU takes no more work after hardest, 8, 4" in text


def test_an_interrupt_leaves_what_was_measured(tmp_path, monkeypatch):
    code, result, text = dry_run(tmp_path, monkeypatch, raising(KeyboardInterrupt()))
    assert code == 130 and result["state"] == "interrupted"
    assert [row["contender"] for row in result["rows"]] == ["bare GEMM", "GEMM + one pass"]
    assert "Not complete: interrupted" in text and "| bare GEMM |" in text


def test_an_error_of_the_benchmark_itself_leaves_what_was_measured(tmp_path, monkeypatch):
    contenders_of = gpu.contenders.contenders_of

    def broken(case):
        if case.loss != "hardest":
            raise AssertionError("broken")
        return contenders_of(case)

    monkeypatch.setattr(gpu.contenders, "contenders_of", broken)
    with pytest.raises(AssertionError, match="broken"):
        gpu.main(["--dry-run", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["state"] == "stopped: AssertionError: broken" and result["rows"]


def test_the_report_is_there_after_every_case(tmp_path, monkeypatch):
    """Also for what no handler sees, such as SIGKILL."""
    written = []
    write = gpu.report.write

    def counting(result, directory):
        write(result, directory)
        written.append(
            (result["state"], len(json.loads((directory / "gpu.json").read_text())["rows"]))
        )

    monkeypatch.setattr(gpu.report, "write", counting)
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    assert len(written) == TINY + 1 and written[-1][0] == "finished"
    assert {state for state, _ in written[:-1]} == {"still running"}
    counts = [count for _, count in written]
    assert counts[0] > 0 and sorted(set(counts)) == counts[:-1]


def test_a_report_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "gpu.md"
    file.write_text("old")
    monkeypatch.setattr(Path, "write_text", lambda path, text: path.write_bytes(b"hal") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.report.replace(file, "half")
    assert file.read_text() == "old"


def test_a_contender_that_hangs_ends_the_process_with_a_report(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr(gpu_run, "HANG_SECONDS", 0.2)
    monkeypatch.setattr(os, "_exit", ends.append)

    def fused(*inputs):
        time.sleep(0 if ends else 0.5)
        return sum(x.sum() for x in inputs)

    code, result, _ = dry_run(tmp_path, monkeypatch, fused)
    assert ends[0] == 1 and code == 1
    assert result["failed"][0]["what"] == "hardest, 8, 4, float32, fused"
    assert result["failed"][0]["reason"] == "no end after 0.2 s"
    assert result["state"] == "stopped: hardest, 8, 4, float32, fused hangs"


def test_sigterm_leaves_a_report(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", str(tmp_path)]
    root = Path(gpu.__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()  # of the first contender
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 130
    assert json.loads((tmp_path / "gpu.json").read_text())["state"] == "interrupted"


@pytest.mark.parametrize("case", gpu.contenders.TINY_CASES, ids=lambda case: case.loss)
def test_the_contenders_compute_the_same(case):
    inputs = [torch.randn(9, 5, dtype=torch.float64) for _ in range(2)]
    if gpu.contenders.family_of(case) == "scores":
        inputs = [torch.randn(9, 9, dtype=torch.float64)]
    fused = gpu.contenders.fused_loss(case, "reference")(*inputs)
    assert torch.allclose(fused, gpu.contenders.eager_loss(case)(*inputs), rtol=1e-6)


@pytest.mark.parametrize("case", gpu.contenders.CASES, ids=str)
@pytest.mark.parametrize("hopper", [True, False])
def test_the_cuda_backend_contends_where_it_has_kernels(hopper, case, monkeypatch):
    """Not where it only passes Triton on: off Hopper, and where the scores are kept."""
    monkeypatch.setattr(gpu.contenders.fused_vse, "backends", lambda: {"cuda": "available"})
    monkeypatch.setattr(gpu.contenders, "is_hopper", lambda: hopper)
    contenders = {x.name: x.function for x in gpu.contenders.contenders_of(case)}
    kept = case.size <= 2048 and case.loss != "hardest"
    takes_large = hopper and case.dtype == "bfloat16" and not kept
    takes = "," not in case.loss and (case.size <= 512 or takes_large)
    assert ("fused (cuda)" in contenders) == takes
    assert ("fused (cuda), graph" in contenders) == (takes and case.size <= 512)
    if takes:
        pair = [torch.ones(2, 2), torch.ones(2, 2)]
        with pytest.raises((RuntimeError, ValueError), match="cuda"):  # asks for it by name
            contenders["fused (cuda)"](*pair)


def test_no_report_from_a_failing_test_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "tests_pass", lambda minutes: False)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_skipped_tests_are_no_pass_and_no_gpu_is_an_error(tmp_path):
    assert not gpu.tests_pass(1)
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_tests_that_hang_are_no_pass(monkeypatch):
    monkeypatch.setattr(gpu, "TESTS", ["--collect-only"])
    assert not gpu.tests_pass(1e-4)


def test_first_calls_note_what_fails_and_what_takes_too_long(monkeypatch):
    saved = []
    run = gpu_run.Run(Host(), {}, time.monotonic() + 60, saved.append)
    outcomes = iter(
        [
            1.5,
            0.5,
            subprocess.CalledProcessError(
                1, "python", stderr="Traceback\nRuntimeError: no compiler\n"
            ),
            subprocess.TimeoutExpired("python", 1),
        ]
    )

    def first_call(*arguments):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(gpu.measure, "first_call", first_call)
    monkeypatch.setattr(gpu.measure, "FIRST_CALLS", gpu.measure.FIRST_CALLS[:2])
    run.first_calls()
    assert list(run.result["first_call_seconds"].values()) == [1.5, 0.5]
    assert [entry["reason"] for entry in run.result["failed"]] == ["RuntimeError: no compiler"]
    assert [entry["reason"] for entry in run.result["skipped"]] == ["out of time"]
    run.deadline = time.monotonic() - 1
    run.first_calls()
    assert len(run.result["skipped"]) == 5 and saved


CASE = gpu.contenders.Case("hardest", 16, 32, "float32")


def contender(mode="eager"):
    fused = gpu.contenders.fused_loss(CASE, "reference")
    return gpu.contenders.Contender("fused", fused, True, 0, mode)


def test_no_input_stays_in_the_cache_until_its_turn(monkeypatch):
    meter, used = Host(), []
    meter.cache_bytes = 1 << 20
    sets = gpu.measure.inputs(CASE, meter)
    inputs_bytes = sum(x.nbytes for tensors in sets for x in tensors)
    assert inputs_bytes >= 2 * meter.cache_bytes
    monkeypatch.setattr(gpu.measure, "MOST", 250)
    monkeypatch.setattr(gpu.measure, "SECONDS", 1e9)
    gpu.measure.summary("forward", meter, lambda i: used.append(i % len(sets)), False)
    assert len(used) == gpu.measure.WARM_UP + 250
    assert used == [i % len(sets) for i in range(len(used))]  # on and on, not from the first again


def test_gradients_of_earlier_calls_do_not_count_as_input(monkeypatch):
    sets = gpu.measure.inputs(CASE, Host())
    monkeypatch.setattr(gpu.measure, "inputs", lambda case, meter: sets)
    meter, seen = Host(), []

    def peak_bytes(call):
        seen.extend(x.grad for x in sets[0])
        return 0

    meter.peak_bytes = peak_bytes
    gpu.measure.measure(CASE, contender(), meter)
    assert seen == [None] * 4


def test_all_that_is_timed_of_a_graph_is_its_replay():
    meter, queued, launched = Host(), [], []

    def replay(i):
        launched.append(i)

    def times(call, count, is_queued):
        assert call is replay
        queued.append(is_queued)
        return [1.0] * count

    meter.times, meter.replayed = times, lambda call, sets: replay
    gpu.measure.measure(CASE, contender("graph"), meter)
    assert set(queued) == {True}
    assert len(launched) == 2 * gpu.measure.LEAST  # what Python takes


def test_launches_that_were_not_counted_show(tmp_path, monkeypatch):
    text = dry_run(tmp_path, monkeypatch, lambda *x: x[0].sum(), launches=lambda call: None)[2]
    assert "| ? / ? |" in text and "| ? |" in text and "None / " not in text
