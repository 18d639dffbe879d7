"""Which loss to take: the trainer's losses with their settings, over several seeds.

    python -m benchmarks.study                         # digits: every loss, then the collapse
    python -m benchmarks.study --data DIR --name flickr8k --seeds 5
    python -m benchmarks.study --part collapse --seeds 20

Runs train_reference.py once for each configuration and seed, one process a core with one thread each, and
writes results/study_<name>.{json,md,png}. A run that is in the JSON is not repeated: the study goes on where
it was stopped. Hyperparameters are chosen by the dev set; the tables show the test set.
"""

import argparse
import concurrent.futures
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cpu import RESULTS, cpu_name

ROOT = Path(__file__).resolve().parents[1]
# Name in the table: flags of train_reference.py.
LOSSES = {
    "all negatives": "--loss all_negatives",
    "all negatives, hardness 9 at τ 0.1": "--loss all_negatives --hardness 9 --temperature 0.1",
    "sigmoid": "--loss sigmoid",
    "sum of hinges": "--loss hinge",
    "hardest after 3 epochs of all negatives": "--loss hardest_negative --warmup-epochs 3",
    "hardest, smooth, after the same": "--loss hardest_negative --smooth --warmup-epochs 3",
    "hardest, select 0.05": "--loss hardest_negative --select 0.05",
    "hardest from scratch": "--loss hardest_negative --warmup-epochs 0",
}
_FROM_SCRATCH = "--loss hardest_negative --warmup-epochs 0 --epochs 2 --batch-size"
COLLAPSE = {
    f"{what}, batch {batch}": f"{_FROM_SCRATCH} {batch} {flags}"
    for batch in (32, 128, 512)
    for what, flags in (("hardest", ""), ("hardest, select 0.05", "--select 0.05"))
}
PARTS = {"losses": LOSSES, "collapse": COLLAPSE}


def run(flags: str, seed: int, data: str | None) -> dict:
    """The last line of a run's metrics, and what the epochs say of the plateau."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "train_reference.py", *flags.split(), "--seed", str(seed)]
        command += ["--threads", "1", "--output", str(output)] + (["--data", data] if data else [])
        start = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-500:]}")
        lines = [json.loads(x) for x in (output / "metrics.jsonl").read_text().splitlines()]
    *epochs, last = lines
    return {
        "test": last["test"],
        "dev_rsum": max(line["dev"]["rsum"] for line in epochs),
        "epochs_on_plateau": sum(bool(line["on_plateau"]) for line in epochs),
        "ends_on_plateau": bool(epochs[-1]["on_plateau"]),
        "seconds": time.monotonic() - start,
    }


def results(jobs: list, options: argparse.Namespace) -> Iterator[tuple[str, int, dict]]:
    """As they come. After an error no further run begins."""
    pool = concurrent.futures.ThreadPoolExecutor(options.processes)
    try:
        running = {
            pool.submit(run, flags, seed, options.data): (name, seed) for name, seed, flags in jobs
        }
        for future in concurrent.futures.as_completed(running):
            yield *running[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def summary(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(report: dict) -> str:
    lines = []
    for part, configurations in PARTS.items():
        done = {name: list(report["runs"].get(name, {}).values()) for name in configurations}
        if not any(done.values()):
            continue
        lines += [
            f"\n{part}, test set, mean ± standard deviation over the seeds:\n",
            "| | seeds | image to text R@1 | R@5 | R@10 | text to image R@1 | R@5 | R@10 | rsum"
            " | on the plateau at the end | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, runs in done.items():
            if not runs:
                continue
            recalls = [
                summary([r["test"][direction][f"R@{k}"] for r in runs])
                for direction in ("image_to_text", "text_to_image")
                for k in (1, 5, 10)
            ]
            stuck = sum(r["ends_on_plateau"] for r in runs)
            seconds = statistics.median(r["seconds"] for r in runs)
            rsum = summary([r["test"]["rsum"] for r in runs])
            cells = [name, len(runs), *recalls, rsum, f"{stuck} of {len(runs)}", f"{seconds:.0f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines).strip() + f"\n\n{report['machine']}, torch {report['torch']}.\n"


def plot(report: dict, path: Path) -> None:
    """rsum of every run, a row for each configuration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [name for part in PARTS.values() for name in part if report["runs"].get(name)]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1), layout="constrained")
    for y, name in enumerate(reversed(rows)):
        values = [run["test"]["rsum"] for run in report["runs"][name].values()]
        axes.plot(values, [y] * len(values), "o", alpha=0.5)
        axes.plot(statistics.mean(values), y, "|", color="black", markersize=14)
    axes.set(xlabel="rsum on the test set, a dot for each seed", yticks=range(len(rows)))
    axes.set_yticklabels(reversed(rows))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="features in vsepp's layout (default: scenes of digits)")
    parser.add_argument("--name", default="digits", help="of the results' files")
    parser.add_argument("--part", choices=PARTS, help="default: all of them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()

    import torch

    path = options.folder / f"study_{options.name}.json"
    report = json.loads(path.read_text()) if path.exists() else {"runs": {}}
    report |= {"machine": cpu_name(), "torch": torch.__version__}
    jobs = [
        (name, seed, flags)
        for seed in range(options.seeds)
        for part in ([options.part] if options.part else PARTS)
        for name, flags in PARTS[part].items()
        if str(seed) not in report["runs"].get(name, {})
    ]
    print(f"{len(jobs)} runs to go, {options.processes} at a time", flush=True)
    for number, (name, seed, result) in enumerate(results(jobs, options), 1):
        report["runs"].setdefault(name, {})[str(seed)] = result
        path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        path.with_suffix(".md").write_text(table(report))
        rsum = result["test"]["rsum"]
        print(f"{number}/{len(jobs)} {name}, seed {seed}: rsum {rsum:.1f}", flush=True)
    if report["runs"]:
        plot(report, path.with_suffix(".png"))
        print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
