"""The Hopper kernel's synchronisation as a model with every interleaving at random: the mbarriers, the copy
engine and wgmma of two blocks of a cluster, each agent a generator that yields where it may be interrupted.

It follows csrc/cuda/hopper_kernel.cuh line by line; `break_rule` leaves one rule out, to see that the
model would notice.
"""

import random
from collections.abc import Callable, Iterator

WARPS = 4


class Barrier:
    """An mbarrier: a phase ends when the arrivals and the announced bytes are all there."""

    def __init__(self, arrivals: int):
        self.arrivals, self.pending, self.bytes, self.phase = arrivals, arrivals, 0, 0

    def arrive(self, count: int = 0):
        self.pending -= 1
        assert self.pending >= 0, "more arrivals than the barrier counts"
        self.add_bytes(count)

    def add_bytes(self, count: int):
        self.bytes += count
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.arrivals

    def is_over(self, parity: int) -> bool:
        return self.phase != parity


class Block:
    def __init__(self, stages: int):
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(2 * WARPS) for _ in range(stages)]
        # What each part of a stage holds, as (tile, step); and who is reading it.
        self.data = [{"images": None, 0: None, 1: None} for _ in range(stages)]
        self.readers = [0] * stages
        self.turn = [0, 0]  # arrivals at the turn barriers, 2 consumers each
        self.consumed: list[tuple[int, int]] = []
        self.multiplying: set[int] = set()


class Cluster:
    def __init__(self, tiles: int, steps: int, stages: int, break_rule: str = ""):
        self.tiles, self.steps, self.stages, self.rule = tiles, steps, stages, break_rule
        self.blocks = [Block(stages), Block(stages)]
        self.copies: list[Callable[[], None]] = []  # under way, done in any order

    def position(self, count: int) -> tuple[int, int]:
        return count % self.stages, count // self.stages % 2

    def copy(self, to: int, stage: int, part, value):
        def done():
            block = self.blocks[to]
            assert block.readers[stage] == 0, "a stage is overwritten while wgmma reads it"
            block.data[stage][part] = value
            block.full[stage].add_bytes(-1)

        self.copies.append(done)

    def produce(self, rank: int) -> Iterator[None]:
        block, count = self.blocks[rank], 0
        for tile in range(self.tiles):
            for step in range(self.steps):
                stage, phase = self.position(count)
                while not block.empty[stage].is_over(phase ^ 1):
                    yield
                # Three boxes land here: the images, and half of the captions from each block.
                block.full[stage].arrive(3)
                yield
                self.copy(rank, stage, "images", (tile, step))
                yield
                for other in (0, 1):
                    self.copy(other, stage, rank, (tile, step))
                yield
                count += 1

    def release(self, rank: int, stage: int) -> Iterator[None]:
        self.blocks[rank].readers[stage] -= 1
        for _ in range(WARPS):
            for to in (rank,) if self.rule == "release to own block only" else (0, 1):
                self.blocks[to].empty[stage].arrive()
                yield

    def consume(self, rank: int, consumer: int) -> Iterator[None]:
        block, count = self.blocks[rank], consumer * self.steps
        if consumer == 1:
            block.turn[0] += 1
        for tile in range(consumer, self.tiles, 2):
            if self.rule != "no turns":
                while block.turn[consumer] == 0:
                    yield
                block.turn[consumer] -= 1
            assert not block.multiplying, "both consumers issue products"
            block.multiplying.add(consumer)
            previous = None
            for step in range(self.steps):
                stage, phase = self.position(count + step)
                while not block.full[stage].is_over(phase):
                    yield
                block.readers[stage] += 1  # wgmma begins
                assert set(block.data[stage].values()) == {(tile, step)}, "another step's data"
                block.consumed.append((tile, step))
                yield
                if self.rule == "release before the wait":
                    yield from self.release(rank, stage)
                    block.readers[stage] += 1
                elif previous is not None:
                    yield from self.release(rank, previous)
                previous = stage
                yield
            block.multiplying.remove(consumer)
            if tile + 1 < self.tiles:
                block.turn[1 - consumer] += 1
            yield
            if self.rule == "release before the wait":
                block.readers[previous] -= 1
            else:
                yield from self.release(rank, previous)
            count += 2 * self.steps
            for _ in range(random.randrange(3 * self.steps + 10)):  # the epilogue
                yield

    def run(self, seed: int) -> None:
        random.seed(seed)
        agents = [self.produce(rank) for rank in (0, 1)]
        agents += [self.consume(rank, consumer) for rank in (0, 1) for consumer in (0, 1)]
        weights = [random.choice([1, 1, 5, 20]) for _ in agents]
        copy_weight = random.choice([1, 5, 20])
        idle = 0
        while agents:
            before = self._state()
            if self.copies and random.random() < copy_weight / (copy_weight + sum(weights)):
                self.copies.pop(random.randrange(len(self.copies)))()
            else:
                i = random.choices(range(len(agents)), weights)[0]
                try:
                    next(agents[i])
                except StopIteration:
                    agents.pop(i), weights.pop(i)
            idle = idle + 1 if self._state() == before else 0
            assert idle < 100_000, "deadlock"
        assert not self.copies, "a copy outlives the kernel"
        expected = [(tile, step) for tile in range(self.tiles) for step in range(self.steps)]
        for block in self.blocks:
            assert block.consumed == expected, "tiles out of order"
            assert block.turn == [0, 0], "a turn was given and not taken"

    def _state(self):
        return len(self.copies), [
            (len(b.consumed), b.turn[:], [x.pending for x in b.full + b.empty]) for b in self.blocks
        ]
