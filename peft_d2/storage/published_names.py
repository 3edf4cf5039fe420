"""ResNet weights of Caffe2's ImageNet files, of torchvision and of timm, under the names of Detectron2's backbones."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_STEM = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
_NAME = re.compile(
    r"(?:layer(?P<layer>[1-4])\.(?P<block>\d+)\.)?(?P<part>conv\d|bn\d|downsample\.[01])\.(?P<tensor>\w+)"
)
_CAFFE2_BRANCHES = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_CAFFE2_BLOCK = re.compile(
    r"res(?P<stage>[2-5])_(?P<block>\d+)_(?P<branch>branch1|branch2[abc])_(?P<kind>w|b|bn_s|bn_b|bn_rm|bn_riv)"
)
_CAFFE2_STEM = re.compile(r"(conv1_(?P<conv>w|b)|res_conv1_(?P<norm>bn_s|bn_b|bn_rm|bn_riv))")
_CAFFE2_KINDS = {
    "w": "weight",
    "b": "bias",
    "bn_s": "norm.weight",
    "bn_b": "norm.bias",
    "bn_rm": "norm.running_mean",
    "bn_riv": "norm.running_var",
}


def from_caffe2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Caffe2's ResNet tensors; names of other parts stay as they are.

    Caffe2's affine channels have no statistics; mean 0 and variance 1 are added, as Detectron2's frozen norm expects.
    """
    result = {}
    for name, value in state.items():
        new = _of_caffe2(name)
        result[new] = value
        if new.endswith(".norm.weight"):
            stem = new.removesuffix("weight")
            result.setdefault(stem + "running_mean", torch.zeros_like(value))
            result.setdefault(stem + "running_var", torch.ones_like(value))
    return result


def _of_caffe2(name: str) -> str:
    block = _CAFFE2_BLOCK.fullmatch(name)
    if block is not None:
        return (
            f"res{block['stage']}.{block['block']}.{_CAFFE2_BRANCHES[block['branch']]}.{_CAFFE2_KINDS[block['kind']]}"
        )
    stem = _CAFFE2_STEM.fullmatch(name)
    if stem is not None:
        return f"stem.conv1.{_CAFFE2_KINDS[stem['conv'] or stem['norm']]}"
    return name


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of such a ResNet."""
    return {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.bn2.weight"} <= state.keys()


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a ResNet's tensors; the classifier's keep their names."""
    return {_of_torchvision(name): value for name, value in state.items()}


def _of_torchvision(name: str) -> str:
    found = _NAME.fullmatch(name)
    if found is None:
        return name
    layer, block, part, tensor = found.groups()
    if layer is None:
        return f"{_STEM[part]}.{tensor}" if part in _STEM else name
    inner = {"downsample.0": "shortcut", "downsample.1": "shortcut.norm"}.get(part) or re.sub(
        r"bn(\d)", r"conv\1.norm", part
    )
    return f"res{int(layer) + 1}.{block}.{inner}.{tensor}"


def misfit(model: nn.Module) -> str:
    """Why torchvision's weights would be wrong in this model although all names and shapes fit; else empty.

    Its bottlenecks have their stride in the 3x3 convolution, Detectron2's, by default, in the first 1x1; it was trained
    on RGB images of unit variance, Detectron2's own ImageNet weights on BGR images that are not divided by anything.
    """
    for name, module in model.named_modules():
        first = getattr(module, "conv1", None)
        if isinstance(first, nn.Conv2d) and hasattr(module, "conv3") and max(first.stride) > 1:
            return f"{name}.conv1 has stride {max(first.stride)}; set MODEL.RESNETS.STRIDE_IN_1X1 False"
    mean, std = (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    if not (isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.numel() == std.numel() == 3):
        return ""
    if bool((std == 1).all()) or float(mean.flatten()[0]) < float(mean.flatten()[2]):
        found = [[round(v, 3) for v in values.flatten().tolist()] for values in (mean, std)]
        return (
            f"the model takes pixels less {found[0]}, over {found[1]}; set INPUT.FORMAT RGB, "
            "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375]"
        )
    return ""
