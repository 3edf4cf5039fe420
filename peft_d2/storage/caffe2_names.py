"""ResNet weights of Caffe2's ImageNet files (`R-50.pkl`, `R-101.pkl`) under the names of Detectron2's backbones."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BRANCHES = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_BLOCK = re.compile(
    r"res(?P<stage>[2-5])_(?P<block>\d+)_(?P<branch>branch1|branch2[abc])_(?P<kind>w|b|bn_s|bn_b|bn_rm|bn_riv)"
)
_STEM = re.compile(r"(conv1_(?P<conv>w|b)|res_conv1_(?P<norm>bn_s|bn_b|bn_rm|bn_riv))")
_KINDS = {
    "w": "weight",
    "b": "bias",
    "bn_s": "norm.weight",
    "bn_b": "norm.bias",
    "bn_rm": "norm.running_mean",
    "bn_riv": "norm.running_var",
}


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Caffe2's ResNet tensors; names of other parts stay as they are.

    Caffe2's affine channels have no statistics; mean 0 and variance 1 are added, as Detectron2's frozen norm expects.
    """
    result = {}
    for name, value in state.items():
        new = _renamed(name)
        result[new] = value
        if new.endswith(".norm.weight"):
            stem = new.removesuffix("weight")
            result.setdefault(stem + "running_mean", torch.zeros_like(value))
            result.setdefault(stem + "running_var", torch.ones_like(value))
    return result


def _renamed(name: str) -> str:
    block = _BLOCK.fullmatch(name)
    if block is not None:
        return f"res{block['stage']}.{block['block']}.{_BRANCHES[block['branch']]}.{_KINDS[block['kind']]}"
    stem = _STEM.fullmatch(name)
    if stem is not None:
        return f"stem.conv1.{_KINDS[stem['conv'] or stem['norm']]}"
    return name
