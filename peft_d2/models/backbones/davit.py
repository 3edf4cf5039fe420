"""Dual Attention Vision Transformers (Ding et al., ECCV 2022) as Detectron2 backbones, with SEEM's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from peft_d2.models.backbones.stages import (
    PatchEmbed,
    StagedBackbone,
    drop_path_rates,
    from_windows,
    pad_bottom_right,
    to_windows,
)
from peft_d2.models.checks import expect_heads, expect_lengths
from peft_d2.models.layers.transformer import FeedForward, run_block
from peft_d2.models.registration import entry

_MLP_RATIO = 4
# What SEEM's published yaml files set; the defaults are its DaViT-d3.
KEYS = """
MODEL:
  BACKBONE:
    DAVIT:
      {DROP_PATH_RATE: 0.3, PATCH_SIZE: [7, 2, 2, 2], PATCH_STRIDE: [4, 2, 2, 2], PATCH_PADDING: [3, 0, 0, 0],
       PATCH_PRENORM: [false, true, true, true], DIM_EMBED: [128, 256, 512, 1024], NUM_HEADS: [4, 8, 16, 32],
       NUM_GROUPS: [4, 8, 16, 32], DEPTHS: [1, 1, 9, 1], WINDOW_SIZE: 7, CONV_AT_ATTN: true, CONV_AT_FFN: true,
       OUT_FEATURES: [res2, res3, res4, res5], OUT_INDICES: [0, 1, 2, 3], ENABLE_CHECKPOINT: false}
"""


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention (..., T, C), in the order of operations that gives the published results to the bit."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


class WindowAttention(nn.Module):
    """Self-attention of the pixels within windows (equation 3), padding included: (N, H, W, C) -> the same."""

    def __init__(self, dim: int, n_heads: int, window: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = pad_bottom_right(x, self.window)
        tokens = to_windows(padded, self.window)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = _attend(q, k, v).transpose(1, 2).flatten(2)
        return from_windows(self.proj(attended), self.window, *padded.shape[1:3])[:, :height, :width]


class ChannelAttention(nn.Module):
    """Self-attention of the channels within groups: each channel is a token that all pixels describe (equation 5)."""

    def __init__(self, dim: int, n_groups: int) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same."""
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.n_groups, -1)).permute(2, 0, 3, 4, 1)
        return self.proj(_attend(q, k, v).flatten(1, 2).transpose(1, 2)).view(x.shape)


class DepthwiseConvolution(nn.Module):
    """3 x 3, each channel for itself: (N, H, W, C) -> the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Residual(nn.Module):
    """x + drop_path(fn(norm(x))), without the norm where ``norm`` is None."""

    def __init__(self, norm: nn.Module | None, fn: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.fn = fn
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.fn(x if self.norm is None else self.norm(x)))


def attention_block(name: str, attention: nn.Module, dim: int, drop_path: float, node: CfgNode) -> nn.Sequential:
    """An ``attention`` under ``name`` and a feed-forward network, after depthwise convolutions if ``node`` asks."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if node.CONV_AT_ATTN:
        parts["conv1"] = Residual(None, DepthwiseConvolution(dim))
    parts[name] = Residual(nn.LayerNorm(dim), attention, drop_path)
    if node.CONV_AT_FFN:
        parts["conv2"] = Residual(None, DepthwiseConvolution(dim))
    feed_forward = nn.Sequential(OrderedDict(net=FeedForward(dim, _MLP_RATIO * dim)))
    parts["ffn"] = Residual(nn.LayerNorm(dim), feed_forward, drop_path)
    return nn.Sequential(parts)


def _pair(node: CfgNode, stage: int, rates: Sequence[float]) -> nn.Sequential:
    """A block that attends within windows and one that attends among channels."""
    dim = node.DIM_EMBED[stage]
    windows = WindowAttention(dim, node.NUM_HEADS[stage], node.WINDOW_SIZE)
    channels = ChannelAttention(dim, node.NUM_GROUPS[stage])
    return nn.Sequential(
        OrderedDict(
            spatial_block=attention_block("window_attn", windows, dim, rates[0], node),
            channel_block=attention_block("channel_attn", channels, dim, rates[1], node),
        )
    )


@entry(BACKBONE_REGISTRY, "PD2DaViT", upstream="davit", keys=KEYS)
class DaViT(StagedBackbone):
    """Four stages of blocks that attend first within windows, then among channels, named ``res2`` to ``res5``.

    Sides of images should be multiples of ``size_divisibility``: steps without padding drop an odd row or column.
    DEPTHS counts pairs of blocks; ENABLE_CHECKPOINT computes pairs again in the backward pass.
    """

    config_node = "MODEL.BACKBONE.DAVIT"

    def build(self, node: CfgNode, in_channels: int) -> None:
        """Add a patch embedding and pairs of blocks for each stage, under the published names."""
        path, patches = self.config_node, ("PATCH_SIZE", "PATCH_STRIDE", "PATCH_PADDING", "PATCH_PRENORM")
        expect_lengths(path, node, "DIM_EMBED", "DEPTHS", "NUM_HEADS", "NUM_GROUPS", *patches)
        for stage, channels in enumerate(node.DIM_EMBED):
            for key in ("NUM_HEADS", "NUM_GROUPS"):
                expect_heads(f"{path}.DIM_EMBED[{stage}]", channels, f"{path}.{key}[{stage}]", node[key][stage])
        self.use_checkpoint = node.ENABLE_CHECKPOINT
        dims = node.DIM_EMBED
        norms = ["before" if before else "after" for before in node.PATCH_PRENORM]
        strides, kernels, paddings = node.PATCH_STRIDE, node.PATCH_SIZE, node.PATCH_PADDING
        self.convs = nn.ModuleList(
            PatchEmbed(inner, dims[i], strides[i], kernels[i], paddings[i], norms[i], whole=False)
            for i, inner in enumerate([in_channels, *dims[:-1]])
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(_pair(node, stage, rates[i : i + 2]) for i in range(0, len(rates), 2)))
            for stage, rates in enumerate(drop_path_rates([2 * depth for depth in node.DEPTHS], node.DROP_PATH_RATE))
        )
        self._name_stages(dims, list(accumulate(node.PATCH_STRIDE, mul)), node.OUT_FEATURES)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = image.permute(0, 2, 3, 1)
        outputs = {}
        stages: Any = self.blocks
        for name, conv, pairs in zip(self._stage_names, self.convs, stages, strict=True):
            x = conv(x)
            for pair in pairs:
                x = run_block(pair, x, use_checkpoint=self.use_checkpoint)
            if name in self._out_features:
                outputs[name] = x.permute(0, 3, 1, 2).contiguous()
        return outputs
