"""The two-way transformer of Segment Anything: tokens and an image's pixels attend to each other.

Kirillov et al., "Segment Anything", ICCV 2023, appendix A, "Lightweight mask decoder". Names are the published ones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from peft_d2.models.sam.common import MLPBlock


class DownsampledAttention(nn.Module):
    """Multi-head attention within ``dim // downsample`` channels; inputs and output have ``dim``."""

    def __init__(self, dim: int, n_heads: int, downsample: int = 1) -> None:
        super().__init__()
        inner = dim // downsample
        if inner % n_heads:
            raise ValueError(f"{inner} channels cannot be shared out among {n_heads} heads; choose a multiple")
        self.n_heads = n_heads
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, C), k and v (B, S, C) -> (B, T, C)."""
        heads = [
            project(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for project, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        ]
        return self.out_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """Tokens attend to each other, then to the image; an MLP; then the image attends to the tokens.

    ``first``: the self-attention sees the tokens without their positions and replaces them.
    """

    def __init__(self, dim: int, n_heads: int, mlp_dim: int, downsample: int, first: bool) -> None:
        super().__init__()
        self.self_attn = DownsampledAttention(dim, n_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = DownsampledAttention(dim, n_heads, downsample)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLPBlock(dim, mlp_dim, nn.ReLU)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = DownsampledAttention(dim, n_heads, downsample)
        self.first = first

    def forward(self, tokens: Tensor, pixels: Tensor, token_pos: Tensor, pixel_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) and pixels (B, S, C), each with positions of its shape."""
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
    """``depth`` two-way blocks and a last attention from the tokens to the image.

    Args:
        depth: number of blocks.
        dim: channels of tokens and pixels.
        n_heads: attention heads.
        mlp_dim: hidden channels of the MLPs.
        downsample: by what the attentions between tokens and image reduce the channels.
    """

    def __init__(self, depth: int, dim: int, n_heads: int, mlp_dim: int, downsample: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dim, n_heads, mlp_dim, downsample, first=i == 0) for i in range(depth))
        self.final_attn_token_to_image = DownsampledAttention(dim, n_heads, downsample)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, pixels: Tensor, pixel_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C), which are their own positions; pixels and their positions (B, S, C)."""
        token_pos = tokens
        for layer in self.layers:
            tokens, pixels = layer(tokens, pixels, token_pos, pixel_pos)
        attended = self.final_attn_token_to_image(tokens + token_pos, pixels + pixel_pos, pixels)
        return self.norm_final_attn(tokens + attended), pixels
