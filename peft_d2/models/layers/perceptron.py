"""Two-layer perceptrons, each with the names that its models publish."""

from __future__ import annotations

from torch import Tensor, nn


class Perceptron(nn.Module):
    """Linear, activation, linear, as Segment Anything's transformers name them.

    Args:
        dim: channels in and out.
        hidden: channels between.
        activation: its class.
    """

    def __init__(self, dim: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.lin1 = nn.Linear(dim, hidden)
        self.act = activation()
        self.lin2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.lin2(self.act(self.lin1(x)))


class Mlp(nn.Module):
    """Linear, GELU, linear, as the hierarchical backbones name them.

    Args:
        dim: channels in and out.
        hidden: channels between.
        drop: dropout after either layer.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
