"""What an injected model remembers, and its tensors: an adapter's, the base's, and what is trained of both.

``state_dict()`` of an injected model holds the base's keys, the adapter layers, and, where an adapter could not be had
back without them, the values that are not installed now: the base's of what is trained in full, and other adapters'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapted import STORE, ActiveAdapter, Adapted, walk
from .errors import AdapterStateError, InjectionError
from .targets import BaseTensor

_ATTRIBUTE = "_peft_adapted_model"
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")
_BASE, _VALUES = f"{STORE}_base.", f"{STORE}_values."  # keys of values that are not installed


@dataclass
class LayerRecord:
    """Where one adapter layer sits: the module's first name, its own class, and how many numbers the layer adds."""

    name: str
    method: str
    kind: str
    parameters: int


@dataclass
class AdapterRecord:
    """One named adapter: ``methods`` with every key filled in, ``train`` as given, where its layers are (``places``),
    and the first names of all tensors trained in full.
    """

    methods: list[dict[str, Any]]
    train: list[str]
    places: list[LayerRecord] = field(default_factory=list)
    full: list[str] = field(default_factory=list)


@dataclass
class Injection:
    """A plain record of what was injected, and which adapter runs.

    ``base_file`` is where the base's weights came from, if they were loaded by name before the injection.
    """

    adapters: dict[str, AdapterRecord]
    running: ActiveAdapter
    merged: bool = False
    base_file: str = ""

    @property
    def active(self) -> str:
        """Name of the adapter that runs and is trained."""
        return self.running.name

    @property
    def enabled(self) -> bool:
        """False within ``disabled``."""
        return self.running.enabled

    @property
    def methods(self) -> list[dict[str, Any]]:
        """Methods of the active adapter."""
        return self.adapters[self.active].methods

    @property
    def train(self) -> list[str]:
        """TRAIN patterns of the active adapter."""
        return self.adapters[self.active].train

    @property
    def places(self) -> list[LayerRecord]:
        """Layers of the active adapter."""
        return self.adapters[self.active].places


@dataclass
class AdaptedModel:
    """The live side of an :class:`Injection`. Tensors trained in full exist per adapter, and as the base's."""

    record: Injection
    modules: dict[str, list[Adapted]] = field(default_factory=dict)  # per adapter: those that hold its layers
    injected: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # per adapter
    full: dict[str, BaseTensor] = field(default_factory=dict)  # what some adapter trains in full, by first name
    base: dict[str, Tensor] = field(default_factory=dict)  # their frozen values; none where everything is trained
    original: dict[str, Tensor] = field(default_factory=dict)  # the objects that were there before the injection
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # per adapter, its own tensors of these
    start: dict[str, dict[str, str]] = field(default_factory=dict)  # per adapter: hashes of its tensors untrained
    was_trainable: dict[str, bool] = field(default_factory=dict)  # requires_grad before the injection, by first name
    statistics: list[tuple[Adapted, bool]] = field(default_factory=list)  # norms, and whether they were in train mode
    hashes: dict[str, Any] = field(default_factory=dict)  # of the base's tensors, kept from one fingerprint to the next
    installed: str | None = None  # whose values the model holds; None: the base's, within ``disabled``

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy that is made within ``disabled`` has its adapters on, see :class:`ActiveAdapter`."""
        self.__dict__.update(state)
        self.install(self.record.active)

    def install(self, adapter: str | None) -> None:
        """Put one adapter's (or the base's) tensors that are trained in full into the model."""
        if adapter == self.installed:
            return
        if self.installed is not None:
            own = self.values[self.installed]
            own.update({name: self.full[name].get() for name in own})
        chosen = self.values[adapter] if adapter is not None else {}
        for name, tensor in self.full.items():
            tensor.put(chosen[name] if name in chosen else self.base[name])
        self.installed = adapter

    def own_value(self, adapter: str, name: str) -> Tensor:
        """The tensor of one adapter that is trained in full, installed or not."""
        return self.full[name].get() if self.installed == adapter else self.values[adapter][name]

    def require_plain(self) -> None:
        """Raise while adapters are merged or disabled."""
        if self.record.merged:
            raise InjectionError("the adapter is merged into the weights: call unmerge(model) first")
        if not self.record.enabled:
            raise InjectionError("adapters are disabled: leave the disabled(model) block first")

    def adapter(self, name: str) -> AdapterRecord:
        """The record of one adapter.

        Raises:
            InjectionError: there is none of this name.
        """
        if name not in self.record.adapters:
            known = ", ".join(map(repr, self.record.adapters))
            raise InjectionError(f"there is no adapter {name!r}; this model has {known}")
        return self.record.adapters[name]


def attach(model: nn.Module, adapted: AdaptedModel) -> None:
    """Remember it on the model itself, so that copies and pickles carry their own."""
    model.__dict__[_ATTRIBUTE] = adapted


def detach(model: nn.Module) -> None:
    """Forget it."""
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


def get_root(model: nn.Module) -> nn.Module:
    """The injected module itself.

    Raises:
        InjectionError: nothing was injected.
    """
    root = injected_root(model)
    if root is None:
        raise InjectionError(
            f"{type(model).__name__} has no injection: call inject(model, methods, train) on the whole model first"
        )
    return root


def get_adapted(model: nn.Module) -> AdaptedModel:
    """What an injected model remembers.

    Raises:
        InjectionError: nothing was injected.
    """
    return get_root(model).__dict__[_ATTRIBUTE]


def get_injection(model: nn.Module) -> Injection | None:
    """The record of what was injected into ``model``; None when nothing was."""
    return get_adapted(model).record if injected_root(model) is not None else None


def hash_memo(model: nn.Module) -> dict[str, Any]:
    """Where hashes of the base's tensors are kept, so that not every checkpoint hashes all of them again."""
    return get_adapted(model).hashes


