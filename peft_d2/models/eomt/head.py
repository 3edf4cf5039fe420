"""What EoMT adds to a ViT: queries, three layers for their masks, one for their classes, and a few that upscale."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from peft_d2.models.checks import expect_numbers
from peft_d2.models.layers.transformer import LayerNorm2d
from peft_d2.models.registration import entry


class AnnealedQueries(nn.Embedding):
    """Queries, and for each joint block the probability that one of them attends to its mask alone.

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
