"""The one place that changes a class: a module keeps its identity, names and weights, and runs its adapter layers.

An adapted module gets one child, ``peft``, that holds the adapter layers of each named adapter, and its ``__class__``
becomes a subclass of its own class. Nothing is wrapped or replaced, so base keys, shared aliases, pickling,
``deepcopy``, ``torch.compile`` and ``torch.export`` see an ordinary module. Norms with running statistics are adapted
too, without a layer: they stay in eval mode unless they are trained.

State-dict names of injected tensors: ``<path>.peft.<adapter>.<method>.<local name>``. Files use
``<path>.<local name>``: neither the word peft nor the adapter's name is in them.
"""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import InjectionError

STORE = "peft"
_WRAPPED = "_checkpoint_wrapped_module"  # what torch's wrappers for activation checkpointing call the module in them
_FIELDS = ("peft_active", "peft_backup", "peft_merged", "peft_mode", "peft_name", "peft_trained_by")
_CLASSES: dict[tuple[type[nn.Module], type[Adapted] | None], type[Adapted]] = {}


@dataclass
class ActiveAdapter:
    """What all adapted modules of one model read: which adapter runs, and whether any does."""

    name: str
    enabled: bool = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Switch adapters on in a copy that was made within ``disabled``: the end of that block does not reach it."""
        self.__dict__.update(state, enabled=True)


class AdapterLayer(nn.Module):
    """The tensors that one method adds to one target module for one adapter, and what is computed with them.

    ``changes_weights`` is True where the layer does nothing but change the module's weights: it can be merged.
    """

    changes_weights: ClassVar[bool] = False

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The adapted output of ``module``; ``forward`` computes the one without this layer."""
        raise NotImplementedError

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights with which the bare module would give the adapted output, by name; empty where none would do.

        ``weights`` are the module's own by name, those that earlier layers changed in their place.
        """
        return {}


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first input of a module's call, whether it was given by position or by keyword."""
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values())))


