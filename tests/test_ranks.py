"""Losses over the batch of all ranks, `group=`, in processes of their own that talk over gloo."""

import socket

import pytest
import ranks_cases
import torch

import fused_vse

spawn = torch.multiprocessing.get_context("spawn")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def on_ranks(size: int, job, *arguments, timeout: float = 300) -> list:
    """What job(rank, size, *arguments) returned on every rank; fails with a rank's traceback."""
    with spawn.Manager() as manager:
        results = manager.dict()
        port = free_port()
        processes = [
            spawn.Process(target=ranks_cases.run, args=(r, size, port, job, arguments, results))
            for r in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
        results = dict(results)
    assert sorted(results) == list(range(size)), "a rank hung or died"
    for status, result in results.values():
        assert status == "ok", result
    return [results[rank][1] for rank in range(size)]


def backends():
    for name in ("reference", "cpu"):
        status = fused_vse.backends()[name]
        skip = () if status == "available" else (pytest.mark.skip(reason=status),)
        yield pytest.param(name, marks=skip)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_process(size, backend):
    """Every loss, even, uneven and queued batches, ids, ties across ranks, all reductions, order similarity;
    in float64 to 1e-12."""
    counts = on_ranks(size, ranks_cases.every_case, backend)
    assert counts == [75 if size == 1 else 100] * size
