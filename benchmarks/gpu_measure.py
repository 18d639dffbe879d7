"""How benchmarks.gpu measures: CUDA events, inputs that do not stay in L2, medians with their spread."""

import ctypes
import itertools
import math
import os
import statistics
import subprocess
import sys
import time

import torch

from .gpu_contenders import Case, Contender, family_of

SECONDS = 0.4  # for one measurement
WARM_UP, LEAST, MOST = 3, 10, 1000
ROUND = 200  # calls without a synchronisation: three entries each of a queue that holds 1024
# 20 µs a call, in which Python puts the replay of a graph and two events into the queue.
QUEUEING_CYCLES = 40_000


class HostMeter:
    """Stands in for a GPU in a dry run."""

    device, cache_bytes = "cpu", 1

    def __init__(self):
        self.turns = itertools.count()

    def busy(self) -> None:
        pass

    def free_memory(self) -> None:
        pass

    def is_alive(self) -> bool:
        return True

    def times(self, call, count: int, queued: bool = False) -> list[float]:
        result = []
        for i in itertools.islice(self.turns, count):
            start = time.perf_counter()
            call(i)
            result.append(time.perf_counter() - start)
        return result

    def peak_bytes(self, call) -> int:
        call(0)
        return 0

    def launches(self, call) -> int:
        call(0)
        return 0

    def replayed(self, call, sets: int):
        return call


class GpuMeter:
    device = "cuda"

    def __init__(self):
        self.cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.turns = itertools.count()

    def busy(self) -> None:
        """Starts a second or more of work, so that the clocks are those under load."""
        x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        y = torch.empty_like(x)
        for _ in range(900):
            torch.mm(x, x, out=y)

    def free_memory(self) -> None:
        """Gives back what PyTorch keeps: the driver counts it as taken."""
        torch.cuda.empty_cache()

    def is_alive(self) -> bool:
        """False after an error that stays, such as an illegal address: every later call raises it."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def times(self, call, count: int, queued: bool = False) -> list[float]:
        """Seconds of each call by events on the stream, of inputs in turn.

        The GPU waits for Python where that is slower. If `queued`, all calls are in its queue before the
        first begins, so that the times are the GPU's alone.
        """
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for event in itertools.chain(*events):
            event.record()  # the first time creates it
        torch.cuda.synchronize()
        if queued:
            torch.cuda._sleep(count * QUEUEING_CYCLES)
        for i, (start, stop) in zip(itertools.islice(self.turns, count), events, strict=True):
            start.record()
            call(i)
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1000 for start, stop in events]

    def peak_bytes(self, call) -> int:
        """What a call needs on top of its input, gradients included."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, call) -> int | None:
        """Kernels, copies and fills that a call starts: the nodes of its CUDA graph. None without one.

        Not by a profiler, whose hooks can stay behind and slow down every later launch
        (https://github.com/pytorch/kineto/pull/1264).
        """
        graph, count = torch.cuda.CUDAGraph(keep_graph=True), ctypes.c_size_t()
        try:
            with torch.cuda.graph(graph):
                call(0)
            handle = ctypes.c_void_p(graph.raw_cuda_graph())
            get_nodes = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
            return None if get_nodes(handle, None, ctypes.byref(count)) else count.value
        except (RuntimeError, OSError):
            return None

    def replayed(self, call, sets: int):
        """`call` on each of the input sets as a CUDA graph of its own."""
        graphs, pool = [], torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(sets):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        for i in range(sets):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):  # they never run at the same time
                call(i)
            graph.replay()  # the first one copies the graph to the GPU
            graphs.append(graph)
        return lambda i: graphs[i % sets].replay()


def inputs(case: Case, meter) -> list[list[torch.Tensor]]:
    """Enough inputs, of normalised random embeddings, that none stays in the cache until its turn."""
    dtype = getattr(torch, case.dtype)
    is_scores = family_of(case) == "scores"
    shapes = [(case.size, case.size)] if is_scores else [(case.size, case.dim)] * 2
    set_bytes = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    sets = max(math.ceil(2 * meter.cache_bytes / set_bytes), 1)
    generator = torch.Generator(meter.device).manual_seed(0)
    result = []
    for _ in range(sets):
        tensors = []
        for shape in shapes:
            x = torch.randn(shape, device=meter.device, generator=generator)
            x = x.clamp(-1, 1) if is_scores else torch.nn.functional.normalize(x)
            tensors.append(x.to(dtype).requires_grad_())
        result.append(tensors)
    return result


def measure(case: Case, contender: Contender, meter) -> dict:
    """One row of the report; times in seconds, with the spread between the 10 % and 90 % quantiles."""
    if contender.always_fresh:
        torch.compiler.reset()
    sets = inputs(case, meter)

    def forward(i):
        with torch.no_grad():
            return contender.function(*sets[i % len(sets)])

    def step(i):
        pair = sets[i % len(sets)]
        for x in pair:
            x.grad = None
        contender.function(*pair).backward()

    row = {**case._asdict(), "contender": contender.name}
    for name, call in (("forward", forward), ("step", step)):
        if name == "step" and not contender.differentiable:
            continue
        for i in range(WARM_UP):
            call(i)
        for x in itertools.chain(*sets):
            x.grad = None  # which would count as taken before the call
        row[f"{name}_bytes"] = meter.peak_bytes(call)
        is_graph = contender.mode == "graph"
        timed = meter.replayed(call, len(sets)) if is_graph else call
        row[f"{name}_host"] = host_seconds(timed, meter)
        row |= summary(name, meter, timed, is_graph)
        row[f"{name}_launches"] = meter.launches(call)
    return row


def host_seconds(call, meter) -> float:
    """Time until a call returns, with the GPU idle before it: what Python and the dispatcher take."""
    result = []
    for i in range(LEAST):
        if meter.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call(i)
        result.append(time.perf_counter() - start)
    return statistics.median(result)


def summary(name: str, meter, call, queued: bool) -> dict:
    estimate = statistics.median(meter.times(call, WARM_UP, queued))
    count = min(max(int(SECONDS / max(estimate, 1e-7)), LEAST), MOST)
    times = []
    while len(times) < count:
        times += meter.times(call, min(count - len(times), ROUND), queued)
    times.sort()
    return {
        name: statistics.median(times),
        f"{name}_low": times[count // 10],
        f"{name}_high": times[count - 1 - count // 10],
        f"{name}_count": count,
    }


FIRST_CALLS = [
    (loss, size) for size in (128, 4096) for loss in ("hardest_negative_loss", "all_negatives_loss")
]
FIRST_CALL = """
import time, torch, fused_vse
x = torch.nn.functional.normalize(torch.randn({size}, 256, device="cuda")).bfloat16().requires_grad_()
torch.cuda.synchronize()
start = time.perf_counter()
fused_vse.{loss}(x, x.detach(), backend="triton").backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def first_call(loss: str, size: int, cache: str, timeout: float) -> float:
    """Seconds of the first step in a new process that keeps what Triton compiles in `cache`."""
    command = [sys.executable, "-c", FIRST_CALL.format(size=size, loss=loss)]
    run = subprocess.run(
        command,
        env=os.environ | {"TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout,
    )
    return float(run.stdout)
