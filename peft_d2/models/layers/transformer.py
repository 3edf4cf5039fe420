"""Transformer sublayers with residual and norm, one module each, so that anything can be put after any of them.

Sequences come first, (length, N, C), but in deformable attention (Zhu et al., Deformable DETR, ICLR 2021, section 4),
whose modules follow the position codes. The parts are children of the usual torch types that are called, never read.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_d2.ops import ms_deform_attn_fused

_TEMPERATURE = 10000.0


def run_block(block: nn.Module, *inputs: Any, use_checkpoint: bool) -> Tensor:
    """``block(*inputs)``; with ``use_checkpoint``, its activations are computed again in the backward pass.

    Not reentrant, so that what is trained inside gets its gradients behind frozen layers, too.
    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, section 4.
    """
    if use_checkpoint and block.training and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def init_transformer(module: nn.Module) -> None:
    """Initialise matrices of ``module`` Xavier-uniform, and deformable attentions as their paper says."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for part in module.modules():
        if isinstance(part, MSDeformAttn):
            part.reset_parameters()


class AttentionLayer(nn.Module):
    """Attention, residual, norm; ``pre_norm`` normalises the input of the attention instead of the sum.

    ``name`` is what the attention is called in state dicts.
    """

    def __init__(self, d_model: int, n_heads: int, pre_norm: bool = False, name: str = "self_attn") -> None:
        super().__init__()
        self.add_module(name, nn.MultiheadAttention(d_model, n_heads))
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm
        self.name = name
        init_transformer(self)

    def forward(
        self, x: Tensor, position: Tensor, memory: tuple[Tensor, Tensor] | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Update the queries x (Q, N, C), to which ``position`` is added for attending.

        ``memory`` are keys and values (S, N, C), positions added already, as several layers share them; None: the
        queries. ``attn_mask`` (N * heads, Q, S) is True, or -inf, where attending is forbidden.
        """
        source = self.norm(x) if self.pre_norm else x
        query = source + position
        key, value = memory or (query, source)
        x = x + self.get_submodule(self.name)(query, key, value, attn_mask=attn_mask, need_weights=False)[0]
        return x if self.pre_norm else self.norm(x)


class FFNLayer(nn.Module):
    """Linear, ReLU, linear, residual, norm: (L, N, C) -> the same; arguments as in :class:`AttentionLayer`."""

    def __init__(self, d_model: int, d_hidden: int, pre_norm: bool = False) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, d_hidden)
        self.linear2 = nn.Linear(d_hidden, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.pre_norm = pre_norm
        init_transformer(self)

    def forward(self, x: Tensor) -> Tensor:
        source = self.norm(x) if self.pre_norm else x
        x = x + self.linear2(F.relu(self.linear1(source)))
        return x if self.pre_norm else self.norm(x)


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, under DETR's names: x (L, N, C), position broadcastable to it."""

    def __init__(self, d_model: int, n_heads: int, d_ffn: int, dropout: float = 0.0, pre_norm: bool = False) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        source = self.norm1(x) if self.pre_norm else x
        query = source if position is None else source + position
        x = x + self.dropout(self.self_attn(query, query, source, need_weights=False)[0])
        x = x if self.pre_norm else self.norm1(x)
        source = self.norm2(x) if self.pre_norm else x
        x = x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(source)))))
        return x if self.pre_norm else self.norm2(x)


