"""In-place specialisation: a module keeps its identity, its names and its weights, and gains a class.

A specialised module gets one child, ``peft``, that holds the injected parts of each named adapter, and its
``__class__`` becomes a subclass of its own class with one mixin per method. Nothing is wrapped or replaced, so base
keys, shared aliases, pickling, ``deepcopy``, ``torch.compile`` and ``torch.export`` see an ordinary module.

State-dict names of injected tensors: ``<path>.peft.<adapter>.<method>.<local name>``. Files use
``<path>.<local name>``: neither the word peft nor the adapter's name is in them.
"""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

STORE = "peft"
_CLASSES: dict[tuple[type, tuple[type, ...]], type[Specialised]] = {}


@dataclass
class Switch:
    """What all specialised modules of one model read: which adapter runs, and whether any does."""

    active: str
    enabled: bool = True


class Part(nn.Module):
    """The injected parameters of one method, one adapter, one place. Its ``forward`` is the injected arithmetic.

    A part whose effect is a change of weights also implements :meth:`effective_weights` and can then be merged.
    """

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights (by name within the base module) that give the adapted output; empty when there are none."""
        return {}

    def base_changed(self, module: nn.Module) -> None:
        """Called when base weights were loaded after injection: start anew if the start depends on them."""


class PartStore(nn.ModuleDict):
    """Adapter name -> method name -> :class:`Part`. Keeps its values when a state dict knows none of them."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update({prefix + key: value for key, value in self.state_dict(keep_vars=True).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


