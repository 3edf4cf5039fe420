"""Flipped bits, cuts and exchanges in training states and base weights: found by name, or without any effect."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_d2 import peft
from peft_d2.engine.checkpointer import STATE_RECORD, TRAINING_STATE, Checkpointer
from peft_d2.storage import CheckpointError, load_base

from .world import Result, World

OLDER, NEWER = 3, 7


class Steps:
    """A trainer as far as checkpoints know it."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        self.iteration = -1

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "seed": 7, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])


class Run:
    """A model of two layers in training, with its checkpoints."""

    def __init__(self, folder: Path, peft_run: bool) -> None:
        torch.manual_seed(0)
        self.folder, self.peft_run = folder, peft_run
        self.model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        if peft_run:
            peft.inject(self.model, [{"NAME": "lora", "TARGETS": ["0"], "RANK": 2}], train=["2"])
        self.trainer = Steps(self.model)
        self.checkpointer = Checkpointer(self.model, str(folder), trainer=self.trainer)

    def step(self, iteration: int) -> None:
        """Train one step and save it as that iteration."""
        torch.manual_seed(iteration)
        self.trainer.optimizer.zero_grad()
        self.model(torch.randn(5, 3)).square().sum().backward()
        self.trainer.optimizer.step()
        self.trainer.iteration = iteration
        self.checkpointer.save(f"{self.checkpointer.prefix}_{iteration:07d}", iteration=iteration)

    def values(self) -> list[torch.Tensor]:
        """All that a checkpoint must hold."""
        moments = [v.clone() for state in self.trainer.optimizer.state_dict()["state"].values() for v in state.values()]
        return [p.detach().clone() for p in self.model.parameters() if p.requires_grad] + moments

    def files(self, iteration: int) -> list[Path]:
        """The files of a checkpoint that hold its training state."""
        path = self.folder / f"{self.checkpointer.prefix}_{iteration:07d}"
        return [path / TRAINING_STATE, path / STATE_RECORD] if self.peft_run else [path.with_suffix(".pth")]


def damaged_states(world: World, count: int, seed: int = 0) -> list[Result]:
    """``count`` mutations of training states, half of a PEFT run, half of a full one.

    The run must go on from the older checkpoint, exactly, with one line of warning, or from the newer one, exactly.
    """
    results = []
    logger = logging.getLogger("peft_d2.engine.checkpointer")
    for peft_run, share in ((True, count - count // 2), (False, count // 2)):
        result = Result(f"a damaged training state, {'adapter folders' if peft_run else 'model files'}")
        chance, folder = random.Random(seed), world.root / f"states_{peft_run}"
        run, expected = Run(folder, peft_run), {}
        base = str(world.root / "two_layers.pth")
        torch.save({"model": Run(world.root / "none", False).model.state_dict()}, base)
        for iteration in (OLDER, NEWER):
            run.step(iteration)
            expected[iteration] = run.values()
        whole = {path: path.read_bytes() for path in run.files(NEWER)}
        for _ in range(share):
            path, lines = chance.choice(list(whole)), _Lines()
            kind = chance.choice([*["a bit flipped"] * 8, "cut short", "zeros", "the older one's", "deleted"])
            _damage(path, run.files(OLDER)[list(whole).index(path)], kind, chance)
            logger.addHandler(lines)
            fresh = Run(folder, peft_run)
            try:
                fresh.checkpointer.resume_or_load(base, resume=True)
                outcome = _judge(fresh, expected, lines)
            except Exception as error:
                outcome = f"crashed: {type(error).__name__}: {error}"[:300]
            logger.removeHandler(lines)
            path.write_bytes(whole[path])
            good = outcome in ("passed over", "harmless")
            result.add("" if good else f"{kind} in {path.name}: {outcome}", outcome.partition(":")[0])
        results.append(result)
    return results


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _judge(run: Run, expected: dict[int, list[torch.Tensor]], lines: _Lines) -> str:
    iteration = run.trainer.iteration
    if iteration not in expected:
        return f"lost: it goes on from {iteration}"
    found = run.values()
    if len(found) != len(expected[iteration]) or not all(map(torch.equal, found, expected[iteration])):
        return "silent: other values"
    if iteration == NEWER:
        return "harmless"
    said = [line for line in lines.lines if "is passed over" in line]
    return "passed over" if len(said) == 1 else f"silent: {len(said)} lines"


def _damage(path: Path, older: Path, kind: str, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "a bit flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "cut short":
        del data[chance.randrange(len(data)) :]
    elif kind == "zeros":
        start = chance.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    if kind == "deleted":
        path.unlink()
    elif kind == "the older one's":
        shutil.copyfile(older, path)
    else:
        path.write_bytes(data)


def damaged_bases(world: World, count: int, seed: int = 0) -> list[Result]:
    """``count`` flipped bits of a base ``.pth``: refused with the file's name, or the very same weights."""
    result, chance = Result("a bit of base weights flipped"), random.Random(seed)
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40), nn.Linear(40, 20))
    path, expected = world.root / "flipped.pth", {n: v.clone() for n, v in model.state_dict().items()}
    torch.save({"model": model.state_dict()}, path)
    whole = path.read_bytes()
    for _ in range(count):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            load_base(model, path)
            outcome = "harmless"
            if not all(torch.equal(value, expected[name]) for name, value in model.state_dict().items()):
                outcome = "silent"
        except CheckpointError as error:
            outcome = "refused" if path.name in str(error) else f"refused without its name: {error}"
        except Exception as error:
            outcome = f"crashed: {type(error).__name__}: {error}"[:300]
        result.add("" if outcome in ("refused", "harmless") else outcome, outcome.partition(":")[0])
    return [result]
