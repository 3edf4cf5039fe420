"""A backbone of one's own under Mask2Former: Detectron2's registry and four maps are all that it takes."""

from __future__ import annotations

from typing import Any

from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import Tensor, nn

import peft_d2
from peft_d2.engine.config import load_config


@BACKBONE_REGISTRY.register()
class MyBackbone(Backbone):
    """Four strided convolutions. ``res2`` to ``res5`` are the names that the configs of all heads ask for."""

    def __init__(self, cfg: Any, input_shape: Any) -> None:
        super().__init__()
        widths = {"res2": 16, "res3": 32, "res4": 64, "res5": 128}
        self.stem = nn.Conv2d(input_shape.channels, 16, 3, stride=2, padding=1)
        before = [16, *widths.values()]
        self.stages = nn.ModuleDict(
            {name: nn.Conv2d(c_in, c, 3, 2, 1) for c_in, (name, c) in zip(before, widths.items(), strict=False)}
        )
        self._out_features = list(widths)
        self._out_feature_channels = widths
        self._out_feature_strides = {name: 4 * 2**i for i, name in enumerate(widths)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """(N, C, H, W), normalised -> maps by name."""
        maps, x = {}, self.stem(x).relu()
        for name, stage in self.stages.items():
            maps[name] = x = stage(x).relu()
        return maps


def main(config_file: str) -> nn.Module:
    """Build a published config on it, with LoRA in its stages."""
    peft_d2.register(upstream_names=True)
    opts = ["MODEL.BACKBONE.NAME", "MyBackbone", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
    model = build_model(load_config(config_file, opts=opts).cfg)
    lora = {"NAME": "lora", "TARGETS": ["backbone.stages.*"], "RANK": 4}
    print(peft_d2.inject(model, [lora], train=["sem_seg_head"]))
    return model


if __name__ == "__main__":
    main("configs/coco/instance/mask2former_r50.yaml")
