"""EoMT: a plain ViT whose last blocks attend over queries and patches together, without pixel or transformer decoder.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025. Matching, losses and inference are
Mask2Former's, and so is the config node: ``DEC_LAYERS`` counts the predictions, one before each joint block and one at
the end. Tasks are told apart by ``TEST``.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from peft_d2.data.images import output_size
from peft_d2.models.backbones.stages import MapBackbone, note_freeze_at
from peft_d2.models.backbones.timm import PixelChange, timm_of_config
from peft_d2.models.checks import expect, expect_numbers
from peft_d2.models.eomt.names import with_own_names
from peft_d2.models.layers.criterion import Target
from peft_d2.models.layers.transformer import LayerNorm2d
from peft_d2.models.mask2former.model import MaskFormer
from peft_d2.models.registration import entry

KEYS = """
MODEL:
  EOMT:
    # When the attention masks of each joint block begin to be left out in training, and when none is left: shares of
    # SOLVER.MAX_ITER, one for each block. [] leaves them as they are. Queries that are frozen keep theirs.
    ANNEALING_START: []
    ANNEALING_END: []
    # Semantic inference by overlapping squares of so many pixels a side; 0 takes the image as a whole.
    WINDOW: 0
    # MODEL.WEIGHTS holds the encoder as a difference to MODEL.TIMM.WEIGHTS, as the authors publish it for DINOv3.
    DELTA: false
SOLVER:
  {LAYER_DECAY: 1.0, LAYER_DECAY_BLOCKS: "backbone.net.blocks.*", LAYER_DECAY_SPARED: 0, BACKBONE_WARMUP_ITERS: 0}
