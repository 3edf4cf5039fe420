"""Segment Anything 2 on images, with prompts (Ravi et al., arXiv 2408.00714), as a Detectron2 meta-architecture.

It differs from Segment Anything in its encoder, in the fine maps that its mask decoder sees, in a score for an object
being there at all, and in that images are stretched to squares, not padded. What is for videos is left out. The encoder
is Hiera (Ryali et al., ICML 2023; windowed positions: Bolya et al., ICLR 2024) with a pyramid. Parameter names are the
published ones, but for the MLPs, whose layers are called as Segment Anything's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from torch import Tensor, nn

from peft_d2.models.backbones.stages import MapBackbone, from_windows, note_freeze_at, pad_bottom_right, to_windows
from peft_d2.models.checks import expect, expect_heads, expect_lengths, expect_multiple, expect_numbers
from peft_d2.models.layers.postprocess import Canvas
from peft_d2.models.layers.transformer import MLP, run_block
from peft_d2.models.registration import entry
from peft_d2.models.sam.image_encoder import MLPBlock
from peft_d2.models.sam.mask_decoder import SAMMaskDecoder
from peft_d2.models.sam.model import SegmentAnything
from peft_d2.models.sam.prompt_encoder import Prompts
from peft_d2.models.sam2.names import with_own_names

_STABLE, _MARGIN = 0.98, 0.05  # a mask is stable whose area changes by no more within so many logits
_PATCH, _STRIDE = 4, 16  # of the first map, and of the image's embedding
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
        """Windowed attention, cut to ``height`` and ``width`` afterwards; padded pixels are attended to like others."""
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
        self.patch_embed.proj = nn.Conv2d(len(cfg.MODEL.PIXEL_MEAN), node.EMBED_DIM, 7, _PATCH, padding=3)
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
        """The first block's input (N, H / 4, W / 4, dim) of images (N, C, H, W)."""
        x = self.patch_embed.get_submodule("proj")(x)
        height, width = x.shape[-2:]
        window = self.pos_embed_window
        times = [-(-side // of) for side, of in zip((height, width), window.shape[-2:], strict=True)]
        tiled = window.tile(1, 1, *times)[..., :height, :width]
        return (x + F.interpolate(self.pos_embed, size=(height, width), mode="bicubic") + tiled).permute(0, 2, 3, 1)

    def run(self, maps: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
        """Run the blocks ``start`` to ``stop`` on ``maps["features"]`` (N, H, W, C).

        Returns ``maps`` with their output as "features", and with the maps of stages that end among these blocks.
        """
        maps, x = dict(maps), maps["features"]
        for number in range(start, min(stop, len(self.blocks))):
            x = run_block(self.blocks[number], x, use_checkpoint=self.use_checkpoint)
            if number in self.ends:
                maps[_LEVELS[self.ends.index(number)]] = x.permute(0, 3, 1, 2)
        return {**maps, "features": x}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (N, C, H, W) to the maps ``res2`` to ``res5`` (N, C_l, H_l, W_l)."""
        maps = self.run({"features": self.embed(x)}, 0, len(self.blocks))
        return {name: maps[name] for name in _LEVELS}


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
        """Images after the first ``count`` of the ``steps``."""
        maps = self.trunk.run({"features": self.trunk.embed(x)}, 0, count)
        return self.pyramid(maps) if count == len(self.steps) else maps

    def rest(self, features: Mapping[str, Tensor], x: Tensor, count: int) -> dict[str, Tensor]:
        """The three maps, from what :meth:`first` made of the images ``x`` in ``count`` steps."""
        done = count == len(self.steps)
        return dict(features) if done else self.pyramid(self.trunk.run(features, count, len(self.steps)))

    def pyramid(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The neck's three maps of the trunk's four."""
        convs = reversed(list(self.neck.get_submodule("convs").children()))
        laterals = {name: conv(maps[name]) for name, conv in zip(_LEVELS, convs, strict=True)}
        coarse = F.interpolate(laterals.pop("res5").float(), scale_factor=2.0, mode="nearest")
        return {**laterals, "res4": laterals["res4"] + coarse.to(laterals["res4"].dtype)}


@entry(BACKBONE_REGISTRY, "PD2SAM2Hiera", keys=KEYS)
class SAM2Hiera(MapBackbone):
    """Hiera for other heads: its four maps as they are, below ``net.``."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        super().__init__()
        note_freeze_at(cfg, "PD2SAM2Hiera")
        self.net = Hiera(cfg)
        strides = {name: _PATCH * 2**i for i, name in enumerate(_LEVELS)}
        self.give_out(_LEVELS, dict(zip(_LEVELS, self.net.channels, strict=True)), strides)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W), normalised; sides are padded to multiples of the largest stride."""
        return self.net(self.padded(x))

    def upgrade_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Hiera of a whole Segment Anything 2 checkpoint under this backbone's names; others stay as they are."""
        trunk = "image_encoder.trunk."
        inside = {n.removeprefix(trunk): value for n, value in with_own_names(state).items() if n.startswith(trunk)}
        return {f"{prefix}net.{name}": value for name, value in inside.items()} if inside else dict(state)


class SAM2MaskDecoder(SAMMaskDecoder):
    """Segment Anything's with finer maps of the image, and a score for the object being there."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        dim = cfg.MODEL.SAM.OUT_CHANNELS
        self.dynamic_multimask = cfg.MODEL.SAM2.DYNAMIC_MULTIMASK
        self.obj_score_token = nn.Embedding(1, dim)
        self.conv_s0 = nn.Conv2d(dim, dim // 8, kernel_size=1)
        self.conv_s1 = nn.Conv2d(dim, dim // 4, kernel_size=1)
        self.pred_obj_score_head = MLP(dim, dim, 1, 3)

    def own_tokens(self) -> Tensor:
        return torch.cat([self.obj_score_token.weight, super().own_tokens()])

    def upscale(self, pixels: Tensor, fine: Sequence[Tensor]) -> Tensor:
        grow, norm, act, grow_again, act_again = self.output_upscaling
        pixels = act(norm(grow(pixels) + self.conv_s1(fine[1])))
        return act_again(grow_again(pixels) + self.conv_s0(fine[0]))

    def forward(
        self,
        embedding: Tensor,
        positions: Tensor,
        tokens: Tensor,
        dense: Tensor,
        multimask: bool,
        fine: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """As in Segment Anything, and also logits (B, 1) that the object is there.

        ``fine`` are maps (1, C, 4 G, 4 G) and (1, C, 2 G, 2 G) of the image. In inference, with DYNAMIC_MULTIMASK, a
        single mask that is not stable gives way to the best of the three.
        """
        tokens, upscaled = self.attend(embedding, positions, tokens, dense, fine)
        there = self.pred_obj_score_head(tokens[:, 0])
        quality = self.iou_prediction_head(tokens[:, 1]).sigmoid()
        if not multimask and (self.training or not self.dynamic_multimask):
            return self.masks(tokens[:, 2:], upscaled, [0]), quality[:, :1], there
        masks = self.masks(tokens[:, 2:], upscaled, range(len(self.output_hypernetworks_mlps)))
        if multimask:
            return masks[:, 1:], quality[:, 1:], there
        inside, around = ((masks[:, 0] > limit).flatten(1).sum(1) for limit in (_MARGIN, -_MARGIN))
        stable = inside >= _STABLE * around  # an empty mask is
        rows = torch.arange(masks.shape[0], device=masks.device)  # no len(): an export keeps the number open
        best = 1 + quality[:, 1:].argmax(1)
        chosen = torch.where(stable, 0, best)
        return masks[rows, chosen][:, None], quality[rows, chosen][:, None], there


@entry(META_ARCH_REGISTRY, "PD2SAM2")
class SAM2(SegmentAnything):
    """See :class:`~peft_d2.models.sam.model.SegmentAnything`; images may have any proportions."""

    image_encoders = {"": SAM2ImageEncoder}
    pads_boxes = True
    mask_decoder_class = SAM2MaskDecoder

    def __init__(self, cfg: CfgNode) -> None:
        node = cfg.MODEL.SAM
        expect(node.PATCH_SIZE == _STRIDE, "MODEL.SAM.PATCH_SIZE", node.PATCH_SIZE, f"{_STRIDE} for SAM 2")
        expect_multiple("MODEL.SAM.IMAGE_SIZE", node.IMAGE_SIZE, 32, "{} for SAM 2")
        super().__init__(cfg)
        self.no_mem_embed = nn.Parameter(torch.zeros(node.OUT_CHANNELS))

    def image_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The embeddings (N, C, G, G) of images (N, 3, S, S), and their finer maps, at 4 G and at 2 G."""
        maps = self.image_encoder(images)
        return maps["res4"] + self.no_mem_embed[:, None, None], maps["res2"], maps["res3"]

    def preprocess(self, image: Tensor, name: str = "an image") -> Tensor:
        """Normalise (C, H, W), then stretch to (C, S, S)."""
        self.checked_size(image, name)
        square = (self.image_size, self.image_size)
        normed = self.normalised(image, name)[None]
        exact = normed.to(torch.promote_types(normed.dtype, torch.float32))  # torch has no such kernel for halves
        return F.interpolate(exact, size=square, mode="bilinear", align_corners=False, antialias=True)[0].to(normed)

    def _canvas(self, size: tuple[int, int], output: tuple[int, int] | None = None) -> Canvas:
        output = output or size
        return Canvas(output, output, output)  # masks cover the whole image

    def _prompts(self, item: dict[str, Any], size: tuple[int, int]) -> Prompts:
        prompts = super()._prompts(item, size)
        scale = torch.tensor([self.image_size / size[1], self.image_size / size[0]], device=self.device)
        boxes = None if prompts.boxes is None else prompts.boxes * scale.repeat(2)
        points = prompts.points and (prompts.points[0] * scale, prompts.points[1])
        return replace(prompts, boxes=boxes, points=points)

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published checkpoint under this model's names."""
        return with_own_names(state)
