"""The image encoder of Segment Anything (Kirillov et al., ICCV 2023, section 3 and appendix A).

A plain ViT in the manner of ViTDet (Li et al., ECCV 2022): attention within windows, but for a few global blocks.
Parameter names are the published ones.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import Tensor, nn

from peft_d2.models.backbones.stages import PatchEmbed, from_windows, pad_bottom_right, to_windows
from peft_d2.models.checks import expect, expect_heads, expect_multiple, expect_numbers
from peft_d2.models.layers.transformer import FeedForward, LayerNorm2d, run_block

MLPBlock = partial(FeedForward, names=("lin1", "lin2"))


def normed_convolutions(in_channels: int, channels: int) -> tuple[nn.Module, ...]:
    """A 1 x 1 and a 3 x 3 convolution to ``channels``, each followed by a norm."""
    return (
        nn.Conv2d(in_channels, channels, kernel_size=1, bias=False),
        LayerNorm2d(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        LayerNorm2d(channels),
    )


class ImageEncoder(nn.Module):
    """Image (N, C, H, W), normalised, sides multiples of the patch, to embedding (N, channels, H / patch, W / patch).

    ``MODEL.SAM`` describes it for squares of IMAGE_SIZE px; other sizes interpolate the positions that are made for it.
    Without the ``neck`` to OUT_CHANNELS, the last block's channels are given out.
    """

    def __init__(self, cfg: CfgNode, neck: bool = True) -> None:
        super().__init__()
        node = cfg.MODEL.SAM
        path = "MODEL.SAM"
        expect_numbers(path, node, PATCH_SIZE=1, IMAGE_SIZE=1, DEPTH=1, WINDOW_SIZE=1, OUT_CHANNELS=0)
        expect_multiple(f"{path}.IMAGE_SIZE", node.IMAGE_SIZE, node.PATCH_SIZE, "PATCH_SIZE, {}")
        inside = all(0 <= i < node.DEPTH for i in node.GLOBAL_BLOCKS)
        expect(inside, f"{path}.GLOBAL_BLOCKS", node.GLOBAL_BLOCKS, f"numbers of the {node.DEPTH} blocks, from 0")
        expect_heads(f"{path}.EMBED_DIM", node.EMBED_DIM, f"{path}.NUM_HEADS", node.NUM_HEADS)
        grid, dim = node.IMAGE_SIZE // node.PATCH_SIZE, node.EMBED_DIM
        self.patch = node.PATCH_SIZE
        self.channels = node.OUT_CHANNELS if neck else dim
        self.use_checkpoint = node.USE_CHECKPOINT
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.patch_embed = PatchEmbed(len(cfg.MODEL.PIXEL_MEAN), dim, node.PATCH_SIZE, norm="")
        windows = [0 if i in node.GLOBAL_BLOCKS else node.WINDOW_SIZE for i in range(node.DEPTH)]
        self.blocks = nn.ModuleList(EncoderBlock(dim, node.NUM_HEADS, node.MLP_RATIO, w, grid) for w in windows)
        self.neck: nn.Module = nn.Sequential(*normed_convolutions(dim, node.OUT_CHANNELS)) if neck else nn.Identity()
        self.steps = [*(f"blocks.{i}." for i in range(node.DEPTH)), "neck."]

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x, 0), x, 0)

    def first(self, x: Tensor, count: int) -> Tensor:
        """Images after the first ``count`` of the ``steps``: (N, H', W', C), or the final map after all of them."""
        # oneDNN's convolution of large patches in bfloat16 takes 780 MiB at 1024 px, and 8 times float32's time.
        with torch.autocast("cpu", enabled=False):
            x = self.patch_embed(x.permute(0, 2, 3, 1))
        positions: Tensor = self.pos_embed
        if x.shape[1:3] != positions.shape[1:3]:
            resized = F.interpolate(positions.permute(0, 3, 1, 2), size=x.shape[1:3], mode="bicubic")
            positions = resized.permute(0, 2, 3, 1)
        return self._run(x + positions, 0, count)

    def rest(self, features: Tensor, x: Tensor, count: int) -> Tensor:
        """The final map, from what :meth:`first` made of the images ``x`` in ``count`` steps."""
        return self._run(features, count, len(self.steps)) if count < len(self.steps) else features

    def _run(self, x: Tensor, start: int, stop: int) -> Tensor:
        for block in self.blocks[start:stop]:
            x = run_block(block, x, use_checkpoint=self.use_checkpoint)
        return self.neck(x.permute(0, 3, 1, 2)) if stop == len(self.steps) else x


class BackboneEncoder(nn.Module):
    """``MODEL.BACKBONE`` as an image encoder: its maps from stride PATCH_SIZE on, joined at that one, and the neck."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        node = cfg.MODEL.SAM
        self.backbone = build_backbone(cfg)
        shapes = {name: s for name, s in self.backbone.output_shape().items() if s.stride >= node.PATCH_SIZE}
        self.names = sorted(shapes, key=lambda name: shapes[name].stride)
        strides = [shapes[name].stride for name in self.names]
        has_own = strides[:1] == [node.PATCH_SIZE]
        expect(has_own, "MODEL.SAM.PATCH_SIZE", node.PATCH_SIZE, f"the stride of a map of {cfg.MODEL.BACKBONE.NAME}")
        expect_multiple("MODEL.SAM.IMAGE_SIZE", node.IMAGE_SIZE, strides[-1], "the backbone's stride, {}")
        channels = sum(shapes[name].channels for name in self.names)
        self.neck = nn.Sequential(*normed_convolutions(channels, node.OUT_CHANNELS))

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, C, S, S), normalised, to embedding (N, channels, S / patch, S / patch)."""
        maps = self.backbone(x)
        first, *others = (maps[name] for name in self.names)
        enlarged = (F.interpolate(m, size=first.shape[2:], mode="bilinear", align_corners=False) for m in others)
        return self.neck(torch.cat([first, *enlarged], dim=1))


class EncoderBlock(nn.Module):
    """Attention and MLP, each pre-normed with a residual; with ``window`` 0, attention over the whole ``grid``."""

    def __init__(self, dim: int, n_heads: int, mlp_ratio: float, window: int, grid: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RelativePositionAttention(dim, n_heads, (window or grid,) * 2)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(dim, int(dim * mlp_ratio))
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, dim) -> the same."""
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


