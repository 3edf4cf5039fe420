"""Hooks of a run: the frozen weights are proved unchanged, and a preempted job saves and leaves in order."""

from __future__ import annotations

import logging
import signal
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from peft_d2 import peft

logger = logging.getLogger(__name__)


class FrozenWeights(HookBase):
    """Compares a hash of everything that is not trained before and after the run.

    Raises:
        RuntimeError: after the last step, when a frozen weight has moved.
    """

    def before_train(self) -> None:
        self._before = peft.frozen_hash(unwrapped(self.trainer.model))

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return
        if peft.frozen_hash(unwrapped(self.trainer.model)) != self._before:
            raise RuntimeError(
                "a frozen weight or buffer changed during training: the adapter would not fit its base. "
                "Some code outside of the trained parts writes to the model."
            )
        logger.info("Frozen weights are unchanged (hash %s).", self._before[:12])


class SaveOnSignal(HookBase):
    """On SIGTERM finish the step, save, and leave with exit code 0; ``--resume`` goes on from there."""

    def before_train(self) -> None:
        self._requested = False
        self._previous: Any = None
        try:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        except ValueError:  # signals belong to the main thread
            logger.debug("not in the main thread: SIGTERM keeps its meaning")

    def _request(self, number: int, frame: Any) -> None:
        self._requested = True

    def after_step(self) -> None:
        if not self._any_rank():
            return
        trainer = self.trainer
        if trainer.iter + 1 < trainer.max_iter:
            trainer.checkpointer.save(f"{trainer.checkpointer.prefix}_{trainer.iter:07d}", iteration=trainer.iter)
            comm.synchronize()
            logger.info("SIGTERM: saved after iteration %d; run again with --resume.", trainer.iter)
            raise SystemExit(0)

    def after_train(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _any_rank(self) -> bool:
        """Whether the signal reached any rank: all must leave after the same step."""
        if comm.get_world_size() == 1:
            return self._requested
        flag = torch.tensor(float(self._requested), device=next(self.trainer.model.parameters()).device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
