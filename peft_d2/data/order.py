"""Which images make up which batch: a pure function of the seed, so that it can be taken up at any iteration.

Batches are formed for all ranks together and then dealt out. The same numbers result for one process and for many,
as long as the total batch size is the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch


class Draw(NamedTuple):
    """One place in the stream of samples."""

    record: int  # index in the data set
    number: int  # of the sample, counted over all batches and ranks from 0


class BatchOrder:
    """Endless batches of :class:`Draw` for one rank.

    Args:
        groups: group of every record; a batch is of one group (portrait or landscape, to save padding).
        batch_size: images of one batch over all ranks.
        seed: of the shuffles.
        repeats: how often each record comes in an epoch, fractions by chance; None is once.
        start: batches to pass over.
        rank, world: this rank's part of every batch.
    """

    def __init__(
        self, groups: Sequence[int], batch_size: int, seed: int, *,
        repeats: Sequence[float] | None = None, start: int = 0, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if not len(groups):
            raise ValueError("there is no image to train on.")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"SOLVER.IMS_PER_BATCH {batch_size} cannot be dealt out evenly to {world} processes.")
        self.groups, self.batch_size, self.seed = np.asarray(groups), batch_size, seed
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=np.float64)
        self.start, self.rank, self.share = start, rank, batch_size // world

    def __iter__(self) -> Iterator[list[Draw]]:
        first = self.rank * self.share
        for batch_number, batch in enumerate(self._batches()):
            if batch_number >= self.start:
                mine = range(first, first + self.share)
                yield [Draw(batch[i], batch_number * self.batch_size + i) for i in mine]

    def _batches(self) -> Iterator[list[int]]:
        """Images that do not fill a batch of their group yet wait for the next epoch."""
        waiting: dict[int, list[int]] = {int(group): [] for group in np.unique(self.groups)}
        epoch = 0
        while True:
            for index in self._epoch(epoch).tolist():
                group = waiting[int(self.groups[index])]
                group.append(index)
                if len(group) == self.batch_size:
                    yield list(group)
                    group.clear()
            epoch += 1

    def _epoch(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        indices = np.arange(len(self.groups))
        if self.repeats is not None:
            whole = np.floor(self.repeats)
            extra = rng.random(len(indices)) < self.repeats - whole
            indices = np.repeat(indices, (whole + extra).astype(int))
        return rng.permutation(indices)


@contextmanager
def sample_seed(seed: int, number: int) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's random numbers depend on (seed, number) alone; outside nothing changes."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([seed, number]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    torch.random.default_generator.manual_seed(int(words[3]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
