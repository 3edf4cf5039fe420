"""Every config loads; the published hyper-parameters are in effect; published yaml files run as they are."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg

from peft_d2.engine.config import read_tree
from peft_d2.engine.errors import ConfigError
from peft_d2.models import add_models_config

from .conftest import ROOT, build_published, make_config

FILES = sorted(
    str(path.relative_to(ROOT / "configs"))
    for folder in ("coco", "cityscapes", "ade20k", "lvis")
    for path in (ROOT / "configs" / folder).rglob("mask2former_*.yaml")
)

# Read off the published files: file -> effective values.
PUBLISHED: dict[str, dict[str, Any]] = {
    "coco/instance/mask2former_r50.yaml": {
        "SOLVER.MAX_ITER": 368750,
        "SOLVER.STEPS": (327778, 355092),
        "SOLVER.BASE_LR": 0.0001,
        "SOLVER.WEIGHT_DECAY": 0.05,
        "SOLVER.BACKBONE_MULTIPLIER": 0.1,
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
        "SOLVER.AMP.ENABLED": True,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.WARMUP_ITERS": 10,
        "INPUT.IMAGE_SIZE": 1024,
        "INPUT.DATASET_MAPPER_NAME": "coco_instance_lsj",
        "INPUT.FORMAT": "RGB",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 80,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 6,
        "MODEL.MASK_FORMER.DEC_LAYERS": 10,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 100,
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 12544,
        "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.1,
        "MODEL.MASK_FORMER.DROPOUT": 0.0,
        "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.8,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
        "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": False,
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "TEST.EVAL_PERIOD": 5000,
    },
    "coco/panoptic/mask2former_swin_l_in21k.yaml": {
        "SOLVER.MAX_ITER": 737500,
        "SOLVER.STEPS": (655556, 710184),
        "INPUT.DATASET_MAPPER_NAME": "coco_panoptic_lsj",
        "MODEL.WEIGHTS": "swin_large_patch4_window12_384_22k.pkl",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 133,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 200,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True,
        "MODEL.SWIN.EMBED_DIM": 192,
        "MODEL.SWIN.DEPTHS": (2, 2, 18, 2),
        "MODEL.SWIN.NUM_HEADS": (6, 12, 24, 48),
        "MODEL.SWIN.WINDOW_SIZE": 12,
        "MODEL.SWIN.PRETRAIN_IMG_SIZE": 384,
        "MODEL.SWIN.DROP_PATH_RATE": 0.3,
        "DATASETS.TEST": ("coco_2017_val_panoptic_with_sem_seg",),
    },
    "cityscapes/instance/mask2former_r50.yaml": {
        "SOLVER.MAX_ITER": 90000,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
        "SOLVER.POLY_LR_POWER": 0.9,
        "SOLVER.WARMUP_ITERS": 0,
        "INPUT.CROP.SIZE": (512, 1024),
        "INPUT.MAX_SIZE_TRAIN": 4096,
        "INPUT.MIN_SIZE_TEST": 1024,
        "INPUT.COLOR_AUG_SSD": True,
        "INPUT.SIZE_DIVISIBILITY": -1,
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 8,
    },
    "cityscapes/semantic/mask2former_swin_l_in21k.yaml": {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 19,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 100,
        "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": True,
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": False,
    },
    "ade20k/semantic/mask2former_r50.yaml": {
        "SOLVER.MAX_ITER": 160000,
        "INPUT.CROP.SIZE": (512, 512),
        "INPUT.SIZE_DIVISIBILITY": 512,
        "INPUT.MAX_SIZE_TEST": 2048,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 150,
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": False,
        "TEST.AUG.MIN_SIZES": (256, 384, 512, 640, 768, 896),
    },
    "ade20k/semantic/mask2former_swin_b_in21k.yaml": {
        "INPUT.CROP.SIZE": (640, 640),
        "INPUT.MIN_SIZE_TEST": 640,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 150,
        "MODEL.SWIN.EMBED_DIM": 128,
    },
    "ade20k/panoptic/mask2former_r50.yaml": {
        "INPUT.CROP.SIZE": (640, 640),
        "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True,
        "INPUT.DATASET_MAPPER_NAME": "mask_former_panoptic",
    },
    "ade20k/instance/mask2former_r50.yaml": {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": 100},
}


def value(cfg: CfgNode, key: str) -> Any:
    found = functools.reduce(lambda node, part: node[part], key.split("."), cfg)
    return tuple(found) if isinstance(found, list) else found


@pytest.mark.parametrize("file", FILES)
def test_it_loads_and_names_registered_parts(file: str) -> None:
    cfg = make_config(file)
    assert cfg.MODEL.META_ARCHITECTURE == "PD2MaskFormer"
    assert cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE == "multi_scale_pixel_decoder"
    is_swin = "swin" in file
    assert (cfg.MODEL.BACKBONE.NAME == "PD2SwinTransformer") == is_swin
    if is_swin:
        heads, dim = cfg.MODEL.SWIN.NUM_HEADS, cfg.MODEL.SWIN.EMBED_DIM
        assert [dim * 2**i // 32 for i in range(4)] == heads  # every published Swin has 32 channels a head


def test_there_is_one_for_every_backbone_and_task() -> None:
    assert len(FILES) == 14 + 18 + 19 + 6
    assert all(
        {f"{data}/{task}/mask2former_{b}.yaml" for b in ("r50", "r101", "swin_t", "swin_s", "swin_l_in21k")}
        <= set(FILES)
        for data, task in [
            ("coco", "instance"),
            ("coco", "panoptic"),
            ("cityscapes", "semantic"),
            ("ade20k", "semantic"),
        ]
    )


@pytest.mark.parametrize("file", PUBLISHED)
def test_published_hyper_parameters(file: str) -> None:
    cfg = make_config(file)
    expected = PUBLISHED[file]
    assert {key: value(cfg, key) for key in expected} == expected


def test_lvis() -> None:
    cfg = make_config("lvis/mask2former_r50.yaml")
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 1203
    assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"


def test_multi_scale_training_sizes() -> None:
    for file, side in (
        ("cityscapes/panoptic/mask2former_r50.yaml", 1024),
        ("ade20k/semantic/mask2former_r50.yaml", 512),
    ):
        expected = [int(0.1 * step * side) for step in range(5, 21)]
        assert list(make_config(file).INPUT.MIN_SIZE_TRAIN) == pytest.approx(expected, abs=1)


UPSTREAM_STYLE = """
MODEL:
  META_ARCHITECTURE: "MaskFormer"
  DEVICE: "meta"
  BACKBONE: {NAME: "D2SwinTransformer", FREEZE_AT: 0}
  SWIN: {EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24], WINDOW_SIZE: 7, APE: False, PATCH_NORM: True}
  RESNETS: {STEM_TYPE: "basic", RES5_MULTI_GRID: [1, 1, 1]}
  SEM_SEG_HEAD:
    NAME: "MaskFormerHead"
    NUM_CLASSES: 19
    LOSS_WEIGHT: 1.0
    CONVS_DIM: 256
    MASK_DIM: 256
    PIXEL_DECODER_NAME: "MSDeformAttnPixelDecoder"
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    TRANSFORMER_ENC_LAYERS: 6
  MASK_FORMER:
    TRANSFORMER_DECODER_NAME: "MultiScaleMaskedTransformerDecoder"
    TRANSFORMER_IN_FEATURE: "multi_scale_pixel_decoder"
    ENC_LAYERS: 0
    DEC_LAYERS: 10
    TEST: {PANOPTIC_ON: True, OVERLAP_THRESHOLD: 0.8}
