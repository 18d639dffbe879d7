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

A contender that raises an error is listed as failed and the others go on, unless the GPU is lost; the exit
code is then 1. The report is written after every size: an interrupt leaves what was measured until then.

compute-sanitizer takes longer than all of that: `python -m pytest tests/gpu/test_cuda_sanitizer.py`.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import gpu_contenders as contenders
from . import gpu_measure as measure
from . import gpu_report as report
from . import need
from .gpu_run import FINISHED, RUNNING, Run, first_line

RESULTS = Path(__file__).parent / "results"
# For the first steps of eight new processes; no more than a quarter of the time that the tests leave.
FIRST_CALLS_SECONDS = 75
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
    if not options.dry_run and not options.skip_tests:
        need("pytest")
        if not tests_pass(options.minutes):
            print("the GPU tests failed: no measurement")
            return 1

    deadline = start + 60 * options.minutes
    cases = contenders.TINY_CASES if options.dry_run else contenders.CASES
    meter = measure.HostMeter() if options.dry_run else measure.GpuMeter()

    def save(result: dict) -> None:
        if not options.skip_tests:
            report.write(result, options.output)

    meter.busy()
    about = {"clocks_before": report.clocks()}
    about |= {"dry_run": options.dry_run, "machine": report.machine()}
    run = Run(meter, about, deadline, save)
    try:
        left = deadline - time.monotonic()
        run.measure(
            cases, deadline - (0 if options.dry_run else min(FIRST_CALLS_SECONDS, left / 4))
        )
        if not options.dry_run:
            run.first_calls()
        if run.result["state"] == RUNNING:
            meter.busy()
            run.result["clocks_after"] = report.clocks()
            run.result["state"] = FINISHED
    except KeyboardInterrupt:
        run.result["state"] = "interrupted"
        return 130
    except Exception as error:
        run.result["state"] = f"stopped: {first_line(error)}"
        raise
    finally:
        run.save()
        if options.skip_tests:
            print(report.markdown(run.result))
    return 0 if run.result["state"] == FINISHED and not run.result["failed"] else 1


def tests_pass(minutes: float) -> bool:
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-rs", "-m", "gpu", *map(str, TESTS)]
    with tempfile.TemporaryFile("w+") as output:
        try:
            code = subprocess.run(
                command, env=environment, stdout=output, stderr=output, timeout=60 * minutes
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        output.seek(0)
        text = output.read()
    print(text[-3000:])
    # All skipped is no pass.
    return code == 0 and " passed" in text


if __name__ == "__main__":
    # As Ctrl-C does, so that the report is written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
