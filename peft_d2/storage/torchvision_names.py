"""ResNet weights of torchvision and timm (``layer1.0.conv1.weight``) under the names of Detectron2's backbones."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

_STEM = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
_NAME = re.compile(
    r"(?:layer(?P<layer>[1-4])\.(?P<block>\d+)\.)?(?P<part>conv\d|bn\d|downsample\.[01])\.(?P<tensor>\w+)"
)


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of such a ResNet."""
    return {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer4.0.bn2.weight"} <= state.keys()


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a ResNet's tensors; the classifier's keep their names."""
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
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
