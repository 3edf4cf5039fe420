"""The mask decoder of Segment Anything (Kirillov et al., ICCV 2023, appendix A). Names are the published ones."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from peft_d2.models.layers.transformer import MLP
from peft_d2.models.sam.common import LayerNorm2d
from peft_d2.models.sam.transformer import TwoWayTransformer

_AMBIGUOUS = 3  # masks for a prompt that could mean several things; one more is for a prompt that cannot


class SAMMaskDecoder(nn.Module):
    """Masks and their expected IoU from an image's embedding and prompts, both of OUT_CHANNELS of ``MODEL.SAM``."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        node, masks = cfg.MODEL.SAM, _AMBIGUOUS + 1
        dim = node.OUT_CHANNELS
        self.transformer = TwoWayTransformer(node.DECODER_DEPTH, dim, node.DECODER_HEADS, node.DECODER_MLP_DIM)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(masks, dim)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, kernel_size=2, stride=2),
            LayerNorm2d(dim // 4),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, 3) for _ in range(masks))
        self.iou_prediction_head = MLP(dim, node.IOU_HEAD_HIDDEN, masks, node.IOU_HEAD_DEPTH)

    def forward(
        self, embedding: Tensor, positions: Tensor, tokens: Tensor, dense: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Decode B prompts together.

        Args:
            embedding: of the image, (1, C, G, G), or one per prompt (B, C, G, G).
            positions: of its pixels, (1, C, G, G).
            tokens: of the prompts, (B, T, C).
            dense: added to the pixels, (B, C, G, G).
            multimask: the masks for ambiguous prompts instead of the single one.

        Returns:
            Logits (B, K, 4 G, 4 G) and expected IoU (B, K), K = 1, or 3 for ambiguous prompts.
        """
        count, grid = len(tokens), embedding.shape[-2:]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(count, -1, -1)
        pixels = (embedding + dense).flatten(2).transpose(1, 2)
        pixel_positions = positions.flatten(2).transpose(1, 2).expand_as(pixels)
        tokens, pixels = self.transformer(torch.cat([own, tokens], dim=1), pixels, pixel_positions)
        upscaled = self.output_upscaling(pixels.transpose(1, 2).unflatten(2, grid))
        # The first token expects the IoU, one token per mask follows.
        chosen = range(1, len(self.output_hypernetworks_mlps)) if multimask else range(1)
        weights = torch.stack([self.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in chosen], dim=1)
        masks = torch.einsum("bkc,bchw->bkhw", weights, upscaled)
        return masks, self.iou_prediction_head(tokens[:, 0])[:, list(chosen)]
