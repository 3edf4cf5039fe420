"""How the tokens of an image lie in it, for parts that convolve them."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .method import MethodError, Site

GRIDS = ("auto", "square")


class TokenGrid:
    """Height and width of tokens (N, L, C) at one place.

    Args:
        site: the place; with ``GRID`` auto its module or the one that holds it tells H and W as attributes, as Swin's
            blocks and the attention of Segment Anything do in each forward pass.
        grid: one of GRIDS; square takes sqrt(L) x sqrt(L).
    """

    def __init__(self, site: Site, grid: str) -> None:
        self.name = site.name
        self.square = grid == "square"
        self._owners: list[nn.Module] = [owner for owner in (site.module, site.parent) if owner is not None]

    def size(self, tokens: Tensor) -> tuple[int, int]:
        """(H, W), H W = L.

        Raises:
            MethodError: neither the module nor its parent tells one that fits.
        """
        length = tokens.shape[1] if tokens.dim() == 3 else 0
        side = math.isqrt(length)
        if self.square and length and side * side == length:
            return side, side
        for owner in self._owners:
            height, width = getattr(owner, "H", None), getattr(owner, "W", None)
            if isinstance(height, int) and isinstance(width, int) and height * width == length:
                return height, width
        raise MethodError(
            f"{self.name}: the image grid of its tokens {tuple(tokens.shape)} is needed, and neither the module nor "
            "its parent holds H and W that fit; choose a module with four-dimensional tensors, or GRID square if it is"
        )
