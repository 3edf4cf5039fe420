"""Dual Attention Vision Transformers (Ding et al., ECCV 2022) as Detectron2 backbones, with SEEM's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from peft_d2.models.backbones.stages import StagedBackbone, drop_path_rates, image_channels, init_linear
from peft_d2.models.checks import expect_heads, expect_lengths
from peft_d2.models.layers.recompute import run_block
from peft_d2.models.layers.windows import from_windows, pad_bottom_right, to_windows


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


class FeedForward(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.dim = dim
        self.net = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.net(x)


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
    name: str,
    attention: nn.Module,
    dim: int,
    mlp_ratio: float,
    drop_path: float,
    conv_at_attn: bool = True,
    conv_at_ffn: bool = True,
) -> nn.Sequential:
    """Attention, called ``name``, and a feed-forward network; a depthwise convolution (a position code) before each.

    Maps (N, H, W, C) to the same.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if conv_at_attn:
        parts["conv1"] = Residual(None, DepthwiseConvolution(dim))
    parts[name] = Residual(nn.LayerNorm(dim), attention, drop_path)
    if conv_at_ffn:
        parts["conv2"] = Residual(None, DepthwiseConvolution(dim))
    parts["ffn"] = Residual(nn.LayerNorm(dim), FeedForward(dim, int(dim * mlp_ratio)), drop_path)
    return nn.Sequential(parts)


def _pair(
    dim: int,
    n_heads: int,
    n_groups: int,
    window: int,
    qkv_bias: bool,
    drop_paths: tuple[float, float],
    options: dict[str, Any],
) -> nn.Sequential:
    windows, channels = WindowAttention(dim, n_heads, window, qkv_bias), ChannelAttention(dim, n_groups, qkv_bias)
    return nn.Sequential(
        OrderedDict(
            spatial_block=attention_block("window_attn", windows, dim, drop_path=drop_paths[0], **options),
            channel_block=attention_block("channel_attn", channels, dim, drop_path=drop_paths[1], **options),
        )
    )


class ConvEmbed(nn.Module):
    """A strided convolution with a LayerNorm over the channels before (``pre_norm``) or after it."""

    def __init__(
        self, in_channels: int, dim: int, kernel: int, stride: int, padding: int, pre_norm: bool = False
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(in_channels if pre_norm else dim)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, in_channels) -> (N, H', W', dim)."""
        x = self.norm(x) if self.pre_norm else x
        x = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x if self.pre_norm else self.norm(x)


class DaViT(StagedBackbone):
    """Four stages of blocks that attend first within windows, then among channels, named ``res2`` to ``res5``.

    Sides of images should be multiples of ``size_divisibility``: steps without padding drop an odd row or column.

    Args:
        dims, depths: channels of the stages, and pairs of blocks in them.
        n_heads, n_groups: heads of the window attention and groups of the channel attention, per stage.
        kernels, strides, paddings, pre_norms: of the convolution before each stage.
        out_features: which stages are given out.
        in_channels: of the image.
        window: side of the windows.
        mlp_ratio: hidden channels of the feed-forward networks over ``dims``.
        qkv_bias: whether q, k and v have a bias.
        drop_path: stochastic depth of the last block, growing linearly from 0.
        conv_at_attn, conv_at_ffn: whether there are convolutions before attention and feed-forward networks.
        use_checkpoint: recompute each pair of blocks in the backward pass instead of keeping its activations.
    """

    config_node = "MODEL.BACKBONE.DAVIT"

    @configurable
    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        n_heads: Sequence[int],
        n_groups: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        paddings: Sequence[int],
        pre_norms: Sequence[bool],
        out_features: Sequence[str],
        in_channels: int = 3,
        window: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
        conv_at_attn: bool = True,
        conv_at_ffn: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        sizes = zip([in_channels, *dims], dims, kernels, strides, paddings, pre_norms, strict=False)
        self.convs = nn.ModuleList(ConvEmbed(*size) for size in sizes)
        options = {"mlp_ratio": mlp_ratio, "conv_at_attn": conv_at_attn, "conv_at_ffn": conv_at_ffn}
        rates = drop_path_rates([2 * depth for depth in depths], drop_path)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    _pair(dim, heads, groups, window, qkv_bias, pair, options)
                    for pair in zip(paths[::2], paths[1::2], strict=True)
                )
            )
            for dim, heads, groups, paths in zip(dims, n_heads, n_groups, rates, strict=True)
        )
        self._name_stages(dims, list(accumulate(strides, mul)), out_features)
        self.apply(init_linear)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Arguments from ``MODEL.BACKBONE.DAVIT``.

        Raises:
            ModelConfigError: a list has another length than ``DIM_EMBED``, or channels cannot be shared out.
        """
        davit = cfg.MODEL.BACKBONE.DAVIT
        lists = {
            "dims": "DIM_EMBED",
            "depths": "DEPTHS",
            "n_heads": "NUM_HEADS",
            "n_groups": "NUM_GROUPS",
            "kernels": "PATCH_SIZE",
            "strides": "PATCH_STRIDE",
            "paddings": "PATCH_PADDING",
            "pre_norms": "PATCH_PRENORM",
        }
        path = cls.config_node
        expect_lengths(path, davit, *lists.values())
        for stage, channels in enumerate(davit.DIM_EMBED):
            for key in ("NUM_HEADS", "NUM_GROUPS"):
                expect_heads(f"{path}.DIM_EMBED[{stage}]", channels, f"{path}.{key}[{stage}]", davit[key][stage])
        return {argument: davit[key] for argument, key in lists.items()} | {
            "in_channels": image_channels(cfg, cls),
            "out_features": davit.OUT_FEATURES,
            "window": davit.WINDOW_SIZE,
            "drop_path": davit.DROP_PATH_RATE,
            "conv_at_attn": davit.CONV_AT_ATTN,
            "conv_at_ffn": davit.CONV_AT_FFN,
            "use_checkpoint": davit.ENABLE_CHECKPOINT,
        }

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) -> the maps (N, C_l, H_l, W_l) of ``out_features`` by name."""
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