class Layers(nn.Module):
    """Runs layers one after the other, each with the same further arguments, and ``norm``, if any, at the end.

    ``use_checkpoint`` recomputes activations in the backward pass.
    """

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.use_checkpoint = False

    def forward(self, x: Tensor, *arguments: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = run_block(layer, x, *arguments, use_checkpoint=self.use_checkpoint)
        return x if self.norm is None else self.norm(x)


class TransformerEncoder(Layers):
    """A stack of :class:`TransformerEncoderLayer`; with ``pre_norm``, one more norm at its end."""

    def __init__(
        self, n_layers: int, d_model: int, n_heads: int, d_ffn: int, dropout: float = 0.0, pre_norm: bool = False
    ) -> None:
        layers = (TransformerEncoderLayer(d_model, n_heads, d_ffn, dropout, pre_norm) for _ in range(n_layers))
        super().__init__(layers, nn.LayerNorm(d_model) if pre_norm else None)


class MLP(nn.Module):
    """``n_layers`` linear layers with ReLU between them: (..., d_in) -> (..., d_out)."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, n_layers: int) -> None:
        super().__init__()
        widths = [d_in, *[d_hidden] * (n_layers - 1), d_out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Sequential):
    """Linear, activation, linear, each with dropout, as backbones have it: (..., dim) -> the same.

    ``names``: what the layers are called in state dicts.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        names: tuple[str, str] = ("fc1", "fc2"),
    ) -> None:
        first = {names[0]: nn.Linear(dim, hidden), "act": activation(), "drop1": nn.Dropout(drop)}
        super().__init__(OrderedDict({**first, names[1]: nn.Linear(hidden, dim), "drop2": nn.Dropout(drop)}))


