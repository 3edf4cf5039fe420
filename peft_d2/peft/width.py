"""The width (channels) of a module's output, and the axis it lies on, read off the module before any forward pass.

Parameters must exist before the optimizer does, so nothing waits for the first batch. What cannot be read is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .method import MethodError, Options, Site, expect
from .runtime import walk
from .specialise import STORE, base_class

LAYOUTS = ("auto", "last", "first")
_WIDTH_ATTRIBUTES = ("d_model", "embed_dim", "hidden_size", "hidden_dim", "dim", "out_dim")
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


def output_width(site: Site, options: OutputOptions) -> Width:
    """Width of the output at ``site``; the options override what the module says.

    Raises:
        MethodError: the module does not say, or says two things.
    """
    found = _of_module(site.module)
    if not found and site.parent is not None and _is_bare(site.module):
        found = _of_module(site.parent)  # a dropout or an activation: what its siblings are made for
    first = _is_channels_first(site.module) if options.layout == "auto" else options.layout == "first"
    if options.dim is not None:
        return Width(options.dim, first)
    if len(found) != 1:
        says = f"it could be {' or '.join(map(str, sorted(found)))}" if found else "it does not say"
        raise MethodError(
            f"{site.name} ({base_class(site.module).__name__}): the width of its output is unknown, {says}; set DIM"
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
    if isinstance(module, nn.Sequential):
        widths: list[int | None] = [_of_leaf(child) for child in children]
        known = [width for width in widths if width is not None]
        return {known[-1]} if known else _last_of(children)
    linears = [child for child in children if isinstance(child, nn.Linear)]
    if linears and linears[0].in_features == linears[-1].out_features:
        return {linears[-1].out_features}  # a perceptron or an attention: in and out are as wide
    return set()


def _last_of(children: list[nn.Module]) -> set[int]:
    for child in reversed(children):
        found = _of_module(child)
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
