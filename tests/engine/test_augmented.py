"""``TEST.AUG`` through the trainer: real models, Detectron2's keys, a second set of figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_d2.engine.errors import ConfigError
from peft_d2.engine.launch import check_run
from peft_d2.engine.trainer import Trainer
from peft_d2.evaluation.augmented import augmented_model

from .test_training import train

HERE = Path(__file__).parent


@pytest.mark.parametrize("config", ["tiny.yaml", "tiny_mask_dino.yaml"])
def test_one_view_is_the_plain_prediction(make_cfg: Callable[..., Any], config: str) -> None:
    cfg = make_cfg("TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.FLIP", False, config=HERE / config)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    record = next(iter(Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))[0]
    with torch.no_grad():
        plain = model([record])[0]["instances"]
    augmented = augmented_model(cfg, model)([record])[0]["instances"]
    plain = plain[plain.pred_masks.flatten(1).any(1)]
    assert len(augmented) == len(plain) > 0
    assert torch.allclose(augmented.scores, plain.scores) and torch.equal(augmented.pred_classes, plain.pred_classes)
    assert torch.equal(augmented.pred_masks, plain.pred_masks)
    assert torch.allclose(augmented.pred_boxes.tensor, plain.pred_boxes.tensor, atol=1e-3)


def test_a_training_ends_with_both_figures(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    opts = ("SOLVER.MAX_ITER", 1, "TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(32, 48)", "TEST.AUG.MAX_SIZE", 64)
    trainer = train(make_cfg("MODEL.WEIGHTS", base_weights, *opts))
    assert {"segm/AP", "bbox/AP", "segm_TTA/AP", "bbox_TTA/AP"} <= set(trainer.checkpointer.metrics)
    assert (tmp_path / "inference_TTA").is_dir()


def test_panoptic_results_are_refused(make_cfg: Callable[..., Any]) -> None:
    cfg = make_cfg("TEST.AUG.ENABLED", True, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", True)
    with pytest.raises(ConfigError, match="TEST.AUG cannot be combined with the model's TEST.PANOPTIC_ON"):
        check_run(cfg, evaluate=True)
