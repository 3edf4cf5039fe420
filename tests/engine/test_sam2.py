"""Segment Anything 2 through the trainer: boxes in, adapters trained, mIoU, Dice and mask AP out; features kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2")

from peft_d2 import peft  # noqa: E402
from peft_d2.data.loader import build_train_loader  # noqa: E402
from peft_d2.engine.trainer import Trainer  # noqa: E402

from ..models.sam2.test_sam2 import TINY as SMALL  # noqa: E402
from .test_mask_dino import methods_of  # noqa: E402
from .test_processes import BATCH, assert_two_equal_one, steps_of  # noqa: E402
from .test_sam import CONFIGS, TINY, loss  # noqa: E402
from .test_training import StopAfter, assert_equal, train, trained  # noqa: E402

KEYS = {
    **{key: value for key, value in TINY.items() if not key.startswith("MODEL.SAM.")},
    **SMALL,
    **{"MODEL.SAM.IMAGE_SIZE": 64, "SOLVER.MAX_ITER": 25},
}


@pytest.fixture
def sam2_cfg(make_cfg: Callable[..., Any]) -> Callable[..., Any]:
    """``sam2_cfg("lora_cobot", key, value, ...)``: the tiny model with a file of configs/peft, on the toy set."""

    def make(recipe: str, *opts: Any) -> Any:
        pairs = [part for item in KEYS.items() for part in item]
        pairs += ["MODEL.META_ARCHITECTURE", "PEFTModel", "MODEL.PEFT.META_ARCHITECTURE", "PD2SAM2"]
        return make_cfg(*pairs, *methods_of(f"sam2/{recipe}.yaml"), *opts, config=CONFIGS / "sam2" / "hiera_t.yaml")

    return make


@pytest.mark.parametrize("recipe", ["lora_cobot", "adaptformer_cobot"])
def test_train_evaluate_and_load(sam2_cfg: Callable[..., Any], tmp_path: Path, recipe: str) -> None:
    cfg = sam2_cfg(recipe)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    batch = next(iter(build_train_loader(cfg)))
    before = loss(trainer.model, batch)
    results = trainer.train()
    assert results is not None and {"mIoU", "mDice", "DSC"} <= results["masks"].keys() and "segm" in results
    assert loss(trainer.model, batch) < 0.8 * before
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"loss_dice", "loss_mask", "masks/mIoU", "segm/AP"} <= {key for row in rows for key in row}
    torch.save(peft.base_state_dict(trainer.model), tmp_path / "base.pth")
    cfg.MODEL.WEIGHTS, cfg.MODEL.PEFT.WEIGHTS = str(tmp_path / "base.pth"), str(tmp_path / "adapter_final")
    again = Trainer.build_model(cfg)
    found, expected = again.state_dict(), trainer.model.state_dict()
    same = [key for key in found if not key.startswith("peft_base.")]
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in same)


def test_a_run_with_kept_features_learns_the_same(sam2_cfg: Callable[..., Any], tmp_path: Path) -> None:
    """LoRA in the last block alone: all before it is run once for an image."""
    last = "[{'NAME': 'lora', 'TARGETS': ['trunk.blocks.6.attn.qkv'], 'RANK': 2}]"
    opts = (
        "MODEL.PEFT.METHODS",
        last,
        "SOLVER.MAX_ITER",
        6,
        "INPUT.RANDOM_FLIP",
        "none",
        "MODEL.PEFT.PROVE_LIVE",
        False,
    )
    losses, calls = [], []
    for folder in ("", str(tmp_path / "cache")):
        cfg = sam2_cfg("lora", *opts, "MODEL.FEATURE_CACHE", folder)
        trainer = Trainer(cfg)
        seen: list[int] = []
        blocks = trainer.model.image_encoder.trunk.blocks
        for block in (blocks[5], blocks[6]):
            block.register_forward_hook(lambda module, inputs, output, s=seen: s.append(len(output)))
        trainer.resume_or_load(resume=False)
        batch = next(iter(build_train_loader(cfg)))
        trainer.train()
        calls.append(sum(seen))
        losses.append(loss(trainer.model, batch))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert calls == [2 * (12 + 6), 6 + 12 + 6]  # images in six steps of two and in the evaluation; six of them once


def test_two_processes_equal_one(sam2_cfg: Callable[..., Any], tmp_path: Path) -> None:
    """No trained tensor is left without a gradient, which two processes would wait for. The second step is NaN."""
    torch.save(Trainer.build_model(sam2_cfg("decoder")).state_dict(), tmp_path / "base.pth")
    options = (*BATCH, "INPUT.PROMPTS.BOX_NOISE", 0.0, "INPUT.RANDOM_FLIP", "none")
    options = (*options, "MODEL.WEIGHTS", tmp_path / "base.pth")
    one = steps_of(sam2_cfg("lora", *options, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path / "one"))
    cfg = sam2_cfg("lora", *options, "OUTPUT_DIR", tmp_path / "two")
    assert_two_equal_one(one, cfg, tmp_path)


def test_a_stopped_run_continues(sam2_cfg: Callable[..., Any], tmp_path: Path) -> None:
    options = ("SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3)
    whole = trained(train(sam2_cfg("adaptformer_cobot", *options, "OUTPUT_DIR", tmp_path / "whole")))
    stopped = sam2_cfg("adaptformer_cobot", *options, "OUTPUT_DIR", tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAfter(3))
    resumed = train(stopped, resume=True)
    assert resumed.start_iter == 3
    assert_equal(whole, trained(resumed))
