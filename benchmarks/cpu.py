"""CPU benchmark: the fused losses against the formulas in eager PyTorch and against the bare GEMM.

    python -m benchmarks.cpu            # about four minutes; writes benchmarks/results/cpu.{json,md}
    python -m benchmarks.cpu --readme   # ... and puts the table into README.md

Every entry is one forward + backward step on L2-normalised random embeddings, D = 1024, measured by
pytest-benchmark; ratios are of medians within the run, the contenders of a case one after another. The
bare GEMM is I @ T.T in row blocks into a reused buffer: what a step cannot do without.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import fused_vse
from fused_vse import all_negatives_loss, hardest_negative_loss
from fused_vse.arguments import check_batch

from . import need

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
MARKERS = "<!-- benchmark:cpu -->", "<!-- /benchmark:cpu -->"
DIM = 1024
THREADS = 2
MEMORY_ROWS, MEMORY_DIM = 65536, 128

IN_FLOAT32 = "hardest, without the bfloat16 search"
CROSS_ENTROPY = "all_negatives, eager as two cross_entropy"
# loss, N, dtype, GEMMs in the floor: without scores that are kept, S is multiplied twice
CASES = [
    ("hardest", 128, "float32", 1),
    ("all_negatives", 128, "float32", 3),
    ("hardest", 1024, "float32", 1),
    ("all_negatives", 1024, "float32", 3),
    ("hardest", 8192, "float32", 1),
    (IN_FLOAT32, 8192, "float32", 1),
    ("all_negatives", 8192, "float32", 4),
    (CROSS_ENTROPY, 8192, "float32", 4),
    ("hardest", 8192, "bfloat16", 1),
]


def eager_hardest(images, captions):
    scores = images @ captions.T
    eye = torch.eye(len(scores), dtype=torch.bool)
    positive = scores.diagonal()
    negative = scores.masked_fill(eye, -torch.inf)
    image_loss = (0.2 + negative.max(1)[0] - positive).relu()
    caption_loss = (0.2 + negative.max(0)[0] - positive).relu()
    return (image_loss + caption_loss).mean() / 0.1


def eager_all_negatives(images, captions):
    scores = images @ captions.T
    eye = torch.eye(len(scores), dtype=torch.bool)
    positive = scores.diagonal() / 0.1
    negative = (scores / 0.1).masked_fill(eye, -torch.inf)
    softplus = torch.nn.functional.softplus
    image_loss = softplus(negative.logsumexp(1) - positive)
    caption_loss = softplus(negative.logsumexp(0) - positive)
    return (image_loss + caption_loss).mean()


def eager_cross_entropy(images, captions):
    """The same loss as CLIP writes it; it knows no ids, extra negatives or margin."""
    logits, labels = images @ captions.T / 0.1, torch.arange(len(images))
    cross_entropy = torch.nn.functional.cross_entropy
    return cross_entropy(logits, labels) + cross_entropy(logits.T, labels)


EAGER = {
    "hardest": eager_hardest,
    "all_negatives": eager_all_negatives,
    CROSS_ENTROPY: eager_cross_entropy,
}
FUSED = {
    "hardest": hardest_negative_loss,
    "all_negatives": all_negatives_loss,
    CROSS_ENTROPY: all_negatives_loss,
}


def embeddings(rows: int, dtype: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(rows, DIM, generator=generator) for _ in range(2))
    return [torch.nn.functional.normalize(x).to(getattr(torch, dtype)) for x in pair]


def gemm_step(rows: int, dtype: str):
    images, captions = embeddings(rows, dtype)
    block = min(rows, 1024)
    buffer = torch.empty(block, rows, dtype=images.dtype)

    def step():
        for begin in range(0, rows, block):
            torch.mm(images[begin : begin + block], captions.T, out=buffer)

    return step


def loss_step(loss, rows: int, dtype: str):
    pair = [x.requires_grad_() for x in embeddings(rows, dtype)]

    def step():
        for x in pair:
            x.grad = None
        loss(*pair).backward()

    return step


def float32_step(rows: int, dtype: str):
    """The fused hardest-negative step as a CPU without fast bfloat16 takes it, loss formula aside."""
    images, captions = embeddings(rows, dtype)
    ops = torch.ops.fused_vse_cpu
    batch = check_batch(images, captions, None, None, None, None, "dot", False)
    d_positive, d_score = torch.full((rows,), -20.0 / rows), torch.full((2 * rows,), 10.0 / rows)

    def step():
        ops.positive_scores(*batch)
        found = ops.float32_hardest_negatives(*batch, None)
        ops.hardest_negatives_backward(*batch, *found, d_positive, d_score, True, True, False)

    return step


def contenders():
    for case in CASES:
        loss = case[0]
        yield case, "gemm"
        yield case, "fused"
        if loss in EAGER:
            yield case, "eager"


def pytest_generate_tests(metafunc):
    metafunc.parametrize(("case", "contender"), list(contenders()), ids=str)


def test_step(benchmark, case, contender):
    loss, rows, dtype = case[:3]
    if contender == "gemm":
        step = gemm_step(rows, dtype)
    elif loss == IN_FLOAT32:
        step = float32_step(rows, dtype)
    else:
        step = loss_step((FUSED if contender == "fused" else EAGER)[loss], rows, dtype)
    benchmark.extra_info.update(case=case, contender=contender)
    rounds = {128: 2000, 1024: 30, 8192: 3 if contender == "eager" else 7}[rows]
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=2 if rows < 8192 else 1)


def peak_memory(name: str) -> float:
    """Extra resident MiB of one step at N = 65536, D = 128, gradients included."""
    pair = [torch.randn(MEMORY_ROWS, MEMORY_DIM).requires_grad_() for _ in range(2)]
    FUSED[name](*(x[:64] for x in pair), normalize=True).backward()
    for x in pair:
        x.grad = None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = [torch.nn.functional.normalize(x.detach()).requires_grad_() for x in pair]
    kept = sum(x.numel() * x.element_size() for x in rows) / 2**20
    FUSED[name](*rows).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - kept


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def table(report: dict) -> str:
    medians = {(tuple(e["case"]), e["contender"]): e["median"] for e in report["entries"]}
    lines = [
        f"{report['cpu']}, {report['threads']} threads, torch {report['torch']}, D = {DIM}; medians of"
        " forward + backward in one run.",
        "",
        "| loss | N | dtype | fused | eager | bare GEMM | fused / eager | fused / GEMMs of the floor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        loss, rows, dtype, gemms = case
        fused, gemm = medians[case, "fused"], medians[case, "gemm"]
        eager = medians.get((case, "eager"))
        cells = [
            loss.replace("_", " "),
            str(rows),
            dtype,
            f"{fused * 1e3:.2f} ms",
            "" if eager is None else f"{eager * 1e3:.2f} ms",
            f"{gemm * 1e3:.2f} ms",
            "" if eager is None else f"{fused / eager:.2f}",
            f"{fused / gemm / gemms:.2f} × {gemms}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Extra memory of one step at N = {MEMORY_ROWS}, D = {MEMORY_DIM} (S: 16 GiB):"]
    lines += [f"{name.replace('_', ' ')} {mib:.0f} MiB," for name, mib in report["memory"].items()]
    return "\n".join(lines).rstrip(",") + "."


def write_into_readme(text: str) -> None:
    before, _, rest = README.read_text().partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    README.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--memory", choices=FUSED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.memory:
        print(peak_memory(arguments.memory))
        return 0
    need("pytest", "pytest_benchmark")
    if fused_vse.backends()["cpu"] != "available":
        print(f"the cpu backend is not available: {fused_vse.backends()['cpu']}", file=sys.stderr)
        return 1

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "benchmark.json"
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
        command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
        command += [f"--benchmark-json={output}", "--benchmark-columns=median,iqr,rounds"]
        if subprocess.run(command, env=environment).returncode:
            return 1
        measured = json.loads(output.read_text())["benchmarks"]
    entries = [
        {**b["extra_info"], **{key: b["stats"][key] for key in ("median", "iqr", "min", "rounds")}}
        for b in measured
    ]
    memory = {}
    for name in ("hardest", "all_negatives"):
        command = [sys.executable, "-m", "benchmarks.cpu", "--memory", name]
        memory[name] = float(subprocess.run(command, capture_output=True, check=True).stdout)
    report = {
        "cpu": cpu_name(),
        "threads": THREADS,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fused_vse": fused_vse.__version__,
        "entries": entries,
        "memory": memory,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    text = table(report)
    (RESULTS / "cpu.md").write_text(text + "\n")
    print(text)
    if arguments.readme:
        write_into_readme(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
