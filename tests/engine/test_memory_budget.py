"""MODEL.PEFT.MEMORY_BUDGET in a run: the same losses, also in pieces and resumed; a refusal before the first step."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from safetensors.torch import load_file
from torch import nn

import peft_d2
from peft_d2 import memory, peft
from peft_d2.engine import processes
from peft_d2.memory.blocks import Block

from .conftest import DINO, TINY
from .test_training import StopAfter, assert_equal, train, trained


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line["total_loss"] for line in lines if "total_loss" in line]


class AllRecompute(HookBase):
    """Lets every block recompute, whatever this machine's budget leaves: it runs after the plan was made."""

    def before_train(self) -> None:
        for block in recomputing(self.trainer.model):
            block.memory_block.mode = "recompute"


def recomputing(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


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


RUNS = {
    "dropout and drop path": ("MODEL.MASK_FORMER.DROPOUT", 0.3, "MODEL.SWIN.DROP_PATH_RATE", 0.3),
    "bf16": ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bf16"),
    "accumulation": ("SOLVER.ACCUMULATE", 2),
    "mask_dino": (),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_weights_bit_for_bit(
    make_cfg: Callable[..., Any], weights_of: Callable[[Path], Path], tmp_path: Path, name: str
) -> None:
    config = DINO if name == "mask_dino" else TINY
    options = ("MODEL.WEIGHTS", weights_of(config), "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()", *RUNS[name])
    plain = train(make_cfg(*options, peft=True, config=config, output=tmp_path / "plain"))
    options += ("MODEL.PEFT.MEMORY_BUDGET", 100)
    fitted = train(make_cfg(*options, peft=True, config=config, output=tmp_path / "fitted"), AllRecompute())
    assert len(recomputing(fitted.model)) > 5 and not recomputing(plain.model)
    assert_equal(trained(plain), trained(fitted))


def test_stopped_and_resumed_under_a_budget(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    """It ends with the weights of a run without one, and its file is that run's, to merge, swap and load."""
    options = ("MODEL.WEIGHTS", base_weights, "DATASETS.TEST", "()")
    plain = train(make_cfg(*options, peft=True, output=tmp_path / "plain"))
    cfg = make_cfg(*options, "MODEL.PEFT.MEMORY_BUDGET", 100, peft=True, output=tmp_path / "fitted")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, AllRecompute(), StopAfter(3))
    fitted = train(cfg, AllRecompute(), resume=True)
    assert_equal(trained(plain), trained(fitted))
    files = [load_file(tmp_path / run / "adapter_final" / "adapter_model.safetensors") for run in ("plain", "fitted")]
    assert_equal(*files)
    model, expected = fitted.model.eval(), plain.model.eval()
    image = [{"image": torch.full((3, 64, 64), 100.0), "height": 64, "width": 64}]
    with torch.no_grad():
        before = expected(image)[0]["instances"].scores
        assert torch.equal(model(image)[0]["instances"].scores, before)
        for one in (model, expected):
            peft.merge(one)
        assert torch.equal(model(image)[0]["instances"].scores, expected(image)[0]["instances"].scores)
        peft.unmerge(model)
        peft_d2.load_adapter(model, tmp_path / "plain" / "adapter_final", name="other")
        peft_d2.set_adapter(model, "other")
        assert torch.equal(model(image)[0]["instances"].scores, before)


def one_of_two(plain: Any, fitted: Any, folder: str) -> None:
    """What each of two processes runs."""
    peft_d2.register()
    runs = trained(train(plain)), trained(train(fitted, AllRecompute()))
    torch.save(runs, Path(folder, f"{comm.get_rank()}.pth"))


def test_two_processes_under_a_budget(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    options = ("MODEL.WEIGHTS", base_weights, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", 4)
    plain = make_cfg(*options, peft=True, output=tmp_path / "plain")
    fitted = make_cfg(*options, "MODEL.PEFT.MEMORY_BUDGET", 100, peft=True, output=tmp_path / "fitted")
    processes.launch(one_of_two, (plain, fitted, str(tmp_path)), processes.Layout(2, on_cpu=True))
    results = [run for rank in (0, 1) for run in torch.load(tmp_path / f"{rank}.pth")]
    for result in results[1:]:
        assert_equal(results[0], result)


def test_a_budget_that_is_none(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    cfg = make_cfg("MODEL.WEIGHTS", base_weights, "MODEL.PEFT.MEMORY_BUDGET", "lots", peft=True)
    with pytest.raises(memory.MemoryBudgetError, match="expected GiB above 0"):
        train(cfg)