class Adapted(nn.Module):
    """Base of the classes that adapted modules get beside their own one; :func:`adapt` makes these, nobody else."""

    peft_base_class: ClassVar[type[nn.Module]]
    peft_mixin: ClassVar[type[Adapted] | None]  # a subclass of Adapted that the module is as well, if any
    peft: nn.ModuleDict  # adapter name -> method name -> AdapterLayer, innermost first; only where there are any
    peft_active: ActiveAdapter
    peft_backup: dict[str, Tensor]  # base weights while merged, bit for bit
    peft_merged: list[str]  # methods whose layers are in the weights
    peft_mode: bool  # whether train() or eval() came last; a norm with frozen statistics is in eval mode after both
    peft_name: str  # the module's first name in the model
    peft_trained_by: frozenset[str] | None  # of a norm with running statistics: the adapters that train them

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with the active adapter's layers around it, the innermost first."""
        if not isinstance(self, Adapted):  # somebody kept this bound method, and the adapters were taken out since
            return type(self).forward(self, *args, **kwargs)
        forward = super().forward
        if self.peft_merged and self.training and torch.is_grad_enabled():
            warnings.warn("the adapter is merged into the weights and is not trained; unmerge(model)", stacklevel=4)
        for layer in self.peft_running():
            forward = partial(layer.adapted_forward, self, forward)
        return forward(*args, **kwargs)

    def train(self, mode: bool = True) -> Adapted:
        """As of every module, but that a norm whose running statistics are frozen stays in eval mode."""
        self.peft_mode = mode
        frozen = self.peft_trained_by is not None and self.peft_active.name not in self.peft_trained_by
        return super().train(mode and not frozen)

    def peft_layers(self, adapter: str | None = None) -> dict[str, Any]:
        """Method name -> layer, of ``adapter`` or else of the active one."""
        name = self.peft_active.name if adapter is None else adapter
        if STORE not in self._modules or name not in self.peft:
            return {}
        return dict(self.peft[name].items())  # type: ignore[operator]

    def peft_running(self) -> list[Any]:
        """The layers that run now: none while disabled, and none that is merged into the weights."""
        if not self.peft_active.enabled:
            return []
        return [layer for method, layer in self.peft_layers().items() if method not in self.peft_merged]

    def peft_tensors(self, adapter: str | None = None) -> dict[str, Tensor]:
        """Injected parameters and buffers by local name (``lora_a``), of ``adapter`` or else of the active one."""
        tensors: dict[str, Tensor] = {}
        for layer in self.peft_layers(adapter).values():
            own = layer.state_dict(keep_vars=True)
            assert not tensors.keys() & own.keys(), f"two layers at {self.peft_name} share names"
            tensors.update(own)
        return tensors

    def peft_parameters(self, adapter: str | None = None) -> dict[str, nn.Parameter]:
        """Those of :meth:`peft_tensors` that are trained."""
        return {name: value for name, value in self.peft_tensors(adapter).items() if isinstance(value, nn.Parameter)}

    def __prepare_scriptable__(self) -> Any:
        raise InjectionError(
            f"torch.jit.script reads no model with adapters ({self.peft_name or 'the whole of it'} is one's): use "
            "torch.jit.trace or torch.export, or script what peft.remove(model, keep=True) leaves, a plain merged model"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(
                f"{type(self).peft_base_class.__qualname__} pickles itself in its own way and cannot be adapted"
            )
        return (_new, (type(self).peft_base_class, type(self).peft_mixin), *reduced[2:])


class _AdaptedSequential(Adapted):
    """Keeps the store of adapter layers out of the children that nn.Sequential runs."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([child for name, child in self._modules.items() if name != STORE and child is not None])

    def __len__(self) -> int:
        return len(self._modules) - (STORE in self._modules)


def _zero_with_adapters(name: str) -> Any:
    """A property that reads as 0 while adapters run inside the module, and else as the value the module gave it."""

    def get(module: nn.Module) -> Any:
        runs = any(child.peft_running() for child in adapted_modules(module))
        return 0 if runs else module.__dict__.get(name, 0)

    return property(get, lambda module, value: module.__dict__.update({name: value}))


class _AdaptedEncoderLayer(Adapted):
    """Keeps nn.TransformerEncoderLayer off its fast path, which reads raw weights, while adapters run inside it."""

    activation_relu_or_gelu = _zero_with_adapters("activation_relu_or_gelu")


class _AdaptedEncoder(Adapted):
    """Keeps nn.TransformerEncoder from packing padded batches for that fast path while adapters run inside it."""

    use_nested_tensor = _zero_with_adapters("use_nested_tensor")


_SPECIAL: dict[type[nn.Module], type[Adapted]] = {
    nn.Sequential: _AdaptedSequential,
    nn.TransformerEncoderLayer: _AdaptedEncoderLayer,
    nn.TransformerEncoder: _AdaptedEncoder,
}


def _adapted_class(base: type[nn.Module], mixin: type[Adapted] | None = None) -> type[Adapted]:
    """The one subclass of ``base``, and of ``mixin`` if given, that adapted modules of the class ``base`` get."""
    if (base, mixin) not in _CLASSES:
        special = next((special for kind, special in _SPECIAL.items() if issubclass(base, kind)), Adapted)
        fields = {"peft_base_class": base, "peft_mixin": mixin, "__module__": base.__module__, "__doc__": base.__doc__}
        bases = (special,) if mixin is None else (mixin,) if special is Adapted else (mixin, special)
        made: type[Adapted] = type(f"Adapted{base.__name__}", (*bases, base), fields)
        _CLASSES.setdefault((base, mixin), made)
    return _CLASSES[base, mixin]


def _new(base: type[nn.Module], mixin: type[Adapted] | None = None) -> nn.Module:
    """An empty instance, for unpickling and deepcopy."""
    cls = _adapted_class(base, mixin)
    return cls.__new__(cls)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module has without adapters."""
    return module.peft_base_class if isinstance(module, Adapted) else type(module)


def replaced_forward(module: nn.Module) -> str:
    """Why an adapted class would have no effect: the object has a forward of its own; empty when it has none."""
    return (
        f"the forward of this very {base_class(module).__name__} was replaced (by a hook of accelerate, a patch), and "
        "would pass over adapter layers: inject first, or take that off"
        if "forward" in module.__dict__
        else ""
    )


def adapt_problem(module: nn.Module) -> str:
    """Why a module cannot be adapted; empty when it can."""
    kind = base_class(module).__name__
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return f"{kind} is a container without a forward; choose the modules in it"
    if isinstance(module, torch.jit.ScriptModule):
        return f"{kind} is a scripted module, whose class cannot change"
    if problem := replaced_forward(module):
        return problem
    if not isinstance(module, Adapted) and hasattr(module, STORE):
        return f"{kind} already has an attribute {STORE!r}, which adapter layers need"
    return ""


def adapt(module: nn.Module, active: ActiveAdapter, name: str, mixin: type[Adapted] | None = None) -> Adapted:
    """Change the class of ``module`` in place to an adapted one, with ``mixin`` if given.

    Args:
        active: which adapter runs, shared by all adapted modules of the model.
        name: the module's first name in the model.
        mixin: a subclass of :class:`Adapted` that the module is to be as well. Without it, a module that is adapted
            already stays as it is.
    """
    if not isinstance(module, Adapted):
        module.__class__ = _adapted_class(type(module))
        vars(module).update(peft_active=active, peft_name=name, peft_backup={}, peft_merged=[])
        trained_by = frozenset[str]() if has_statistics(module) else None
        vars(module).update(peft_mode=module.training, peft_trained_by=trained_by)
    assert isinstance(module, Adapted)
    if mixin is not None and not isinstance(module, mixin):
        module.__class__ = _adapted_class(base_class(module), mixin)
    return module


def restore(module: Adapted) -> None:
    """Undo :func:`adapt`: the module has its own class and mode again and nothing injected."""
    if module.peft_trained_by is not None:
        module.training = module.peft_mode
    module._modules.pop(STORE, None)
    for name in _FIELDS:
        module.__dict__.pop(name, None)
    module.__class__ = module.peft_base_class  # type: ignore[assignment]


def add_layer(module: Adapted, adapter: str, method: str, layer: AdapterLayer) -> None:
    """Store a layer of the adapter; it runs around the layers that the module has of it already."""
    if STORE not in module._modules:
        module.add_module(STORE, nn.ModuleDict())
    if adapter not in module.peft:
        module.peft[adapter] = nn.ModuleDict()
    module.peft[adapter][method] = layer  # type: ignore[operator]


def remove_layers(module: Adapted, adapter: str) -> None:
    """Remove all layers of one adapter from the module, which stays adapted until :func:`restore`."""
    if STORE in module._modules and adapter in module.peft:
        del module.peft[adapter]
        if not len(module.peft):
            del module._modules[STORE]


def has_statistics(module: nn.Module) -> bool:
    """Whether training a batch would move this module's running statistics (BatchNorm of any make)."""
    own = module._buffers  # wrappers hand on the attributes of what is in them
    return "running_mean" in own and isinstance(own["running_mean"], Tensor) and hasattr(module, "momentum")


def guard(model: nn.Module, active: ActiveAdapter) -> list[Adapted]:
    """Adapt every norm with running statistics, and torch's encoders that hold adapted modules.

    Returns:
        the norms, whose statistics are frozen unless an adapter trains them.
    """
    named = [(unwrapped_name(name), module) for name, module in model.named_modules()]
    norms = [adapt(module, active, name) for name, module in named if has_statistics(module)]
    for name, module in named:
        if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer) and adapted_modules(module):
            adapt(module, active, name)
    return norms


