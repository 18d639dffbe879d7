"""Benchmark of the losses over the batch of all ranks.

    python -m benchmarks.ranks                       # writes results/ranks.{json,md}
    python -m benchmarks.ranks --rows 512 --dims 64 --folder /tmp

Without GPUs the ranks talk over gloo and have one thread each, and a time is processor time: with fewer
processors than ranks it alone says what a schedule costs. With as many GPUs as ranks they talk over NCCL,
and a time is that of the slowest rank. Every entry is the median of some forward + backward steps in
float32; the ratio is that over one process with the whole batch: of processor time summed over the ranks,
or of the time times W.

    group         `group=` of the loss
    gather_rows   both sides gathered, own pairs as anchors, the same fused loss
    eager         both sides gathered, own rows and own columns as logits in plain PyTorch (open_clip's
                  local_loss with gather_with_grad)
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import distributed
from torch.nn.functional import cross_entropy

from benchmarks.cpu import RESULTS, cpu_name
from fused_vse import all_negatives_loss, hardest_negative_loss
from fused_vse.distributed import gather_rows

LOSSES = {"all_negatives": all_negatives_loss, "hardest": hardest_negative_loss}
MARGIN, TEMPERATURE = 0.2, 0.1


def eager(name, images, captions):
    own = images.shape[0]
    all_images, all_captions = gather_rows(images), gather_rows(captions)  # the own ones first
    loss, labels = 0.0, torch.arange(own, device=images.device)
    for scores in (images @ all_captions.T, captions @ all_images.T):
        if name == "all_negatives":
            loss = loss + cross_entropy(scores / TEMPERATURE, labels)
        else:
            positive = scores.diagonal()
            hardest = scores.scatter(1, labels[:, None], -torch.inf).amax(1)
            loss = loss + ((MARGIN + hardest - positive).relu() / TEMPERATURE).mean()
    return loss


def gathered(name, images, captions):
    own = images.shape[0]
    return LOSSES[name](gather_rows(images), gather_rows(captions), num_pairs=own)


def shared(name, images, captions):
    return LOSSES[name](images, captions, group=distributed.group.WORLD)


CONTENDERS = {"group": shared, "gather_rows": gathered, "eager": eager}


def measure(rank: int, size: int, port: int, rows: int, dim: int, steps: int, results) -> None:
    """One rank: for each loss and contender, its seconds in each step and its value."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() >= size
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    distributed.init_process_group(backend, rank=rank, world_size=size)
    generator = torch.Generator().manual_seed(0)
    own = slice(rank * rows // size, (rank + 1) * rows // size)
    pair = [torch.randn(rows, dim, generator=generator)[own].to(device) for _ in range(2)]
    pair = [torch.nn.functional.normalize(x).requires_grad_() for x in pair]
    clock = time.perf_counter if gpus else time.process_time

    def step(contender: str, name: str) -> tuple[float, float]:
        for x in pair:
            x.grad = None
        if gpus:
            torch.cuda.synchronize()
        distributed.barrier()
        start = clock()
        loss = CONTENDERS[contender](name, *pair)
        loss.backward()
        if gpus:
            torch.cuda.synchronize()
        return clock() - start, loss.item()

    found = {}
    for case in itertools.product(LOSSES, CONTENDERS):
        _, *seconds = (step(case[1], case[0])[0] for _ in range(steps + 1))  # one to warm up
        found[case] = seconds, step(case[1], case[0])[1]
    results.put(found)
    distributed.destroy_process_group()


def of_ranks(size: int, rows: int, dim: int, steps: int) -> list[dict]:
    """An entry for each loss and contender: seconds are processor time of all ranks, or W times the slowest
    one's; the loss is the mean of the ranks' values."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = size, port, rows, dim, steps, results
    ranks = [context.Process(target=measure, args=(r, *arguments)) for r in range(size)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=1800) for _ in ranks]
    for process in ranks:
        process.join()
    gpus, entries = torch.cuda.device_count() >= size, []
    for case in found[0]:
        by_step = zip(*(of_rank[case][0] for of_rank in found), strict=True)
        totals = [size * max(x) if gpus else sum(x) for x in by_step]
        loss = statistics.fmean(of_rank[case][1] for of_rank in found)
        entry = {"case": (*case, rows, dim, size), "seconds": statistics.median(totals)}
        entries.append(entry | {"loss": loss})
    return entries


def table(report: dict) -> str:
    lines = [
        f"{report['machine']}, torch {report['torch']}, float32; {report['time']}; medians of forward +"
        " backward.",
        "",
        "| loss | N | D | W | " + " | ".join(CONTENDERS) + " | over one process: "
        + " | ".join(CONTENDERS) + " |",
        "|---" * (4 + 2 * len(CONTENDERS)) + "|",
    ]  # fmt: skip
    found = {tuple(e["case"]): e["seconds"] for e in report["entries"]}
    for name, rows, dim, size in dict.fromkeys((n, r, d, w) for n, _, r, d, w in found):
        seconds = [found[name, contender, rows, dim, size] for contender in CONTENDERS]
        alone = found[name, "gather_rows", rows, dim, 1]  # where nothing is gathered
        cells = [name.replace("_", " "), str(rows), str(dim), str(size)]
        cells += [f"{s * 1e3:.0f} ms" for s in seconds] + [f"{s / alone:.2f}" for s in seconds]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 8192], help="global N")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 1024], help="D")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="W, 1 among them")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the results go")
    given = parser.parse_args()
    if 1 not in given.ranks or any(rows % size for rows in given.rows for size in given.ranks):
        parser.error("--ranks needs 1, and each of --rows must be a multiple of each of --ranks")
    gpus = torch.cuda.device_count() >= max(given.ranks)
    entries = []
    for rows, dim, size in itertools.product(given.rows, given.dims, given.ranks):
        print(f"N = {rows}, D = {dim}, W = {size}", file=sys.stderr)
        entries += of_ranks(size, rows, dim, given.steps)
    report = {
        "machine": torch.cuda.get_device_name() if gpus else cpu_name(),
        "time": "W x time of the slowest rank" if gpus else "processor time of all ranks",
        "torch": torch.__version__,
        "entries": entries,
    }
    given.folder.mkdir(exist_ok=True)
    (given.folder / "ranks.json").write_text(json.dumps(report, indent=1) + "\n")
    (given.folder / "ranks.md").write_text(table(report) + "\n")
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
