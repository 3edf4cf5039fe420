"""Focal Modulation Networks (Yang et al., NeurIPS 2022) as Detectron2 backbones, with the published parameter names.

Two kinds are published, which differ in their blocks and not in size alone: that of SEEM's Focal-L (:class:`FocalNet`)
and that of its Focal-T, with depthwise convolutions before either half of a block (:class:`DepthwiseFocalNet`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from peft_d2.models.backbones.stages import PatchEmbed, Stage, StagedBackbone, drop_path_rates, init_linear
from peft_d2.models.checks import ModelConfigError, expect_lengths
from peft_d2.models.layers.transformer import FeedForward
from peft_d2.models.registration import entry

_KERNEL_STEP = 2  # a level's kernel is wider by this than that of the level before
_LAYER_SCALE = 1e-4
# What SEEM's published yaml files set; the defaults are its Focal-T.
KEYS = """
MODEL:
  BACKBONE:
    FOCAL:
      {PRETRAIN_IMG_SIZE: 224, PATCH_SIZE: 4, EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], FOCAL_LEVELS: [3, 3, 3, 3],
       FOCAL_WINDOWS: [3, 3, 3, 3], DROP_PATH_RATE: 0.3, MLP_RATIO: 4.0, DROP_RATE: 0.0, PATCH_NORM: true,
       USE_CONV_EMBED: true, SCALING_MODULATOR: true, USE_CHECKPOINT: false, USE_POSTLN: true,
       USE_POSTLN_IN_MODULATION: false, USE_LAYERSCALE: true, OUT_FEATURES: [res2, res3, res4, res5],
       OUT_INDICES: [0, 1, 2, 3]}
"""


class FocalModulation(nn.Module):
    """Each pixel's query times a gated sum of its contexts, from near to global (equations 3 to 7).

    Args:
        dim: channels.
        levels: depthwise convolutions, one after the other; the mean over the map comes on top.
        window: kernel of the first.
        drop: dropout of the result.
        scaled: divide the sum by the number of contexts.
        norm: normalise before the last projection.
    """

    def __init__(
        self, dim: int, levels: int, window: int, drop: float = 0.0, scaled: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim
        self.scaled = scaled
        self.f = nn.Linear(dim, 2 * dim + levels + 1)
        self.h = nn.Conv2d(dim, dim, kernel_size=1)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        kernels = [window + _KERNEL_STEP * level for level in range(levels)]
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False), nn.GELU())
            for kernel in kernels
        )
        self.ln = nn.LayerNorm(dim) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same."""
        contexts = len(self.focal_layers) + 1
        projected = self.f(x).permute(0, 3, 1, 2).contiguous()
        query, context, gates = projected.split((self.dim, self.dim, contexts), dim=1)
        total = torch.zeros_like(context)
        for level, layer in enumerate(self.focal_layers):
            context = layer(context)
            total = total + context * gates[:, level : level + 1]
        total = total + self.act(context.mean((2, 3), keepdim=True)) * gates[:, -1:]
        if self.scaled:
            total = total / contexts
        modulated = (query * self.h(total)).permute(0, 2, 3, 1)
        return self.proj_drop(self.proj(modulated if self.ln is None else self.ln(modulated)))


