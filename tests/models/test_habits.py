"""Our models under other habits: hasattr, tracing, exporting, images of few or many channels, checkpointing."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_backbone
from detectron2.structures import Boxes
from torch import Tensor, nn

import peft_d2
from peft_d2 import peft
from peft_d2.data.images import DatasetError

from ..tiny_sam import SIZES
from .backbones.test_backbones import DAVIT, FOCAL
from .conftest import CLASSIFIERS, make_config
from .test_training import sample

FOCAL_NODE, DAVIT_NODE = "MODEL.BACKBONE.FOCAL", "MODEL.BACKBONE.DAVIT"
SWIN = {"EMBED_DIM": 8, "NUM_HEADS": [1, 2, 2, 4], "DEPTHS": [1, 1, 2, 1]}
SAM = {"IMAGE_SIZE": 64, **SIZES}

# Backbone: its config node and what makes it small, its key for activation checkpointing, a module of its last stage.
BACKBONES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "PD2SwinTransformer": ("MODEL.SWIN", SWIN, "USE_CHECKPOINT", "layers.3.*.qkv"),
    "PD2FocalNet": (FOCAL_NODE, FOCAL, "USE_CHECKPOINT", "layers.3.*.fc1"),
    "PD2DepthwiseFocalNet": (FOCAL_NODE, FOCAL, "USE_CHECKPOINT", "layers.3.*.fc1"),
    "PD2DaViT": (DAVIT_NODE, DAVIT, "ENABLE_CHECKPOINT", "blocks.3.*.qkv"),
    "PD2SAMViT": ("MODEL.SAM", SAM, "USE_CHECKPOINT", "net.blocks.3.*.qkv"),
    "PD2SEEMViT": ("MODEL.SAM", SAM, "USE_CHECKPOINT", "blocks.3.*.qkv"),
}
every_backbone = pytest.mark.parametrize("name", BACKBONES)


def backbone(name: str, overrides: dict[str, Any] | None = None) -> nn.Module:
    node, options, _, _ = BACKBONES[name]
    options = options if node == "MODEL.SAM" else {**options, "DROP_PATH_RATE": 0.0}
    keys = {"MODEL.BACKBONE.NAME": name, **{f"{node}.{key}": value for key, value in options.items()}}
    torch.manual_seed(0)
    return build_backbone(make_config(overrides={**keys, **(overrides or {})}))


def test_no_property_raises_anything_but_an_attribute_error() -> None:
    """``hasattr``, loops over ``dir``, tracing and debuggers read every property."""
    found = []
    for file in sorted(Path(peft_d2.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "property" in [ast.unparse(d) for d in node.decorator_list]:
                raised = [ast.unparse(inner) for inner in ast.walk(node) if isinstance(inner, ast.Raise)]
                found += [f"{file.name}: {node.name}: {r[:60]}" for r in raised if "AttributeError" not in r]
    assert found == []


def test_every_attribute_can_be_asked_for(classifier: Any) -> None:
    model = classifier({"TEST.PANOPTIC_ON": True})
    model.metadata = SimpleNamespace(name="mine")  # does not tell things from stuff
    assert {name for name in dir(model) if not hasattr(model, name)} == set()
    assert model.thing_classes is None


class Predictions(nn.Module):
    """A model up to its predictions, tensors in and out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model.predict(self.model.backbone(image))
        return outputs["pred_logits"], outputs["pred_masks"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_models_can_be_traced_and_exported(classifier: Any, how: str) -> None:
    base = classifier({"TEST.PANOPTIC_ON": True}).eval()
    base.metadata = SimpleNamespace(name="mine")
    model = Predictions(base)
    image = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        if how == "trace":
            other: Any = torch.jit.trace(model, image, check_trace=False)
        else:
            other = torch.export.export(model, (image,)).module()
        for found, expected in zip(other(image), model(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@every_backbone
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_backbones_take_as_many_channels_as_the_pixels_have(name: str, channels: int) -> None:
    pixels = {"MODEL.PIXEL_MEAN": [1.0] * channels, "MODEL.PIXEL_STD": [1.0] * channels}
    model = backbone(name, pixels)
    maps = model(torch.rand(1, channels, 64, 64))
    assert {key: value.shape[1] for key, value in maps.items()} == {
        key: shape.channels for key, shape in model.output_shape().items()
    }


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [*CLASSIFIERS, "sam"])
def test_models_train_on_as_many_channels_and_refuse_others(build: Any, sam: Any, kind: str, channels: int) -> None:
    pixels = {"MODEL.PIXEL_MEAN": [100.0] * channels, "MODEL.PIXEL_STD": [50.0] * channels}
    item = sample("tensor", size=(96, 96))
    item["instances"].gt_boxes = Boxes(torch.tensor([[4.0, 6, 30, 40], [20, 10, 70, 50], [0, 0, 12, 12]]))
    item["file_name"] = "a.tif"
    if kind == "sam":
        model = sam(pixels).train()
    else:
        config, options, _ = CLASSIFIERS[kind]
        model = build(config, {**options, **pixels}).train()
    item["image"] = torch.rand(channels, 96, 96) * 255
    assert all(loss.isfinite() for loss in model([item]).values())
    for other in {1, 3, 4} - {channels}:  # a single channel would be spread over all by broadcasting
        item["image"] = torch.rand(other, 96, 96)
        with pytest.raises(
            DatasetError, match=rf"a\.tif: the image is \({other}, 96, 96\).* takes {channels} channels"
        ):
            model([item])


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "sam"])
def test_results_have_the_size_that_is_asked_for(build: Any, sam: Any, kind: str) -> None:
    model = sam({}) if kind == "sam" else build(*CLASSIFIERS[kind][:2])
    item = {"image": torch.rand(3, 96, 96) * 255, "boxes": torch.tensor([[4.0, 6, 30, 40]]), "file_name": "a.png"}
    (result,) = model.eval()([{**item, "height": 48.0, "width": np.int64(72)}])  # as after a division
    assert result["instances"].pred_masks.shape[1:] == (48, 72)
    with pytest.raises(DatasetError, match=r"a\.png: results of 0 x 96 px are asked for"):
        model([{**item, "height": 0}])


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "sam"])
def test_an_image_of_one_pixel(build: Any, sam: Any, kind: str) -> None:
    """Padded to 32 px its coarsest map has one, and at width 32 each group of a norm has a single value."""
    model = sam({}) if kind == "sam" else build(*CLASSIFIERS[kind][:2])
    item = {"image": torch.rand(3, 1, 1) * 255, "boxes": torch.tensor([[0.0, 0, 1, 1]])}
    [result] = model.eval()([item])
    assert result["instances"].pred_masks.shape[1:] == (1, 1) and result["instances"].scores.isfinite().all()