class RelativePositionAttention(nn.Module):
    """Multi-head self-attention over all pixels of a map, with a learned term per relative row and column.

    Li et al., "MViTv2", CVPR 2022, equations 4 and 5: ``logits = q k' / sqrt(d) + q . R_h[y - y'] + q . R_w[x - x']``,
    with the unscaled q. ``size`` (H, W): what the tables of relative positions are made for; others interpolate them.
    """

    def __init__(self, dim: int, n_heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * size[0] - 1, dim // n_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * size[1] - 1, dim // n_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, H W, C) -> (B, H W, C) for maps of ``size`` (H, W)."""
        self.H, self.W = size  # what is injected into qkv may have to know how its tokens lie
        batch, tokens, channels = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        x = attend_on_map(q, k, v, self.rel_pos_h, self.rel_pos_w, size)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, channels))


def attend_on_map(q: Tensor, k: Tensor, v: Tensor, table_h: Tensor, table_w: Tensor, size: tuple[int, int]) -> Tensor:
    """Softmax of the logits above times v, for q, k, v (B, M, T, d) of a map of ``size`` (H, W), T = H W.

    A fused kernel takes no bias that has a gradient, and a bias is (T, T) a head: 768 MiB in float32 for 4096 tokens
    and 12 heads. So the terms of rows and columns are H + W more channels of q, and those of k say where a key lies.
    """
    (height, width), channels = size, q.shape[-1]
    grid, unscaled = q.unflatten(2, size), channels**0.5
    of_rows = (relative_rows(table_h, height, height) * unscaled).to(q.dtype)
    of_columns = (relative_rows(table_w, width, width) * unscaled).to(q.dtype)
    rows = torch.einsum("bmyxd,ykd->bmyxk", grid, of_rows)
    columns = torch.einsum("bmyxd,xkd->bmyxk", grid, of_columns)
    in_row = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0)
    in_column = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
    q = torch.cat([grid, rows, columns], dim=-1).flatten(2, 3)
    k = torch.cat([k, torch.cat([in_row, in_column], dim=-1).expand(*k.shape[:2], -1, -1)], dim=-1)
    v = F.pad(v, (0, height + width))  # kernels want as many channels
    return F.scaled_dot_product_attention(q, k, v, scale=channels**-0.5)[..., :channels]


def relative_rows(table: Tensor, queries: int, keys: int) -> Tensor:
    """Rows of ``table`` (L, d) for each pair of a query's and a key's coordinate: (queries, keys, d).

    The coarser axis is stretched to the finer one. A table made for another length is interpolated linearly.
    """
    needed = 2 * max(queries, keys) - 1
    if len(table) != needed:
        table = F.interpolate(table.t()[None].float(), size=needed, mode="linear")[0].t().to(table.dtype)
    query = torch.arange(queries, device=table.device)[:, None] * max(keys / queries, 1.0)
    key = torch.arange(keys, device=table.device)[None, :] * max(queries / keys, 1.0)
    return table[(query - key + (keys - 1) * max(queries / keys, 1.0)).long()]
