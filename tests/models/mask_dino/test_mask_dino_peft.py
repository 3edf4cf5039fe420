"""PEFT of Mask DINO by configs/peft: the published parameter counts, and that the first step starts from the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_targets import describe, inspect_parser
from torch import nn

from peft_d2 import peft
from peft_d2.engine.checkpointer import Checkpointer
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_without_weights
from peft_d2.models import register

from ..conftest import R50_DINO, ROOT, SWIN_L_DINO
from ..test_training import sample, step

METHODS = {path.stem: path for path in sorted((ROOT / "configs" / "peft" / "mask_dino").rglob("*.yaml"))}
# Abou Baker et al., MAKE 6(4), 2024, table of trainable parameters: file -> R50's count, % of R50, % of Swin-L.
PUBLISHED = {
    "adapters1": (1_144_660, 2.17, 0.51),
    "adapters2": (1_938_772, 3.61, 0.86),
    "adapters3": (2_732_884, 5.02, 1.21),
    "adapters1_r16": (553_684, 1.06, 0.25),
    "adapters2_r16": (756_820, 1.44, 0.34),
    "adapters3_r16": (959_956, 1.82, 0.43),
    "heads": (350_548, 0.67, 0.16),
    "conventional": (28_603_092, 54.9, 12.4),
}
# LoRA's places: projections of the deformable attentions, and parts of the decoder's self-attentions.
OFFSETS, WEIGHTS, VALUES, OUTPUT = "sampling_offsets", "attention_weights", "value_proj", "output_proj"
LORA = {
    "lora_offsets": ([OFFSETS], ""),
    "lora_weights": ([WEIGHTS], ""),
    "lora_values": ([VALUES], ""),
    "lora_output": ([OUTPUT], ""),
    "lora_offsets_weights": ([OFFSETS, WEIGHTS], ""),
    "lora_values_output": ([VALUES, OUTPUT], ""),
    "lora_deformable": ([OFFSETS, WEIGHTS, VALUES, OUTPUT], ""),
    "lora_qv": ([], "qv"),
    "lora_qkvo": ([], "qkvo"),
    "lora": ([OFFSETS, VALUES], "qv"),
    "lora_all": ([OFFSETS, WEIGHTS, VALUES, OUTPUT], "qkvo"),
}


def lora_parameters(projections: list[str], parts: str, levels: int) -> int:
    """Rank 8, width 256, 8 heads of 4 points a level: 6 + 9 deformable attentions and 9 self-attentions; the heads."""
    outputs = {OFFSETS: 8 * levels * 4 * 2, WEIGHTS: 8 * levels * 4, VALUES: 256, OUTPUT: 256}
    return PUBLISHED["heads"][0] + 8 * (15 * sum(256 + outputs[p] for p in projections) + 9 * len(parts) * 512)


@pytest.fixture(scope="module")
def bases() -> dict[str, nn.Module]:
    """Both whole models, on the meta device."""
    register()
    return {c: build_without_weights(load_config(str(ROOT / "configs" / c)).cfg) for c in (R50_DINO, SWIN_L_DINO)}


def injected(base: nn.Module, method: Path) -> peft.Report:
    """The report of a copy of ``base`` with one of configs/peft."""
    node = load_config(str(ROOT / "configs" / R50_DINO), str(method)).cfg.MODEL.PEFT
    return peft.inject(copy.deepcopy(base), [dict(entry) for entry in node.METHODS], train=tuple(node.TRAIN))


def test_every_file_is_counted() -> None:
    assert set(METHODS) == {*PUBLISHED, *LORA}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_parameters(bases: dict[str, nn.Module], name: str) -> None:
    count, r50, swin_l = PUBLISHED[name]
    report = injected(bases[R50_DINO], METHODS[name])
    assert report.trainable == count
    assert report.percent == pytest.approx(r50, abs=0.051 if r50 > 10 else 0.00501)
    report = injected(bases[SWIN_L_DINO], METHODS[name])
    assert name == "conventional" or report.trainable == count
    assert report.percent == pytest.approx(swin_l, abs=0.051 if swin_l > 10 else 0.00501)


@pytest.mark.parametrize("name", LORA)
def test_the_parameters_of_lora(bases: dict[str, nn.Module], name: str) -> None:
    for config, levels in ((R50_DINO, 4), (SWIN_L_DINO, 5)):
        report = injected(bases[config], METHODS[name])
        assert report.trainable == lora_parameters(*LORA[name], levels)


@pytest.mark.parametrize(("config", "percent"), [(R50_DINO, "2.17"), (SWIN_L_DINO, "0.51")])
def test_the_tool_prints_them(config: str, percent: str) -> None:
    arguments = ["--config-file", str(ROOT / "configs" / config), "--peft-config", str(METHODS["adapters1"])]
    last = describe(inspect_parser().parse_args(arguments)).splitlines()[-1]
    assert last.startswith("1,144,660 of ") and last.endswith(f"{percent} %.")


# The paper's data sets: classes, image size, and the pixel statistics of its published code (RGB, 0 to 255).
DATA = {
    "cityscapes": (8, 1024, [73.18, 82.93, 72.41], [47.27, 48.10, 47.37]),
    "ndd20": (1, 512, [92.28, 154.55, 153.19], [67.14, 39.63, 41.33]),
    "wixray": (12, 450, [249.49, 248.82, 246.35], [18.63, 20.32, 28.58]),
    "zerowaste": (4, 512, [127.44, 122.56, 116.07], [60.49, 59.09, 63.04]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("data", DATA)
def test_the_papers_settings_with_every_method(name: str, data: str) -> None:
    """One command line takes both files, and neither undoes what the other says."""
    classes, size, mean, std = DATA[data]
    for backbone in ("r50", "swin_l"):
        model = ROOT / "configs" / "mask_dino" / "paper" / f"{data}_{backbone}.yaml"
        cfg = load_config(str(model), str(METHODS[name])).cfg
        assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT.META_ARCHITECTURE) == ("PEFTModel", "PD2MaskDINO")
        assert (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.INPUT.IMAGE_SIZE) == (classes, size)
        assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD) == ("RGB", mean, std)
        solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
        assert (solver.OPTIMIZER, solver.IMS_PER_BATCH, solver.WEIGHT_DECAY) == ("ADAMW", 4, 0.05)
        assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.01)
        assert solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and 0 < solver.STEPS[0] < solver.MAX_ITER
        # heads and what is injected learn at 1e-3, everything but the backbone at 1e-4
        in_full = solver.BASE_LR * cfg.MODEL.PEFT.TRAIN_LR_FACTOR
        assert in_full == pytest.approx(1e-4 if name == "conventional" else 1e-3)
        if cfg.MODEL.PEFT.METHODS:
            assert solver.BASE_LR * cfg.MODEL.PEFT.LR_FACTOR == pytest.approx(1e-3)


def test_a_checkpoint_of_other_classes_under_peft(small_dino: Any, tmp_path: Path) -> None:
    """Heads start anew and are trained; the label embeddings, which are not, are those of the checkpoint."""
    base = small_dino({"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3})
    labels = base.sem_seg_head.predictor.label_enc.weight
    torch.save({"model": base.state_dict()}, tmp_path / "base.pth")
    for classes in (1, 7):
        model = small_dino({"MODEL.SEM_SEG_HEAD.NUM_CLASSES": classes})
        peft.inject(model, [], train=["sem_seg_head.predictor.{class_embed,mask_embed,bbox_embed}"])
        Checkpointer(model).load(str(tmp_path / "base.pth"))
        assert torch.equal(model.sem_seg_head.predictor.label_enc.weight, torch.cat([labels] * 3)[:classes])
        assert model.sem_seg_head.predictor.class_embed.weight.shape[0] == classes


STEPS = [(name, "r50") for name in METHODS if name not in ("heads", "conventional")]


@pytest.mark.parametrize(("name", "backbone"), [*STEPS, ("adapters3", "swin"), ("lora_all", "swin")])
def test_step_0_is_the_base(small_dino: Any, name: str, backbone: str) -> None:
    swin = {"MODEL.SWIN.EMBED_DIM": 24, "MODEL.SWIN.DEPTHS": [1, 1, 1, 1], "MODEL.SWIN.NUM_HEADS": [1, 1, 2, 2]}
    model = small_dino(swin, SWIN_L_DINO) if backbone == "swin" else small_dino()
    inputs = [sample("tensor", 2)]
    before = {name: value.item() for name, value in step(model, inputs).items()}
    with torch.no_grad():
        expected = model.eval()(inputs)[0]["instances"]
    node = load_config(str(ROOT / "configs" / R50_DINO), str(METHODS[name])).cfg.MODEL.PEFT
    peft.inject(model, [dict(entry) for entry in node.METHODS], train=tuple(node.TRAIN))
    assert {name: value.item() for name, value in step(model, inputs).items()} == before
    trained = list(peft.trained_parameters(model))
    assert all(t.param.grad is not None for t in trained)
    with torch.no_grad():
        found = model.eval()(inputs)[0]["instances"]
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_masks, expected.pred_masks)
    # The perceptron that predicts boxes has many names and is trained once.
    assert len({id(t.param) for t in trained}) == len(trained)
