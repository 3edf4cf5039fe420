"""Segment Anything's image encoder as a backbone: under a pyramid of its own, and as SEEM takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from peft_d2.models.backbones.stages import MapBackbone, note_freeze_at
from peft_d2.models.checks import expect_some_of
from peft_d2.models.layers.transformer import LayerNorm2d
from peft_d2.models.registration import entry
from peft_d2.models.sam.image_encoder import ImageEncoder, normed_convolutions

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}  # of patches of 16 px
_SEEM_CHANNELS = {"res2": 128, "res3": 256, "res4": 512, "res5": 1024}
KEYS = """
MODEL:
  SAM:
    # Levels of the backbones' pyramids; those of PD2SAMViT have so many channels each.
    OUT_FEATURES: [res2, res3, res4, res5]
    PYRAMID_CHANNELS: 256
"""


@entry(BACKBONE_REGISTRY, "PD2SAMViT", keys=KEYS)
class SAMViT(MapBackbone):
    """The encoder under a pyramid (ViTDet's, section 3 of Li et al., ECCV 2022), for other heads."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        super().__init__()
        self.net = ImageEncoder(cfg, neck=False)
        channels, names = cfg.MODEL.SAM.PYRAMID_CHANNELS, list(cfg.MODEL.SAM.OUT_FEATURES)
        note_freeze_at(cfg, "PD2SAMViT")
        self.pyramid = simple_pyramid("MODEL.SAM", names, self.net.channels, channels)
        strides = {name: self.net.patch * STRIDES[name] // 16 for name in names}
        self.give_out(names, dict.fromkeys(names, channels), strides)

    @property
    def size_divisibility(self) -> int:
        return max(self.net.patch, super().size_divisibility)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W), normalised; sides are padded to multiples of the largest stride."""
        features = self.net(self.padded(x))
        return {name: level(features) for name, level in self.pyramid.items()}

    def upgrade_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The encoder of a whole Segment Anything checkpoint under this backbone's names; others stay as they are."""
        if not any(name.startswith("image_encoder.blocks.") for name in state):
            return dict(state)
        inside = {n.removeprefix("image_encoder."): v for n, v in state.items() if n.startswith("image_encoder.")}
        return {f"{prefix}net.{name}": value for name, value in inside.items() if not name.startswith("neck.")}


def simple_pyramid(path: str, names: Sequence[str], dim: int, channels: int) -> nn.ModuleDict:
    """The wanted levels ``names`` (from OUT_FEATURES of ``path``), each made of one map of ``dim`` at stride 16."""
    expect_some_of(f"{path}.OUT_FEATURES", names, STRIDES, "the pyramid's levels")
    return nn.ModuleDict({name: _level(dim, channels, STRIDES[name]) for name in names})


def _level(dim: int, channels: int, stride: int) -> nn.Sequential:
    rescale: list[nn.Module] = []
    if stride == 4:
        rescale = [nn.ConvTranspose2d(dim, dim // 2, 2, 2), LayerNorm2d(dim // 2), nn.GELU()]
        dim //= 2
    if stride <= 8:
        rescale.append(nn.ConvTranspose2d(dim, dim // 2, 2, 2))
        dim //= 2
    if stride == 32:
        rescale.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*rescale, *normed_convolutions(dim, channels))


class GroupNormPyramid(nn.Module):
    """SEEM's pyramid: each of the levels ``names`` is made of the same map (N, dim, H, W) at stride 16."""

    def __init__(self, dim: int, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        fine, coarse = max(_SEEM_CHANNELS["res3"], dim // 2), max(_SEEM_CHANNELS["res5"], 2 * dim)
        self.down_4 = nn.Sequential(
            *_group_normed(nn.ConvTranspose2d(dim, fine, 2, stride=2)),
            nn.GELU(),
            *_group_normed(nn.ConvTranspose2d(fine, fine // 2, 2, stride=2)),
            *_output(fine // 2, "res2"),
        )
        self.down_8 = nn.Sequential(*_group_normed(nn.ConvTranspose2d(dim, fine, 2, stride=2)), *_output(fine, "res3"))
        self.down_16 = nn.Sequential(*_output(dim, "res4"))
        self.down_32 = nn.Sequential(*_group_normed(nn.Conv2d(dim, coarse, 2, stride=2)), *_output(coarse, "res5"))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The wanted ones of the levels ``res2`` to ``res5``, at strides 4 to 32."""
        return {name: self.get_submodule(f"down_{STRIDES[name]}")(x) for name in self.names}


@entry(BACKBONE_REGISTRY, "PD2SEEMViT", upstream="D2ViT")
class SEEMViT(ImageEncoder, MapBackbone):
    """The encoder as SEEM takes it: a pyramid of group-normed levels in the place of the neck; patches of 16 px."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        super().__init__(cfg, neck=False)
        expect_some_of("MODEL.SAM.OUT_FEATURES", cfg.MODEL.SAM.OUT_FEATURES, STRIDES, "the pyramid's levels")
        note_freeze_at(cfg, "PD2SEEMViT")
        self.neck = GroupNormPyramid(self.channels, cfg.MODEL.SAM.OUT_FEATURES)
        self.give_out(cfg.MODEL.SAM.OUT_FEATURES, _SEEM_CHANNELS, STRIDES)


def _group_normed(convolution: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, nn.Module]:
    return convolution, nn.GroupNorm(1, convolution.out_channels)


def _output(channels: int, name: str) -> tuple[nn.Module, ...]:
    return *_group_normed(nn.Conv2d(channels, _SEEM_CHANNELS[name], kernel_size=1)), nn.GELU()