class Specialised(nn.Module):
    """Base of all mixins. It is never instantiated: modules become instances by :func:`specialise`."""

    layer: ClassVar[int] = 0  # order in the class: a mixin of a higher layer runs around the lower ones
    peft_base_class: ClassVar[type[nn.Module]]
    peft_mixins: ClassVar[tuple[type[Specialised], ...]]
    peft: PartStore
    peft_switch: Switch
    peft_backup: dict[str, Tensor]  # base weights while merged, bit for bit
    peft_merged: list[str]  # methods whose parts are in the weights
    peft_name: str  # the place's first name in the model, for messages

    def peft_part(self, method: str) -> Any:
        """The part of ``method`` that applies now, or None (adapters disabled, or the active one has none here)."""
        switch = self.peft_switch
        if not switch.enabled or switch.active not in self.peft:
            return None
        parts = self.peft_parts(switch.active)
        if method not in parts:
            return None
        return parts[method]

    def peft_parts(self, adapter: str) -> nn.ModuleDict:
        """Method name -> part of one adapter that is here."""
        parts = self.peft[adapter]
        assert isinstance(parts, nn.ModuleDict)
        return parts

    def peft_runs(self) -> bool:
        """Whether a part runs here now that is not merged into the weights."""
        switch = self.peft_switch
        return switch.enabled and STORE in self._modules and switch.active in self.peft and not self.peft_backup

    def peft_weight_part(self, method: str) -> Any:
        """As :meth:`peft_part`, for parts that merge: None while they are merged into the weights."""
        if self.peft_backup:
            if self.training and torch.is_grad_enabled():
                warnings.warn("the adapter is merged into the weights and is not trained; unmerge(model)", stacklevel=3)
            return None
        return self.peft_part(method)

    def peft_parameters(self, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """Injected parameters by local name (``lora_a``), of ``adapter`` or of the active one."""
        return {name: value for name, value in self.peft_tensors(adapter).items() if isinstance(value, nn.Parameter)}

    def peft_tensors(self, adapter: str | None = None) -> dict[str, Tensor]:
        """Injected parameters and buffers by local name, of ``adapter`` or of the active one."""
        name = self.peft_switch.active if adapter is None else adapter
        tensors: dict[str, Tensor] = {}
        if STORE in self._modules and name in self.peft:
            for part in self.peft_parts(name).values():
                own = part.state_dict(keep_vars=True)
                assert not tensors.keys() & own.keys(), f"two parts at {self.peft_name} share names"
                tensors.update(own)
        return tensors

    def peft_all_parts(self) -> Iterator[tuple[str, Part]]:
        """(adapter name, part) of every adapter, active or not."""
        if STORE in self._modules:
            for adapter in self.peft:
                for part in self.peft_parts(adapter).values():
                    assert isinstance(part, Part)
                    yield adapter, part

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As every module's, without what is merged: it is in the weights, and would come twice where both are
        loaded.
        """
        state = super().state_dict(*args, **kwargs)
        for method in self.peft_merged:
            merged = f"{kwargs.get('prefix', '')}{STORE}.{self.peft_switch.active}.{method}."
            for key in [key for key in state if key.startswith(merged)]:
                del state[key]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = [*self._parameters, *self._buffers]
        loads_base = any(prefix + name in state_dict for name in own)
        if loads_base and self.peft_backup:
            args[-1].append(f"{prefix[:-1]} holds merged weights: call unmerge(model) before loading others")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if loads_base and not any(key.startswith(f"{prefix}{STORE}.") for key in state_dict):
            for _, part in self.peft_all_parts():
                part.base_changed(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(
                f"{type(self).peft_base_class.__qualname__} pickles itself in its own way and cannot be specialised"
            )
        return (new_specialised, (type(self).peft_base_class, type(self).peft_mixins), *reduced[2:])


class SequentialMixin(Specialised):
    """nn.Sequential runs all of its children; the store of parts is not one of them."""

    layer = -1

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([child for name, child in self._modules.items() if name != STORE and child is not None])

    def __len__(self) -> int:
        return len(self._modules) - (STORE in self._modules)


def specialised_class(base: type[nn.Module], mixins: tuple[type[Specialised], ...]) -> type[Specialised]:
    """The one class for a base class and its mixins (outermost first)."""
    known = _CLASSES.get((base, mixins))
    if known is not None:
        return known
    label = "".join(mixin.__name__.removesuffix("Mixin") for mixin in mixins)
    fields = {"peft_base_class": base, "peft_mixins": mixins, "__module__": base.__module__, "__doc__": base.__doc__}
    made: type[Specialised] = type(f"{label}{base.__name__}", (*mixins, base), fields)
    return _CLASSES.setdefault((base, mixins), made)


def new_specialised(base: type[nn.Module], mixins: tuple[type[Specialised], ...]) -> nn.Module:
    """An empty instance, for unpickling and deepcopy."""
    cls = specialised_class(base, mixins)
    return cls.__new__(cls)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before any injection."""
    return type(module).peft_base_class if isinstance(module, Specialised) else type(module)


def specialise_problem(module: nn.Module) -> str:
    """Why a module cannot be specialised; empty when it can."""
    kind = base_class(module).__name__
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return f"{kind} is a container without a forward; choose the modules in it"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{kind} is a scripted module, whose class cannot change"
    if not isinstance(module, Specialised) and hasattr(module, STORE):
        return f"{kind} already has an attribute {STORE!r}, which injected parts need"
    return ""


def specialise(module: nn.Module, mixin: type[Specialised], switch: Switch, name: str) -> Specialised:
    """Give ``module`` the mixin, in place; a second call with the same mixin changes nothing.

    Raises:
        TypeError: the module cannot change its class, or is a container that only holds others.
    """
    base = base_class(module)
    problem = specialise_problem(module)
    if problem:
        raise TypeError(f"{name}: {problem}")
    mixins = {mixin, *type(module).peft_mixins} if isinstance(module, Specialised) else {mixin}
    if issubclass(base, nn.Sequential):
        mixins.add(SequentialMixin)
    ordered = tuple(sorted(mixins, key=lambda item: (-item.layer, item.__name__)))
    if not isinstance(module, Specialised):
        module.__dict__.update(peft_switch=switch, peft_backup={}, peft_merged=[], peft_name=name)
    module.__class__ = specialised_class(base, ordered)
    assert isinstance(module, Specialised)
    return module


def add_part(module: Specialised, adapter: str, method: str, part: Part) -> None:
    """Store one part; its mixin finds it by adapter and method name."""
    if STORE not in module._modules:
        module.add_module(STORE, PartStore())
    if adapter not in module.peft:
        module.peft[adapter] = nn.ModuleDict()
    module.peft_parts(adapter)[method] = part


def remove_parts(module: Specialised, adapter: str) -> None:
    """Forget all parts of one adapter at one place."""
    if STORE in module._modules and adapter in module.peft:
        del module.peft[adapter]


def restore(module: nn.Module) -> None:
    """Undo :func:`specialise`: the module has its own class again and nothing injected."""
    if not isinstance(module, Specialised):
        return
    base = type(module).peft_base_class
    module._modules.pop(STORE, None)
    for name in ("peft_switch", "peft_backup", "peft_merged", "peft_name"):
        module.__dict__.pop(name, None)
    module.__class__ = base  # type: ignore[assignment]


def specialised_modules(model: nn.Module) -> Iterator[Specialised]:
    """All specialised modules of a model, each once."""
    return (module for module in model.modules() if isinstance(module, Specialised))
