"""Hooks of a run: seeds, the proofs before and after it, saving on a signal, writers, a bar on a terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from peft_d2 import memory, peft
from peft_d2.engine.processes import INTERRUPTED, handled
from peft_d2.engine.step import unwrapped

_SAME_KEY = 1.0  # seconds within which a second SIGINT is the same Ctrl-C, passed on by torchrun

logger = logging.getLogger(__name__)


def seed_everything(seed: int, rank: int, iteration: int) -> None:
    """Seed Python, NumPy and torch from all three numbers."""
    words = np.random.SeedSequence((seed, rank, iteration)).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    torch.manual_seed(int(words[2]) % 2**63)


class SeedEachStep(HookBase):
    """Seeds before each step from the config's seed, this rank and the step's number.

    So a resumed run draws the same random numbers without anything stored, and an evaluation in between changes none.
    """

    def before_step(self) -> None:
        """Seed Python, NumPy and torch."""
        seed_everything(self.trainer.cfg.SEED, comm.get_rank(), self.trainer.iter)


class FrozenWeights(HookBase):
    """Compares a hash of everything that is not trained before and after the run.

    Raises:
        RuntimeError: after the last step, when a frozen weight has moved.
    """

    def before_train(self) -> None:
        """Hash all that is not trained."""
        self._before = peft.frozen_hash(unwrapped(self.trainer.model))

    def after_train(self) -> None:
        """Compare the hashes, unless the run has ended early."""
        if self.trainer.iter < self.trainer.max_iter:
            return
        if peft.frozen_hash(unwrapped(self.trainer.model)) != self._before:
            raise RuntimeError(
                "a frozen weight or buffer changed during training: the adapter would not fit its base. "
                "Some code outside of the trained parts writes to the model."
            )
        logger.info("Frozen weights are unchanged (hash %s).", self._before[:12])


class FitMemory(HookBase):
    """Fits the step into ``MODEL.PEFT.MEMORY_BUDGET`` before the first one, and measures what it really takes.

    Raises:
        MemoryBudgetError: before the first step, when no choice fits.
    """

    _STEPS = 10  # how many of them are measured before the peak is logged

    def before_train(self) -> None:
        """Make the plan with the first batch. All processes take as many pieces as the one that needs most."""
        step = self.trainer._trainer
        model = unwrapped(step.model)

        def forward(model: Any, batch: Any) -> Any:
            with step.precision():
                return model(batch)

        states = 1 if isinstance(step.optimizer, torch.optim.SGD) else 2
        self._plan = memory.fit_memory(
            model,
            list(self.trainer.loader.first()),
            self.trainer.cfg.MODEL.PEFT.MEMORY_BUDGET,
            forward=forward,
            optimizer_states=states,
            pieces=step.pieces,
            agree=lambda excess: max(comm.all_gather(excess)),
        )
        step.pieces = self._plan.pieces
        logger.info("Memory of a training step:\n%s", self._plan)
        self._peak = memory.StepPeak(model)

    def after_step(self) -> None:
        """Log the measured peak once, before an evaluation can raise it."""
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if done == min(self._STEPS, self.trainer.max_iter - self.trainer.start_iter):
            measured = self._peak.read()
            logger.info(
                "Memory: the first %d steps took %.2f GiB at most; predicted were %.2f GiB.",
                *(done, measured / 2**30, self._plan.peak / 2**30),
            )
            if self._plan.budget is not None and measured > self._plan.budget:
                logger.warning("Memory: that is more than the budget: the first batch was smaller than others.")


class ProveLive(HookBase):
    """Proves on the first images, before a run's first step, that all that is trained has an effect and a gradient.

    A resumed run only warns: it begins with other images, and its proof was made when it was started.
    """

    def before_train(self) -> None:
        """Make the passes; see :func:`peft_d2.peft.prove_live`.

        Raises:
            LivenessError: with what is not live, and why.
        """
        step = self.trainer._trainer
        # All processes take the same images, so that their forward passes are equally many.
        batches = comm.all_gather(list(self.trainer.loader.first())[:2])
        images = [image for batch in batches for image in batch][:4]
        try:
            with step.precision():
                own, refusal = peft.not_live(unwrapped(step.model), *[[image] for image in images]), None
        except peft.PeftError as error:  # all processes stop together
            own, refusal = [], error
        refusals, everywhere = zip(*comm.all_gather((refusal, own)), strict=True)
        if any(refusals):
            raise next(filter(None, refusals))
        found = [item for item in own if all(item in others for others in everywhere)]
        faults = [item for item in found if item.is_fault]
        if faults and self.trainer.start_iter > 0:
            logger.warning(
                "On the first images of the resumed run, %s They could when it was started, so it goes on.",
                peft.describe(faults),
            )
        elif faults:
            raise peft.LivenessError(f"{peft.describe(faults)} MODEL.PEFT.PROVE_LIVE False trains all the same.")
        else:
            rest = f"; {len(found)} parameters have no part in these images' losses" if found else ""
            logger.info("Each adapter layer takes part, and gradients reach what is trained%s.", rest)


class SaveOnSignal(HookBase):
    """On SIGTERM or Ctrl-C finish the step, save, and leave; ``--resume`` goes on from there.

    A second Ctrl-C leaves at once. A signal that is ignored, as SIGINT is in the background, stays so.
    """

    def __init__(self) -> None:
        self._taken = contextlib.ExitStack()

    def before_train(self) -> None:
        """Take the signals over."""
        self._process, self._interrupted = os.getpid(), 0.0
        self._taken.enter_context(handled(dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._request)))

    def _request(self, number: int, frame: Any) -> None:
        """Handle a signal: ask the training step to stop after this one; a second Ctrl-C interrupts at once."""
        if os.getpid() != self._process:  # a fork, of a pool say, inherits the handler: it would never end
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted and now > self._interrupted + _SAME_KEY:
                raise KeyboardInterrupt
            self._interrupted = self._interrupted or now
            os.write(2, INTERRUPTED)
        self.trainer._trainer.stop_requested = True  # the step tells all processes: all leave after the same one

    def after_step(self) -> None:
        """Save and leave where a signal has come.

        Raises:
            SystemExit: with code 0, after SIGTERM.
            KeyboardInterrupt: after Ctrl-C.
        """
        trainer = self.trainer
        if trainer._trainer.stop and trainer.iter + 1 < trainer.max_iter:
            trainer.checkpointer.save(f"{trainer.checkpointer.prefix}_{trainer.iter:07d}", iteration=trainer.iter)
            comm.synchronize()
            reason = "Ctrl-C" if self._interrupted else "SIGTERM"
            logger.info("%s: saved after iteration %d; run again with --resume.", reason, trainer.iter)
            raise KeyboardInterrupt if self._interrupted else SystemExit(0)

    def after_train(self) -> None:
        """Give the signals their former meaning back."""
        self._taken.close()


class Writers(PeriodicWriter):
    """Detectron2's PeriodicWriter, whose writers are made when the training begins: each of them opens its file.

    A full disk at the end of the training is an error in the log, and no reason to fail.
    """

    def __init__(self) -> None:
        super().__init__([])

    def before_train(self) -> None:
        """Make the writers, let the services open their runs.

        Raises:
            ConfigError: one of them cannot.
        """
        self._writers = self.trainer.build_writers()
        for writer in self._writers:
            if hasattr(writer, "start"):
                writer.start()

    def after_train(self) -> None:
        """Write what is left and close the files; a full disk is said, and no reason to fail."""
        try:
            super().after_train()
        except OSError as error:
            logger.error("The figures of the last iterations could not be written: %s", error.strerror or error)


def on_terminal() -> bool:
    """Whether this process may draw a bar; elsewhere Detectron2's plain lines are all there is."""
    return comm.is_main_process() and sys.stderr.isatty()


