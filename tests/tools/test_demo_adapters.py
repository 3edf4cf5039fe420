"""``tools/demo.py --adapters``: several adapters on one base, side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("detectron2")

import demo
import torch
from detectron2.modeling import build_model
from PIL import Image

import peft_d2
from peft_d2 import peft
from peft_d2.engine.config import load_config

TINY = Path(__file__).parents[1] / "engine" / "tiny.yaml"


def test_each_adapter_is_drawn_beside_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detectron2.utils.visualizer.random_color", lambda **_: np.array([0.2, 0.9, 0.4]))
    peft_d2.register()
    torch.manual_seed(0)
    model = build_model(load_config(str(TINY)).cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "base.pth")
    peft_d2.inject(model, train=["class_embed", "mask_embed"])
    peft_d2.save_adapter(model, tmp_path / "same")
    for item in peft.trained_parameters(model):
        item.param.data.neg_()
    peft_d2.save_adapter(model, tmp_path / "other")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    arguments = [
        "--config-file",
        str(TINY),
        "--input",
        str(tmp_path / "photo.png"),
        "--output",
        str(tmp_path / "drawn"),
    ]
    arguments += ["--confidence-threshold", "0", "--adapters", f"same={tmp_path}/same", f"other={tmp_path}/other"]
    demo.main([*arguments, "--opts", "MODEL.WEIGHTS", str(tmp_path / "base.pth")])
    picture = np.asarray(Image.open(tmp_path / "drawn" / "photo.png"))[demo._CAPTION :]
    base, same, other = np.split(picture, 3, axis=1)
    assert base.shape == (480, 480, 3)
    assert np.array_equal(base, same) and not np.array_equal(base, other)


def test_what_cannot_be_drawn_is_refused_before_a_model_is_built(tmp_path: Path) -> None:
    beside = load_config(str(TINY), opts=["MODEL.PEFT.WEIGHTS", str(tmp_path)]).cfg
    with pytest.raises(demo.ConfigError, match="--adapters names what is drawn: give MODEL.PEFT.WEIGHTS there"):
        demo.Predictor(beside, {"night": tmp_path})
    with_boxes = load_config(str(TINY), opts=["MODEL.LOAD_PROPOSALS", "True"]).cfg
    with pytest.raises(demo.ConfigError, match="boxes that were computed before, which an image file does not hold"):
        demo.Predictor(with_boxes)


@pytest.mark.parametrize("argument", ["night", "night=", "night={folder}/missing", "=x"])
def test_what_is_no_adapter_is_refused(argument: str, tmp_path: Path) -> None:
    with pytest.raises(demo.ConfigError, match="expected NAME=DIR"):
        demo.read_adapters([argument.format(folder=tmp_path)])


def test_an_adapter_on_the_hub_is_one_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = tmp_path / "models--user--night" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text(commit.name)
    assert demo.read_adapters(["night=user/night@main"]) == {"night": commit}
