"""What methods must know of a module's output: its width, the axis of its channels, where tokens lie in the image.

Adapter layers must exist before the optimizer does, so nothing waits for the first batch: the width is read off the
module, and what cannot be read is asked for.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .adapted import STORE, base_class, walk
from .errors import MethodError
from .method import Options, expect
from .targets import Target

LAYOUTS = ("auto", "last", "first")
GRIDS = ("auto", "square")
_WIDTH_ATTRIBUTES = ("d_model", "embed_dim", "hidden_size", "hidden_dim", "dim", "out_dim")
_SIDE = re.compile(r"down|short|skip|^se$|attn|act|drop|pool|peft")  # children beside a block's main path
_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
)


@dataclass(frozen=True)
class OutputOptions(Options):
    """Keys of every method that runs on a module's output.

    ``DIM`` is the output's width where the module does not say it. ``LAYOUT``: last (..., C), first (N, C, ...), or
    auto.
    """

    dim: int | None = None
    layout: str = "auto"

    def check(self) -> None:
        """As the base's; ``DIM`` and ``LAYOUT`` besides."""
        super().check()
        expect(self.dim is None or self.dim > 0, "DIM", self.dim, "a positive integer")
        expect(self.layout in LAYOUTS, "LAYOUT", self.layout, f"one of {', '.join(LAYOUTS)}")


@dataclass(frozen=True)
class Width:
    """``channels`` of a module's (first) output, on the last axis or, channels first, on axis 1."""

    channels: int
    channels_first: bool


def output_width(target: Target, options: OutputOptions) -> Width:
    """Width of the output at ``target``; the options override what the module says.

    Raises:
        MethodError: the module does not say, or says two things.
    """
    found = _of_module(target.module)
    if not found and target.parent is not None and _is_bare(target.module):
        found = _of_module(target.parent)  # a dropout or an activation: what its siblings are made for
    first = _is_channels_first(target.module) if options.layout == "auto" else options.layout == "first"
    if options.dim is not None:
        return Width(options.dim, first)
    if len(found) != 1:
        says = f"it could be {' or '.join(map(str, sorted(found)))}" if found else "it does not say"
        raise MethodError(
            f"{target.name} ({base_class(target.module).__name__}): the width of its output is unknown, {says}; set DIM"
        )
    return Width(found.pop(), first)


def _is_bare(module: nn.Module) -> bool:
    """Neither weights nor children of its own: a dropout, an activation, an identity."""
    return not module._parameters and set(module._modules) <= {STORE}


def _is_channels_first(module: nn.Module) -> bool:
    if isinstance(module, _CHANNELS_FIRST):
        return True
    kinds = {
        isinstance(child, _CHANNELS_FIRST)
        for _, child, _ in walk(module)
        if isinstance(child, (*_CHANNELS_FIRST, nn.Linear, nn.LayerNorm, nn.MultiheadAttention))
    }
    return kinds == {True}


def _of_module(module: nn.Module) -> set[int]:
    """Possible output widths: one when the module says it, none when it does not."""
    own = _of_leaf(module)
    if own is not None:
        return {own}
    for attribute in _WIDTH_ATTRIBUTES:
        value = getattr(module, attribute, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return {value}
    children = [child for name, child in module.named_children() if name != STORE]
    norms = {_of_leaf(child) for child in children if isinstance(child, nn.LayerNorm)}
    if norms:
        return {width for width in norms if width is not None}
    linears = [child for child in children if isinstance(child, nn.Linear)]
    if linears and linears[0].in_features == linears[-1].out_features:
        return {linears[-1].out_features}  # a perceptron or an attention: in and out are as wide
    return _last_of(children)  # in the order of running, as nearly all are; the first forward compares


def _last_of(children: list[nn.Module]) -> set[int]:
    for child in reversed(children):
        found = _of_module(child) if not isinstance(child, nn.ModuleList) else _last_of(list(child))
        if found:
            return found
    return set()


def _of_leaf(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.MultiheadAttention | nn.Embedding):
        return module.embed_dim if isinstance(module, nn.MultiheadAttention) else module.embedding_dim
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    if isinstance(module, nn.GroupNorm):
        return module.num_channels
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features
    channels = getattr(module, "out_channels", None)
    return channels if isinstance(channels, int) else None


def check_width(x: Tensor, width: Width, name: str) -> None:
    """Raise a :class:`MethodError` unless ``x`` has the expected channels on the expected axis."""
    axis = 1 if width.channels_first else -1
    if x.dim() < 2 or x.shape[axis] != width.channels:
        where = "axis 1 (LAYOUT first)" if width.channels_first else "the last axis (LAYOUT last)"
        raise MethodError(
            f"{name}: its output is {tuple(x.shape)}, but the adapter was made for "
            f"{width.channels} channels on {where}; set DIM and LAYOUT"
        )


def map_first_tensor(out: Any, change: Any, name: str) -> Any:
    """``change`` applied to a tensor, or to the first element of a tuple; every other output is refused by name."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        items = (change(out[0]), *out[1:])
        return type(out)(*items) if hasattr(out, "_fields") else items
    raise MethodError(
        f"{name} returns {type(out).__name__}; an adapter needs a tensor or a tuple that begins with one: "
        "choose a module inside"
    )


class TokenGrid:
    """Height and width of tokens (N, L, C) at one place.

    Args:
        target: the place; with ``GRID`` auto its module or the one that holds it tells H and W as attributes, as Swin's
            blocks and the attention of Segment Anything do in each forward pass.
        grid: one of GRIDS; square takes sqrt(L) x sqrt(L).
    """

    def __init__(self, target: Target, grid: str) -> None:
        self.name = target.name
        self.square = grid == "square"
        self._owners: list[nn.Module] = [owner for owner in (target.module, target.parent) if owner is not None]

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