SOLVER: {OPTIMIZER: "ADAMW", BACKBONE_MULTIPLIER: 0.1, LR_SCHEDULER_NAME: "WarmupPolyLR"}
INPUT:
  DATASET_MAPPER_NAME: "mask_former_panoptic"
  COLOR_AUG_SSD: True
  SIZE_DIVISIBILITY: -1
  CROP: {SINGLE_CATEGORY_MAX_AREA: 0.75}
VERSION: 2
"""


OLD = {
    "lora_mask_dino": "mask_dino/lora",
    "lora_qkvo_mask_dino": "mask_dino/ablations/lora_qkvo",
    "lora_mask2former_swin": "mask2former/lora_swin",
    "lora_cobot_swin": "mask2former/lora_cobot_swin",
    "lora_cobot_sam_mask2former": "mask2former/lora_cobot_sam",
    "lora_sam": "sam/lora",
    "lora_mask_rcnn": "mask_rcnn/lora",
}


@pytest.mark.parametrize("old", OLD)
def test_a_path_of_before_the_folders_names_the_new_one(old: str, tmp_path: Path) -> None:
    """Given itself, and as the base of somebody's own file."""
    folder = ROOT / "configs" / "peft"
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {folder}/{old}.yaml")
    for path in (folder / f"{old}.yaml", tmp_path / "mine.yaml"):
        said = f"{old}.yaml' does not exist. It is {folder}/{OLD[old]}.yaml now"
        with pytest.raises(ConfigError, match=said) as refused:
            read_tree(str(path))
        assert "\n" not in str(refused.value)


def test_upstream_names_build_our_models(tmp_path: Path) -> None:
    model = build_published(UPSTREAM_STYLE, tmp_path)
    parts = (model, model.backbone, model.sem_seg_head, model.sem_seg_head.pixel_decoder, model.sem_seg_head.predictor)
    assert all(type(part).__module__.startswith("peft_d2.") for part in parts)
    assert model.sem_seg_head.num_classes == 19 and model.panoptic_on


def test_config_nodes_keep_what_is_there() -> None:
    cfg = get_cfg()
    cfg.MODEL.MASK_FORMER = CfgNode({"NHEADS": 2})  # as if upstream's function had come first
    cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 17
    add_models_config(cfg)
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 3
    add_models_config(cfg)
    assert (cfg.MODEL.MASK_FORMER.NHEADS, cfg.MODEL.SEM_SEG_HEAD.MASK_DIM, cfg.MODEL.MASK_FORMER.DEC_LAYERS) == (
        2,
        17,
        3,
    )
    assert cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD == 0.0


def test_configs_share_no_list() -> None:
    first, second = get_cfg(), get_cfg()
    add_models_config(first)
    first.MODEL.SWIN.DEPTHS[0] = 9
    add_models_config(second)
    assert second.MODEL.SWIN.DEPTHS == [2, 2, 6, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5"}, "TRANSFORMER_IN_FEATURE is 'res5'"),
        ({"MODEL.MASK_FORMER.DEC_LAYERS": 0}, "DEC_LAYERS is 0"),
        ({"MODEL.MASK_FORMER.HIDDEN_DIM": 30}, "multiple of 4"),
        ({"MODEL.MASK_FORMER.NHEADS": 7}, "multiple of MODEL.MASK_FORMER.NHEADS, 7"),
    ],
)
def test_bad_values_are_named(small: Any, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small(overrides)
