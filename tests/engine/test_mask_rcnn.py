"""Detectron2's own Mask R-CNN under PEFT: a plain script's five lines, and a run on own data."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model

import peft_d2
from peft_d2 import peft
from peft_d2.data.registration import register_coco
from peft_d2.engine.trainer import Trainer
from peft_d2.peft.ranking import recommend

CONFIGS = Path(__file__).parents[2] / "configs"
ZOO = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
METHODS = [
    {"NAME": "lora", "RANK": 2, "TARGETS": ["box_head.fc1", "box_head.fc2"]},
    {"NAME": "adapter", "REDUCTION": 8, "TARGETS": ["backbone.bottom_up.res5.*"]},
]


def small(cfg: Any, toy_set: toy.ToySet, output: Path) -> None:
    """Shrink a zoo config to what a test has time for."""
    register_coco("rcnn_toys", toy_set.json, toy_set.images)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("rcnn_toys",), ()
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
    cfg.DATALOADER.NUM_WORKERS, cfg.TEST.DETECTIONS_PER_IMAGE = 0, 5
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = 2, 2, 2
    cfg.SOLVER.BASE_LR = 1e-6  # random weights under frozen norms give huge features
    cfg.SEED, cfg.OUTPUT_DIR = 1, str(output)


def zoo_config() -> Any:
    cfg = get_cfg()
    peft_d2.add_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(ZOO))
    return cfg


def with_peft(cfg: Any) -> Any:
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT.META_ARCHITECTURE = "PEFTModel", cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.PEFT.METHODS, cfg.MODEL.PEFT.TRAIN = METHODS, ["roi_heads.box_predictor"]
    return cfg


def test_a_plain_script(toy_set: toy.ToySet, tmp_path: Path) -> None:
    """Detectron2's DefaultTrainer, unchanged: its optimizer sees only what is trained, its checkpoint loads again."""
    peft_d2.register()
    cfg = with_peft(zoo_config())
    small(cfg, toy_set, tmp_path)
    trainer = DefaultTrainer(cfg)
    frozen = peft.frozen_hash(trainer.model)
    before = {t.name: t.param.detach().clone() for t in peft.trained_parameters(trainer.model)}
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert peft.frozen_hash(trainer.model) == frozen
    moved = {t.name for t in peft.trained_parameters(trainer.model) if not torch.equal(t.param, before[t.name])}
    assert any("lora_b" in name for name in moved) and any("box_predictor" in name for name in moved)
    again = build_model(cfg)
    DetectionCheckpointer(again).load(str(tmp_path / "model_final.pth"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_trial_passes_outside_of_a_trainer(toy_set: toy.ToySet, tmp_path: Path) -> None:
    """As README says it: on a batch of one's own, without the storage that Detectron2's trainer provides."""
    peft_d2.register()
    cfg = zoo_config()
    small(cfg, toy_set, tmp_path)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(cfg)
    peft_d2.inject(model, METHODS, train=["roi_heads.box_predictor"])
    batch = next(iter(DefaultTrainer.build_train_loader(cfg)))
    peft_d2.prove_live(model, batch)
    peft_d2.fit_memory(model, batch, None)
    found = recommend(build_model(cfg), [batch, batch], 200_000, ["roi_heads.box_predictor"])
    assert 0 < found.parameters <= 200_000 and found.methods


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_our_trainer(toy_set: toy.ToySet, tmp_path: Path, threshold: float, caplog: pytest.LogCaptureFixture) -> None:
    """The second threshold lets nothing pass: what sits behind the boxes cannot be proved live then, which is said."""
    peft_d2.register()
    plain = zoo_config()
    small(plain, toy_set, tmp_path / "base")
    base = Trainer(plain)
    base.resume_or_load(resume=False)
    base.train()
    cfg = with_peft(zoo_config())
    small(cfg, toy_set, tmp_path / "peft")
    cfg.MODEL.WEIGHTS = str(tmp_path / "base" / "model_final.pth")
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    with caplog.at_level(logging.INFO, "peft_d2"):
        results = trainer.train()
    lines = [record.getMessage() for record in caplog.records]
    assert any("gradients reach what is trained" in line for line in lines)
    assert any("The model finds nothing" in line for line in lines) == (threshold > 0.0)
    assert results is not None and (set(results) == {"bbox", "segm"} or threshold > 0.0)
    adapter = tmp_path / "peft" / "adapter_final"
    assert (adapter / "adapter_model.safetensors").stat().st_size < 0.1 * Path(cfg.MODEL.WEIGHTS).stat().st_size
    fresh = build_model(plain)
    DetectionCheckpointer(fresh).load(cfg.MODEL.WEIGHTS)
    peft_d2.load_adapter(fresh, adapter)
    trained = {t.name: t.param for t in peft.trained_parameters(trainer.model)}
    for item in peft.trained_parameters(fresh):
        assert torch.equal(item.param, trained[item.name]), item.name


@pytest.mark.parametrize("file", ["mask_rcnn/lora.yaml", "full.yaml"])
def test_peft_files(file: str, make_cfg: Callable[..., Any]) -> None:
    from peft_d2.engine.config import load_config
    from peft_d2.engine.factory import build_without_weights

    peft_d2.register()
    folder = CONFIGS / "peft"
    cfg = load_config(model_zoo.get_config_file(ZOO), str(folder / file), ["MODEL.DEVICE", "cpu"]).cfg
    model = build_without_weights(cfg)
    report = peft.make_report(model)
    assert next(model.parameters()).device.type == "meta"
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert (report.percent > 99) == (file == "full.yaml")


@pytest.mark.parametrize(
    "file",
    sorted(p.name for p in (CONFIGS / "peft/mask2former").glob("*.yaml") if not re.search("_sam|e3va", p.name)),
)
def test_peft_files_of_mask2former(file: str) -> None:
    from peft_d2.engine.config import load_config
    from peft_d2.engine.factory import build_without_weights

    peft_d2.register()
    path = CONFIGS / "peft/mask2former" / file
    model = build_without_weights(load_config(str(Path(__file__).with_name("tiny.yaml")), str(path)).cfg)
    methods = {entry["NAME"].lower() for entry in peft.get_injection(model).methods}
    assert methods == ({re.match("[a-z]+?(?=s?[_.])", file).group()} if not file.startswith("heads") else set())
