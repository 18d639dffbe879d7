"""The logic of benchmarks.gpu without a GPU: cases, budget, report. The measurements need one."""

import json

import pytest
import torch

gpu = pytest.importorskip("benchmarks.gpu")


def test_dry_run_writes_both_reports(tmp_path):
    assert gpu.main(["--dry-run", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["dry_run"] and not result["skipped"]
    losses = {(row["loss"], row["contender"]) for row in result["rows"]}
    assert ("hardest", "fused") in losses and ("hinge_sum", "torch.compile, graph") in losses
    for row in result["rows"]:
        assert row["forward_low"] <= row["forward"] <= row["forward_high"]
        assert ("step" in row) == (row["contender"] not in ("bare GEMM", "GEMM + one pass"))
    text = (tmp_path / "gpu.md").read_text()
    assert "mean nothing" in text and "| hardest, 8, 4, float32 | fused |" in text


def test_a_spent_budget_skips_the_rest(tmp_path):
    assert gpu.main(["--dry-run", "--minutes", "0", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert not result["rows"] and {s["reason"] for s in result["skipped"]} == {"out of time"}


@pytest.mark.parametrize("case", gpu.contenders.TINY_CASES, ids=lambda case: case.loss)
def test_the_contenders_compute_the_same(case):
    inputs = [torch.randn(9, 5, dtype=torch.float64) for _ in range(2)]
    if gpu.contenders.family_of(case) == "scores":
        inputs = [torch.randn(9, 9, dtype=torch.float64)]
    fused = gpu.contenders.fused_loss(case, "reference")(*inputs)
    assert torch.allclose(fused, gpu.contenders.eager_loss(case)(*inputs), rtol=1e-6)


@pytest.mark.parametrize("case", gpu.contenders.CASES, ids=str)
def test_the_cuda_backend_contends_where_it_has_kernels(case, monkeypatch):
    monkeypatch.setattr(gpu.contenders.fused_vse, "backends", lambda: {"cuda": "available"})
    contenders = {x.name: x.function for x in gpu.contenders.contenders_of(case)}
    takes = "," not in case.loss and (case.size <= 512 or case.dtype == "bfloat16")
    assert ("fused (cuda)" in contenders) == takes
    assert ("fused (cuda), graph" in contenders) == (takes and case.size <= 512)
    if takes:
        pair = [torch.ones(2, 2), torch.ones(2, 2)]
        with pytest.raises((RuntimeError, ValueError), match="cuda"):  # asks for it by name
            contenders["fused (cuda)"](*pair)


def test_no_report_from_a_failing_test_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "tests_pass", lambda: False)
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_skipped_tests_are_no_pass_and_no_gpu_is_an_error(tmp_path):
    assert not gpu.tests_pass()
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())
