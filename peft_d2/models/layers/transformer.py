"""Transformer sublayers with residual and norm, one module each, so that anything can be put after any of them.

Sequences come first: (length, N, C). The parts are children of the usual torch types that are called, never read.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from peft_d2.models.layers.recompute import run_block


def _with(x: Tensor, position: Tensor | None) -> Tensor:
    return x if position is None else x + position


def xavier_matrices(module: nn.Module) -> None:
    """Xavier-uniform start for every matrix of ``module``; vectors keep theirs."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class SelfAttentionLayer(nn.Module):
    """Self-attention, dropout, residual, norm.

    Args:
        d_model: channels.
        n_heads: attention heads.
        dropout: probability, on attention weights and on the result.
        pre_norm: the norm is applied to the input of the attention instead of to the sum.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        xavier_matrices(self)

    def forward(self, x: Tensor, position: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x, position: (L, N, C); attn_mask: (L, L) or (N * heads, L, L), True where attending is forbidden."""
        source = self.norm(x) if self.pre_norm else x
        place = _with(source, position)
        attended = self.self_attn(place, place, source, attn_mask=attn_mask, need_weights=False)[0]
        x = x + self.dropout(attended)
        return x if self.pre_norm else self.norm(x)


class CrossAttentionLayer(nn.Module):
    """Attention of queries to a memory, dropout, residual, norm. Arguments as in :class:`SelfAttentionLayer`."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout)
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        xavier_matrices(self)

    def forward(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        position: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x, position: (Q, N, C) queries and what is added to them for attending.
            key, value: (S, N, C); the key holds the memory's position code already, as several layers share it.
            attn_mask: (N * heads, Q, S), True where attending is forbidden.
        """
        source = self.norm(x) if self.pre_norm else x
        query = _with(source, position)
        attended = self.multihead_attn(query, key, value, attn_mask=attn_mask, need_weights=False)[0]
        x = x + self.dropout(attended)
        return x if self.pre_norm else self.norm(x)


class FFNLayer(nn.Module):
    """Linear, ReLU, linear, residual, norm. Arguments as in :class:`SelfAttentionLayer`."""

    def __init__(self, d_model: int, d_hidden: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_hidden)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_hidden, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm
        xavier_matrices(self)

    def forward(self, x: Tensor) -> Tensor:
        """(L, N, C) -> (L, N, C)."""
        source = self.norm(x) if self.pre_norm else x
        x = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(source)))))
        return x if self.pre_norm else self.norm(x)


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, under DETR's names; arguments as in :class:`SelfAttentionLayer`."""

    def __init__(self, d_model: int, n_heads: int, d_ffn: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """x (L, N, C), position broadcastable to it -> (L, N, C)."""
        source = self.norm1(x) if self.pre_norm else x
        place = _with(source, position)
        x = x + self.dropout1(self.self_attn(place, place, source, need_weights=False)[0])
        x = x if self.pre_norm else self.norm1(x)
        source = self.norm2(x) if self.pre_norm else x
        x = x + self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(source)))))
        return x if self.pre_norm else self.norm2(x)


class TransformerEncoder(nn.Module):
    """A stack of :class:`TransformerEncoderLayer`; with ``pre_norm``, one more norm at its end.

    ``use_checkpoint`` set to True: each layer's activations are computed again in the backward pass instead of kept.
    """

    def __init__(
        self, n_layers: int, d_model: int, n_heads: int, d_ffn: int, dropout: float = 0.0, pre_norm: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(d_model, n_heads, d_ffn, dropout, pre_norm) for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(d_model) if pre_norm else None
        self.use_checkpoint = False

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """(L, N, C) -> (L, N, C); the position is added in every layer."""
        for layer in self.layers:
            x = run_block(layer, x, position, use_checkpoint=self.use_checkpoint)
        return x if self.norm is None else self.norm(x)


class MLP(nn.Module):
    """``n_layers`` linear layers with ReLU between them."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, n_layers: int) -> None:
        super().__init__()
        widths = [d_in, *[d_hidden] * (n_layers - 1), d_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
