"""Losses and gradients that are not finite: every process stops before the step is applied or saved."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from peft_d2.engine import processes
from peft_d2.engine.errors import LossNotFinite, one_line_errors
from peft_d2.engine.trainer import Trainer

from .world import Child, Result, World

_ITERATION = 3


class Poison(HookBase):
    """Makes a loss or a gradient NaN from one iteration on, on the last rank."""

    def __init__(self, iteration: int, what: str) -> None:
        self.iteration, self.what = iteration, what

    def before_step(self) -> None:
        if self.trainer.iter != self.iteration or comm.get_rank() + 1 < comm.get_world_size():
            return
        step = self.trainer._trainer
        forward = step.model.forward

        def poisoned(data: Any) -> dict[str, torch.Tensor]:
            losses = forward(data)
            if self.what == "loss":
                losses["loss_mask"] = losses["loss_mask"] * float("nan")
            else:
                losses["loss_mask"] = losses["loss_mask"] + losses["loss_mask"].sub(losses["loss_mask"]).sqrt()
            return losses

        step.model.forward = poisoned


def bad_losses(world: World, quick: bool = False) -> list[Result]:
    """NaN in a loss or in a gradient alone, with mixed precision and without, in one process and on one of two."""
    result = Result("NaN in a loss or a gradient")
    ways = list(itertools.product(("loss", "gradient"), (False, True), (1, 2)))
    for what, amp, ranks in ways[3:5] if quick else ways:
        output = world.root / f"nan_{what}_{amp}_{ranks}"
        cfg = world.cfg(output, "SOLVER.AMP.ENABLED", amp, "SOLVER.MAX_ITER", 10)
        child = Child(
            lambda tell, cfg=cfg, what=what, ranks=ranks: _launch(cfg, what, ranks), output.with_suffix(".txt")
        )
        status = child.wait()
        child.close()
        text = child.console.read_text(errors="replace")
        last = f"adapter_{_ITERATION - 1:07d}"
        failure = f"{what}, amp {amp}, {ranks} ranks: "
        if status != 1 or not re.search(rf"^error: iteration {_ITERATION}: .*(loss|gradients)", text, re.MULTILINE):
            failure += f"exit code {status}: {text[-300:]}"
        elif max(path.name for path in output.glob("adapter_*")) != last:
            failure += "a bad step was saved"
        elif [path.read_text() for path in sorted(output.glob("rank*"))] != ["equals the checkpoint"] * ranks:
            failure += "a bad step was applied"
        else:
            failure = ""
        result.add(failure, f"in {what}")
    return [result]


def _launch(cfg: Any, what: str, ranks: int) -> None:
    processes._START = "fork"  # type: ignore[attr-defined]
    layout = processes.Layout(ranks, on_cpu=True)
    one_line_errors(lambda: processes.launch(_train, (cfg, what), layout))


def _train(cfg: Any, what: str) -> None:
    trainer = Trainer(cfg)
    trainer.register_hooks([Poison(_ITERATION, what)])
    trainer.resume_or_load(resume=False)
    try:
        trainer.train()
    except LossNotFinite:
        after = _trained(trainer)
        stored = Trainer(cfg)
        stored.resume_or_load(resume=True)
        same = all(torch.equal(after[name], value) for name, value in _trained(stored).items())
        verdict = "equals the checkpoint" if same else "differs from the checkpoint"
        Path(cfg.OUTPUT_DIR, f"rank{comm.get_rank()}").write_text(verdict)
        raise


def _trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = trainer.model.named_parameters()
    return {name.removeprefix("module."): p.detach().clone() for name, p in found if p.requires_grad}
