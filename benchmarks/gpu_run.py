"""The run of benchmarks.gpu: one contender after the other, with a note of what goes wrong, and the report
kept up to date, so that whatever ends the run leaves what was measured."""

import contextlib
import gc
import os
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable

import torch

from . import gpu_contenders as contenders
from . import gpu_measure as measure
from . import gpu_report as report

# A contender takes seconds, a minute if it has much to compile; a kernel that hangs never ends.
HANG_SECONDS = 180
RUNNING, FINISHED = "still running", "finished"


class Run:
    """`result` is what the report shows, `about` the part known before; `save` writes it."""

    def __init__(self, meter, about: dict, deadline: float, save: Callable[[dict], None]):
        self.meter, self.deadline, self._save = meter, deadline, save
        self.start = time.monotonic()
        self.result = {
            **about,
            "state": RUNNING,
            "clocks_after": None,
            "seconds": 0.0,
            "first_call_seconds": {},
            "rows": [],
            "skipped": [],
            "failed": [],
        }

    def save(self) -> None:
        self.result["seconds"] = time.monotonic() - self.start
        self._save(self.result)

    def measure(self, cases: list[contenders.Case], deadline: float) -> None:
        for case in cases:
            for contender in contenders.contenders_of(case):
                if self.result["state"].startswith("stopped"):
                    return
                self._contend(case, contender, deadline)
            self.save()

    def _contend(
        self, case: contenders.Case, contender: contenders.Contender, deadline: float
    ) -> None:
        name = report.name_of({**case._asdict(), "contender": contender.name})
        try:
            self.meter.free_memory()
            reason = why_not(case, contender, deadline)
            if reason:
                self._note("skipped", name, reason)
                return
            with self._watched(name):
                self.result["rows"].append(measure.measure(case, contender, self.meter))
            print(report.line(self.result["rows"][-1]), flush=True)
            return
        except Exception as error:  # noqa: BLE001 - whatever a compiler, a kernel or the driver raises
            out_of_memory = is_out_of_memory(error)
            reason = "out of memory" if out_of_memory else first_line(error)
            if not out_of_memory:
                traceback.print_exc()
        gc.collect()  # the frames that the error held, and their tensors
        self._note("skipped" if out_of_memory else "failed", name, reason)
        if not self.meter.is_alive():
            self.result["state"] = f"stopped: the GPU takes no more work after {name}"

    def _note(self, kind: str, name: str, reason: str) -> None:
        self.result[kind].append({"what": name, "reason": reason})
        print(f"{name}: {kind}: {reason}", flush=True)

    @contextlib.contextmanager
    def _watched(self, name: str):
        """Ends the process, with its report, where Python waits for a kernel and sees no signal."""

        def give_up():
            self._note("failed", name, f"no end after {HANG_SECONDS} s")
            self.result["state"] = f"stopped: {name} hangs"
            self.save()
            os._exit(1)

        timer = threading.Timer(HANG_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def first_calls(self) -> None:
        """Of a new process, with nothing compiled before and with all of it."""
        for loss, size in measure.FIRST_CALLS:
            with tempfile.TemporaryDirectory() as cache:
                for state in ("compiling", "from the disk cache"):
                    self._first_call(
                        f"first step of {loss}, N = {size}, {state}", loss, size, cache
                    )
        self.save()

    def _first_call(self, name: str, loss: str, size: int, cache: str) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            self._note("skipped", name, "out of time")
            return
        try:
            seconds = measure.first_call(loss, size, cache, left)
            self.result["first_call_seconds"][name] = seconds
        except subprocess.TimeoutExpired:
            self._note("skipped", name, "out of time")
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines() or [str(error)]
            self._note("failed", name, lines[-1])


def first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_out_of_memory(error: BaseException | None) -> bool:
    """Also where a compiler or the end of a graph's capture has made another error of it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def why_not(case, contender, deadline: float) -> str | None:
    if time.monotonic() > deadline:
        return "out of time"
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        needed = (contender.entry_bytes + contenders.input_bytes(case)) * case.size**2
        if needed > 0.9 * free:
            return f"needs {needed / 2**30:.0f} GiB of {free / 2**30:.0f}"
    return None
