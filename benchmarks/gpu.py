"""GPU benchmark: one command for a machine with a GPU, done in 8 minutes.

    python -m benchmarks.gpu                   # writes benchmarks/results/gpu.{json,md}
    python -m benchmarks.gpu --minutes 20      # ... with more time for the sizes that come last
    python -m benchmarks.gpu --dry-run --output DIR   # the same steps on tiny sizes without a GPU

First the GPU tests; if any fails, nothing is measured and the exit code is 1. Then every loss forward,
forward + backward and its peak memory, against eager PyTorch, torch.compile, cuBLAS's bare GEMM and the
GEMM plus one pass over the stored scores; "fused" is Triton, and "fused (cuda)" the cuda backend where it
takes the size and is there. The order similarity and the losses on given scores are measured against
eager PyTorch and torch.compile. Times are medians over inputs that rotate through more memory
than the L2 cache holds. The most telling sizes come first; what no longer fits into the time or the
memory is listed as skipped.

compute-sanitizer takes longer than all of that: `python -m pytest tests/test_cuda_sanitizer.py`.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import gpu_contenders as contenders
from . import gpu_measure as measure
from . import gpu_report as report

RESULTS = Path(__file__).parent / "results"
TESTS = sorted((Path(__file__).parent.parent / "tests").glob("test_gpu*.py"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="stop measuring after this time")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory for the report")
    parser.add_argument("--skip-tests", action="store_true", help="print, but write no report")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes, no GPU, no numbers of use"
    )
    options = parser.parse_args(arguments)
    start = time.monotonic()
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA GPU is visible; run this on a machine that has one, or with --dry-run")
        return 2
    if not options.dry_run and not options.skip_tests and not tests_pass():
        print("the GPU tests failed: no measurement")
        return 1

    deadline = start + 60 * options.minutes
    meter = measure.HostMeter() if options.dry_run else measure.GpuMeter()
    cases = contenders.TINY_CASES if options.dry_run else contenders.CASES
    before = report.machine()
    rows, skipped = [], []
    for case in cases:
        for contender in contenders.contenders_of(case):
            reason = why_not(case, contender, deadline)
            if reason is None:
                try:
                    rows.append(measure.measure(case, contender, meter))
                    print(report.line(rows[-1]), flush=True)
                    continue
                except torch.OutOfMemoryError:
                    reason = "out of memory"
                    torch.cuda.empty_cache()
            skipped.append({**case._asdict(), "contender": contender.name, "reason": reason})
    first_calls = {} if options.dry_run else measure.first_calls()
    result = {
        "dry_run": options.dry_run,
        "machine": before,
        "clocks_after": report.clocks(),
        "seconds": time.monotonic() - start,
        "first_call_seconds": first_calls,
        "rows": rows,
        "skipped": skipped,
    }
    if options.skip_tests:
        print(report.markdown(result))
    else:
        report.write(result, options.output)
    return 0


def tests_pass() -> bool:
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-m", "gpu", *map(str, TESTS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout[-3000:])
    # All skipped is no pass.
    return run.returncode == 0 and " passed" in run.stdout


def why_not(case, contender, deadline: float) -> str | None:
    if time.monotonic() > deadline:
        return "out of time"
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        needed = (contender.entry_bytes + contenders.input_bytes(case)) * case.size**2
        if needed > 0.9 * free:
            return f"needs {needed / 2**30:.0f} GiB of {free / 2**30:.0f}"
    return None


if __name__ == "__main__":
    sys.exit(main())
