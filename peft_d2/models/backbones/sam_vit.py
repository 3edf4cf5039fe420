"""The image encoder of Segment Anything (Kirillov et al., ICCV 2023, section 3 and appendix A), and as a backbone.

A plain ViT in the manner of ViTDet (Li et al., ECCV 2022): attention within windows, but for a few global blocks.
Parameter names are the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from peft_d2.models.backbones.stages import image_channels
from peft_d2.models.checks import expect, expect_at_least, expect_heads, expect_some_of
from peft_d2.models.layers.norm import LayerNorm2d
from peft_d2.models.layers.perceptron import Perceptron
from peft_d2.models.layers.recompute import run_block
from peft_d2.models.layers.relative_attention import RelativePositionAttention
from peft_d2.models.layers.windows import from_windows, pad_bottom_right, to_windows

_EPS = 1e-6


class PatchEmbed(nn.Module):
    """Each patch of ``patch`` px becomes a vector of ``dim`` channels."""

    def __init__(self, in_channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, H / patch, W / patch, dim)."""
        return self.proj(x).permute(0, 2, 3, 1)


class EncoderBlock(nn.Module):
    """Attention and MLP, each pre-normed with a residual; ``window`` 0 attends over the whole map of ``grid`` px."""

    def __init__(self, dim: int, n_heads: int, mlp_ratio: float, window: int, grid: int) -> None:
        super().__init__()
        side = window or grid
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = RelativePositionAttention(dim, n_heads, (side, side))
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Perceptron(dim, int(dim * mlp_ratio), nn.GELU)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        x = x + self._attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if not self.window:
            return self.attn(x.flatten(1, 2), (height, width)).unflatten(1, (height, width))
        # Padded pixels take part: their keys and values are the biases of qkv.
        padded = pad_bottom_right(x, self.window)
        windows = self.attn(to_windows(padded, self.window), (self.window, self.window))
        return from_windows(windows, self.window, *padded.shape[1:3])[:, :height, :width]


class ImageEncoder(nn.Module):
    """Image to embedding.

    Args:
        image_size: side of the square images that positions are made for, px; other sizes interpolate them.
        patch: side of a patch, px.
        dim, depth, n_heads, mlp_ratio: of the transformer.
        window: side of the windows, patches.
        global_blocks: indices of the blocks that attend over the whole map.
        in_channels: of the image.
        out_channels: of the embedding; 0 leaves the neck out and gives the last block's ``dim`` channels.
        use_checkpoint: recompute blocks in the backward pass instead of storing them.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch: int,
        dim: int,
        depth: int,
        n_heads: int,
        mlp_ratio: float,
        window: int,
        global_blocks: Sequence[int],
        out_channels: int,
        in_channels: int = 3,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        grid = image_size // patch
        self.patch = patch
        self.channels = out_channels or dim
        self.use_checkpoint = use_checkpoint
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = PatchEmbed(in_channels, patch, dim)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim, n_heads, mlp_ratio, 0 if i in global_blocks else window, grid) for i in range(depth)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dim, out_channels, kernel_size=1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        ) if out_channels else nn.Identity()  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W), normalised, sides multiples of the patch -> (N, channels, H / patch, W / patch)."""
        x = self.patch_embed(x)
        x = x + self._positions(x.shape[1], x.shape[2])
        for block in self.blocks:
            x = run_block(block, x, use_checkpoint=self.use_checkpoint)
        return self.neck(x.permute(0, 3, 1, 2))

    def _positions(self, height: int, width: int) -> Tensor:
        if (height, width) == tuple(self.pos_embed.shape[1:3]):
            return self.pos_embed
        resized = F.interpolate(self.pos_embed.permute(0, 3, 1, 2), size=(height, width), mode="bicubic")
        return resized.permute(0, 2, 3, 1)


