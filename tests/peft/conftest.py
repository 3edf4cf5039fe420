"""Small models with the structures that adapters meet: Mask2Former's sublayers, fused qkv, Detectron2's convolution,
shared heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


class SelfAttentionLayer(nn.Module):
    """Mask2Former's decoder sublayer: out = norm(x + dropout(attention(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, 4)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.self_attn(x, x, x)[0]))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block with one fused qkv."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(F.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v)
        return x + self.mlp(self.norm2(x))


class Conv2d(nn.Conv2d):
    """Shaped as Detectron2's: convolution, norm, activation in one module."""

    def __init__(
        self, *args: object, norm: nn.Module | None = None, activation: object = None, **kwargs: object
    ) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


class Toy(nn.Module):
    """Image (N, 3, 8, 8) -> class scores (N, tokens, 5), through every kind of place."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = Conv2d(3, width, 3, stride=2, padding=1, norm=nn.BatchNorm2d(width), activation=F.relu)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=2)
        self.layers = nn.ModuleList(SelfAttentionLayer(width) for _ in range(2))
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.neck = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 5)
        self.box = Mlp(5, 8)
        self.box_again = nn.ModuleList([self.box, self.box])  # one module under three names

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x)).flatten(2).permute(2, 0, 1).contiguous()
        for layer in self.layers:
            x = layer(x)
        x = x.transpose(0, 1).contiguous()
        for block in self.blocks:
            x = block(x)
        y = self.head(self.neck(x))
        return y + self.box(y) + self.box_again[1](y)


def disturb(model: nn.Module, scale: float = 0.2) -> None:
    """Give everything that is trained other values, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.fixture
def toy() -> Toy:
    """A frozen-flag-free toy in eval mode; torch chooses kernels by requires_grad, so comparisons need equal flags."""
    model = Toy().eval()
    with torch.no_grad():
        model.stem.norm.running_mean.normal_()  # type: ignore[union-attr]
    return model.requires_grad_(False)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


@pytest.fixture(name="disturb")
def _disturb() -> Callable[[nn.Module], None]:
    return disturb


@pytest.fixture(name="Conv2d")
def _conv2d() -> type[nn.Conv2d]:
    return Conv2d


class Operations(TorchDispatchMode):
    """Names and output shapes of all operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.seen.append((func.overloadpacket.__name__, tuple(out.shape)))
        return out


@pytest.fixture
def operations() -> type[Operations]:
    return Operations
