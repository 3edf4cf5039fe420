"""Dual Attention Vision Transformers (Ding et al., ECCV 2022) as Detectron2 backbones, with SEEM's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from peft_d2.models.backbones.stages import PatchEmbed, StagedBackbone, drop_path_rates, init_linear
from peft_d2.models.checks import expect_heads, expect_lengths
from peft_d2.models.layers.transformer import FeedForward, run_block
from peft_d2.models.layers.windows import from_windows, pad_bottom_right, to_windows
from peft_d2.models.registration import entry

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
    """Softmax attention (..., T, C); written out, as in this order the figures are the published ones to the bit."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


class WindowAttention(nn.Module):
    """Multi-head self-attention of the pixels within windows (equation 3)."""

    def __init__(self, dim: int, n_heads: int, window: int, qkv_bias: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same; padding up to whole windows is attended to, as published."""
        height, width = x.shape[1:3]
        padded = pad_bottom_right(x, self.window)
        tokens = to_windows(padded, self.window)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = _attend(q, k, v).transpose(1, 2).flatten(2)
        return from_windows(self.proj(attended), self.window, *padded.shape[1:3])[:, :height, :width]


class ChannelAttention(nn.Module):
    """Self-attention of the channels within groups: each channel is a token that all pixels describe (equation 5)."""

    def __init__(self, dim: int, n_groups: int, qkv_bias: bool) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same."""
        q, k, v = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.n_groups, -1)).permute(2, 0, 3, 4, 1)
        return self.proj(_attend(q, k, v).flatten(1, 2).transpose(1, 2)).view(x.shape)


class DepthwiseConvolution(nn.Module):
    """3 x 3, each channel for itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same."""
        return self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Residual(nn.Module):
    """x + drop_path(fn(norm(x))), without the norm where ``norm`` is None."""

    def __init__(self, norm: nn.Module | None, fn: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.fn = fn
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same."""
        return x + self.drop_path(self.fn(x if self.norm is None else self.norm(x)))


def attention_block(
    name: str, attention: nn.Module, dim: int, mlp_ratio: float, drop_path: float, convolutions: tuple[bool, bool]
) -> nn.Sequential:
    """Attention, called ``name``, and a feed-forward network: maps (N, H, W, C) to the same.

    ``convolutions``: whether there is a depthwise convolution (a position code) before each.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if convolutions[0]:
        parts["conv1"] = Residual(None, DepthwiseConvolution(dim))
    parts[name] = Residual(nn.LayerNorm(dim), attention, drop_path)
    if convolutions[1]:
        parts["conv2"] = Residual(None, DepthwiseConvolution(dim))
    feed_forward = nn.Sequential(OrderedDict(net=FeedForward(dim, int(dim * mlp_ratio))))
    parts["ffn"] = Residual(nn.LayerNorm(dim), feed_forward, drop_path)
    return nn.Sequential(parts)


@entry(BACKBONE_REGISTRY, "PD2DaViT", upstream="davit", keys=KEYS)
class DaViT(StagedBackbone):
    """Four stages of blocks that attend first within windows, then among channels, named ``res2`` to ``res5``.

    Sides of images should be multiples of ``size_divisibility``: steps without padding drop an odd row or column.

    Args:
        dim_embed, depths: channels of the stages, and pairs of blocks in them.
        num_heads, num_groups: heads of the window attention and groups of the channel attention, per stage.
        patch_size, patch_stride, patch_padding, patch_prenorm: of the convolution before each stage.
        out_features: which stages are given out.
        in_channels: of the image.
        window_size: side of the windows.
        mlp_ratio: hidden channels of the feed-forward networks over ``dim_embed``.
        qkv_bias: whether q, k and v have a bias.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        conv_at_attn, conv_at_ffn: whether there are convolutions before attention and feed-forward networks.
        enable_checkpoint: recompute each pair of blocks in the backward pass instead of keeping its activations.
    """

    config_node = "MODEL.BACKBONE.DAVIT"

    @configurable
    def __init__(
        self,
        *,
        dim_embed: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        num_groups: Sequence[int],
        patch_size: Sequence[int],
        patch_stride: Sequence[int],
        patch_padding: Sequence[int],
        patch_prenorm: Sequence[bool],
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_channels: int = 3,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        conv_at_attn: bool = True,
        conv_at_ffn: bool = True,
        enable_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = enable_checkpoint
        norms = ["before" if before else "after" for before in patch_prenorm]
        sizes = zip([in_channels, *dim_embed], dim_embed, patch_stride, patch_size, patch_padding, norms, strict=False)
        self.convs = nn.ModuleList(
            PatchEmbed(inner, dim, stride, kernel, padding, norm, whole=False)
            for inner, dim, stride, kernel, padding, norm in sizes
        )
        convolutions = conv_at_attn, conv_at_ffn

        def pair(dim: int, heads: int, groups: int, rates: Sequence[float]) -> nn.Sequential:
            windows = WindowAttention(dim, heads, window_size, qkv_bias)
            channels = ChannelAttention(dim, groups, qkv_bias)
            return nn.Sequential(
                OrderedDict(
                    spatial_block=attention_block("window_attn", windows, dim, mlp_ratio, rates[0], convolutions),
                    channel_block=attention_block("channel_attn", channels, dim, mlp_ratio, rates[1], convolutions),
                )
            )

        stages = zip(
            dim_embed, num_heads, num_groups, drop_path_rates([2 * d for d in depths], drop_path_rate), strict=True
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(pair(dim, heads, groups, rates[i : i + 2]) for i in range(0, len(rates), 2)))
            for dim, heads, groups, rates in stages
        )
        self._name_stages(dim_embed, list(accumulate(patch_stride, mul)), out_features)
        self.apply(init_linear)

    @classmethod
    def check(cls, node: CfgNode) -> None:
        """See :meth:`StagedBackbone.check`."""
        path = cls.config_node
        per_stage = (
            "DEPTHS",
            "NUM_HEADS",
            "NUM_GROUPS",
            "PATCH_SIZE",
            "PATCH_STRIDE",
            "PATCH_PADDING",
            "PATCH_PRENORM",
        )
        expect_lengths(path, node, "DIM_EMBED", *per_stage)
        for stage, channels in enumerate(node.DIM_EMBED):
            for key in ("NUM_HEADS", "NUM_GROUPS"):
                expect_heads(f"{path}.DIM_EMBED[{stage}]", channels, f"{path}.{key}[{stage}]", node[key][stage])

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> the maps (N, C_l, H_l, W_l) of ``out_features`` by name."""
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