class Bar:
    """A loader that draws a progress bar while somebody iterates over it."""

    def __init__(self, loader: Iterable[Any], title: str) -> None:
        self._loader, self._title = loader, title

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        with _redirected():
            yield from tqdm(self._loader, desc=self._title, total=len(self), leave=False, dynamic_ncols=True)


class TrainingBar(HookBase):
    """A bar over the run's iterations with the current loss; log lines pass above it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def before_train(self) -> None:
        """Draw the bar, at the iteration where the run starts."""
        self._stack.enter_context(_redirected())
        bar = tqdm(total=self.trainer.max_iter, initial=self.trainer.start_iter, desc="training", dynamic_ncols=True)
        self._bar = self._stack.enter_context(bar)

    def after_step(self) -> None:
        """Advance it by one, with the total loss where one is recorded."""
        with contextlib.suppress(KeyError):
            self._bar.set_postfix(loss=f"{self.trainer.storage.history('total_loss').latest():.3f}", refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        """Leave the bar as it is and give the loggers their streams back."""
        self._stack.close()


def _redirected() -> contextlib.AbstractContextManager[Any]:
    """Let log lines that go to the terminal appear above the bar.

    Only the loggers that write there are named: tqdm would add a handler to any other.
    """
    loggers = [logging.getLogger(name) for name in ("", "detectron2", "fvcore", "peft_d2")]
    return logging_redirect_tqdm([log for log in loggers if any(_writes_to_console(h) for h in log.handlers)])


def _writes_to_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
