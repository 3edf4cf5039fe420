"""MODEL.PEFT.MEMORY_BUDGET in a run: the same losses, also in pieces and resumed; a refusal before the first step."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_d2 import memory
from peft_d2.engine.trainer import Trainer
from peft_d2.memory.blocks import Block

pytest.importorskip("detectron2")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line["total_loss"] for line in lines if "total_loss" in line]


def train(cfg: Any, resume: bool = False) -> Trainer:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_same_losses_under_a_budget(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = ("MODEL.WEIGHTS", base_weights, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2, "SEED", 1)
    options += ("TEST.EVAL_PERIOD", 0, "DATASETS.TEST", "()")
    plain = make_cfg(*options, peft=True, output=tmp_path / "plain")
    before = train(plain)
    with pytest.raises(memory.MemoryBudgetError) as refusal:
        train(make_cfg(*options, "MODEL.PEFT.MEMORY_BUDGET", 0.0001, peft=True, output=tmp_path / "refused"))
    assert not list((tmp_path / "refused").glob("adapter*"))
    budget = round(refusal.value.smallest * 1.02 + 0.01, 4)
    with caplog.at_level(logging.INFO):
        trainer = train(make_cfg(*options, "MODEL.PEFT.MEMORY_BUDGET", budget, peft=True, output=tmp_path / "fitted"))
    assert any(isinstance(module, Block) for module in trainer.model.modules())
    assert "steps took" in caplog.text
    assert losses(tmp_path / "fitted") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert list(trainer.model.state_dict()) == list(before.model.state_dict())


def test_a_budget_that_is_none(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    cfg = make_cfg("MODEL.WEIGHTS", base_weights, "MODEL.PEFT.MEMORY_BUDGET", "lots", peft=True)
    with pytest.raises(memory.MemoryBudgetError, match="expected GiB above 0"):
        train(cfg)
