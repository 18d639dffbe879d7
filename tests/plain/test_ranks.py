"""Losses over the batch of all ranks, `group=`, in processes of their own that talk over gloo."""

import re

import pytest
import ranks_cases
from rank_processes import context, free_port

import fused_vse


def on_ranks(size: int, job, *arguments, timeout: float = 300, lost: tuple[int, ...] = ()) -> list:
    """What job(rank, size, *arguments) returned on every rank, or on those not `lost`; fails with a
    rank's traceback."""
    with context.Manager() as manager:
        results = manager.dict()
        port = free_port()
        processes = [
            context.Process(target=ranks_cases.run, args=(r, size, port, job, arguments, results))
            for r in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
        results = dict(results)
    assert sorted({*results, *lost}) == list(range(size)), "a rank hung or died"
    for status, result in results.values():
        assert status == "ok", result
    return [results[rank][1] for rank in sorted(results)]


def backends():
    for name in ("reference", "cpu"):
        status = fused_vse.backends()[name]
        skip = () if status == "available" else (pytest.mark.skip(reason=status),)
        yield pytest.param(name, marks=skip)


@pytest.mark.parametrize("backend", list(backends()))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_process(size, backend):
    """Every loss, even, uneven and queued batches, ids, ties across ranks, all reductions, order similarity;
    in float64 to 1e-12."""
    counts = on_ranks(size, ranks_cases.every_case, backend)
    assert counts == [123 if size == 1 else 164] * size


@pytest.mark.parametrize("mistake", ranks_cases.MISTAKES)
def test_disagreements_are_the_same_error_on_all_ranks(mistake):
    errors = on_ranks(2, ranks_cases.disagreement, mistake)
    if mistake == "one rank's own mistake":
        assert errors[1].startswith("TypeError: margin must be a float")
        assert (
            errors[0]
            == "RuntimeError: rank 1 of the group refused its arguments; its own error says why"
        )
        return
    assert errors[0] == errors[1]
    expected = {
        "margin": "ValueError: margin must be the same on all ranks of the group, got 0.1, 1.1",
        "D": "ValueError: D must be the same on all ranks of the group, got 5, 6",
        "dtype": "ValueError: the dtype must be the same .*, got torch.float32, torch.float64",
        "ids": "whether there are ids must be the same .*, got False, True",
        "frozen": "whether captions require grad must be the same .*, got True, False",
        "reduction": "reduction must be the same .*, got mean, sum",
        "temperature": "inverse_temperature must be the same .*, got 10.0, 0.909",
        "no pair anywhere": "num_pairs is 0 on all ranks",
    }
    assert re.search(expected[mistake], errors[0]), errors[0]


def test_gather_rows_says_what_differs():
    first, second = on_ranks(2, ranks_cases.gather_mistakes)
    assert first == second and len(first) == 3
    assert all("rows must have the same shape and dtype on all ranks" in x for x in first)
    assert r"[4, 3], a float32 tensor of shape [5, 3]" in first[0]


@pytest.mark.parametrize("size", [2, 3])
def test_gather_rows_of_any_dtype_and_its_second_derivative(size):
    on_ranks(size, ranks_cases.gather_anything)


def test_non_finite_rows_of_one_rank_show_on_all():
    assert all(on_ranks(2, ranks_cases.poison))


def test_the_same_bits_however_ranks_are_delayed_and_hardest_losses_for_any_number_of_them():
    runs = {size: on_ranks(size, ranks_cases.bits, False) for size in (1, 2, 4)}
    assert on_ranks(4, ranks_cases.bits, True) == runs[4]
    for size, ranks in runs.items():
        assert len({str([[name, value] for name, value, _ in rank]) for rank in ranks}) == 1
        for (name, value, _), (_, alone, _) in zip(ranks[0], runs[1][0], strict=True):
            if name in ("hardest", "smooth", "hinge_max"):
                assert value == alone, (name, size)


def test_data_parallel_training_is_that_of_one_process():
    on_ranks(3, ranks_cases.data_parallel)


def test_groups_that_are_a_part_of_all_ranks():
    on_ranks(4, ranks_cases.groups_of_two)


def test_gradients_in_sixteen_bits_are_rounded_once():
    on_ranks(2, ranks_cases.sixteen_bits)
