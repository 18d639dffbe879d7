"""Benchmark of the losses on a given score matrix and of the order similarity, on the CPU.

    python -m benchmarks.drop_in               # about five minutes; writes results/drop_in.{json,md}
    python -m benchmarks.drop_in --threads 1

Every entry is one forward + backward step in float32, measured by pytest-benchmark; eager is the formula
that the projects have: SGRAF's and CHAN's on scores, vsepp's `order_sim` with its [N, N, D] tensor. That
one takes 21 GiB at N = D = 1024; with less than 28 GiB in the machine, N is 512.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from fused_vse import all_negatives_loss, hinge_loss

from . import need
from .cpu import RESULTS, cpu_name

SCORES_ROWS = 8192
ORDER_DIM = 1024
ORDER_ROWS = 1024 if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") > 28 * 2**30 else 512
MARGIN, TEMPERATURE = 0.2, 0.1


def eager_hinge(scores, hardest):
    positive, eye = scores.diag(), torch.eye(len(scores)) > 0.5
    by_image = (MARGIN + scores - positive[:, None]).clamp(min=0).masked_fill_(eye, 0)
    by_caption = (MARGIN + scores - positive).clamp(min=0).masked_fill_(eye, 0)
    if hardest:
        by_image, by_caption = by_image.max(1)[0], by_caption.max(0)[0]
    return by_image.sum() + by_caption.sum()


def eager_info_nce(scores):
    logits, labels = scores / TEMPERATURE, torch.arange(len(scores))
    return cross_entropy(logits, labels) + cross_entropy(logits.T, labels)


def eager_order(images, captions, hardest):
    difference = captions[:, None] - images
    return eager_hinge(-difference.clamp(min=0).pow(2).sum(2).sqrt().t(), hardest)


CASES = {
    ("scores", "sum of hinges"): (lambda s: hinge_loss(scores=s), lambda s: eager_hinge(s, False)),
    ("scores", "max of hinges"): (
        lambda s: hinge_loss(scores=s, hardest=True),
        lambda s: eager_hinge(s, True),
    ),
    ("scores", "all negatives"): (lambda s: all_negatives_loss(scores=s), eager_info_nce),
    ("order", "sum of hinges"): (
        lambda *x: hinge_loss(*x, similarity="order"),
        lambda *x: eager_order(*x, False),
    ),
    ("order", "max of hinges"): (
        lambda *x: hinge_loss(*x, similarity="order", hardest=True),
        lambda *x: eager_order(*x, True),
    ),
}
CONTENDERS = "fused", "eager"


def step_of(case, contender):
    generator = torch.Generator().manual_seed(0)
    if case[0] == "scores":
        inputs = [torch.randn(SCORES_ROWS, SCORES_ROWS, generator=generator).mul_(0.1)]
    else:
        inputs = [torch.rand(ORDER_ROWS, ORDER_DIM, generator=generator) for _ in range(2)]
    for x in inputs:
        x.requires_grad_()
    loss = CASES[case][CONTENDERS.index(contender)]

    def step():
        for x in inputs:
            x.grad = None
        loss(*inputs).backward()

    return step


def pytest_generate_tests(metafunc):
    metafunc.parametrize("case", CASES, ids=" ".join)
    metafunc.parametrize("contender", CONTENDERS)


def test_step(benchmark, case, contender):
    benchmark.extra_info.update(case=case, contender=contender)
    # The eager order similarity takes half a minute.
    rounds = 7 if contender == "fused" else 3 if case[0] == "scores" else 1
    benchmark.pedantic(step_of(case, contender), rounds=rounds, warmup_rounds=int(rounds > 1))


def peak_memory(case: tuple[str, str], contender: str) -> float:
    """Resident MiB that one step needs at its peak, gradients included."""
    step = step_of(case, contender)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def table(report: dict) -> str:
    medians = {(tuple(e["case"]), e["contender"]): e["median"] for e in report["entries"]}
    lines = [
        f"{report['cpu']}, {report['threads']} threads, torch {report['torch']}, float32; medians of"
        " forward + backward.",
        "",
        "| input | loss | fused | eager | fused / eager | extra memory, fused | eager |",
        "|---|---|---|---|---|---|---|",
    ]
    sizes = {
        "scores": f"scores {SCORES_ROWS}²",
        "order": f"order similarity, N = {ORDER_ROWS}, D = {ORDER_DIM}",
    }
    for case in CASES:
        fused, eager = (medians[case, contender] for contender in CONTENDERS)
        memory = [
            f"{report['memory'][' '.join(case)][contender]:.0f} MiB" for contender in CONTENDERS
        ]
        times = f"{fused * 1e3:.0f} ms | {eager * 1e3:.0f} ms"
        cells = [sizes[case[0]], case[1], times, f"{fused / eager:.3f}", *memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        kind, loss, contender = arguments.memory
        print(peak_memory((kind, loss), contender))
        return 0

    need("pytest", "pytest_benchmark")
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
        command += [f"--benchmark-json={output}", "--benchmark-columns=median,iqr,rounds"]
        if subprocess.run(command, env=environment).returncode:
            return 1
        measured = json.loads(output.read_text())["benchmarks"]
    memory = {" ".join(case): {} for case in CASES}
    for case in CASES:
        for contender in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.drop_in", "--memory", *case, contender]
            done = subprocess.run(command, env=environment, capture_output=True, check=True)
            memory[" ".join(case)][contender] = float(done.stdout)
    report = {
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "entries": [
            {**b["extra_info"], **{key: b["stats"][key] for key in ("median", "iqr", "rounds")}}
            for b in measured
        ],
        "memory": memory,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "drop_in.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "drop_in.md").write_text(table(report) + "\n")
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