@dataclass(frozen=True)
class TrainedParameter:
    """One trained parameter: ``kind`` is "injected" or "full", ``name`` as in an adapter file."""

    name: str
    param: nn.Parameter
    kind: Literal["injected", "full"]


def trained_parameters(model: nn.Module) -> Iterator[TrainedParameter]:
    """Every parameter that the active adapter trains, each once; after an optimizer step only these have changed."""
    adapted = get_adapted(model)
    active = adapted.record.active
    for name, tensor in injected_tensors(adapted, active).items():
        if isinstance(tensor, nn.Parameter):
            yield TrainedParameter(name, tensor, "injected")
    for name in adapted.values[active]:
        tensor = adapted.full[name].get()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            yield TrainedParameter(name, tensor, "full")


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """All tensors of one adapter: injected ones as ``<path>.<local name>``, and parameters and buffers of what it
    trains in full.

    Paths are first names in the model; neither a wrapper nor the adapter's name is in them. Tensors are detached, not
    copied.
    """
    return {key: value.detach() for key, value in _tensors(get_adapted(model), name).items()}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy ``state`` into the adapter ``name``.

    Raises:
        AdapterStateError: names or shapes differ; each is listed, and nothing is changed.
        InjectionError: there is no such adapter.
    """
    adapted = get_adapted(model)
    own = _tensors(adapted, name)
    if adapted.record.merged and adapted.record.active == name:
        raise AdapterStateError(f"adapter {name!r} is merged into the weights: call unmerge(model) first")
    problems = [f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state]
    problems += [f"unexpected: {key} {tuple(state[key].shape)}" for key in state if key not in own]
    for key in own:
        if key in state and state[key].shape != own[key].shape:
            problems.append(f"shape of {key}: {tuple(state[key].shape)} given, {tuple(own[key].shape)} expected")
    if problems:
        listed = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise AdapterStateError(
            f"the tensors do not fit adapter {name!r} (other methods, ranks, target modules or classes?):\n  {listed}"
        )
    for key, value in own.items():
        value.copy_(state[key])


def injected_tensors(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    """Injected tensors of one adapter by file name, shared ones under their first name."""
    adapted.adapter(name)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for module in adapted.modules[name]:
        for local, value in module.peft_tensors(name).items():
            if id(value) not in seen:
                seen.add(id(value))
                tensors[f"{module.peft_name}.{local}" if module.peft_name else local] = value
    return tensors


def _tensors(adapted: AdaptedModel, name: str) -> dict[str, Tensor]:
    tensors = injected_tensors(adapted, name)
    kept = {
        id(module.get_parameter(leaf)): value
        for module in adapted.modules[adapted.record.active]
        for leaf, value in module.peft_backup.items()
    }
    for key in adapted.values[name]:
        own = adapted.own_value(name, key)
        tensors[key] = kept.get(id(own), own)  # what was trained, without what is merged into it
    return tensors


def start_hashes(adapted: AdaptedModel, name: str) -> dict[str, str]:
    """Hashes of an adapter's tensors; compared with those of its start they tell whether it was trained or loaded."""
    return {key: tensor_hash(value) for key, value in _tensors(adapted, name).items()}


