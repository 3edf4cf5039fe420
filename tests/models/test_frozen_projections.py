"""Frozen layers multiply all pixels at once: torch would copy a layer's weight for each row of a transposed map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import peft_d2

from .conftest import SMALL, make_config

FOCAL = {"EMBED_DIM": 8, "DEPTHS": [1, 1, 1, 1], "FOCAL_LEVELS": [1, 1, 1, 1], "FOCAL_WINDOWS": [3, 3, 3, 3]}
MODELS: dict[str, dict[str, Any]] = {
    "deformable": {},
    "transformer": {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "PD2TransformerEncoderPixelDecoder"},
    "focal": {
        "MODEL.BACKBONE.NAME": "PD2FocalNet",
        **{f"MODEL.BACKBONE.FOCAL.{key}": value for key, value in FOCAL.items()},
    },
}


class RepeatedMatrices(TorchDispatchMode):
    """Collects the shapes of matrices that a product is given many times over, as views of one."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.bmm.default:
            self.shapes += list(self.repeated(args))
        return function(*args, **(kwargs or {}))

    def repeated(self, operands: tuple[Tensor, ...]) -> Iterator[tuple[int, ...]]:
        for matrices in operands:
            if matrices.shape[0] > 2 and matrices.stride(0) == 0 and min(matrices.shape[1:]) > 1:
                yield tuple(matrices.shape)


@pytest.mark.parametrize("name", MODELS)
def test_no_weight_is_copied_for_each_pixel(name: str) -> None:
    model = build_model(make_config("coco/instance/mask2former_r50.yaml", {**SMALL, **MODELS[name]})).eval()
    model.requires_grad_(False)
    images = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)} for _ in range(2)]
    with torch.no_grad(), RepeatedMatrices() as seen:
        model(images)
    assert seen.shapes == []


def test_the_check_sees_such_a_product() -> None:
    with torch.no_grad(), RepeatedMatrices() as seen:
        torch.nn.Linear(8, 4).requires_grad_(False)(torch.randn(2, 8, 50).permute(2, 0, 1))
    assert seen.shapes == [(50, 8, 4)]


@pytest.mark.parametrize("grad", [False, True])
def test_nor_for_a_layer_that_is_adapted(grad: bool) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 4))
    peft_d2.inject(layer, [{"NAME": "lora", "RANK": 2, "TARGETS": ["0"]}])
    with torch.set_grad_enabled(grad), RepeatedMatrices() as seen:
        for rows in (2, 500):  # few take the thin branch, many the changed weight
            layer(torch.randn(3, 8, rows).permute(2, 0, 1))
    assert seen.shapes == []
