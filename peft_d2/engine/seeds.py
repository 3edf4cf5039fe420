"""Random numbers as a function of (seed, rank, iteration), so that a resumed run draws what it would have drawn."""

from __future__ import annotations

import random

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm


def choose_seed(seed: int) -> int:
    """``seed`` itself, or where it is negative a random one that all ranks agree on."""
    if seed >= 0:
        return seed
    return int(comm.all_gather(random.SystemRandom().randrange(2**31))[0])


def seed_everything(seed: int, rank: int, iteration: int) -> None:
    """Seed Python, NumPy and torch from all three numbers."""
    words = np.random.SeedSequence((seed, rank, iteration)).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    torch.manual_seed(int(words[2]) % 2**63)


class SeedEachStep(HookBase):
    """Seeds before each step. Nothing needs to be stored, and an evaluation in between changes nothing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        """Seed from this rank and the step's number."""
        seed_everything(self.seed, comm.get_rank(), self.trainer.iter)
