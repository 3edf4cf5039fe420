"""Forward passes that leave a model as it was, and what a pass on a small image shows of its modules' outputs."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .adapted import own_parameters

_TOKENS = 6
_FEATURES = {nn.Linear: "in_features", nn.MultiheadAttention: "embed_dim", nn.LayerNorm: "normalized_shape"}
Size = tuple[int, int]


@contextmanager
def as_it_was(root: nn.Module) -> Iterator[None]:
    """After the block a model is as before: its modules' attributes (modes, a loss's running average), gradients,
    requires_grad and buffers; so are Python's and NumPy's random states.
    """
    attributes = [(module, module.training, dict(module.__dict__)) for module in root.modules()]
    parameters = [(parameter, parameter.grad, parameter.requires_grad) for _, parameter in own_parameters(root)]
    buffers = [
        (module._buffers, name, value, value.detach().clone())
        for module in root.modules()
        for name, value in module._buffers.items()
        if value is not None
    ]
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for module, mode, before in attributes:
            module.__dict__.clear()
            module.__dict__.update(before)
            module.training = mode  # of TorchScript's modules it is no entry
        for parameter, gradient, flag in parameters:
            parameter.grad = gradient
            parameter.requires_grad_(flag)
        for table, name, value, kept in buffers:
            table[name] = value
            if value.shape == kept.shape:
                value.detach().copy_(kept)
        random.setstate(states[0])
        np.random.set_state(states[1])


def own_event_storage() -> AbstractContextManager[Any]:
    """An event storage for the block: Detectron2's models write figures to one in training, and fail without."""
    if "detectron2" not in sys.modules:
        return nullcontext()
    from detectron2.utils.events import EventStorage

    return EventStorage()


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: its argument, or a tuple of its arguments, or a callable that takes the model."""
    if callable(batch) and not isinstance(batch, Tensor):
        return batch(model)
    return model(*batch) if isinstance(batch, tuple) else model(with_own_dicts(batch))


def with_own_dicts(batch: Any) -> Any:
    """The batch with its dicts copied, where it is a list of dicts: models change the dicts that they are given."""
    if not isinstance(batch, list):
        return batch
    return [dict(sample) if isinstance(sample, Mapping) else sample for sample in batch]


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors in any nesting of lists, dicts, dataclasses and Detectron2's structures."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [tensor for key in sorted(output, key=str) for tensor in tensors_of(output[key])]
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in tensors_of(item)]
    if callable(getattr(output, "get_fields", None)):  # Instances
        return tensors_of(output.get_fields())
    if hasattr(output, "__dataclass_fields__"):
        return tensors_of(vars(output))
    inner = getattr(output, "tensor", None)  # Boxes, BitMasks and the like
    return [inner] if isinstance(inner, Tensor) else []


@dataclass
class Outputs:
    """What forward passes have shown: by module's name, the shapes of its output, each with the image's (H, W).

    ``problem`` says why the last pass did not reach all modules.
    """

    shapes: dict[str, set[tuple[torch.Size, Size]]] = field(default_factory=lambda: defaultdict(set))
    others: dict[str, str] = field(default_factory=dict)  # class names of outputs that are no tensors
    problem: str = ""

    def note(self, name: str, output: Any, image: Size) -> None:
        """Note the shape of an output of the module ``name``, or of the first of its outputs, for an image (H, W)."""
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor):
            self.shapes[name].add((first.shape, image))
        else:
            self.others[name] = type(output).__name__

    def channels(self, name: str, widths: set[int], first: bool) -> tuple[int, bool] | None:
        """The width of a module's outputs and whether it is on axis 1; None where they do not tell, or disagree.

        In four dimensions, two neighbouring axes are the image's if their lengths have the ratio of its sides, or, as
        in windows, are equal; the other axis is the width. Where both layouts are possible, the one whose width is in
        ``widths`` counts, else ``first``.
        """
        shapes = self.shapes.get(name, set())
        found = {entry for shape, image in shapes if (entry := _beside_the_image(shape, image))}
        found = found or {_by_width(shape, widths, first) for shape, _ in shapes if len(shape) > 1}
        return found.pop() if len(found) == 1 else None


def _beside_the_image(shape: torch.Size, image: Size) -> tuple[int, bool] | None:
    """The width, and whether it is on axis 1, of a shape in which the image's two axes can be told; else None."""
    if len(shape) != 4:
        return None
    last, first = (h == w or h * image[1] == w * image[0] for h, w in (shape[1:3], shape[2:]))
    return None if last == first else (shape[1], True) if first else (shape[-1], False)


