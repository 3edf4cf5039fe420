"""Layers on a module's output, and what they must know of it: its width, the axis of its channels, its image grid.

Adapter layers must exist before the optimizer does, so nothing can wait for the first batch. The width is read off the
module; where that does not tell it, a forward pass on a small image shows it, or the user has to set it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from .adapted import STORE, AdapterLayer, base_class, walk
from .errors import MethodError
from .lora.factors import match_dtype
from .method import Allowed, Method, Options, Positive, one_of
from .probe import Outputs
from .targets import Target, first_match

_NO_TENSOR = "{} returns {}; an adapter needs a tensor or a tuple that begins with one: choose a module inside"
_OUTPUT = re.compile("[1-9][0-9]{0,5} (first|last)").fullmatch
Grid = Annotated[str, one_of("auto", "square")]
_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_LEAVES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "out_features"),
    (nn.MultiheadAttention, "embed_dim"),
    (nn.Embedding, "embedding_dim"),
    (nn.LayerNorm, "normalized_shape"),
    (nn.GroupNorm, "num_channels"),
    (nn.modules.batchnorm._NormBase, "num_features"),
)
_ATTRIBUTES = ("out_channels", "d_model", "embed_dim", "hidden_size", "hidden_dim", "dim", "out_dim")


@dataclass(frozen=True)
class OutputOptions(Options):
    """``DIM`` is the output's width C. ``LAYOUT``: last for (..., C), first for (N, C, ...), or auto.

    ``OUTPUTS`` holds both by module, ``{"stages.0.blocks.1": "40 first"}``, where a forward pass has shown them.
    """

    dim: Positive | None = None
    layout: Annotated[str, one_of("auto", "last", "first")] = "auto"
    outputs: dict[str, Annotated[str, Allowed(_OUTPUT, "a width and a layout, such as '40 first'")]] = field(
        default_factory=dict
    )


class OutputLayer(AdapterLayer):
    """An adapter layer after a module. A subclass says in :meth:`change` what it makes of the output.

    Args:
        target: the module.
        options: ``DIM``, ``LAYOUT`` and ``OUTPUTS`` override what the module says of its output.

    Raises:
        MethodError: the output's width is unknown.
    """

    reads: ClassVar[str] = "output"  # what :meth:`forward` is given
    advice: ClassVar[str] = "set DIM and LAYOUT"  # where that has another width

    def __init__(self, target: Target, options: Any) -> None:
        super().__init__()
        self.name = target.name
        self.channels, self.channels_first = output_width(target, options)

    def change(self, h: Tensor) -> Tensor:
        """The adapted output (..., C) for the module's output (..., C), both in the dtype of the layer's parameters."""
        raise NotImplementedError

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output, adapted; ``forward`` computes the one without this layer."""
        return map_first_tensor(forward(*args, **kwargs), self, self.name)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) or, channels first, (N, C, ...) -> the same shape and dtype.

        Raises:
            MethodError: another width than the layer was made for.
        """
        if x.dim() < 2 or x.shape[1 if self.channels_first else -1] != self.channels:
            where = "axis 1 (LAYOUT first)" if self.channels_first else "the last axis (LAYOUT last)"
            raise MethodError(
                f"{self.name}: its {self.reads} is {tuple(x.shape)}, but the adapter was made for {self.channels} "
                f"channels on {where}; {self.advice}"
            )
        h = match_dtype(x, next(self.parameters()))
        h = self.change(h.movedim(1, -1)).movedim(-1, 1) if self.channels_first else self.change(h)
        return h.to(x.dtype)


class OutputMethod(Method):
    """A method that puts one ``layer_class``, an :class:`OutputLayer`, after each target module."""

    options: Any

    def unsure(self, targets: Sequence[Target]) -> list[Target]:
        options = self.options
        asked = isinstance(options, OutputOptions) and (options.dim is None or options.layout == "auto")
        return [t for t in targets if asked and t.name not in options.outputs and not read_output(t).is_sure]

    def learn(self, targets: Sequence[Target], seen: Outputs) -> None:
        """Note in ``OUTPUTS`` where a forward pass has shown another width or layout than the module tells.

        Raises:
            MethodError: neither the pass nor the module tells the width of an output.
        """
        for target in targets:
            read, shapes = read_output(target), [tuple(shape) for shape, _ in seen.shapes.get(target.name, ())]
            if not shapes and (kind := seen.others.get(target.name)):
                raise MethodError(_NO_TENSOR.format(target.name, kind))
            found = seen.channels(target.name, read.widths, read.first)
            if found is not None and (read.widths, read.first) != ({found[0]}, found[1]):
                text = f"{found[0]} {'first' if found[1] else 'last'}"
                self.options = replace(self.options, outputs={**self.options.outputs, target.name: text})
            try:
                output_width(target, self.options, trust=found is not None or not shapes)
            except MethodError as error:
                why = f"gave {shapes}" if shapes else f"did not reach it ({seen.problem or 'no input is known'})"
                raise MethodError(
                    f"{error}, and LAYOUT; or give inject an example, what the model is called with. A forward pass on "
                    f"a small image {why}"
                ) from error

    def refusal(self, target: Target) -> str:
        return never_called(target)


def never_called(target: Target) -> str:
    """Why torch never runs this module's forward; empty when nothing is known against it."""
    if isinstance(target.parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights without calling it; choose the attention itself"
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    container = issubclass(base_class(target.module), containers)
    return "it only holds other modules and has no output; choose the modules in it" if container else ""


def map_first_tensor(out: Any, change: Callable[[Tensor], Tensor], name: str) -> Any:
    """``change`` applied to a tensor, or to the first element of a tuple; every other output is refused by name."""
    if isinstance(out, Tensor):
        return change(out)
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        items = (change(out[0]), *out[1:])
        return type(out)(*items) if hasattr(out, "_fields") else items
    raise MethodError(_NO_TENSOR.format(name, type(out).__name__))


@dataclass(frozen=True)
class ReadOutput:
    """What can be read off a module about its output: possible widths, and whether they are on axis 1 (``first``).

    ``is_sure``: no forward pass is needed to know.
    """

    widths: set[int]
    first: bool
    is_sure: bool


def output_width(target: Target, options: OutputOptions, trust: bool = True) -> tuple[int, bool]:
    """The width of the (first) output of ``target``, and whether its axis is 1 instead of the last one.

    Without ``trust`` the width must come from the options, not from the module.

    Raises:
        MethodError: no width is known, or several are possible.
    """
    read = read_output(target)
    widths, first = read.widths if trust else set[int](), read.first
    if said := options.outputs.get(target.name) or first_match(options.outputs, target.name):
        width, layout = said.split()
        widths, first = {int(width)}, layout == "first"
    if options.layout != "auto":
        first = options.layout == "first"
    if options.dim is None and len(widths) != 1:
        says = f"it could be {' or '.join(map(str, sorted(widths)))}" if widths else "it does not say"
        raise MethodError(
            f"{target.name} ({base_class(target.module).__name__}): the width of its output is unknown, {says}; set DIM"
        )
    return options.dim or next(iter(widths)), first


def read_output(target: Target) -> ReadOutput:
    """What can be read off the module of ``target``; of a dropout or an activation, what its parent tells."""
    module = target.module
    is_alone = not (module._parameters or set(module._modules) - {STORE} or _widths(module)[0])
    if is_alone and target.parent is not None:
        module = target.parent
    widths, is_said = _widths(module)
    known = (*_CHANNELS_FIRST, nn.Linear, nn.LayerNorm, nn.MultiheadAttention)
    inside = [child for _, child, _ in walk(module) if isinstance(child, known)]
    layouts = {isinstance(child, _CHANNELS_FIRST) for child in inside}
    # A norm of another make may have channels anywhere: timm's LayerNorm2d is a LayerNorm.
    usual = all(not isinstance(child, nn.LayerNorm) or base_class(child) is nn.LayerNorm for child in inside)
    first = isinstance(module, _CHANNELS_FIRST) or layouts == {True}
    agrees = usual and (isinstance(module, known) or len(layouts) == 1)
    return ReadOutput(widths, first, is_said and agrees and len(widths) == 1 and not is_alone)


def _widths(module: nn.Module) -> tuple[set[int], bool]:
    """Possible output widths of a module, none where nothing tells; and whether they are known instead of guessed."""
    for attribute in [name for kind, name in _LEAVES if isinstance(module, kind)]:
        value: Any = getattr(module, attribute)
        return {value if isinstance(value, int) else value[-1]}, True
    children = [child for name, child in module.named_children() if name != STORE]
    linears = [child for child in children if isinstance(child, nn.Linear)]
    norms: set[int] = set().union(*(_widths(child)[0] for child in children if isinstance(child, nn.LayerNorm)))
    ends = norms | {child.out_features for child in linears[-1:]}
    for attribute in _ATTRIBUTES:
        if type(value := getattr(module, attribute, None)) is int:
            return {value}, attribute == "out_channels" or ends == {value}
    if not isinstance(module, nn.ModuleList):
        if norms:
            return norms, ends == norms
        if linears and linears[0].in_features == linears[-1].out_features:
            return ends, True  # a perceptron or an attention: in and out are as wide
    # The last child that says one: most run in order, and the first forward compares.
    widths, is_said = next((said for child in reversed(children) if (said := _widths(child))[0]), (set(), False))
    return widths, is_said and isinstance(module, nn.Sequential)


class TokenGrid:
    """Height and width of the image that the tokens (N, L, C) of one module make up.

    With ``GRID`` square they are sqrt(L) each. With auto the module or its parent has them as attributes H and W, which
    Swin's blocks and the attention of Segment Anything set in each forward pass. As many tokens as an attribute
    ``num_prefix_tokens`` says come first and are no part of the image: a class, registers, queries.
    """

    def __init__(self, target: Target, grid: str) -> None:
        self.name = target.name
        self.square = grid == "square"
        self._owners = [owner for owner in (target.module, target.parent) if owner is not None]

    def split(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """(N, L, C) -> tokens (N, P, C) that are no part of the image, if any, and the image (N, H, W, C).

        Four dimensions stay as they are.

        Raises:
            MethodError: neither the module nor its parent tells an H and W that fit.
        """
        if x.dim() == 4:
            return None, x
        length = x.shape[1] if x.dim() == 3 else 0
        if self.square and math.isqrt(length) ** 2 == length > 0:
            return None, x.unflatten(1, (math.isqrt(length),) * 2)
        for owner in self._owners:
            height, width, others = (getattr(owner, key, 0) for key in ("H", "W", "num_prefix_tokens"))
            if height and width and others + height * width == length:
                return (x[:, :others] if others else None), x[:, others:].unflatten(1, (height, width))
        raise MethodError(
            f"{self.name}: the image grid of its tokens {tuple(x.shape)} is needed, and neither the module nor "
            "its parent holds H and W that fit; choose a module with four-dimensional tensors, or GRID square if it is"
        )


def with_others(others: Tensor | None, image: Tensor, shape: Any) -> Tensor:
    """The inverse of :meth:`TokenGrid.split`: tokens and an image of its kind -> ``shape``."""
    return image.reshape(shape) if others is None else torch.cat([others, image.flatten(1, 2)], dim=1)
