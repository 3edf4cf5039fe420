"""A tiny EoMT on each of the two kinds of encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs timm, of the test extra")

CLASSES, QUERIES, SIDE = 5, 7, 64
NAMES = {"dinov2": "vit_small_patch14_reg4_dinov2", "dinov3": "vit_small_patch16_dinov3_qkvb"}
SIZES = "embed_dim: 48, num_heads: 4, patch_size: 16, depth: 4, img_size: 64"
TINY: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.META_ARCHITECTURE": "PD2EoMT",
    "MODEL.BACKBONE.NAME": "PD2EoMTEncoder",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.SEM_SEG_HEAD.NAME": "PD2EoMTHead",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": QUERIES,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.CLASS_WEIGHT": 2.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 5.0,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 256,
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": SIDE,
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "INPUT.FORMAT": "RGB",
}


@pytest.fixture
def eomt(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``eomt("dinov3", {key: value})``: layer scales are of the order of 1, so that the blocks have an effect."""

    def run(kind: str = "dinov2", overrides: dict[str, Any] | None = None, more: str = "") -> nn.Module:
        torch.manual_seed(0)
        kwargs = f"{{{SIZES}, init_values: 0.7{more}}}"
        return build("", {**TINY, "MODEL.TIMM.NAME": NAMES[kind], "MODEL.TIMM.KWARGS": kwargs, **(overrides or {})})

    return run
