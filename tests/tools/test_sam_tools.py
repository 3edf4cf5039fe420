"""Segment Anything through the tools: pictures of prompted masks, one merged checkpoint, what other formats refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("detectron2")

import demo  # noqa: E402
from merge_adapter import merge_adapter, merge_parser  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2 import adapters, peft  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402

from ..tiny_sam import SIZES  # noqa: E402

ROOT = Path(__file__).parents[2]
SAM = {**SIZES, "IMAGE_SIZE": 64, "PATCH_SIZE": 8, "DEPTH": 2, "GLOBAL_BLOCKS": [1]}
LORA = {"NAME": "lora", "TARGETS": ["image_encoder.*.qkv"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": True}
ADAPTFORMER = {"NAME": "adaptformer", "TARGETS": ["image_encoder.*.mlp"], "BOTTLENECK": 8, "COBOT": True}


def build(config: Path, seed: int = 0) -> torch.nn.Module:
    from detectron2.modeling import build_model

    peft_d2.register()
    torch.manual_seed(seed)
    return build_model(load_config(str(config)).cfg).eval()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The tiny model's config with its base weights beside it, and two photos."""
    path = tmp_path / "config.yaml"
    model = {"DEVICE": "cpu", "WEIGHTS": str(tmp_path / "base.pth"), "SAM": SAM}
    base = {"_BASE_": str(ROOT / "configs" / "sam" / "vit_b_medical.yaml")}
    path.write_text(yaml.safe_dump({**base, "MODEL": model, "INPUT": {"FORMAT": "RGB"}}))
    torch.save({"model": build(path).state_dict()}, tmp_path / "base.pth")
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(pixels).save(photos / name)
    return path


@pytest.fixture
def pictured(config: Path) -> Callable[..., list[Path]]:
    """Run the demo with a boxes file of this content, or none."""

    def run(boxes: Any) -> list[Path]:
        folder = config.parent
        arguments = ["--config-file", config, "--input", folder / "photos", "--output", folder / "out"]
        if boxes is not None:
            (folder / "boxes.json").write_text(json.dumps(boxes))
            arguments += ["--boxes", folder / "boxes.json"]
        return demo.picture(demo.demo_parser().parse_args([*map(str, arguments), "--confidence-threshold", "-9"]))

    return run


def test_demo_of_boxes(
    pictured: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(demo, "draw", lambda *a: seen.append(a[1]["instances"]) or len(seen[-1]))
    assert [p.name for p in pictured({"a.png": [[5, 5, 30, 30], [0, 0, 90, 40]], "b.png": []})] == ["a.png", "b.png"]
    two, none = seen
    assert len(two) == 2 and len(none) == 0 and two.pred_masks.shape == (2, 40, 90) and not two.has("pred_classes")
    assert "a.png: 2 instances" in capsys.readouterr().out


def test_demo_writes_the_picture(pictured: Callable[..., list[Path]]) -> None:
    paths = pictured({"a.png": [[5, 5, 30, 30]], "b.png": []})
    assert all(Image.open(path).size == (1080, 480) for path in paths)


@pytest.mark.parametrize(
    ("boxes", "said"),
    [
        (None, "takes boxes as prompts: name them with --boxes"),
        ([[1, 2, 3, 4]], "no boxes for 'a.png'. Expected {'a.png'"),
        ({"a.png": [[1, 2, 3]], "b.png": []}, "no boxes for 'a.png'"),
        ({"a.png": []}, "no boxes for 'b.png'"),
    ],
)
def test_demo_without_boxes(pictured: Callable[..., list[Path]], boxes: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pictured(boxes)


def adapted(config: Path, method: dict[str, Any]) -> torch.nn.Module:
    model = build(config)
    peft_d2.inject(model, [method], train=["mask_decoder"])
    with torch.no_grad():
        for item in peft.trained_parameters(model):
            item.param.add_(0.05 * torch.randn_like(item.param))
    peft_d2.save_adapter(model, config.parent / "adapter")
    return model.eval()


def scores(model: torch.nn.Module) -> torch.Tensor:
    item = {"image": torch.full((3, 30, 64), 90.0), "boxes": [[3.0, 4, 30, 20]]}
    with torch.no_grad():
        found = model([item])[0]["instances"]
    return torch.cat([found.scores, found.pred_masks.flatten().float()])


def merged(config: Path) -> str:
    folder = config.parent
    flags = ["--config-file", config, "--adapter", folder / "adapter", "--output", folder / "merged.pth"]
    return merge_adapter(merge_parser().parse_args([*map(str, flags), "MODEL.WEIGHTS", str(folder / "base.pth")]))


def test_one_checkpoint_of_lora_with_cobot(config: Path) -> None:
    model = adapted(config, LORA)
    assert "merged.pth" in merged(config)
    plain = build(config, seed=5)
    plain.load_state_dict(torch.load(config.parent / "merged.pth", weights_only=True)["model"])
    torch.testing.assert_close(scores(plain), scores(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores(plain), scores(build(config)), atol=1e-3)
    again = build(config)
    adapters.load_adapter(again, config.parent / "adapter")
    assert torch.equal(scores(again), scores(model))


def test_what_no_weight_can_hold_and_no_other_format_knows(config: Path) -> None:
    adapted(config, ADAPTFORMER)
    with pytest.raises(peft.PeftError, match="no weight can hold"):
        merged(config)
    assert json.loads((config.parent / "adapter" / "adapter_config.json").read_text())["peft_type"] == "PEFT_D2"


def test_lora_with_cobot_is_no_plain_lora(config: Path) -> None:
    adapted(config, LORA)
    assert json.loads((config.parent / "adapter" / "adapter_config.json").read_text())["peft_type"] == "PEFT_D2"
