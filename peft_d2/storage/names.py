"""Names of tensors: those of ResNets from Caffe2 and torchvision become those of Detectron2's backbones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

# From the names in ResNets of Caffe2's ImageNet files, and of torchvision and timm, to those of Detectron2's backbones:
# each row is applied in turn.
_FROM_CAFFE2 = (
    (r"res(\d)_(\d+)_branch1_", r"res\1.\2.shortcut."),
    (r"res(\d)_(\d+)_branch2a_", r"res\1.\2.conv1."),
    (r"res(\d)_(\d+)_branch2b_", r"res\1.\2.conv2."),
    (r"res(\d)_(\d+)_branch2c_", r"res\1.\2.conv3."),
    (r"(res_)?conv1_(?=w$|b$|bn_)", "stem.conv1."),
    (r"(?<=\.)w$", "weight"),
    (r"(?<=\.)b$", "bias"),
    (r"(?<=\.)bn_s$", "norm.weight"),
    (r"(?<=\.)bn_b$", "norm.bias"),
    (r"(?<=\.)bn_rm$", "norm.running_mean"),
    (r"(?<=\.)bn_riv$", "norm.running_var"),
)
FROM_TORCHVISION = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^layer1\.", "res2."),
    (r"^layer2\.", "res3."),
    (r"^layer3\.", "res4."),
    (r"^layer4\.", "res5."),
    (r"(?<=\.)downsample\.0\.", "shortcut."),
    (r"(?<=\.)downsample\.1\.", "shortcut.norm."),
    (r"(?<=\.)bn(\d)\.", r"conv\1.norm."),
)
TORCHVISION = {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.bn2.weight"}
_PROGRAMS = (  # how names begin in the state dicts of these programs alone
    (r"model\.pixel_level_module\.", "Hugging Face's transformers"),
    (r"vision_encoder\.layers\.\d+\.layer_norm1\.", "Hugging Face's transformers"),
    (r"encoder\.layer\.\d+\.attention\.attention\.", "Hugging Face's transformers"),
    (r"model\.\d+\.(cv\d|conv|m\.\d+)\.", "ultralytics"),
    (r"(bbox_head|panoptic_head|decode_head|rpn_head\.rpn_conv|roi_head\.bbox_head)\.", "mmdetection or its kin"),
    (r"backbone\.body\.|backbone\.0\.body\.", "torchvision's detectors or DETR"),
)


def written_by(names: Iterable[str]) -> str:
    """The program whose names a state dict has, of those whose checkpoints do not fit here; "" if none is known."""
    names = list(names)
    return next((program for part, program in _PROGRAMS if any(re.match(part, name) for name in names)), "")


def renamed(name: str, table: Sequence[tuple[str, str]]) -> str:
    """A tensor's name after the rows (pattern, replacement) of ``table``, applied one after the other."""
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def from_caffe2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Caffe2's ResNet tensors; names of other parts stay as they are.

    Caffe2's affine channels have no statistics; mean 0 and variance 1 are added, as Detectron2's frozen norm expects.
    """
    result = {renamed(name, _FROM_CAFFE2): value for name, value in state.items()}
    for name, value in list(result.items()):
        if name.endswith(".norm.weight"):
            result.setdefault(name.removesuffix("weight") + "running_mean", torch.zeros_like(value))
            result.setdefault(name.removesuffix("weight") + "running_var", torch.ones_like(value))
    return result


def torchvision_misfit(model: nn.Module) -> str:
    """Why torchvision's weights would be wrong in this model although all names and shapes fit; else empty.

    Its bottlenecks have their stride in the 3x3 convolution, Detectron2's, by default, in the first 1x1; it was trained
    on RGB images of unit variance, Detectron2's own ImageNet weights on BGR images that are not divided by anything.
    """
    for name, module in model.named_modules():
        first = getattr(module, "conv1", None)
        if isinstance(first, nn.Conv2d) and hasattr(module, "conv3") and max(first.stride) > 1:
            return f"{name}.conv1 has stride {max(first.stride)}; set MODEL.RESNETS.STRIDE_IN_1X1 False"
    pixels = [getattr(model, name, None) for name in ("pixel_mean", "pixel_std")]
    if not all(isinstance(value, Tensor) and value.numel() == 3 for value in pixels):
        return ""
    mean, std = ([round(v, 3) for v in value.flatten().tolist()] for value in pixels if value is not None)
    if std != [1, 1, 1] and mean[0] >= mean[2]:
        return ""
    return (
        f"the model takes pixels less {mean}, over {std}; set INPUT.FORMAT RGB, "
        "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375]"
    )