def encoder_settings(cfg: CfgNode) -> dict[str, Any]:
    """The arguments of :class:`ImageEncoder` in ``MODEL.SAM``.

    Raises:
        ModelConfigError: values that are out of range or do not go together.
    """
    node, path = cfg.MODEL.SAM, "MODEL.SAM"
    expect_at_least(path, node, PATCH_SIZE=1, IMAGE_SIZE=1, DEPTH=1, WINDOW_SIZE=1, OUT_CHANNELS=0)
    whole = node.IMAGE_SIZE % node.PATCH_SIZE == 0
    expect(whole, f"{path}.IMAGE_SIZE", node.IMAGE_SIZE, f"a multiple of PATCH_SIZE, {node.PATCH_SIZE}")
    inside = all(0 <= i < node.DEPTH for i in node.GLOBAL_BLOCKS)
    expect(inside, f"{path}.GLOBAL_BLOCKS", node.GLOBAL_BLOCKS, f"numbers of the {node.DEPTH} blocks, from 0")
    expect_heads(f"{path}.EMBED_DIM", node.EMBED_DIM, f"{path}.NUM_HEADS", node.NUM_HEADS)
    return {
        "image_size": node.IMAGE_SIZE,
        "patch": node.PATCH_SIZE,
        "dim": node.EMBED_DIM,
        "depth": node.DEPTH,
        "n_heads": node.NUM_HEADS,
        "mlp_ratio": node.MLP_RATIO,
        "window": node.WINDOW_SIZE,
        "global_blocks": node.GLOBAL_BLOCKS,
        "out_channels": node.OUT_CHANNELS,
        "use_checkpoint": node.USE_CHECKPOINT,
    }


class SAMViT(Backbone):
    """The image encoder without its neck, and a simple feature pyramid (ViTDet, section 3): any head can sit on it.

    Each level is made of the last block's map alone: rescaled, then two convolutions with norms.

    Args:
        net: the encoder; its blocks' map is ``net.channels`` wide, at stride ``net.patch``.
        channels: of each level.
        out_features: out of ``res2`` to ``res5`` (strides 4 to 32, for patches of 16 px).
    """

    _SCALES = {"res2": 4.0, "res3": 2.0, "res4": 1.0, "res5": 0.5}

    @configurable
    def __init__(self, *, net: ImageEncoder, channels: int, out_features: Sequence[str]) -> None:
        super().__init__()
        expect_some_of("MODEL.SAM.OUT_FEATURES", out_features, self._SCALES, "the pyramid's levels")
        self.net = net
        self.pyramid = nn.ModuleDict(
            {name: _level(net.channels, channels, self._SCALES[name]) for name in out_features}
        )
        self._out_features = list(out_features)
        self._out_feature_channels = {name: channels for name in out_features}
        self._out_feature_strides = {name: int(net.patch / self._SCALES[name]) for name in out_features}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """See ``MODEL.SAM`` in :mod:`peft_d2.models.config`."""
        return {
            "net": ImageEncoder(
                **{**encoder_settings(cfg), "out_channels": 0, "in_channels": image_channels(cfg, cls)}
            ),
            "channels": cfg.MODEL.SAM.PYRAMID_CHANNELS,
            "out_features": cfg.MODEL.SAM.OUT_FEATURES,
        }

    @property
    def size_divisibility(self) -> int:
        """The largest stride."""
        return max(self.net.patch, *self._out_feature_strides.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W), normalised; sides are padded to multiples of the largest stride."""
        height, width = x.shape[-2:]
        multiple = self.size_divisibility
        features = self.net(F.pad(x, (0, -width % multiple, 0, -height % multiple)))
        return {name: level(features) for name, level in self.pyramid.items()}

    def upgrade_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """The encoder of a whole Segment Anything checkpoint under this backbone's names; others stay as they are."""
        if not any(name.startswith("image_encoder.blocks.") for name in state):
            return dict(state)
        inside = {n.removeprefix("image_encoder."): v for n, v in state.items() if n.startswith("image_encoder.")}
        return {f"{prefix}net.{name}": value for name, value in inside.items() if not name.startswith("neck.")}


def _level(dim: int, channels: int, scale: float) -> nn.Sequential:
    """Rescale by ``scale``, then 1 x 1 and 3 x 3 convolutions to ``channels``, each normed."""
    rescale: list[nn.Module] = []
    if scale == 4.0:
        rescale = [nn.ConvTranspose2d(dim, dim // 2, 2, 2), LayerNorm2d(dim // 2), nn.GELU()]
        dim //= 2
    if scale >= 2.0:
        rescale.append(nn.ConvTranspose2d(dim, dim // 2, 2, 2))
        dim //= 2
    if scale == 0.5:
        rescale.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(
        *rescale,
        nn.Conv2d(dim, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    )
