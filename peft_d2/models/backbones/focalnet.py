"""Focal Modulation Networks (Yang et al., NeurIPS 2022) as Detectron2 backbones, with the published parameter names.

The two published kinds have different blocks: SEEM's Focal-L is a :class:`FocalNet`; its Focal-T, which has depthwise
convolutions before both halves of a block, is a :class:`DepthwiseFocalNet`.
"""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from peft_d2.models.backbones.stages import PatchEmbed, StagedBackbone
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

    Contexts are depthwise convolutions, one after the other, the first with a kernel of ``window``, and the map's mean.
    """

    def __init__(self, node: CfgNode, dim: int, levels: int, window: int) -> None:
        super().__init__()
        self.dim = dim
        self.scaled = node.SCALING_MODULATOR
        self.f = nn.Linear(dim, 2 * dim + levels + 1)
        self.h = nn.Conv2d(dim, dim, kernel_size=1)
        self.act = nn.GELU()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(node.DROP_RATE)
        kernels = [window + _KERNEL_STEP * level for level in range(levels)]
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False), nn.GELU())
            for kernel in kernels
        )
        self.ln = nn.LayerNorm(dim) if node.USE_POSTLN_IN_MODULATION else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, dim) -> the same."""
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
        modulated = (query * self.h(total)).permute(0, 2, 3, 1).contiguous()
        return self.proj_drop(self.proj(modulated if self.ln is None else self.ln(modulated)))


class FocalBlock(nn.Module):
    """Modulation and MLP, each with stochastic depth, a residual and, if USE_LAYERSCALE, learned gains per channel.

    USE_POSTLN normalises the output of each half instead of its input. ``depthwise`` puts a depthwise convolution with
    a residual before each half, and the post-norm after the sum.
    """

    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def __init__(
        self, node: CfgNode, dim: int, levels: int, window: int, drop_path: float, depthwise: bool = False
    ) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.post_norm = node.USE_POSTLN
        for name in ("gamma_1", "gamma_2"):
            gain = nn.Parameter(torch.full((dim,), _LAYER_SCALE)) if node.USE_LAYERSCALE else None
            self.register_parameter(name, gain)
        self.dw1 = _depthwise(dim) if depthwise else None
        self.norm1 = nn.LayerNorm(dim)
        self.modulation = FocalModulation(node, dim, levels, window)
        self.dw2 = _depthwise(dim) if depthwise else None
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * node.MLP_RATIO), drop=node.DROP_RATE)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, dim) -> the same."""
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
    """Four stages at strides 4, 8, 16 and 32, named ``res2`` to ``res5``; those in OUT_INDICES end in a norm.

    Images may have any size, as every stage pads. USE_CONV_EMBED has overlapping convolutions between the stages, not
    patches side by side. USE_CHECKPOINT computes blocks again in the backward pass.
    """

    config_node = "MODEL.BACKBONE.FOCAL"
    depthwise = False
    _STEM_PADDING = 2

    def build(self, node: CfgNode, in_channels: int) -> None:
        """Add the patch embedding, the stages and the norms of those in OUT_INDICES."""
        expect_lengths(self.config_node, node, "DEPTHS", "FOCAL_LEVELS", "FOCAL_WINDOWS")
        patch, dims = node.PATCH_SIZE, [node.EMBED_DIM * 2**i for i in range(len(node.DEPTHS))]
        kernel, padding = (7, self._STEM_PADDING) if node.USE_CONV_EMBED else (patch, 0)
        step = (3, 1) if node.USE_CONV_EMBED else (2, 0)
        self.patch_embed = PatchEmbed(in_channels, dims[0], patch, kernel, padding, "after" if node.PATCH_NORM else "")
        self.pos_drop = nn.Dropout(node.DROP_RATE)

        def block(i: int, number: int, drop_path: float) -> FocalBlock:
            return FocalBlock(node, dims[i], node.FOCAL_LEVELS[i], node.FOCAL_WINDOWS[i], drop_path, self.depthwise)

        self._add_stages(node, dims, block, lambda dim: PatchEmbed(dim, 2 * dim, 2, *step))
        for i in node.OUT_INDICES:
            self.add_module(f"norm{i}", nn.LayerNorm(dims[i]))
        normed = [self._stage_names[i] for i in node.OUT_INDICES]
        if bare := [name for name in self._out_features if name not in normed]:
            raise ModelConfigError(
                f"{self.config_node}.OUT_INDICES leaves out {bare} of OUT_FEATURES; add their numbers"
            )

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self._run_stages(self.pos_drop(self.patch_embed(image.permute(0, 2, 3, 1))))


@entry(BACKBONE_REGISTRY, "PD2DepthwiseFocalNet", upstream="focal_dw")
class DepthwiseFocalNet(FocalNet):
    """Focal-T's kind: depthwise convolutions in the blocks, norms after the sums, and a centred stem."""

    depthwise = True
    _STEM_PADDING = 3
