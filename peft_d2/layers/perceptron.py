"""The two-layer perceptron of Segment Anything's transformers, with the published names."""

from __future__ import annotations

from torch import Tensor, nn


class Perceptron(nn.Module):
    """Linear, activation, linear.

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
