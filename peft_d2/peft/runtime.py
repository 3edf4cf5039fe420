"""What an injected model remembers about its injection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .errors import PeftError
from .specialise import STORE, Specialised, Switch

_ATTRIBUTE = "_peft_runtime"
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


class InjectionError(PeftError, RuntimeError):
    """An operation does not fit the state of the model's injection."""


@dataclass
class Place:
    """Where one part sits: ``name`` is the module's first name, ``kind`` its base class, ``parameters`` how many
    numbers it adds.
    """

    name: str
    method: str
    kind: str
    parameters: int


@dataclass
class AdapterRecord:
    """One named adapter: ``methods`` with every key filled in, ``train`` as given, its places, and all tensors
    trained in full.
    """

    methods: list[dict[str, Any]]
    train: list[str]
    places: list[Place] = field(default_factory=list)
    full: list[str] = field(default_factory=list)


@dataclass
class Injection:
    """A plain record: what was injected, under which names, and which adapter runs."""

    adapters: dict[str, AdapterRecord]
    active: str
    enabled: bool = True
    merged: bool = False

    @property
    def methods(self) -> list[dict[str, Any]]:
        """Methods of the active adapter."""
        return self.adapters[self.active].methods

    @property
    def train(self) -> list[str]:
        """TRAIN patterns of the active adapter."""
        return self.adapters[self.active].train

    @property
    def places(self) -> list[Place]:
        """Places of the active adapter."""
        return self.adapters[self.active].places


@dataclass
class Slot:
    """Where a tensor that is trained in full is registered: all of its owners and all of its names."""

    owners: list[tuple[nn.Module, str]]
    names: list[str]

    def get(self) -> Tensor:
        """The tensor that is installed now."""
        module, leaf = self.owners[0]
        tensor = module._parameters[leaf] if leaf in module._parameters else module._buffers[leaf]
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        """Install another tensor under every name, on the device and in the dtype of the one before."""
        before = self.get()
        if tensor.device != before.device or tensor.dtype != before.dtype:
            tensor.data = tensor.data.to(before.device, before.dtype)
        for module, leaf in self.owners:
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = tensor  # type: ignore[assignment]


@dataclass
class Runtime:
    """The live side of an :class:`Injection`. Tensors trained in full exist once per adapter, and once as the
    base's.
    """

    record: Injection
    switch: Switch
    places: dict[str, list[Specialised]] = field(default_factory=dict)  # per adapter
    injected: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # per adapter
    slots: dict[str, Slot] = field(default_factory=dict)
    base: dict[str, Tensor] = field(
        default_factory=dict
    )  # frozen values of the slots; empty when everything is trained
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # per adapter, its own tensors for the slots
    loaded: dict[str, set[str]] = field(default_factory=dict)  # per adapter, slots whose values came from a file
    was_trainable: dict[str, bool] = field(default_factory=dict)  # requires_grad before injection, by first name
    statistics: list[nn.Module] = field(default_factory=list)  # norms whose running statistics are frozen
    installed: str | None = None  # whose values the slots hold; None: the base's

    def install(self, adapter: str | None) -> None:
        """Put one adapter's (or the base's) fully trained tensors into the model."""
        if adapter == self.installed:
            return
        if self.installed is not None:
            own = self.values[self.installed]
            own.update({name: self.slots[name].get() for name in own})
        chosen = self.values[adapter] if adapter is not None else {}
        for name, slot in self.slots.items():
            slot.put(chosen[name] if name in chosen else self.base[name])
        self.installed = adapter


def attach(model: nn.Module, runtime: Runtime) -> None:
    """Remember the runtime on the model itself, so that copies and pickles carry their own."""
    model.__dict__[_ATTRIBUTE] = runtime


def detach(model: nn.Module) -> None:
    """Forget the runtime."""
    model.__dict__.pop(_ATTRIBUTE, None)


def injected_root(model: nn.Module) -> nn.Module | None:
    """The module that was given to ``inject``: ``model``, or what DataParallel, DDP or ``torch.compile`` wrap."""
    seen: nn.Module | None = model
    while isinstance(seen, nn.Module):
        if _ATTRIBUTE in seen.__dict__:
            return seen
        seen = seen._modules.get("module") or seen._modules.get("_orig_mod")
    return None


def refuse_wrapper(model: nn.Module) -> None:
    """Raise where ``model`` is not the model itself: a wrapper knows the parameters that were there when it was made.

    Raises:
        InjectionError: naming the wrapper.
    """
    wrapper = type(model).__name__
    if wrapper in _WRAPPERS:
        raise InjectionError(f"this is a {wrapper} around a model: inject the model itself, then wrap it")


def get_runtime(model: nn.Module) -> Runtime:
    """The runtime of an injected model.

    Raises:
        InjectionError: nothing was injected.
    """
    root = injected_root(model)
    if root is None:
        raise InjectionError(
            f"{type(model).__name__} has no injection: call inject(model, methods, train) on the whole model first"
        )
    return root.__dict__[_ATTRIBUTE]


def get_injection(model: nn.Module) -> Injection | None:
    """The record of what was injected into ``model``; None when nothing was."""
    return get_runtime(model).record if injected_root(model) is not None else None


def known_adapter(runtime: Runtime, name: str) -> AdapterRecord:
    """The record of one adapter.

    Raises:
        InjectionError: there is none of this name.
    """
    if name not in runtime.record.adapters:
        raise InjectionError(
            f"there is no adapter {name!r}; this model has {', '.join(map(repr, runtime.record.adapters))}"
        )
    return runtime.record.adapters[name]


def walk(
    module: nn.Module, prefix: str = "", parent: nn.Module | None = None
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """(name, module, parent) of a module tree, shared modules under each of their names, injected parts left out."""
    yield prefix, module, parent
    for name, child in module._modules.items():
        if child is not None and not (name == STORE and isinstance(module, Specialised)):
            yield from walk(child, f"{prefix}.{name}" if prefix else name, module)
