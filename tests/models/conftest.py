"""Building models from the repository's configs, and the goldens."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

import peft_d2
from peft_d2.models import add_models_config, register

from ..tiny_sam import SAM_TINY

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"

# Models that train in a blink: ResNet-18 with group norm, hidden width 32, one or two encoder and decoder layers.
_SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
}

SMALL = {
    **_SMALL,
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 64,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 2,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 6,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 128,
}

R50_DINO, SWIN_L_DINO = "mask_dino/coco/instance_r50.yaml", "mask_dino/coco/instance_swin_l.yaml"

SMALL_DINO = {
    **_SMALL,
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MaskDINO.HIDDEN_DIM": 32,
    "MODEL.MaskDINO.DIM_FEEDFORWARD": 32,
    "MODEL.MaskDINO.NHEADS": 4,
    "MODEL.MaskDINO.DEC_LAYERS": 2,
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 8,
    "MODEL.MaskDINO.TRAIN_NUM_POINTS": 64,
    "MODEL.MaskDINO.DN_NUM": 7,
}

SMALL_EOMT = {
    **{key: value for key, value in _SMALL.items() if "RESNETS" not in key},
    "MODEL.TIMM.NAME": "vit_small_patch14_reg4_dinov2",
    # Layer scales as after some training, so that the blocks have an effect.
    "MODEL.TIMM.KWARGS": "{embed_dim: 32, num_heads: 4, patch_size: 16, depth: 4, img_size: 64, init_values: 0.7}",
    "MODEL.TIMM.WEIGHTS": "",
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 6,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 128,
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1,
    "MODEL.EOMT.ANNEALING_START": [0.2, 0.6],
    "MODEL.EOMT.ANNEALING_END": [0.6, 0.9],
}

# Models that share MaskClassifier: a config, what makes it small, and the config node of its own.
CLASSIFIERS = {
    "mask2former": ("coco/instance/mask2former_r50.yaml", SMALL, "MASK_FORMER"),
    "mask_dino": (R50_DINO, SMALL_DINO, "MaskDINO"),
    "eomt": ("eomt/coco/instance_dinov2_small_640.yaml", SMALL_EOMT, "MASK_FORMER"),
}


def make_config(path: str = "", overrides: dict[str, Any] | None = None) -> CfgNode:
    """The config of a file below ``configs/``, by default of none, with overrides."""
    register(upstream_names=True)
    cfg = get_cfg()
    add_models_config(cfg)
    if path:
        cfg.merge_from_file(str(ROOT / "configs" / path))
    cfg.merge_from_list([part for item in (overrides or {}).items() for part in item])
    return cfg


def build_published(text: str, folder: Path) -> nn.Module:
    """The model of a config file as it is published, whose names are those of upstream, without its weights."""
    (folder / "published.yaml").write_text(text, encoding="utf-8")
    cfg = make_config(str(folder / "published.yaml"))
    with torch.device("meta"):
        return build_model(cfg)


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """``build("coco/instance/mask2former_r50.yaml", {key: value})`` builds on the CPU unless told otherwise."""

    def run(path: str, overrides: dict[str, Any] | None = None) -> nn.Module:
        return build_model(make_config(path, {"MODEL.DEVICE": "cpu", **(overrides or {})}))

    return run


@pytest.fixture
def small(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``small(instance overrides)``: the small model with further overrides."""
    return lambda overrides=None: build("coco/instance/mask2former_r50.yaml", {**SMALL, **(overrides or {})})


@pytest.fixture
def small_dino(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``small_dino(overrides, config)``: a small Mask DINO."""

    def run(overrides: dict[str, Any] | None = None, config: str = R50_DINO) -> nn.Module:
        torch.manual_seed(0)
        return build(config, {**SMALL_DINO, **(overrides or {})})

    return run


@pytest.fixture(params=CLASSIFIERS)
def classifier(build: Callable[..., nn.Module], request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    """``classifier(overrides)``: each model of ``CLASSIFIERS``; keys without ``MODEL`` are of the model's own node."""
    config, options, node = CLASSIFIERS[request.param]

    def run(overrides: dict[str, Any] | None = None) -> nn.Module:
        torch.manual_seed(0)
        own = {k if k.startswith("MODEL.") else f"MODEL.{node}.{k}": v for k, v in (overrides or {}).items()}
        return build(config, {**options, **own})

    return run


@pytest.fixture
def sam(filler: ModuleType) -> Callable[..., nn.Module]:
    """``sam(overrides)``: the tiny Segment Anything in eval mode, filled as the golden was."""

    def run(overrides: dict[str, Any] | None = None) -> nn.Module:
        cfg = get_cfg()
        peft_d2.add_config(cfg)
        cfg.merge_from_file(str(ROOT / "configs" / "sam" / "vit_b.yaml"))
        cfg.merge_from_list([part for item in {**SAM_TINY, **(overrides or {})}.items() for part in item])
        register()
        model = build_model(cfg).eval()
        filler.fill(model)
        return model

    return run


@pytest.fixture(scope="session")
def filler() -> ModuleType:
    """``tests/goldens/fill.py``."""
    spec = importlib.util.spec_from_file_location("goldens_fill", GOLDENS / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def golden() -> Callable[[str], dict[str, Any]]:
    """The JSON of a golden."""
    return lambda name: json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))