class FocalBlock(nn.Module):
    """Modulation and MLP, each with layer scale, stochastic depth and a residual.

    Args:
        dim, levels, window: as in :class:`FocalModulation`.
        depthwise: a depthwise convolution with a residual before either half, and the post-norm after the sum.
        post_norm: normalise what a half gives (or, with ``depthwise``, the sum) instead of its input.
        layer_scale: learned gains per channel of what the halves give.
        mlp_ratio: hidden channels of the MLP over ``dim``.
        drop, drop_path: dropout, and stochastic depth of this block.
        scaled, norm: of the modulation.
    """

    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def __init__(
        self,
        dim: int,
        levels: int,
        window: int,
        drop_path: float,
        *,
        depthwise: bool = False,
        post_norm: bool = False,
        layer_scale: bool = False,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        scaled: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.post_norm = post_norm
        for name in ("gamma_1", "gamma_2"):
            self.register_parameter(name, nn.Parameter(torch.full((dim,), _LAYER_SCALE)) if layer_scale else None)
        self.dw1 = _depthwise(dim) if depthwise else None
        self.norm1 = nn.LayerNorm(dim)
        self.modulation = FocalModulation(dim, levels, window, drop, scaled, norm)
        self.dw2 = _depthwise(dim) if depthwise else None
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), drop=drop)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> the same."""
        x = self._half(x, self.dw1, self.norm1, self.modulation, self.gamma_1)
        return self._half(x, self.dw2, self.norm2, self.mlp, self.gamma_2)

    def _half(
        self, x: Tensor, convolution: nn.Module | None, norm: nn.Module, change: nn.Module, gamma: Tensor | None
    ) -> Tensor:
        if convolution is not None:
            x = x + convolution(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        changed = change(x if self.post_norm else norm(x))
        if self.post_norm and not self.depthwise:
            changed = norm(changed)
        x = x + self.drop_path(changed if gamma is None else gamma * changed)
        return norm(x) if self.post_norm and self.depthwise else x


def _depthwise(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)


@entry(BACKBONE_REGISTRY, "PD2FocalNet", upstream="focal", keys=KEYS)
class FocalNet(StagedBackbone):
    """Four stages at strides 4, 8, 16 and 32, named ``res2`` to ``res5``, each with a norm of its own on its output.

    Images may have any size, as every stage pads.

    Args:
        embed_dim: channels of the first stage; they double with each.
        depths, focal_levels, focal_windows: blocks, focal levels and first focal kernel per stage.
        out_features: which stages are given out.
        out_indices: numbers of the stages that have an output norm; all by default.
        in_channels: of the image.
        patch_size, patch_norm: stride of the first stage; a norm after the stem.
        use_conv_embed: overlapping convolutions between the stages instead of patches side by side.
        drop_rate, drop_path_rate: dropout, and stochastic depth of the last block, growing linearly from 0.
        use_postln, use_layerscale, scaling_modulator, use_postln_in_modulation: see :class:`FocalBlock`.
        use_checkpoint: recompute each block in the backward pass instead of keeping its activations.
    """

    config_node = "MODEL.BACKBONE.FOCAL"
    depthwise = False
    _STEM_PADDING = 2

    @configurable
    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        focal_levels: Sequence[int],
        focal_windows: Sequence[int],
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        out_indices: Sequence[int] | None = None,
        in_channels: int = 3,
        patch_size: int = 4,
        patch_norm: bool = True,
        use_conv_embed: bool = True,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_postln: bool = False,
        use_layerscale: bool = False,
        scaling_modulator: bool = False,
        use_postln_in_modulation: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**i for i in range(len(depths))]
        stem = (7, self._STEM_PADDING) if use_conv_embed else (patch_size, 0)
        step = (3, 1) if use_conv_embed else (2, 0)
        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size, *stem, norm="after" if patch_norm else "")
        self.pos_drop = nn.Dropout(drop_rate)
        options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "drop": drop_rate, "depthwise": self.depthwise}
        options |= {"post_norm": use_postln, "layer_scale": use_layerscale}
        options |= {"scaled": scaling_modulator, "norm": use_postln_in_modulation}
        self.layers = nn.ModuleList()
        for i, (dim, rates) in enumerate(zip(dims, drop_path_rates(depths, drop_path_rate), strict=True)):
            downsample = PatchEmbed(dim, 2 * dim, 2, *step) if i + 1 < len(dims) else None
            blocks = [FocalBlock(dim, focal_levels[i], focal_windows[i], rate, **options) for rate in rates]
            self.layers.append(Stage(blocks, downsample, use_checkpoint))
        self._name_stages(dims, [patch_size * 2**i for i in range(len(dims))], out_features)
        for i in range(len(dims)) if out_indices is None else out_indices:
            self.add_module(f"norm{i}", nn.LayerNorm(dims[i]))
        bare = [f"res{i + 2}" for i in range(len(dims)) if not hasattr(self, f"norm{i}")]
        if bare := [name for name in bare if name in out_features]:
            raise ModelConfigError(
                f"{self.config_node}.OUT_INDICES leaves out {bare} of OUT_FEATURES; add their numbers"
            )
        self.apply(init_linear)

    @classmethod
    def check(cls, node: CfgNode) -> None:
        """See :meth:`StagedBackbone.check`."""
        expect_lengths(cls.config_node, node, "DEPTHS", "FOCAL_LEVELS", "FOCAL_WINDOWS")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> the maps (N, C_l, H_l, W_l) of ``out_features`` by name."""
        return self._run_stages(self.pos_drop(self.patch_embed(image.permute(0, 2, 3, 1))))


@entry(BACKBONE_REGISTRY, "PD2DepthwiseFocalNet", upstream="focal_dw")
class DepthwiseFocalNet(FocalNet):
    """The other kind: depthwise convolutions in the blocks, norms after the sums, and a centred stem."""

    depthwise = True
    _STEM_PADDING = 3
