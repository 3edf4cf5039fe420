"""Segment Anything 2 on images, with prompts (Ravi et al., arXiv 2408.00714), as a Detectron2 meta-architecture.

It differs from Segment Anything in its encoder, in the fine maps that its mask decoder sees, in a score for an object
being there at all, and in that images are stretched to squares, not padded. What is for videos is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from peft_d2.models.checks import expect
from peft_d2.models.layers.postprocess import Canvas
from peft_d2.models.layers.transformer import MLP
from peft_d2.models.registration import entry
from peft_d2.models.sam.mask_decoder import SAMMaskDecoder
from peft_d2.models.sam.model import SegmentAnything
from peft_d2.models.sam.prompt_encoder import PromptEncoder, Prompts
from peft_d2.models.sam2.image_encoder import SAM2ImageEncoder
from peft_d2.models.sam2.names import with_own_names

_STABLE, _MARGIN = 0.98, 0.05  # a mask is stable whose area changes by no more within so many logits
_STRIDE = 16  # of the image's embedding


class SAM2PromptEncoder(PromptEncoder):
    """Segment Anything's; after a box comes a token that is no point."""

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens, dense = super().forward(points, boxes, masks)
        if boxes is not None:
            tokens = torch.cat([tokens, self.not_a_point_embed.weight.expand(len(tokens), 1, -1)], dim=1)
        return tokens, dense


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

    def forward(  # type: ignore[override]
        self,
        embedding: Tensor,
        positions: Tensor,
        tokens: Tensor,
        dense: Tensor,
        multimask: bool,
        fine: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As Segment Anything's, and logits (B, 1) of an object being there.

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

    image_encoder_class = SAM2ImageEncoder
    prompt_encoder_class = SAM2PromptEncoder
    mask_decoder_class = SAM2MaskDecoder

    def __init__(self, cfg: CfgNode) -> None:
        node = cfg.MODEL.SAM
        expect(node.PATCH_SIZE == _STRIDE, "MODEL.SAM.PATCH_SIZE", node.PATCH_SIZE, f"{_STRIDE} for SAM 2")
        expect(node.IMAGE_SIZE % 32 == 0, "MODEL.SAM.IMAGE_SIZE", node.IMAGE_SIZE, "a multiple of 32 for SAM 2")
        super().__init__(cfg)
        self.no_mem_embed = nn.Parameter(torch.zeros(node.OUT_CHANNELS))

    def encode(self, images: Tensor) -> list[Any]:
        return list(zip(*(maps.split(1) for maps in self.image_maps(images)), strict=True))

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

    def decode(self, embedding: Any, prompts: Prompts, multimask: bool = False) -> tuple[Tensor, Tensor]:
        """As Segment Anything's, for what :meth:`encode` gives of one image."""
        coarse, *fine = embedding
        tokens, dense = self.prompt_encoder(prompts.points, prompts.boxes, prompts.masks)
        positions = self.prompt_encoder.dense_positions()
        return self.mask_decoder(coarse, positions, tokens, dense, multimask, fine)[:2]

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published checkpoint under this model's names."""
        return with_own_names(state)