"""


@entry(BACKBONE_REGISTRY, "PD2EoMTEncoder")
class EoMTEncoder(MapBackbone):
    """The ViT that ``MODEL.TIMM`` names, below ``net.``; it runs its blocks but for the last ``DEC_LAYERS - 1``.

    These are the ``joint_blocks``, in which queries stand before the tokens. What is injected can read off the blocks
    and their parts how tokens lie: ``num_prefix_tokens``, then a grid of H x W.
    """

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        super().__init__()
        node = cfg.MODEL.MASK_FORMER
        self.net = timm_of_config(cfg)
        note_freeze_at(cfg, "PD2EoMTEncoder")
        blocks: Any = getattr(self.net, "blocks", ())
        plain = len(blocks) > 0 and hasattr(self.net, "_pos_embed") and not getattr(self.net, "rope_mixed", False)
        plain = plain and not isinstance(self.net.norm, nn.Identity)
        expect(
            plain, "MODEL.TIMM.NAME", cfg.MODEL.TIMM.NAME, "a plain ViT that ends in a norm, such as DINOv2 or DINOv3"
        )
        masked = "attn_mask" in inspect.signature(type(blocks[0]).forward).parameters
        expect(
            masked, "MODEL.TIMM.NAME", cfg.MODEL.TIMM.NAME, "a ViT with masked attention, as timm 1.0.20 or newer has"
        )
        depth, joint = len(blocks), node.DEC_LAYERS - 1
        expect(
            0 < joint <= depth, "MODEL.MASK_FORMER.DEC_LAYERS", node.DEC_LAYERS, f"2 to {depth + 1}: joint blocks + 1"
        )
        self.first_joint = depth - joint
        self.steps = [*(f"net.blocks.{i}." for i in range(depth)), "net.norm."]  # the joint blocks included
        for number, block in enumerate(blocks):
            before = node.NUM_OBJECT_QUERIES if number >= self.first_joint else 0
            for module in (block, block.attn, block.mlp):  # timm's rotated attention reads it, and what is injected
                module.num_prefix_tokens = self.net.num_prefix_tokens + before
        self.pixels = PixelChange(self.net, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT == "BGR")
        patch = max(self.net.patch_embed.patch_size)
        self.give_out(["tokens"], {"tokens": self.net.embed_dim}, {"tokens": patch})

    def forward(self, x: Tensor) -> dict[str, Any]:
        """The joint blocks' input, of images (N, C, H, W), normalised by the config, sides multiples of the patch.

        ``tokens`` (N, P + H' W', dim), those before the patches being the class and the registers; ``grid`` (H', W').
        """
        return self.rest(self.first(x, 0), x, 0)

    def first(self, x: Tensor, count: int) -> Tensor:
        """Tokens of images after the first ``count`` of the ``steps``, at most up to the joint blocks."""
        grid = self._lay_out(x)
        placed = self.net._pos_embed(self.net.patch_embed(self.pixels(x)))
        tokens = self.net.norm_pre(placed[0] if isinstance(placed, tuple) else placed)
        return self._run(tokens, self._rope(grid), 0, count) if count else tokens

    def rest(self, tokens: Tensor, x: Tensor, count: int) -> dict[str, Any]:
        """What :meth:`forward` returns, from what :meth:`first` made of the images ``x``."""
        grid = self._lay_out(x)
        rope = self._rope(grid)
        return {"tokens": self._run(tokens, rope, count, self.first_joint), "grid": grid, "rope": rope}

    def _run(self, tokens: Tensor, rope: Tensor | None, start: int, stop: int) -> Tensor:
        for block in self.net.blocks[start : min(stop, self.first_joint)]:
            tokens = self.run(block, tokens, rope)
        return tokens

    def _rope(self, grid: tuple[int, int]) -> Tensor | None:
        """The rotary position embedding for a ``grid``, None if the ViT has none."""
        rope = getattr(self.net, "rope", None)
        return None if rope is None else rope.get_embed(shape=list(grid))

    def _lay_out(self, x: Tensor) -> tuple[int, int]:
        """The grid (H', W') of the patches of images ``x``, which is also set on the blocks and their parts."""
        patch = self.net.patch_embed.patch_size
        grid = (x.shape[-2] // patch[0], x.shape[-1] // patch[1])
        for block in self.net.blocks:
            for module in (block, block.attn, block.mlp):
                module.H, module.W = grid
        return grid

    def fit_positions(self, state: dict[str, Tensor]) -> None:
        """Interpolate positions of another square grid in a model's ``state`` to this one's, in place."""
        net, name = self.net, "backbone.net.pos_embed"
        found = state.get(name)
        wanted = getattr(net, "pos_embed", None)
        if found is None or wanted is None or found.shape[1] == wanted.shape[1]:
            return
        from timm.layers import resample_abs_pos_embed

        before = 0 if net.no_embed_class else net.num_prefix_tokens
        if math.isqrt(found.shape[1] - before) ** 2 == found.shape[1] - before:  # else the shapes will be refused
            state[name] = resample_abs_pos_embed(found, list(net.patch_embed.grid_size), num_prefix_tokens=before)

    @staticmethod
    def run(block: nn.Module, tokens: Tensor, rope: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """One block; ``mask`` (N, 1, T, T) is True where a token attends."""
        return block(tokens, attn_mask=mask) if rope is None else block(tokens, rope=rope, attn_mask=mask)

    @property
    def joint_blocks(self) -> Any:
        """The last blocks, which queries and patches pass together."""
        return self.net.blocks[self.first_joint :]


class AnnealedQueries(nn.Embedding):
    """Queries, and for each joint block the probability that a query may attend only within its mask.

    The probabilities are stored with the queries, as these learn to do without masks.
    """

    attn_mask_probs: Tensor

    def __init__(self, count: int, dim: int, blocks: int) -> None:
        super().__init__(count, dim)
        self.register_buffer("attn_mask_probs", torch.ones(blocks))

    @torch.no_grad()
    def anneal(self, progress: float, start: Sequence[float], end: Sequence[float], power: float) -> None:
        """Set the probabilities for the share ``progress`` of a training: 1 until ``start``, 0 from ``end`` on.

        Between the two they fall as (1 - t) ** ``power`` (Kerssies et al., section 3.3).
        """
        for i, (first, last) in enumerate(zip(start, end, strict=True)):
            done = (progress - first) / max(last - first, 1e-12)
            self.attn_mask_probs[i] = (1 - min(max(done, 0.0), 1.0)) ** power


def upscaling(dim: int) -> nn.Sequential:
    """Twice the size: (N, C, H, W) -> (N, C, 2 H, 2 W)."""
    layers = {
        "conv1": nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
        "act": nn.GELU(),
        "conv2": nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False),
        "norm": LayerNorm2d(dim),
    }
    return nn.Sequential(OrderedDict(layers))


@entry(SEM_SEG_HEADS_REGISTRY, "PD2EoMTHead")
class EoMTHead(nn.Module):
    """Masks and classes of the queries that stand before a ViT's tokens; ``ignore_value`` is a semantic map's."""

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        super().__init__()
        head, former, shape = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER, input_shape["tokens"]
        expect_numbers("MODEL.SEM_SEG_HEAD", head, NUM_CLASSES=1)
        expect_numbers("MODEL.MASK_FORMER", former, NUM_OBJECT_QUERIES=1, DEC_LAYERS=2)
        dim = shape.channels
        self.query_feat = AnnealedQueries(former.NUM_OBJECT_QUERIES, dim, former.DEC_LAYERS - 1)
        self.class_embed = nn.Linear(dim, head.NUM_CLASSES + 1)
        layers = (layer for _ in range(3) for layer in (nn.Linear(dim, dim), nn.GELU()))
        self.mask_embed = nn.Sequential(*list(layers)[:-1])
        steps = max(1, int(math.log2(shape.stride)) - 2)  # to a quarter of the image
        self.upscale = nn.Sequential(*(upscaling(dim) for _ in range(steps)))
        self.num_classes, self.ignore_value = head.NUM_CLASSES, head.IGNORE_VALUE

    @property
    def num_queries(self) -> int:
        """Q: how many queries join the patches."""
        return self.query_feat.num_embeddings

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> dict[str, Tensor]:
        """Normed tokens (N, Q + P + H W, C) -> ``pred_logits`` (N, Q, K + 1) and ``pred_masks`` (N, Q, 4 H, 4 W)."""
        queries, patches = tokens[:, : self.num_queries], tokens[:, -grid[0] * grid[1] :]
        pixels = self.upscale(patches.transpose(1, 2).unflatten(2, grid))
        masks = torch.einsum("bqc,bchw->bqhw", self.mask_embed(queries), pixels)
        return {"pred_logits": self.class_embed(queries), "pred_masks": masks}

    @torch.no_grad()
    def attention_mask(self, masks: Tensor, grid: tuple[int, int], tokens: int, probability: Tensor) -> Tensor:
        """(N, 1, T, T), False where a query does not attend: to patches outside of its mask (N, Q, h, w).

        Each query is masked with the ``probability`` () in training. In inference all of them are, or none, as most
        were in training.
        """
        patches, queries = grid[0] * grid[1], masks.shape[1]
        inside = F.interpolate(masks, size=grid, mode="bilinear", align_corners=False).flatten(2) > 0
        free = torch.rand(inside.shape[:2], device=masks.device)[..., None] if self.training else 0.5
        inside |= probability < free
        allowed = torch.ones(masks.shape[0], tokens, tokens, dtype=torch.bool, device=masks.device)
        allowed[:, :queries, -patches:] = inside
        return allowed[:, None]


@entry(META_ARCH_REGISTRY, "PD2EoMT", keys=KEYS)
class EoMT(MaskFormer):
    """EoMT: see :class:`~peft_d2.models.layers.mask_classifier.MaskClassifier`; ``MODEL.TIMM`` names the encoder."""

    pads_with_black = True

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        node, joint = cfg.MODEL.EOMT, cfg.MODEL.MASK_FORMER.DEC_LAYERS - 1
        expect_numbers("MODEL.EOMT", node, WINDOW=0)
        for key in ("ANNEALING_START", "ANNEALING_END"):
            fits = len(node[key]) in (0, joint) and len(node[key]) == len(node.ANNEALING_START)
            expect(fits, f"MODEL.EOMT.{key}", node[key], f"{joint} shares of the training, one for each joint block")
        whole = not node.WINDOW or not (self.instance_on or self.panoptic_on)
        expect(whole, "MODEL.EOMT.WINDOW", node.WINDOW, "0 for instances and panoptic results")
        source = cfg.MODEL.TIMM.WEIGHTS
        expect(source or not node.DELTA, "MODEL.TIMM.WEIGHTS", source, "what MODEL.EOMT.DELTA refers to")
        self.annealing = list(node.ANNEALING_START), list(node.ANNEALING_END), cfg.SOLVER.POLY_LR_POWER
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.window = node.WINDOW
        self._delta_to = cfg.clone() if node.DELTA else None

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """As :class:`~peft_d2.models.layers.mask_classifier.MaskClassifier`; by windows where the config says so."""
        if self.training:
            self.anneal()
        elif self.window and not self.is_empty(batched_inputs):
            return [{"sem_seg": self.by_windows(item)} for item in batched_inputs]
        return super().forward(batched_inputs)

    def anneal(self, progress: float | None = None) -> None:
        """Set the probability of masked attention in each joint block, for the share ``progress`` of a training.

        By default ``progress`` comes from Detectron2's event storage. Without one, or if the queries are frozen,
        nothing changes.
        """
        queries = self.sem_seg_head.query_feat
        if not self.annealing[0] or not queries.weight.requires_grad:
            return
        if progress is None:
            try:
                progress = get_event_storage().iter / self.max_iter
            except AssertionError:  # another trainer
                return
        queries.anneal(progress, *self.annealing)

    def to_batch(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """The images, normalised and padded with black, as published."""
        batch = super().to_batch(batched_inputs)
        black = -self.pixel_mean / self.pixel_std
        for image, (height, width) in zip(batch.tensor, batch.image_sizes, strict=True):
            image[:, height:], image[:, :, width:] = black, black
        return batch

    def predict(self, features: dict[str, Any], targets: list[Target] | None = None) -> dict[str, Any]:
        """The last prediction and, as ``aux_outputs``, those before joint blocks, if a mask or a loss needs them."""
        head, encoder = self.sem_seg_head, self.backbone
        tokens, grid, rope = (features[key] for key in ("tokens", "grid", "rope"))
        queries = head.query_feat.weight.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([queries, tokens], dim=1)
        probabilities = head.query_feat.attn_mask_probs
        # A block that masks nothing needs no prediction before it; a compiled graph cannot depend on that.
        always = self.training or torch.compiler.is_compiling()
        masked = [True] * len(probabilities) if always else (probabilities >= 0.5).tolist()
        predictions = []
        for block, is_masked, probability in zip(encoder.joint_blocks, masked, probabilities.unbind(), strict=True):
            mask = None
            if is_masked:
                predictions.append(head(encoder.net.norm(tokens), grid))
                mask = head.attention_mask(predictions[-1]["pred_masks"], grid, tokens.shape[1], probability)
            tokens = encoder.run(block, tokens, rope, mask)
        return {**head(encoder.net.norm(tokens), grid), "aux_outputs": predictions}

    def by_windows(self, item: dict[str, Any]) -> Tensor:
        """The semantic map (K, height, width) of an image: the mean of those of overlapping windows."""
        image, side = item["image"], self.window
        height, width = image.shape[-2:]
        places = [(y, x) for y in window_starts(height, side) for x in window_starts(width, side)]
        crops = [{**item, "image": image[:, y : y + side, x : x + side]} for y, x in places]
        for crop in crops:
            crop["height"], crop["width"] = crop["image"].shape[-2:]
        maps: Any = super().forward(crops)
        total = maps[0]["sem_seg"].new_zeros(self.sem_seg_head.num_classes + 1, height, width)  # and how often
        for (y, x), result in zip(places, maps, strict=True):
            part = total[:, y : y + side, x : x + side]
            part += F.pad(result["sem_seg"], (0, 0, 0, 0, 0, 1), value=1.0)
        wanted = output_size(item, (height, width))
        return F.interpolate((total[:-1] / total[-1])[None], size=wanted, mode="bilinear", align_corners=False)[0]

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published checkpoint under this model's names; one with ``DELTA`` is added to the weights it refers to.

        Positions for images of another size are interpolated.
        """
        state, published = with_own_names(state, self.state_dict().keys()), state
        self.backbone.fit_positions(state)
        if self._delta_to is not None and state.keys() != published.keys():
            base = {
                f"backbone.net.{name}": value for name, value in timm_of_config(self._delta_to).state_dict().items()
            }
            state = {name: value + base[name] if name in base else value for name, value in state.items()}
        return state


def window_starts(length: int, side: int) -> list[int]:
    """Starts of the fewest evenly spaced windows of ``side`` that cover ``length``."""
    count = -(-length // side)
    return [i * (length - side) // (count - 1) for i in range(count)] if count > 1 else [0]
