"""A tiny model, a tiny data set, and what a run needs around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2")

import toy  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2.engine.checks import apply_class_count  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402

TINY = Path(__file__).with_name("tiny.yaml")
DINO = Path(__file__).with_name("tiny_mask_dino.yaml")
LORA = "[{'NAME': 'lora', 'RANK': 2, 'ALPHA': 2, 'TARGETS': ['qkv', 'self_attn.value_proj']}]"
HEADS = "['sem_seg_head.predictor.class_embed', 'sem_seg_head.predictor.mask_embed']"


@pytest.fixture(scope="session")
def toy_set(tmp_path_factory: pytest.TempPathFactory) -> toy.ToySet:
    """Six pictures of 64 px."""
    return toy.generate(tmp_path_factory.mktemp("toy"), sorted(toy.DOMAINS)[0], images=6, seed=0, size=64)


@pytest.fixture
def make_cfg(toy_set: toy.ToySet, tmp_path: Path) -> Callable[..., Any]:
    """A config of the tiny model on the toy set: ``make_cfg(*opts, peft=True, config=...)``."""

    def make(*opts: Any, peft: bool = False, config: str | Path = TINY, output: Path = tmp_path) -> Any:
        peft_d2.register()
        pairs = ["OUTPUT_DIR", str(output), *map(str, opts)]
        if peft:
            pairs = ["MODEL.PEFT.METHODS", LORA, "MODEL.PEFT.TRAIN", HEADS, *pairs]
        cfg = load_config(str(config), opts=pairs).cfg
        name = f"toy_{toy_set.json.parent.name}"
        cfg.DATASETS.REGISTER = [{"NAME": name, "JSON": str(toy_set.json), "IMAGES": str(toy_set.images)}]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        apply_class_count(cfg)
        return cfg

    return make


@pytest.fixture(scope="session")
def weights_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """``weights_of(config)``: weights of a tiny model with 7 classes, as a training run would leave them."""
    from detectron2.modeling import build_model

    made: dict[Path, Path] = {}

    def make(config: Path) -> Path:
        if config not in made:
            peft_d2.register()
            made[config] = tmp_path_factory.mktemp("base") / "model_final.pth"
            torch.manual_seed(11)
            torch.save({"model": build_model(load_config(str(config)).cfg).state_dict()}, made[config])
        return made[config]

    return make


@pytest.fixture(scope="session")
def base_weights(weights_of: Callable[[Path], Path]) -> Path:
    """Weights of the tiny Mask2Former."""
    return weights_of(TINY)