class LayerNorm2d(nn.Module):
    """Normalises (N, C, H, W) over C at each pixel, with a gain and an offset per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, eps=1e-6).movedim(-1, 1)


def input_projections(in_channels: int, channels: int, levels: int, enforce: bool) -> nn.ModuleList:
    """A 1 x 1 convolution per level; where the channels fit already, an identity, unless ``enforce`` is set."""
    projections: list[nn.Module] = []
    for _ in range(levels):
        if in_channels == channels and not enforce:
            projections.append(nn.Identity())
        else:
            projections.append(Conv2d(in_channels, channels, kernel_size=1))
            weight_init.c2_xavier_fill(projections[-1])
    return nn.ModuleList(projections)


def sine_code(place: Tensor, channels: int) -> Tensor:
    """Sines and cosines of ``place`` in turn: (...) -> (..., channels).

    Wavelengths grow geometrically, by a factor of 10,000 over the channels; 1 is a full turn of the shortest.
    """
    pair = torch.arange(channels, dtype=torch.float32, device=place.device) // 2
    wavelength = _TEMPERATURE ** (2 * pair / channels)
    angle = (place * (2 * math.pi))[..., None] / wavelength
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


class SinePosition2d(nn.Module):
    """Fixed sine and cosine codes of ``channels``, a multiple of 4: y in the first half of them and x in the second.

    Pixel centres count 1..H and 1..W and are normalised to 2 pi, so that the code depends on the relative place alone
    (Carion et al., End-to-End Object Detection with Transformers, ECCV 2020, appendix A.4).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"SinePosition2d: channels is {channels}; it should be a multiple of 4")
        self.channels = channels

    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        """Codes of a map without padding: (height * width, channels) float32, row by row."""
        y, x = (
            sine_code(torch.arange(1, n + 1, dtype=torch.float32, device=device) / (n + 1e-6), self.channels // 2)
            for n in (height, width)
        )
        return torch.cat([y[:, None].expand(-1, width, -1), x.expand(height, -1, -1)], dim=-1).flatten(0, 1)


def pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2) centres as (x, y) in [0, 1], row by row, float32."""
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)


class MSDeformAttn(nn.Module):
    """Attention from each query to a few learned points around its reference point on every level.

    Channels ``d_model`` of queries, memory and output are a multiple of ``n_heads``. ``backend`` is that of
    :func:`peft_d2.ops.ms_deform_attn`.
    """

    backend: str | None = None

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"MSDeformAttn: d_model is {d_model}; it should be a multiple of n_heads = {n_heads}")
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Head m looks along direction m of M around the circle, point p at distance p + 1; attention is uniform."""
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        # On the unit square rather than the unit circle: the farther coordinate is one pixel a step.
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        bias = direction[:, None, None, :] * distance[None, None, :, None]
        self.sampling_offsets.bias.copy_(bias.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """For each query (N, Q, C), attend to points around its reference points: (N, Q, C).

        Args:
            reference_points: (N, Q, L, 2) as (x, y) or (N, Q, L, 4) as (centre x, centre y, width, height), in [0, 1].
            input_flatten: (N, S, C), the levels' pixels one level after the other.
            input_spatial_shapes, input_level_start_index: (L, 2) as (H, W), and (L,).
            input_padding_mask: (N, S), True at padding, which then contributes nothing.
        """
        n, queries, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        output = ms_deform_attn_fused(
            value.view(n, -1, self.n_heads, self.d_model // self.n_heads),
            input_spatial_shapes,
            input_level_start_index,
            reference_points,
            self.sampling_offsets(query).view(n, queries, self.n_heads, self.n_levels, self.n_points, 2),
            self.attention_weights(query).view(n, queries, self.n_heads, self.n_levels * self.n_points),
            self.backend,
        )
        return self.output_proj(output)


class Levels:
    """Feature maps (N, C, H_l, W_l) of several sizes as one sequence, as deformable attention takes them.

    ``values`` (N, S, C) are one level after the other, row by row; ``sizes`` and ``shapes`` (H_l, W_l) by level, the
    latter a tensor (L, 2); ``starts`` (L,) where each level starts.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        device = maps[0].device
        self.sizes = [(m.shape[-2], m.shape[-1]) for m in maps]
        self.values = torch.cat([m.flatten(2) for m in maps], dim=2).transpose(1, 2)
        lengths = [height * width for height, width in self.sizes]
        self.shapes = torch.tensor(self.sizes, device=device)
        self.starts = torch.tensor([sum(lengths[:level]) for level in range(len(lengths))], device=device)

    def maps_of(self, values: Tensor) -> list[Tensor]:
        """Values (N, S, C) as maps (N, C, H_l, W_l) again."""
        parts = values.split([height * width for height, width in self.sizes], dim=1)
        return [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, self.sizes, strict=True)]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with dropout, residual and norm after it.

    x (N, S, C), position broadcastable to it; the other arguments as :class:`MSDeformAttn` takes them.
    """

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, reference_points: Tensor, shapes: Tensor, starts: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x + position, reference_points, x, shapes, starts)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class MultiScaleDeformableTransformer(nn.Module):
    """The encoder over several feature maps, with level embeddings and sine positions.

    Padding is not masked: the maps count as valid throughout, as the published models were trained.
    """

    def __init__(
        self, d_model: int, d_ffn: int, n_layers: int, n_levels: int, n_heads: int, n_points: int, dropout: float
    ) -> None:
        super().__init__()
        self.level_embed = nn.Parameter(torch.empty(n_levels, d_model))
        layer = d_model, d_ffn, dropout, n_levels, n_heads, n_points
        self.encoder = Layers(DeformableEncoderLayer(*layer) for _ in range(n_layers))
        self.position = SinePosition2d(d_model)
        init_transformer(self)
        nn.init.normal_(self.level_embed)

    def forward(self, maps: Sequence[Tensor], code_order: Sequence[int]) -> list[Tensor]:
        """Maps (N, C, H_l, W_l) by level, in any order of sizes -> the same shapes.

        ``code_order``: the maps in whose order position codes and level embeddings are laid along the sequence.
        """
        device, levels = maps[0].device, Levels(maps)
        codes = [
            self.position(*levels.sizes[i], device) + embed
            for i, embed in zip(code_order, self.level_embed, strict=True)
        ]
        points = torch.cat([pixel_centres(*size, device) for size in levels.sizes])
        references = points[None, :, None].expand(levels.values.shape[0], -1, len(maps), -1)
        return levels.maps_of(self.encoder(levels.values, torch.cat(codes), references, levels.shapes, levels.starts))