def tensor_hash(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes; empty for one without values (on the meta device)."""
    if tensor.is_meta:
        return ""
    value = tensor.detach()
    value = (value.int_repr() if value.is_quantized else value).cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` without injected keys: the names of the base model. After ``merge`` the values are the
    adapted ones.
    """
    root = injected_root(model)
    if root is None:
        return dict(model.state_dict())
    added = injected_keys(root)
    return {key: value for key, value in root.state_dict().items() if key not in added}


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """Name -> value of the base's tensors, whatever adapter is active or merged; nothing is switched for it.

    Where TRAIN is "*" there are no values of the base any more, and these are the trained ones.
    """
    adapted, state = get_adapted(model), base_state_dict(model)
    for name, value in adapted.base.items():
        state.update(dict.fromkeys(adapted.full[name].names, value))
    for path, module, _ in walk(get_root(model)):
        for leaf, value in module.peft_backup.items() if isinstance(module, Adapted) else ():
            state[f"{path}.{leaf}" if path else leaf] = value
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def is_counter(name: str, tensor: Tensor) -> bool:
    """Whether a buffer counts steps, or is another single number that training moves: no property of the base."""
    return not isinstance(tensor, nn.Parameter) and (tensor.numel() == 1 or name.endswith("num_batches_tracked"))


def counters(model: nn.Module) -> set[str]:
    """Names of the base's buffers that :func:`is_counter` takes for counters."""
    return {name for name, value in model.named_buffers(remove_duplicate=False) if is_counter(name, value)}


def injected_keys(model: nn.Module) -> set[str]:
    """Keys of ``model.state_dict()`` that injection added."""
    root = injected_root(model)
    return set() if root is None else {*layer_tensors(root), *_not_installed(get_adapted(root))}


def layer_tensors(root: nn.Module) -> dict[str, Tensor]:
    """All tensors of all adapter layers by their keys in a state dict, shared modules under each of their names."""
    tensors: dict[str, Tensor] = {}
    for path, module, _ in walk(root):
        if isinstance(module, Adapted) and STORE in module._modules:
            prefix = f"{path}.{STORE}." if path else f"{STORE}."
            tensors.update({prefix + key: value for key, value in module.peft.state_dict(keep_vars=True).items()})
    return tensors


def _not_installed(adapted: AdaptedModel) -> dict[str, Tensor]:
    """Values that are neither in a module's tables nor in its adapter layers, by their keys in a state dict.

    A model whose only adapter trains modules in full and injects nothing has none: its state dict has its base's form.
    """
    if adapted.installed is None or (len(adapted.record.adapters) == 1 and not any(adapted.injected.values())):
        return {}
    kept = {_BASE + name: value for name, value in adapted.base.items()}
    for adapter, values in adapted.values.items():
        if adapter != adapted.installed:
            kept.update({f"{_VALUES}{adapter}.{name}": value for name, value in values.items()})
    return kept


def after_state_dict(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """torch's hook after ``state_dict()``: adds what is not installed, leaves out what is merged into the weights."""
    adapted = get_adapted(root)
    for path, module, _parent in walk(root):
        for method in module.peft_merged if isinstance(module, Adapted) else ():
            merged = f"{prefix}{path}{'.' if path else ''}{STORE}.{adapted.record.active}.{method}."
            for key in [key for key in state if key.startswith(merged)]:
                del state[key]
    if not adapted.record.merged:
        state.update({prefix + key: value.detach() for key, value in _not_installed(adapted).items()})


@torch.no_grad()
def take_not_installed(adapted: AdaptedModel, state: dict[str, Any], prefix: str) -> None:
    """Load what :func:`after_state_dict` added and take it out of ``state``, whichever adapter was active there."""
    kept: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in state if key.startswith((prefix + _VALUES, prefix + _BASE))]:
        adapter, _, name = key.removeprefix(prefix).removeprefix(_VALUES).partition(".")
        if key.startswith(prefix + _BASE):
            name, target = key.removeprefix(prefix + _BASE), adapted.base
            adapter = ""
        else:
            target = adapted.values.get(adapter, {})
        if name in target and state[key].shape == target[name].shape:
            kept.setdefault(adapter, {})[name] = state.pop(key)
    base, active = kept.pop("", {}), adapted.record.active
    for name, value in base.items():
        adapted.base[name].copy_(value)
    if active in kept:  # another adapter was active there: its values are under the model's own names
        other = next((name for name, values in adapted.values.items() if values and name not in kept), None)
        for name in adapted.values[other] if other is not None else ():
            aliases = [prefix + alias for alias in adapted.full[name].names if prefix + alias in state]
            if aliases:
                adapted.values[other][name].copy_(state[aliases[0]])  # type: ignore[index]
                state.update(dict.fromkeys(aliases, adapted.base[name]))
        for name, value in kept.pop(active).items():
            state.update({prefix + alias: value for alias in adapted.full[name].names})
    for adapter, values in kept.items():
        for name, value in values.items():
            adapted.values[adapter][name].copy_(value)


def frozen_hash(model: nn.Module) -> str:
    """sha256 over everything that the active adapter does not train, buffers included and counters left out.

    It is the same before and after training, merging and unmerging.

    Raises:
        InjectionError: a module that was adapted or is trained was replaced since.
    """
    require_intact(model)
    adapted, root = get_adapted(model), get_root(model)
    own = adapted.record.adapters[adapted.record.active].full
    left_out = {alias for name in own for alias in adapted.full[name].names} | counters(root)
    digest = hashlib.sha256()
    for key, value in sorted(base_values(root).items()):
        if key not in left_out:
            digest.update(f"{key} {tensor_hash(value)}\n".encode())
    return digest.hexdigest()


def require_intact(model: nn.Module) -> None:
    """Raise where something that was injected, is trained or is kept frozen is not in the model any more.

    Raises:
        InjectionError: naming what was replaced, and the remedy.
    """
    adapted, root = get_adapted(model), get_root(model)
    active = adapted.record.active
    modules = dict(root.named_modules(remove_duplicate=False))
    ours = [(module, "adapted") for module in adapted.modules[active]]
    ours += [(module, "a norm whose statistics are frozen") for module, _ in adapted.statistics]
    gone = [f"{module.peft_name} ({what})" for module, what in ours if modules.get(module.peft_name) is not module]
    for name in adapted.values[active]:
        path, _, leaf = name.rpartition(".")
        tables = (modules[path]._parameters, modules[path]._buffers) if path in modules else ()
        if not any(table.get(leaf) is adapted.full[name].get() for table in tables):
            gone.append(f"{name} (trained in full)")
    if gone:
        more = f" and {len(gone) - 8} more" if len(gone) > 8 else ""
        raise InjectionError(
            f"what was injected is no longer in the model: {', '.join(gone[:8])}{more}. Modules were replaced after "
            "inject (a new head, SyncBatchNorm, fused or quantised layers): change the model first, then inject it"
        )
