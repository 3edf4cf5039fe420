"""Hooks of a run: the frozen weights are proved unchanged, and a preempted job saves and leaves in order."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm

from peft_d2 import peft
from peft_d2.engine.step import unwrapped
from peft_d2.engine.tracking import Tracker

logger = logging.getLogger(__name__)


class FrozenWeights(HookBase):
    """Compares a hash of everything that is not trained before and after the run.

    Raises:
        RuntimeError: after the last step, when a frozen weight has moved.
    """

    def before_train(self) -> None:
        """Hash what must stay."""
        self._before = peft.frozen_hash(unwrapped(self.trainer.model))

    def after_train(self) -> None:
        """Compare, unless the run was broken off."""
        if self.trainer.iter < self.trainer.max_iter:
            return
        if peft.frozen_hash(unwrapped(self.trainer.model)) != self._before:
            raise RuntimeError(
                "a frozen weight or buffer changed during training: the adapter would not fit its base. "
                "Some code outside of the trained parts writes to the model."
            )
        logger.info("Frozen weights are unchanged (hash %s).", self._before[:12])


class ProveLive(HookBase):
    """Proves on the first image, before the first step, that each injected part changes the output.

    A detector that finds nothing yet cannot show that in eval mode; that is said, and no reason to stop.
    """

    def before_train(self) -> None:
        """Look for dead parts.

        Raises:
            DeadPartError: with their names.
        """
        step = self.trainer._trainer
        model = unwrapped(step.model)
        # All processes take the same image: their forward passes meet, where losses are divided by joined counts, and
        # must be equally many.
        image = comm.all_gather(self.trainer.loader.first()[0])[0]
        predictions: list[Any] = []

        def forward(model: Any) -> Any:
            for module in model.modules():
                if not any(True for _ in module.children()) and not any(True for _ in module.parameters()):
                    module.eval()  # dropout and stochastic depth would hide a part by chance
            with step.precision():
                output = model([dict(image)])
            if not model.training:
                predictions.extend(output)
            return output

        _refuse_dead(_dead_everywhere(peft.dead_parts(model, forward, training=True)), "train")
        dead = _dead_everywhere(peft.dead_parts(model, forward, training=False))
        if dead and not any(len(found.get("instances", "?")) for found in predictions):
            logger.info(
                "The model finds nothing on the first image yet: %d parts are not proved in eval mode.", len(dead)
            )
        else:
            _refuse_dead(dead, "eval")
            logger.info("Each injected part changes the output, in train and in eval mode.")


class SaveOnSignal(HookBase):
    """On SIGTERM finish the step, save, and leave with exit code 0; ``--resume`` goes on from there."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: Any = None
        self._process = 0

    def before_train(self) -> None:
        """Listen."""
        self._process = os.getpid()
        try:
            self._previous = signal.signal(signal.SIGTERM, self._request)
        except ValueError:  # signals belong to the main thread
            logger.debug("not in the main thread: SIGTERM keeps its meaning")

    def _request(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a fork, of a pool say, inherits the handler: it would never end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._requested = True

    def after_step(self) -> None:
        """Save and leave where the signal has come.

        Raises:
            SystemExit: with code 0.
        """
        if not self._any_rank():
            return
        trainer = self.trainer
        if trainer.iter + 1 < trainer.max_iter:
            trainer.checkpointer.save(f"{trainer.checkpointer.prefix}_{trainer.iter:07d}", iteration=trainer.iter)
            comm.synchronize()
            logger.info("SIGTERM: saved after iteration %d; run again with --resume.", trainer.iter)
            raise SystemExit(0)

    def after_train(self) -> None:
        """Give the signal its former meaning back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _any_rank(self) -> bool:
        """Whether the signal reached any rank: all must leave after the same step."""
        if comm.get_world_size() == 1:
            return self._requested
        flag = torch.tensor(float(self._requested), device=next(self.trainer.model.parameters()).device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)


class Writers(PeriodicWriter):
    """Detectron2's; services begin with the training; what cannot be written at its end does not hide why it ended."""

    def before_train(self) -> None:
        """Let the services open their runs.

        Raises:
            ConfigError: one of them cannot.
        """
        for writer in self._writers:
            if isinstance(writer, Tracker):
                writer.start()

    def after_train(self) -> None:
        """Write what is left and close the files; a full disk is said, and no reason to fail."""
        try:
            super().after_train()
        except OSError as error:
            logger.error("The figures of the last iterations could not be written: %s", error.strerror or error)


def _dead_everywhere(names: list[str]) -> list[str]:
    """Those of ``names`` that all processes found, so that all go on or all stop."""
    found = comm.all_gather(names)
    return [name for name in names if all(name in others for others in found)]


def _refuse_dead(names: list[str], mode: str) -> None:
    if names:
        raise peft.DeadPartError(
            f"in {mode} mode these injected parts cannot change the output: {', '.join(names)}. The model does not "
            "call these modules, or reads their weights directly: choose a module around them. "
            "MODEL.PEFT.PROVE_LIVE False trains all the same."
        )
