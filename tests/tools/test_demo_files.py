"""What the demo and the nuclei study ship: the packaged base knows its world, the configs train what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch

import peft_d2
from peft_d2 import peft
from peft_d2.data import toy
from peft_d2.data.registration import register_from_config
from peft_d2.engine.checkpointer import Checkpointer
from peft_d2.engine.checks import build_without_weights
from peft_d2.engine.config import load_config
from peft_d2.engine.trainer import Trainer

ROOT = Path(__file__).parents[2]
BASE = ROOT / "peft_d2" / "assets" / "demo_base.safetensors"


@pytest.fixture(autouse=True)
def registered() -> None:
    peft_d2.register()


def test_the_packaged_base_finds_the_shapes_of_its_own_domain(tmp_path: Path) -> None:
    assert BASE.stat().st_size < 10_000_000
    day = toy.generate(tmp_path / "day", "day", 12, seed=77)
    cfg = load_config(str(ROOT / "configs" / "demo" / "base.yaml")).cfg
    cfg.DATASETS.REGISTER = [{"NAME": "packaged_base_day", "JSON": str(day.json), "IMAGES": str(day.images)}]
    cfg.DATASETS.TEST = ("packaged_base_day",)
    cfg.OUTPUT_DIR = str(tmp_path)
    register_from_config(cfg)
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(str(BASE))  # an incomplete file is an error
    with torch.no_grad():
        results = Trainer.test(cfg, model)
    assert results["segm"]["AP"] > 60  # 80 and more on its own validation set; 0 for random weights


@pytest.mark.parametrize(
    ("file", "low", "high"),
    [
        ("demo/heads.yaml", 0.1, 1),
        ("demo/lora.yaml", 1, 6),
        ("demo/adapters.yaml", 1, 6),
        ("demo/full.yaml", 100, 100),
        ("nuclei/mask2former/heads.yaml", 0.1, 1),
        ("nuclei/mask2former/lora.yaml", 1, 6),
        ("nuclei/mask2former/adapters.yaml", 1, 6),
        ("nuclei/mask2former/full.yaml", 100, 100),
        ("nuclei/seem/heads.yaml", 0.5, 2),
        ("nuclei/seem/lora.yaml", 1, 6),
        ("nuclei/seem/adapters3.yaml", 1, 6),
        ("nuclei/seem/conventional.yaml", 20, 50),
        ("nuclei/seem/full.yaml", 100, 100),
    ],
)
def test_configs_train_the_share_that_they_promise(
    file: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # a config may name a file beside it
    model = build_without_weights(load_config(str(ROOT / "configs" / file)).cfg)
    assert low <= peft.make_report(model).percent <= high
