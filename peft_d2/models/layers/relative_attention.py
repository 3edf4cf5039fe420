"""Self-attention on maps whose logits get a learned term per relative row and column.

Li et al., "MViTv2", CVPR 2022, equations 4 and 5: ``logits = q k' / sqrt(d) + q . R_h[y - y'] + q . R_w[x - x']``, with
the unscaled q; used by ViTDet and by the image encoder of Segment Anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def decomposed_bias(q: Tensor, table_h: Tensor, table_w: Tensor, size: tuple[int, int]) -> Tensor:
    """What is added to the logits: (B, M, T, T) for unscaled q (B, M, T, d) on a map of ``size`` (H, W), T = H W."""
    height, width = size
    grid = q.unflatten(2, size)
    rows = torch.einsum("bmyxd,ykd->bmyxk", grid, relative_rows(table_h, height, height).to(q.dtype))
    columns = torch.einsum("bmyxd,xkd->bmyxk", grid, relative_rows(table_w, width, width).to(q.dtype))
    return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


class RelativePositionAttention(nn.Module):
    """Multi-head self-attention over all pixels of a map.

    Args:
        dim: channels.
        n_heads: attention heads.
        size: (H, W) that the tables of relative positions are made for; other sizes interpolate them.
    """

    def __init__(self, dim: int, n_heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        if dim % n_heads:
            raise ValueError(f"{dim} channels cannot be shared out among {n_heads} heads; choose a multiple")
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
        bias = decomposed_bias(q, self.rel_pos_h, self.rel_pos_w, size)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, channels))
