"""Maps cut into square windows and put together again."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pad_bottom_right(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad maps (N, H, W, C) to multiples of ``multiple``."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -width % multiple, 0, -height % multiple))


def to_windows(x: Tensor, window: int) -> Tensor:
    """(N, H, W, C) -> (N * windows, window * window, C); an image's windows follow each other row by row."""
    n, height, width, channels = x.shape
    x = x.view(n, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def from_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`to_windows`."""
    x = x.view(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])
