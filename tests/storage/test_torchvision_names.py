"""torchvision's ResNets in Detectron2's backbones: outputs equal torchvision's own, what would be wrong is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peft_d2.storage import CheckpointError, load_base

pytest.importorskip("detectron2")
torchvision = pytest.importorskip("torchvision")

from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import build_backbone  # noqa: E402


def backbone(depth: int, stride_in_1x1: bool = False) -> nn.Module:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = stride_in_1x1
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return build_backbone(cfg, ShapeSpec(channels=3)).eval()


def published(depth: int, path: Path) -> nn.Module:
    """torchvision's network with random weights and statistics, saved as its files are."""
    torch.manual_seed(depth)
    network = getattr(torchvision.models, f"resnet{depth}")(num_classes=7).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.2)
    torch.save(network.state_dict(), path)
    return network


@pytest.mark.parametrize("depth", [18, 50])
def test_outputs_are_torchvisions(depth: int, tmp_path: Path) -> None:
    network, model = published(depth, tmp_path / "r.pth"), nn.ModuleDict({"backbone": backbone(depth)}).eval()
    report = load_base(model, tmp_path / "r.pth")
    assert report.backbone == "backbone." and sorted(report.unexpected) == ["backbone.fc.bias", "backbone.fc.weight"]
    assert not report.initial
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        x = network.maxpool(network.relu(network.bn1(network.conv1(image))))
        for name, out in model["backbone"](image).items():
            x = network.get_submodule(f"layer{int(name[-1]) - 1}")(x)
            torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-4)


def test_strides_elsewhere_are_refused(tmp_path: Path) -> None:
    published(50, tmp_path / "r.pth")
    with pytest.raises(CheckpointError, match=r"res3\.0\.conv1 has stride 2; set MODEL\.RESNETS\.STRIDE_IN_1X1 False"):
        load_base(backbone(50, stride_in_1x1=True), tmp_path / "r.pth")


def test_a_model_with_torchvisions_names_gets_them_as_they_are(tmp_path: Path) -> None:
    network = published(18, tmp_path / "r.pth")
    model = nn.ModuleDict({"backbone": torchvision.models.resnet18(num_classes=7)})
    load_base(model, tmp_path / "r.pth")
    torch.testing.assert_close(model["backbone"].state_dict(), network.state_dict())


@pytest.mark.parametrize(
    ("mean", "std", "fits"),
    [
        ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], True),
        ([123.675, 116.28, 103.53], [1.0, 1.0, 1.0], False),
        ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395], False),
    ],
    ids=["as torchvision", "not divided", "BGR"],
)
def test_pixels_of_another_kind_are_refused(mean: list[float], std: list[float], fits: bool, tmp_path: Path) -> None:
    published(18, tmp_path / "r.pth")
    model = nn.ModuleDict({"backbone": backbone(18)})
    model.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
    model.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))
    if fits:
        load_base(model, tmp_path / "r.pth")
    else:
        with pytest.raises(CheckpointError, match=r"set INPUT\.FORMAT RGB, MODEL\.PIXEL_MEAN"):
            load_base(model, tmp_path / "r.pth")
