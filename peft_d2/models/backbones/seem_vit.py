"""Segment Anything's image encoder as SEEM takes it: a pyramid of group-normed levels in the place of the neck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from peft_d2.models.backbones.sam_vit import ImageEncoder, encoder_settings
from peft_d2.models.backbones.stages import image_channels
from peft_d2.models.checks import expect_some_of

_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
_CHANNELS = {"res2": 128, "res3": 256, "res4": 512, "res5": 1024}


class GroupNormPyramid(nn.Module):
    """Four levels made of one map of ``dim`` channels at stride 16, each by itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        fine, coarse = max(_CHANNELS["res3"], dim // 2), max(_CHANNELS["res5"], 2 * dim)
        self.down_4 = nn.Sequential(
            *_normed(nn.ConvTranspose2d(dim, fine, 2, stride=2)),
            nn.GELU(),
            *_normed(nn.ConvTranspose2d(fine, fine // 2, 2, stride=2)),
            *_output(fine // 2, "res2"),
        )
        self.down_8 = nn.Sequential(*_normed(nn.ConvTranspose2d(dim, fine, 2, stride=2)), *_output(fine, "res3"))
        self.down_16 = nn.Sequential(*_output(dim, "res4"))
        self.down_32 = nn.Sequential(*_normed(nn.Conv2d(dim, coarse, 2, stride=2)), *_output(coarse, "res5"))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, dim, H, W) -> maps by name."""
        return {name: self.get_submodule(f"down_{stride}")(x) for name, stride in _STRIDES.items()}


class SEEMViT(ImageEncoder, Backbone):
    """See :class:`peft_d2.models.backbones.sam_vit.ImageEncoder`, whose arguments it takes.

    Args:
        out_features: out of ``res2`` to ``res5``.
        settings: of the encoder; patches of 16 px.
    """

    @configurable
    def __init__(self, *, out_features: Sequence[str], **settings: Any) -> None:
        super().__init__(**settings, out_channels=0)
        expect_some_of("MODEL.SAM.OUT_FEATURES", out_features, _STRIDES, "the pyramid's levels")
        self.neck = GroupNormPyramid(self.channels)  # type: ignore[assignment]
        self._out_features = list(out_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """See ``MODEL.SAM`` in :mod:`peft_d2.models.config`."""
        settings = encoder_settings(cfg)
        settings.pop("out_channels")
        return {**settings, "in_channels": image_channels(cfg, cls), "out_features": cfg.MODEL.SAM.OUT_FEATURES}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {name: ShapeSpec(channels=_CHANNELS[name], stride=_STRIDES[name]) for name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        """The largest stride."""
        return max(_STRIDES.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """(N, 3, H, W), normalised, sides multiples of 32 -> maps by name."""
        maps: dict[str, Tensor] = super().forward(x)  # type: ignore[assignment]
        return {name: maps[name] for name in self._out_features}


def _normed(convolution: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, nn.Module]:
    return convolution, nn.GroupNorm(1, convolution.out_channels)


def _output(channels: int, name: str) -> tuple[nn.Module, ...]:
    return *_normed(nn.Conv2d(channels, _CHANNELS[name], kernel_size=1)), nn.GELU()
