"""kill -9 at random moments: of training, of saving, of evaluation, just after a resume, at each call of a save."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase

from peft_d2.engine.checkpointer import TRAINING_STATE
from peft_d2.engine.trainer import Trainer
from peft_d2.storage import adapter_file

from .world import Child, Result, World

Tell = Callable[..., None]
_SAVING_CALLS = ("posix", "_io", "torch")  # modules whose C functions reach the file system
_NEVER = 10**9
_MOMENTS = ("start", "training", "saving", "call", "evaluation", "resumed", "call")


@dataclass
class Seen:
    """What a run's processes have told so far."""

    saved: int = -1  # last iteration whose save returned
    begun: int = -1  # last iteration whose save began
    calls: int = 0  # C calls of the last whole save
    seconds: float = 0.05  # of the last whole save
    digests: dict[int, str] = field(default_factory=dict)


def kills(world: World, count: int, seed: int = 0) -> list[Result]:
    """``count`` kills of a PEFT run and of a full one, half each; one result for each kind of run.

    After each the run is resumed by the next process. It must go on from the newest checkpoint that was whole: the
    last one whose save had returned, or the one that was being written, with exactly the weights and the optimizer
    state that had been there when that save began. At the end the run must be where one that was never killed is.
    """
    return [_run(world, peft, number, seed) for peft, number in ((True, count - count // 2), (False, count // 2))]


def _run(world: World, peft: bool, count: int, seed: int) -> Result:
    name = "adapter folders" if peft else "model files"
    result = Result(f"kill -9, {name}")
    folder, chance, seen = world.root / name.replace(" ", "_"), random.Random(seed), Seen()
    folder.mkdir()
    failure, moment = "", "start"
    for number in range(count + 1):
        at = seen.calls and 1 + (number * 7) % seen.calls  # 7: neighbouring runs look at different parts of a save
        kind = "end" if number == count else _MOMENTS[number % len(_MOMENTS)]
        child = _start(world, folder, peft, at if kind == "call" else _NEVER, 2 if kind == "end" else 0)
        resumed = _watch(child, kind, chance, seen)
        child.close()
        if number:
            result.add(f"killed {moment}: {failure or resumed}" if failure or resumed else "", moment.split()[0])
        failure = "" if child.status == (0 if kind == "end" else -signal.SIGKILL) else _died(child)
        failure = failure or _partial(folder, seen)
        moment = f"call {at}" if kind == "call" else kind
    if failure:
        result.failures.append(failure)
    whole = _uninterrupted(world, peft, seen.saved + 1)
    if whole != seen.digests.get(seen.saved):
        result.failures.append(f"after {count} kills the weights are not those of an uninterrupted run")
    left = [path.name for path in folder.iterdir() if path.suffix in (".tmp", ".old")]
    if left:
        result.failures.append(f"temporaries are left: {left[:3]}")
    return result


def _watch(child: Child, kind: str, chance: random.Random, seen: Seen) -> str:
    """Follow a process until it is killed at its moment, or ends; returns what was wrong with its beginning."""
    wrong = ""
    if kind == "start":  # anywhere from the first import of the model to the first saves
        time.sleep(chance.uniform(0, 0.8))
        child.kill(signal.SIGKILL)
    while words := child.line():
        if words[0] == "resumed":
            wrong = _compare(int(words[1]), words[2], seen)
            seen.saved = max(seen.saved, int(words[1]))  # whole, though the kill came before its save returned
            if kind in ("training", "resumed"):
                time.sleep(chance.uniform(0, 0.6 if kind == "training" else 0.1))
                child.kill(signal.SIGKILL)
        elif words[0] == "evaluating":
            if kind == "evaluation":
                time.sleep(chance.uniform(0, 0.3))
                child.kill(signal.SIGKILL)
        elif words[0] == "saving":
            seen.begun = int(words[1])
            known = seen.digests.setdefault(seen.begun, words[2])
            wrong = wrong or ("" if known == words[2] else f"iteration {seen.begun} differs from its first run")
            if kind == "saving":
                time.sleep(chance.uniform(0, seen.seconds))
                child.kill(signal.SIGKILL)
        else:
            seen.saved, seen.calls, seen.seconds = int(words[1]), int(words[2]), float(words[3])
    child.wait()
    return wrong


def _compare(iteration: int, digest: str, seen: Seen) -> str:
    if iteration not in (seen.saved, seen.begun):
        return f"resumed from {iteration}, but {seen.saved} was saved and {seen.begun} begun"
    if iteration >= 0 and digest != seen.digests[iteration]:
        return f"checkpoint {iteration} does not hold what was saved"
    return ""


def _partial(folder: Path, seen: Seen) -> str:
    """Whether a checkpoint that is written can be seen under its name before it is whole."""
    for iteration in {seen.saved, seen.begun} - {-1}:
        for path in folder.glob(f"[am]*_{iteration:07d}*"):  # names that begin with a dot are not there yet
            try:
                if path.is_dir():
                    adapter_file.read(path)
                torch.load(path / TRAINING_STATE if path.is_dir() else path, weights_only=True)
            except Exception as error:  # torch's reader fails in many ways
                return f"{path.name} is there and not whole: {error}"
    return ""


def _died(child: Child) -> str:
    tail = child.console.read_text(errors="replace").strip().splitlines()[-1:]
    return f"the process ended by itself with {child.status}: {''.join(tail)}"


def _start(world: World, folder: Path, peft: bool, kill_at: int, steps: int) -> Child:
    """A process that resumes the run and trains; it kills itself at the C call ``kill_at`` of its first save."""

    def train(tell: Tell) -> None:
        opts = ("SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINTS_TO_KEEP", 3, "TEST.EVAL_PERIOD", 2)
        cfg = world.cfg(folder, *opts, peft=peft, evaluate=True)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        tell("resumed", trainer.start_iter - 1, _digest(trainer))
        _watch_saves(trainer, tell, kill_at)
        _watch_evaluations(trainer, tell)
        if steps:
            trainer.register_hooks([_LeaveAfter(trainer.start_iter + steps)])
        trainer.train()

    return Child(train, world.root / "console.txt")


class _LeaveAfter(HookBase):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise SystemExit(0)


def _uninterrupted(world: World, peft: bool, steps: int) -> str:
    """Digest of a run that is never killed, after ``steps``."""
    digests: list[str] = []

    def train(tell: Tell) -> None:
        cfg = world.cfg(world.root / f"whole_{peft}", "SOLVER.MAX_ITER", 100_000, peft=peft)
        cfg.SOLVER.CHECKPOINT_PERIOD = 50_000
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.register_hooks([_LeaveAfter(steps)])
        try:
            trainer.train()
        finally:
            tell(_digest(trainer))

    child = Child(train, world.root / "console.txt")
    while words := child.line():
        digests += words
    child.close()
    return digests[-1]


def _digest(trainer: Trainer) -> str:
    """Of what a checkpoint must hold: trained weights and the optimizer's state."""
    found = hashlib.sha256()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            found.update(name.encode() + parameter.detach().numpy().tobytes())
    for index, state in sorted(trainer.optimizer.state_dict()["state"].items()):
        for key, value in sorted(state.items()):
            found.update(f"{index}{key}".encode() + torch.as_tensor(value).numpy().tobytes())
    return found.hexdigest()


def _watch_saves(trainer: Trainer, tell: Tell, kill_at: int) -> None:
    save = trainer.checkpointer.save

    def watched(name: str, **extra: Any) -> None:
        tell("saving", trainer.iter, _digest(trainer))
        calls = 0

        def count(frame: Any, event: str, function: Any) -> None:
            nonlocal calls
            if event in ("c_call", "c_return") and _reaches_files(function):
                calls += 1
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        start = time.perf_counter()
        sys.setprofile(count)
        try:
            save(name, **extra)
        finally:
            sys.setprofile(None)
        if kill_at < _NEVER:  # this save was shorter than the one that was counted
            os.kill(os.getpid(), signal.SIGKILL)
        tell("saved", trainer.iter, calls, time.perf_counter() - start)

    trainer.checkpointer.save = watched


def _watch_evaluations(trainer: Trainer, tell: Tell) -> None:
    test = trainer.test

    def watched(*arguments: Any) -> Any:
        tell("evaluating", trainer.iter)
        return test(*arguments)

    trainer.test = watched  # type: ignore[method-assign]


def _reaches_files(function: Any) -> bool:
    owner = getattr(function, "__self__", None)
    module = getattr(function, "__module__", None) or type(owner).__module__
    return str(module).partition(".")[0] in _SAVING_CALLS
