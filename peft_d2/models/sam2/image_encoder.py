"""Hiera and its pyramid, the image encoder of Segment Anything 2.

Ryali et al., "Hiera", ICML 2023; windowed positions: Bolya et al., ICLR 2024. Parameter names are the published ones,
but for the MLPs, whose layers are called as Segment Anything's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from peft_d2.models.backbones.stages import from_windows, note_freeze_at, pad_bottom_right, to_windows
from peft_d2.models.checks import expect, expect_heads, expect_lengths, expect_numbers
from peft_d2.models.layers.transformer import run_block
from peft_d2.models.registration import entry
from peft_d2.models.sam.image_encoder import MLPBlock
from peft_d2.models.sam2.names import with_own_names

_STRIDE = 4  # of the patches
_LEVELS = ("res2", "res3", "res4", "res5")
KEYS = """
MODEL:
  # Segment Anything 2: Hiera; all else is MODEL.SAM's. The defaults are the published tiny model.
  SAM2:
    {EMBED_DIM: 96, NUM_HEADS: 1, DEPTHS: [1, 2, 7, 2], WINDOW_SIZES: [8, 4, 14, 7], GLOBAL_BLOCKS: [5, 7, 9],
     POSITIONS: [7, 7], MLP_RATIO: 4.0, USE_CHECKPOINT: false,
     # In inference the single mask of a prompt gives way to the best of three where it is not stable, as published.
     # False where training has taught the single mask alone: it would give way to masks that have learned nothing.
     DYNAMIC_MULTIMASK: true}
