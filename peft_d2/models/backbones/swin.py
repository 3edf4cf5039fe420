"""Swin Transformer (Liu et al., ICCV 2021) as a Detectron2 backbone, with the published parameter names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from peft_d2.models.backbones.stages import PatchEmbed, StagedBackbone, from_windows, pad_bottom_right, to_windows
from peft_d2.models.checks import expect_heads, expect_lengths, expect_numbers
from peft_d2.models.layers.transformer import FeedForward
from peft_d2.models.registration import entry

# Added between pixels that are neighbours only by the cyclic shift. The published -100 gives the same float32 results,
# but leaves weights of 1e-44, with which CPUs compute ten times slower.
_SHIFT_PENALTY = -1000.0
KEYS = """
MODEL:
  SWIN:
    {PRETRAIN_IMG_SIZE: 224, PATCH_SIZE: 4, EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24],
     WINDOW_SIZE: 7, MLP_RATIO: 4.0, QKV_BIAS: true, QK_SCALE: null, DROP_RATE: 0.0, ATTN_DROP_RATE: 0.0,
     DROP_PATH_RATE: 0.3, APE: false, PATCH_NORM: true, OUT_FEATURES: [res2, res3, res4, res5], USE_CHECKPOINT: false}
"""


def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """The mask (windows, T, T) added to the logits of shifted windows on a padded map (section 3.2, figure 4)."""

    def region(length: int) -> Tensor:
        place = torch.arange(length, device=device)
        return (place >= length - window).int() + (place >= length - shift).int()

    regions = 3 * region(height)[:, None] + region(width)
    windows = to_windows(regions[None, :, :, None], window)[..., 0]
    return (windows[:, None] != windows[:, :, None]).float() * _SHIFT_PENALTY


def _masked(bias: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """What is added to the logits (rows, heads, T, T): the bias plus each row's own window's mask."""
    if mask is None:
        return bias
    return (bias + mask[:, None]).expand(rows // len(mask), -1, -1, -1, -1).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    # No len(): an export keeps the number of images open.
    return F.scaled_dot_product_attention(q, k, v, _masked(bias, mask, q.shape[0]).to(q.dtype), scale=scale)


class _FusedAttention(torch.autograd.Function):
    """softmax(scale Q K^T + bias) V by torch's fused kernel, and the gradients of q, k, v and bias.

    The kernel has no gradient of the bias on a CPU, and one of bfloat16 there that takes eight times as long as that of
    float32. With P the weights, O the output and G its gradient, that of the logits is P * (G V^T - rowsum(G * O))
    (FlashAttention, arXiv 2205.14135, appendix B.2). P is computed again, not kept; on a CPU in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        output = _attend(q, k, v, bias.detach(), mask, scale)
        ctx.save_for_backward(output, q, k, v, bias, mask)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        output, q, k, v, bias, mask = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32) if q.device.type == "cpu" else q.dtype
        output, query, key, value, outer = (tensor.to(wide) for tensor in (output, q, k, v, grad))
        with torch.autocast(q.device.type, enabled=False):
            weights = ((query * ctx.scale) @ key.transpose(-2, -1) + _masked(bias, mask, len(q))).softmax(-1).to(wide)
            of_logits = (outer @ value.transpose(-2, -1)).sub_((outer * output).sum(-1, keepdim=True)).mul_(weights)
            of_value = weights.transpose(-2, -1) @ outer
            of_query, of_key = of_logits @ key * ctx.scale, of_logits.transpose(-2, -1) @ query * ctx.scale
        of_bias = of_logits.sum_to_size(bias.shape) if ctx.needs_input_grad[3] else None
        return of_query.to(q.dtype), of_key.to(q.dtype), of_value.to(q.dtype), of_bias, None, None


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias per relative place (equation 4)."""

    relative_position_index: Tensor

    def __init__(self, node: CfgNode, dim: int, n_heads: int) -> None:
        super().__init__()
        window = node.WINDOW_SIZE
        self.n_heads = n_heads
        self.scale = node.QK_SCALE or (dim // n_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, n_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        dy, dx = (c.flatten()[:, None] - c.flatten() + window - 1 for c in (y, x))
        self.register_buffer("relative_position_index", dy * (2 * window - 1) + dx)
        self.qkv = nn.Linear(dim, 3 * dim, bias=node.QKV_BIAS)
        self.attn_drop = nn.Dropout(node.ATTN_DROP_RATE)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(node.DROP_RATE)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (N * windows, T, C); mask (windows, T, T), added to the logits."""
        rows, tokens, channels = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]
        if self.training and self.attn_drop.p:
            x = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1) + _masked(bias, mask, rows)).softmax(-1)) @ v
        elif bias.requires_grad or (x.device.type == "cpu" and q.dtype.itemsize < 4 and q.requires_grad):
            x = _FusedAttention.apply(q, k, v, bias, mask, self.scale)
        else:
            x = _attend(q, k, v, bias, mask, self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(rows, tokens, channels)))