@every_backbone
def test_lora_behind_frozen_layers_learns_with_activation_checkpointing(name: str) -> None:
    node, _, key, target = BACKBONES[name]
    gradients = []
    for again in (False, True):
        model = backbone(name, {f"{node}.{key}": again}).train()
        peft.inject(model, [{"NAME": "lora", "RANK": 2, "TARGETS": [target]}])
        torch.manual_seed(0)
        sum(value.square().mean() for value in model(torch.rand(1, 3, 64, 64)).values()).backward()
        gradients.append({t.name: t.param.grad for t in peft.trained_parameters(model)})
    for parameter, expected in gradients[0].items():
        assert gradients[1][parameter] is not None and expected.isfinite().all(), parameter
        torch.testing.assert_close(gradients[1][parameter], expected)
    assert any(expected.any() for expected in gradients[0].values())


@every_backbone
@pytest.mark.parametrize("frozen", [0, 2])
def test_freeze_at_is_not_passed_over_in_silence(name: str, frozen: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="peft_d2"):
        model = backbone(name, {"MODEL.BACKBONE.FREEZE_AT": frozen})
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert ("MODEL.BACKBONE.FREEZE_AT is 2" in caplog.text) == bool(frozen)


@pytest.mark.parametrize("around", ["the whole", "each pass"])
def test_what_is_trained_is_proved_in_half_precision(small: Any, around: str) -> None:
    """Autocast hands on a parameter's copy from pass to pass as long as it is on."""
    model = small()
    peft.inject(
        model, [{"NAME": "lora", "TARGETS": ["sem_seg_head.predictor.*.{self_attn,multihead_attn}"], "RANK": 2}]
    )
    autocast = torch.autocast("cpu", torch.bfloat16)
    if around == "the whole":
        with autocast:
            peft.prove_live(model, [sample("bitmasks")])
    else:
        peft.prove_live(model, lambda model: under(autocast, model, [sample("bitmasks")]))


def under(context: Any, model: nn.Module, batch: Any) -> Any:
    with context:
        return model(batch)