def adapted_modules(model: nn.Module) -> list[Adapted]:
    """All adapted modules of a model, each once."""
    return [module for module in model.modules() if isinstance(module, Adapted)]


def join(path: str, name: str) -> str:
    """The dotted name of ``name`` below ``path``."""
    return f"{path}.{name}" if path else name


def unwrapped_name(name: str) -> str:
    """A name without the levels of torch's ``checkpoint_wrapper`` and ``offload_wrapper``, as state dicts have it."""
    return f"{name}.".replace(f"{_WRAPPED}.", "").removesuffix(".")


def walk(
    module: nn.Module, prefix: str = "", parent: nn.Module | None = None
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Yield (name, module, parent) of the modules of a tree, without adapter layers; shared ones under each name.

    A wrapper of :func:`unwrapped_name` comes before the module in it, under the same name.
    """
    yield prefix, module, parent
    for name, child in module._modules.items():
        if child is not None and not (name == STORE and isinstance(module, Adapted)):
            yield from walk(child, prefix if name == _WRAPPED else join(prefix, name), module)


def own_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all parameters of a model.

    Names are those of the state dict. Models override ``named_parameters`` or ``parameters`` to keep some from their
    optimizers or checkpoints; these have to be frozen and stored all the same.
    """
    named = nn.Module.named_parameters(model, remove_duplicate=remove_duplicate)
    return ((unwrapped_name(name), parameter) for name, parameter in named)


def own_buffers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of all buffers of a model, by the names that they have in its state dict."""
    named = model.named_buffers(remove_duplicate=remove_duplicate)
    return ((unwrapped_name(name), buffer) for name, buffer in named)


def walk_adapted(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield (name, module) of all adapted modules, shared ones under each of their names."""
    for path, module, _ in walk(model):
        if isinstance(module, Adapted):
            yield path, module