class SwinBlock(nn.Module):
    """Window attention and MLP, each pre-normed with a residual; ``shift`` moves the windows cyclically."""

    def __init__(self, node: CfgNode, dim: int, n_heads: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window = node.WINDOW_SIZE
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(node, dim, n_heads)
        self.drop_path = StochasticDepth(drop_path, mode="row")
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, int(dim * node.MLP_RATIO), drop=node.DROP_RATE)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, dim) -> the same, for any H and W."""
        height, width = x.shape[1:3]
        inside = pad_bottom_right(self.norm1(x), self.window)
        padded, mask = inside.shape[1:3], None
        if self.shift:
            inside = inside.roll((-self.shift, -self.shift), dims=(1, 2))
            mask = shift_mask(padded[0], padded[1], self.window, self.shift, x.device)
        attended = from_windows(self.attn(to_windows(inside, self.window), mask), self.window, *padded)
        if self.shift:
            attended = attended.roll((self.shift, self.shift), dims=(1, 2))
        x = x + self.drop_path(attended[:, :height, :width])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Each 2 x 2 pixels become one: (N, H, W, C) -> (N, ceil(H / 2), ceil(W / 2), 2 C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_bottom_right(x, 2)
        # Column by column: (0, 0), (1, 0), (0, 1), (1, 1) as (row, column).
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return self.reduction(self.norm(x))


@entry(BACKBONE_REGISTRY, "PD2SwinTransformer", upstream="D2SwinTransformer", keys=KEYS)
class SwinTransformer(StagedBackbone):
    """Four stages at strides 4, 8, 16 and 32, named ``res2`` to ``res5``, each with a norm of its own on its output.

    Images may have any size, as every stage pads. The absolute position embedding (APE), if it is wanted, is made for
    images of PRETRAIN_IMG_SIZE and interpolated to others. USE_CHECKPOINT computes blocks again in the backward pass.
    """

    config_node = "MODEL.SWIN"

    def build(self, node: CfgNode, in_channels: int) -> None:
        """Add the patch embedding, positions if APE is set, the stages and the norms of their outputs."""
        path = self.config_node
        expect_numbers(path, node, EMBED_DIM=1, WINDOW_SIZE=1, PATCH_SIZE=1)
        expect_lengths(path, node, "DEPTHS", "NUM_HEADS")
        for stage, heads in enumerate(node.NUM_HEADS):
            channels = f"{path}.EMBED_DIM * {2**stage}"
            expect_heads(channels, node.EMBED_DIM * 2**stage, f"{path}.NUM_HEADS[{stage}]", heads)
        patch, dims = node.PATCH_SIZE, [node.EMBED_DIM * 2**i for i in range(len(node.DEPTHS))]
        self.patch_embed = PatchEmbed(in_channels, dims[0], patch, norm="after" if node.PATCH_NORM else "")
        if node.APE:
            side = node.PRETRAIN_IMG_SIZE // patch
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, dims[0], side, side))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(node.DROP_RATE)

        def block(stage: int, number: int, drop_path: float) -> SwinBlock:
            shift = node.WINDOW_SIZE // 2 * (number % 2)  # every second one, by half
            return SwinBlock(node, dims[stage], node.NUM_HEADS[stage], shift, drop_path)

        self._add_stages(node, dims, block, PatchMerging)
        for i, dim in enumerate(dims):
            self.add_module(f"norm{i}", nn.LayerNorm(dim))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.patch_embed(image.permute(0, 2, 3, 1))
        if hasattr(self, "absolute_pos_embed"):
            position = F.interpolate(self.absolute_pos_embed, size=x.shape[1:3], mode="bicubic")
            x = x + position.permute(0, 2, 3, 1)
        return self._run_stages(self.pos_drop(x))
