"""The mask decoder of Segment Anything: tokens and an image's pixels attend to each other, then tokens become masks.

Kirillov et al., ICCV 2023, appendix A, "Lightweight mask decoder". Names are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from peft_d2.models.layers.transformer import MLP, LayerNorm2d
from peft_d2.models.sam.image_encoder import MLPBlock

_AMBIGUOUS = 3  # masks for a prompt that could mean several things; one more is for a prompt that cannot
_DOWNSAMPLE = 2  # by this the attentions between tokens and image reduce the channels


class DownsampledAttention(nn.Module):
    """Multi-head attention within ``dim // downsample`` channels: q (B, T, C), k and v (B, S, C) -> (B, T, C)."""

    def __init__(self, dim: int, n_heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = dim // downsample
        self.n_heads = n_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [
            project(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        ]
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """Tokens attend to each other, then to the image; an MLP; then the image attends to the tokens.

    ``first``: the self-attention sees the tokens without their positions and replaces them. Tokens are (B, T, C),
    pixels (B, S, C), each with positions of its shape.
    """

    def __init__(self, dim: int, n_heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.self_attn = DownsampledAttention(dim, n_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = DownsampledAttention(dim, n_heads, _DOWNSAMPLE)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLPBlock(dim, mlp_dim, nn.ReLU)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = DownsampledAttention(dim, n_heads, _DOWNSAMPLE)
        self.first = first

    def forward(self, tokens: Tensor, pixels: Tensor, token_pos: Tensor, pixel_pos: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens and the pixels after the block, in their shapes."""
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_pos
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_pixels = pixels + pixel_pos
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pos, placed_pixels, pixels))
        tokens = self.norm3(tokens + self.mlp(tokens))
        pixels = self.norm4(pixels + self.cross_attn_image_to_token(placed_pixels, tokens + token_pos, tokens))
        return tokens, pixels


class TwoWayTransformer(nn.Module):
    """``depth`` two-way blocks, then attention from tokens to the image; tokens serve as their own positions."""

    def __init__(self, depth: int, dim: int, n_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, n_heads, mlp_dim, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = DownsampledAttention(dim, n_heads, _DOWNSAMPLE)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, pixels: Tensor, pixel_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and pixels (B, S, C), whose positions have their shape, after attending; the same shapes."""
        token_pos = tokens
        for layer in self.layers:
            tokens, pixels = layer(tokens, pixels, token_pos, pixel_pos)
        attended = self.final_attn_token_to_image(tokens + token_pos, pixels + pixel_pos, pixels)
        return self.norm_final_attn(tokens + attended), pixels


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
        self,
        embedding: Tensor,
        positions: Tensor,
        tokens: Tensor,
        dense: Tensor,
        multimask: bool,
        fine: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """Logits (B, K, 4 G, 4 G) and expected IoU (B, K) of B prompts, K = 1, or 3 for ambiguous prompts.

        The image's ``embedding`` is (1, C, G, G), or one per prompt, its ``positions`` (1, C, G, G); of the prompts are
        ``tokens`` (B, T, C) and what is added to the pixels, ``dense`` (B, C, G, G).
        """
        tokens, upscaled = self.attend(embedding, positions, tokens, dense, fine)
        # The first token expects the IoU, one token per mask follows.
        chosen = list(range(1, len(self.output_hypernetworks_mlps)) if multimask else range(1))
        return self.masks(tokens[:, 1:], upscaled, chosen), self.iou_prediction_head(tokens[:, 0])[:, chosen]

    def own_tokens(self) -> Tensor:
        """The learned tokens (1 + masks, C): one for the expected IoU, then one per mask."""
        return torch.cat([self.iou_token.weight, self.mask_tokens.weight])

    def upscale(self, pixels: Tensor, fine: Sequence[Tensor]) -> Tensor:
        """(B, C, G, G) -> (B, C / 8, 4 G, 4 G); ``fine`` are finer maps of the image, if the model has them."""
        return self.output_upscaling(pixels)

    def attend(
        self, embedding: Tensor, positions: Tensor, tokens: Tensor, dense: Tensor, fine: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """After attention: own tokens, then the prompts' (B, own + T, C), and the upscaled pixels."""
        own = self.own_tokens().expand(tokens.shape[0], -1, -1)
        pixels = (embedding + dense).flatten(2).transpose(1, 2)
        pixel_positions = positions.flatten(2).transpose(1, 2).expand_as(pixels)
        tokens, pixels = self.transformer(torch.cat([own, tokens], dim=1), pixels, pixel_positions)
        return tokens, self.upscale(pixels.transpose(1, 2).unflatten(2, embedding.shape[-2:]), fine)

    def masks(self, tokens: Tensor, upscaled: Tensor, chosen: Sequence[int]) -> Tensor:
        """Logits (B, K, h, w) of the ``chosen`` mask tokens, out of ``tokens`` (B, masks or more, C)."""
        weights = torch.stack([self.output_hypernetworks_mlps[i](tokens[:, i]) for i in chosen], dim=1)
        return torch.einsum("bkc,bchw->bkhw", weights, upscaled)
