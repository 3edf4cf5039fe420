"""Mona: the multi-cognitive visual adapter, a bottleneck with multi-scale depthwise convolutions, after a sublayer.

Yin et al., "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks", CVPR 2025,
arXiv 2408.08345, section 3: ``x0 = s1 LayerNorm(x) + s2 x``; ``u = down(x0)``; ``f = u + mean over k in {3, 5, 7} of
dwconv_k(u)``; ``g = f + conv1x1(f)``; ``out = x + up(dropout(GeLU(g)))``. s1 starts at 1e-6 and s2 at 1, per channel.
The authors start ``up`` at random; here it starts at zero, so the start is the pretrained model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .method import Positive, Probability
from .outputs import Grid, OutputLayer, OutputMethod, OutputOptions, TokenGrid, with_others
from .targets import Target


@dataclass(frozen=True)
class MonaOptions(OutputOptions):
    """``BOTTLENECK`` is the width inside.

    ``GRID`` says how tokens (N, L, C) lie in the image, see :class:`~peft_d2.peft.outputs.TokenGrid`. Four-dimensional
    outputs need none.
    """

    bottleneck: Positive = 64
    dropout: Probability = 0.1
    grid: Grid = "auto"


class MonaAdapter(OutputLayer):
    """x + up(dropout(GeLU(multi-scale convolutions of down(x0)))) for x (N, H, W, C), or (N, L, C) as ``GRID`` says."""

    def __init__(self, target: Target, options: MonaOptions) -> None:
        super().__init__(target, options)
        made, channels, inner = target.factory_kwargs(), self.channels, options.bottleneck
        self.mona_norm = nn.LayerNorm(channels, **made)
        self.mona_gain = nn.Parameter(torch.full((channels,), 1e-6, **made))
        self.mona_skip = nn.Parameter(torch.ones(channels, **made))
        self.mona_down = nn.Linear(channels, inner, **made)
        self.mona_convs = nn.ModuleList(
            nn.Conv2d(inner, inner, size, padding=size // 2, groups=inner, **made) for size in (3, 5, 7)
        )
        self.mona_mix = nn.Conv2d(inner, inner, 1, **made)
        self.mona_up = nn.Linear(inner, channels, **made)
        nn.init.zeros_(self.mona_up.weight)
        nn.init.zeros_(self.mona_up.bias)
        self.dropout = options.dropout
        self.grid = TokenGrid(target, options.grid)

    def change(self, h: Tensor) -> Tensor:
        u = self.mona_down(self.mona_norm(h) * self.mona_gain + h * self.mona_skip)
        others, image = self.grid.split(u)  # others go without convolutions
        f = image.movedim(-1, 1)
        f = f + sum(conv(f) for conv in self.mona_convs) / 3
        g = with_others(others, (f + self.mona_mix(f)).movedim(1, -1), u.shape)
        return h + self.mona_up(F.dropout(F.gelu(g), self.dropout, self.training))


class Mona(OutputMethod):
    """``{NAME: mona, TARGETS: [attn, mlp], BOTTLENECK: 64, DROPOUT: 0.1, GRID: auto}``."""

    name = "mona"
    options_class = MonaOptions
    layer_class = MonaAdapter