def _by_width(shape: torch.Size, widths: set[int], first: bool) -> tuple[int, bool]:
    """The width, and whether it is on axis 1, by which of the two axes is as long as one of ``widths``."""
    last, second = shape[-1] in widths, shape[1] in widths
    on_second = len(shape) > 2 and (second if last != second else first)
    return (shape[1], True) if on_second else (shape[-1], False)


def watch(model: nn.Module, modules: Mapping[str, nn.Module], example: Any = None) -> Outputs:
    """Run ``model`` on ``example``, or on made-up small images, and note the shapes of the outputs of ``modules``.

    Nothing is raised: ``problem`` says why a module was not reached. The model and the random state are as before.
    """
    outputs = Outputs()
    devices = {value.device.index for value in model.parameters() if value.is_cuda}
    with ExitStack() as stack:
        for context in (as_it_was(model), torch.random.fork_rng(sorted(devices)), own_event_storage(), torch.no_grad()):
            stack.enter_context(context)
        model.eval()
        image: Size = (0, 0)
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, given, out, name=name: outputs.note(name, out, image))
            stack.callback(hook.remove)
        for batch in small_inputs(model) if example is None else (example,):
            image = _size_of(batch)
            try:
                call(model, batch)
                outputs.problem = "the model does not call it"
            except Exception as error:  # whatever a foreign model makes of an image that it does not expect
                outputs.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if outputs.shapes.keys() >= modules.keys():
                break
    return outputs


def small_inputs(model: nn.Module) -> Iterator[Any]:
    """Yield what a model could be called with to predict, the smallest first: images of its mean, tokens of zeros."""
    kinds = (*_FEATURES, nn.Embedding, nn.modules.conv._ConvNd)
    first: Any = next((module for module in model.modules() if isinstance(module, kinds)), None)
    mean: Any = getattr(model, "pixel_mean", None)
    like = next((value for value in model.parameters() if value.is_floating_point()), torch.zeros(()))
    kwargs: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    if isinstance(mean, Tensor):  # Detectron2's models
        for height, width in _sizes(model):
            image = mean.detach().flatten()[:, None, None].expand(-1, height, width)
            yield [{"image": image, "height": height, "width": width}]
    elif isinstance(first, nn.Embedding):
        yield torch.zeros(1, _TOKENS, dtype=torch.int64, device=like.device)
    elif isinstance(first, nn.modules.conv._ConvNd):
        for size in _sizes(model):
            sides = {1: size[:1], 2: size, 3: (8, *size)}[len(first.kernel_size)]
            yield torch.zeros(1, first.in_channels, *sides, **kwargs)
    elif first is not None:
        features = next(getattr(first, key) for kind, key in _FEATURES.items() if isinstance(first, kind))
        last = features if isinstance(features, int) else features[-1]
        yield from (torch.zeros(2, *tokens, last, **kwargs) for tokens in ((_TOKENS,), ()))


def _sizes(model: nn.Module) -> Iterator[Size]:
    """Yield image sizes to try: a small one of unequal sides, those that modules say they are made for, 224 x 224."""
    known = [getattr(module, key, None) for module in model.modules() for key in ("img_size", "image_size")]
    published = [getattr(module, "pretrained_cfg", None) for module in model.modules()]  # of timm
    known += [entry.get("input_size", ())[1:] for entry in published if isinstance(entry, dict)]
    step = max([32, *(v for m in model.modules() if type(v := getattr(m, "size_divisibility", 0)) is int)])
    declared = [(size, size) if isinstance(size, int) else tuple(size) for size in known if size]
    sizes = [(2 * step, 3 * step), *(size for size in declared if len(size) == 2), (224, 224)]
    yield from dict.fromkeys(sizes)


def _size_of(batch: Any) -> Size:
    """(H, W) of the first image in a batch; (0, 0) where there is none."""
    images = [value.shape[-2:] for value in tree_leaves(batch) if isinstance(value, Tensor) and value.dim() > 2]
    return (images[0][0], images[0][1]) if images else (0, 0)
