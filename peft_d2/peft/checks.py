"""Proof that each injected part changes the output, in train and in eval mode.

An adapter that torch never runs (a projection whose weight is read without a call, a fast path, a functional block)
trains nothing and says nothing. Here each part must show itself: one backward pass per mode finds the parts that the
output depends on, a pass without gradients shows that they run there as well, and whatever is left is changed by hand
and the outputs are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import AdapterLayer
from .errors import LivenessError
from .record import get_adapted, get_root

Forward = Callable[[nn.Module], Any]


def prove_live(model: nn.Module, forward: Forward) -> None:
    """Prove that every part of the active adapter changes what ``forward(model)`` returns, in train and in eval mode.

    Args:
        model: an injected model. forward: runs the model on a fixed input, and gives the same result twice under the
        same random state. Its output may be any
            nesting of tensors, dicts, lists, tuples and Detectron2's structures. It is called with the model in train
            and in eval mode (``model.training`` says which), with and without gradients.

    Raises:
        LivenessError: naming each part without effect, and the mode.
    The model, its gradients, modes, buffers and the random state are as before.
    """
    dead: list[str] = []
    for training in (True, False):
        mode = "train" if training else "eval"
        dead += [f"{name} ({mode})" for name in dead_parts(model, forward, training)]
    if dead:
        listed = ", ".join(dead[:12]) + (f" and {len(dead) - 12} more" if len(dead) > 12 else "")
        raise LivenessError(
            f"these injected parts cannot change the output: {listed}. The model does not call these modules, or reads "
            "their weights directly; choose a module around them"
        )


def dead_parts(model: nn.Module, forward: Forward, training: bool) -> list[str]:
    """Places (``path: method``) of the active adapter without effect on the output, in one mode."""
    adapted, root = get_adapted(model), get_root(model)
    adapted.require_plain()
    parts = {
        f"{module.peft_name}: {method}": part
        for module in adapted.modules[adapted.record.active]
        for method, part in module.peft_layers().items()
    }
    with _as_it_was(model, root), torch.random.fork_rng():
        model.train(training)
        touched = _reached_by_gradients(model, forward, parts)
        if not training:
            touched &= _run_without_gradients(model, forward, parts)
        return [name for name, part in parts.items() if name not in touched and not _changes(model, forward, part)]


def _reached_by_gradients(model: nn.Module, forward: Forward, parts: dict[str, AdapterLayer]) -> set[str]:
    """Parts of which some parameter has a gradient that is not zero, from one backward pass."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.enable_grad():
        tensors = [tensor for tensor in _tensors(forward(model)) if tensor.requires_grad]
        if tensors:
            sum((tensor * torch.randn_like(tensor)).sum() for tensor in tensors).backward()  # type: ignore[union-attr]
    return {
        name
        for name, part in parts.items()
        if any(p.grad is not None and bool(p.grad.any()) for p in part.parameters())
    }


def _run_without_gradients(model: nn.Module, forward: Forward, parts: dict[str, AdapterLayer]) -> set[str]:
    """Parts whose arithmetic runs in a pass without gradients, where torch takes its shortcuts."""
    ran: set[str] = set()
    hooks = [part.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, part in parts.items()]
    try:
        with torch.no_grad():
            forward(model)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


@torch.no_grad()
def _changes(model: nn.Module, forward: Forward, part: AdapterLayer) -> bool:
    """Whether other values in the part give another output, under the same random state."""
    torch.manual_seed(0)
    before = [tensor.clone() for tensor in _tensors(forward(model))]
    kept = [parameter.detach().clone() for parameter in part.parameters()]
    generator = torch.Generator().manual_seed(1)
    for parameter in part.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.add_(noise.to(parameter.device, parameter.dtype))
    torch.manual_seed(0)
    after = _tensors(forward(model))
    for parameter, value in zip(part.parameters(), kept, strict=True):
        parameter.copy_(value)
    same = len(before) == len(after)
    return not (same and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)))


@contextmanager
def _as_it_was(model: nn.Module, root: nn.Module) -> Iterator[None]:
    """Restores modes, gradients and buffers."""
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in root.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in root.buffers()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer, value in buffers:
            if buffer.shape == value.shape:
                buffer.detach().copy_(value)


def _tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors, and others that hold numbers, of any nesting."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        return [tensor for key in sorted(output, key=str) for tensor in _tensors(output[key])]
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in _tensors(item)]
    if callable(getattr(output, "get_fields", None)):  # Detectron2's Instances
        return _tensors(output.get_fields())
    inner = getattr(output, "tensor", None)  # Detectron2's Boxes, BitMasks and the like
    return [inner] if isinstance(inner, Tensor) else []