"""


def pooled(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, H / 2, W / 2, C)."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


class PooledAttention(nn.Module):
    """Attention over a map (N, H, W, dim) -> (N, H, W, dim_out), or half as high and wide where queries are pooled."""

    def __init__(self, dim: int, dim_out: int, n_heads: int, pool: bool) -> None:
        super().__init__()
        self.n_heads, self.pool = n_heads, pool
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q = pooled(q) if self.pool else q
        heads = [part.flatten(1, 2).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (q, k, v)]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.proj(attended.unflatten(1, q.shape[1:3]))


class HieraBlock(nn.Module):
    """Attention within windows and an MLP; the first block of a stage pools, and widens dim to dim_out."""

    def __init__(self, dim: int, dim_out: int, n_heads: int, mlp_ratio: float, window: int) -> None:
        super().__init__()
        self.pool, self.window = dim != dim_out, window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PooledAttention(dim, dim_out, n_heads, self.pool)
        self.norm2 = nn.LayerNorm(dim_out, eps=1e-6)
        self.mlp = MLPBlock(dim_out, int(dim_out * mlp_ratio))
        if self.pool:
            self.proj = nn.Linear(dim, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, dim) -> (N, H, W, dim_out), or half as high and wide where it pools."""
        shortcut, x = x, self.norm1(x)
        if self.pool:
            shortcut = pooled(self.proj(x))
        x = shortcut + self._attend(x, shortcut.shape[1], shortcut.shape[2])
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, height: int, width: int) -> Tensor:
        """To a map of ``height`` and ``width``; padded pixels take part, as they are."""
        if not self.window:
            return self.attn(x)
        padded = pad_bottom_right(x, self.window)
        windows = self.attn(to_windows(padded, self.window).unflatten(1, (self.window, self.window)))
        step = 2 if self.pool else 1
        sides = [side // step for side in padded.shape[1:3]]
        return from_windows(windows, self.window // step, *sides)[:, :height, :width]


class Hiera(nn.Module):
    """Image (N, 3, H, W), normalised, to the maps of its four stages, at strides 4 to 32, as ``MODEL.SAM2`` says."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        node, path = cfg.MODEL.SAM2, "MODEL.SAM2"
        expect_lengths(path, node, "DEPTHS", "WINDOW_SIZES")
        expect(len(node.DEPTHS) == len(_LEVELS), f"{path}.DEPTHS", node.DEPTHS, f"{len(_LEVELS)} numbers of blocks")
        expect_numbers(path, node, EMBED_DIM=1, MLP_RATIO=0.1)
        expect(min(node.DEPTHS) > 0, f"{path}.DEPTHS", node.DEPTHS, "at least one block in each stage")
        even = all(window > 1 and window % 2 == 0 for window in node.WINDOW_SIZES[:-1])
        expect(even, f"{path}.WINDOW_SIZES", node.WINDOW_SIZES, "even numbers, but for the last stage's")
        depth = sum(node.DEPTHS)
        inside = all(0 <= i < depth for i in node.GLOBAL_BLOCKS)
        expect(inside, f"{path}.GLOBAL_BLOCKS", node.GLOBAL_BLOCKS, f"numbers of the {depth} blocks, from 0")
        expect_heads(f"{path}.EMBED_DIM", node.EMBED_DIM, f"{path}.NUM_HEADS", node.NUM_HEADS)
        self.channels = [node.EMBED_DIM * 2**stage for stage in range(len(_LEVELS))]
        self.ends = [sum(node.DEPTHS[: stage + 1]) - 1 for stage in range(len(_LEVELS))]
        self.use_checkpoint = node.USE_CHECKPOINT
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(len(cfg.MODEL.PIXEL_MEAN), node.EMBED_DIM, 7, _STRIDE, padding=3)
        self.pos_embed = nn.Parameter(torch.zeros(1, node.EMBED_DIM, *node.POSITIONS))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, node.EMBED_DIM, *[node.WINDOW_SIZES[0]] * 2))
        for positions in (self.pos_embed, self.pos_embed_window):
            nn.init.trunc_normal_(positions, std=0.02)
        self.blocks = nn.ModuleList()
        for stage, (count, width) in enumerate(zip(node.DEPTHS, self.channels, strict=True)):
            for number in range(count):
                first = stage > 0 and number == 0  # in windows of the stage before
                window = 0 if len(self.blocks) in node.GLOBAL_BLOCKS else node.WINDOW_SIZES[stage - first]
                heads = node.NUM_HEADS * 2**stage
                self.blocks.append(HieraBlock(width // 2 if first else width, width, heads, node.MLP_RATIO, window))

    def embed(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to what the first block takes, (N, H / 4, W / 4, dim)."""
        x = self.patch_embed.get_submodule("proj")(x)
        height, width = x.shape[-2:]
        window = self.pos_embed_window
        times = [-(-side // of) for side, of in zip((height, width), window.shape[-2:], strict=True)]
        tiled = window.tile(1, 1, *times)[..., :height, :width]
        return (x + F.interpolate(self.pos_embed, size=(height, width), mode="bicubic") + tiled).permute(0, 2, 3, 1)

    def run(self, x: Tensor, maps: dict[str, Tensor], start: int, stop: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Blocks ``start`` to ``stop`` after x (N, H, W, C), and ``maps`` with those of stages that end among them."""
        for number in range(start, stop):
            x = run_block(self.blocks[number], x, use_checkpoint=self.use_checkpoint)
            if number in self.ends:
                maps = {**maps, _LEVELS[self.ends.index(number)]: x.permute(0, 3, 1, 2)}
        return x, maps

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, C, H, W) to the maps ``res2`` to ``res5`` (N, C_l, H_l, W_l)."""
        return self.run(self.embed(x), {}, 0, len(self.blocks))[1]


class SAM2ImageEncoder(nn.Module):
    """Images (N, 3, S, S) to three maps of OUT_CHANNELS: "res2", "res3" and "res4", at strides 4, 8 and 16.

    The two coarsest maps of Hiera are added up in the last of these; the others come from their stage alone.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.trunk = Hiera(cfg)
        self.neck = nn.Module()
        laterals = [nn.Conv2d(width, cfg.MODEL.SAM.OUT_CHANNELS, 1) for width in reversed(self.trunk.channels)]
        self.neck.convs = nn.ModuleList(nn.Sequential() for _ in laterals)
        for level, lateral in zip(self.neck.convs, laterals, strict=True):
            level.add_module("conv", lateral)
        self.steps = [*(f"trunk.blocks.{i}." for i in range(len(self.trunk.blocks))), "neck."]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.pyramid(self.trunk(x))

    def first(self, x: Tensor, count: int) -> dict[str, Tensor]:
        """What the first ``count`` of the ``steps`` make of images."""
        blocks = len(self.trunk.blocks)
        features, maps = self.trunk.run(self.trunk.embed(x), {}, 0, min(count, blocks))
        return self.pyramid(maps) if count > blocks else {**maps, "features": features}

    def rest(self, features: Mapping[str, Tensor], x: Tensor, count: int) -> dict[str, Tensor]:
        """The steps after the first ``count``, of what these make of the images ``x``."""
        if "features" not in features:
            return dict(features)
        maps = {name: value for name, value in features.items() if name != "features"}
        return self.pyramid(self.trunk.run(features["features"], maps, count, len(self.trunk.blocks))[1])

    def pyramid(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The neck's three maps of the trunk's four."""
        convs = reversed(list(self.neck.get_submodule("convs").children()))
        laterals = {name: conv(maps[name]) for name, conv in zip(_LEVELS, convs, strict=True)}
        coarse = F.interpolate(laterals.pop("res5").float(), scale_factor=2.0, mode="nearest")
        return {**laterals, "res4": laterals["res4"] + coarse.to(laterals["res4"].dtype)}


@entry(BACKBONE_REGISTRY, "PD2SAM2Hiera", keys=KEYS)
class SAM2Hiera(Backbone):
    """Hiera for other heads: its four maps as they are, below ``net.``."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        super().__init__()
        note_freeze_at(cfg, "PD2SAM2Hiera")
        self.net = Hiera(cfg)
        self._out_features = list(_LEVELS)
        self._out_feature_channels = dict(zip(_LEVELS, self.net.channels, strict=True))
        self._out_feature_strides = {name: _STRIDE * 2**i for i, name in enumerate(_LEVELS)}

    @property
    def size_divisibility(self) -> int:
        return self._out_feature_strides["res5"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W), normalised; sides are padded to multiples of the largest stride."""
        height, width = x.shape[-2:]
        return self.net(F.pad(x, (0, -width % self.size_divisibility, 0, -height % self.size_divisibility)))

    def upgrade_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Hiera of a whole Segment Anything 2 checkpoint under this backbone's names; others stay as they are."""
        trunk = "image_encoder.trunk."
        inside = {n.removeprefix(trunk): value for n, value in with_own_names(state).items() if n.startswith(trunk)}
        return {f"{prefix}net.{name}": value for name, value in inside.items()} if inside else dict(state)
