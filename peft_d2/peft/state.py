"""What an injected model remembers of its injection, and its tensors: each adapter's, the base's, the trained ones.

``state_dict()`` of an injected model holds the base's keys and the adapter layers. Of what is trained in full a module
holds the values of one adapter at a time, which are *installed*; those of the others, and the base's, are in the state
dict as well, under keys of their own, where an adapter could not be restored without them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .adapted import STORE, ActiveAdapter, Adapted, join, own_buffers, own_parameters, unwrapped_name, walk_adapted
from .errors import AdapterStateError, InjectionError, no_longer_there, shortened
from .lora.factors import LowRank
from .targets import BaseTensor

logger = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
ATTRIBUTE = "_peft_injection"  # of the model itself, so that copies and pickles carry their own
BASE = "base"  # the adapter without layers and values of its own, which is the base itself
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")
_INSIDE = ("module", "_orig_mod", "_fsdp_wrapped_module")  # what wrappers call the model in them
KEPT_BASE, KEPT_VALUES = f"{STORE}_base", f"{STORE}_values"  # first level of keys of values that are not installed

# A name that a file can hold, and the endings of a LoRA's names in the model, each with Hugging Face's in the file.
NAME = re.compile(r"[^.\x00-\x1f\x7f-\x9f\u2028\u2029]+(\.[^.\x00-\x1f\x7f-\x9f\u2028\u2029]+)*")
SUFFIXES = {
    ".lora_a": ".lora_A.weight",
    ".lora_b": ".lora_B.weight",
    ".lora_magnitude": ".lora_magnitude_vector",
    ".lora_embedding_a": ".lora_embedding_A",
    ".lora_embedding_b": ".lora_embedding_B",
}


def _lock() -> Any:
    """A lock for which ``os.fork`` waits: a child would inherit it taken, by a thread that it does not have."""
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock


@dataclass
class LayerRecord:
    """Where one adapter layer is: the module's first name, the layer's method, the module's own class, and how many
    parameters the layer adds.
    """

    name: str
    method: str
    kind: str
    parameters: int


@dataclass
class AdapterRecord:
    """One named adapter: ``methods`` with every key filled in, ``train`` as given, and where its layers are."""

    methods: list[dict[str, Any]]
    train: list[str]
    places: list[LayerRecord] = field(default_factory=list)
    modules: list[Adapted] = field(default_factory=list, compare=False, repr=False)  # those that hold its layers
    injected: list[nn.Parameter] = field(default_factory=list, compare=False, repr=False)
    values: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)  # trained in full, by first name
    start: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # hashes of its tensors at the start
    started_from: str = field(default="", compare=False)  # "user/name@commit" on the hub, if it was loaded from there
    classes: list[str] = field(default_factory=list, compare=False)  # names of those trained on, where they are known
    base: Any = field(default=None, compare=False, repr=False)  # its file's fingerprint of a base of other class counts

    @property
    def full(self) -> list[str]:
        """First names of the tensors that this adapter trains in full."""
        return list(self.values)


@dataclass
class Injection:
    """All that was injected into a model. Of a tensor trained in full there is one for each adapter, and the base's."""

    adapters: dict[str, AdapterRecord]
    running: ActiveAdapter
    merged: bool = False
    base_file: str = ""  # where the base's weights came from, if they were loaded by name before the injection
    installed: str | None = None  # whose values the model holds; None: the base's, within ``disabled``
    # What any adapter trains in full, by first name: where it is in the model, the base's values (none where TRAIN is
    # "*"), and the objects that were there before the injection.
    full: dict[str, BaseTensor] = field(default_factory=dict, compare=False, repr=False)
    base: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    original: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    was_trainable: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)  # before the injection
    statistics: list[Adapted] = field(default_factory=list, compare=False, repr=False)  # norms that stay frozen
    hashes: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # of the base's tensors: a cache
    split: Any = field(default=None, compare=False, repr=False)  # how mixed batches run, once found: mixed.py
    lock: Any = field(default_factory=_lock, compare=False, repr=False)  # one mixed batch at a time

    @property
    def active(self) -> str:
        """Name of the adapter that runs and is trained."""
        return self.running.name

    @property
    def current(self) -> AdapterRecord:
        """The adapter that runs and is trained."""
        return self.adapters[self.active]

    @property
    def methods(self) -> list[dict[str, Any]]:
        """Methods of the active adapter."""
        return self.current.methods

    def __getstate__(self) -> dict[str, Any]:
        """Leave the lock out: it cannot be copied, and a copy gets one of its own."""
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Install the active adapter's values: a copy made within ``disabled`` has its adapters on, too."""
        self.__dict__.update(state, lock=_lock())
        self.install(self.active)

    def install(self, adapter: str | None) -> None:
        """Put the values of what is trained in full into the model: those of ``adapter``, or the base's if None."""
        if adapter == self.installed:
            return
        if self.installed is not None:
            own = self.adapters[self.installed].values
            own.update({name: self.full[name].get() for name in own})
        chosen = self.adapters[adapter].values if adapter is not None else {}
        for name, tensor in self.full.items():
            tensor.put(chosen[name] if name in chosen else self.base[name])
        self.installed = adapter

    def own_value(self, adapter: str, name: str) -> Tensor:
        """The tensor ``name`` as ``adapter`` trains it in full, whether that is installed now or not."""
        return self.full[name].get() if self.installed == adapter else self.adapters[adapter].values[name]

    def require_plain(self) -> None:
        """Raise InjectionError while the adapter is merged into the weights, or adapters are disabled."""
        if self.merged:
            raise InjectionError("the adapter is merged into the weights: call unmerge(model) first")
        if not self.running.enabled:
            raise InjectionError("adapters are disabled: leave the disabled(model) block first")

    def adapter(self, name: str) -> AdapterRecord:
        """The adapter of this name.

        Raises:
            InjectionError: there is none.
        """
        if name not in self.adapters:
            known = ", ".join(map(repr, self.adapters))
            raise InjectionError(
                f"there is no adapter {name!r}; this model has {known}. load_adapter(model, folder, name=...) and "
                "peft.add_adapter(model, name) make another"
            )
        return self.adapters[name]


def injected_root(model: nn.Module) -> nn.Module | None:
    """The module that was given to ``inject``: ``model``, or what DataParallel, DDP or ``torch.compile`` wrap."""
    seen: nn.Module | None = model
    while isinstance(seen, nn.Module):
        if ATTRIBUTE in seen.__dict__:
            return seen
        seen = next((seen._modules[key] for key in _INSIDE if seen._modules.get(key)), None)
    return None


def in_own_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: call the function outside of autocast, and in inference mode only if its model was made in that.

    The model is the function's first argument. What is added to a model has to be of its parameters' mode: tensors made
    in inference mode cannot be trained. Autocast keeps copies of parameters, which the function may have changed: they
    are dropped afterwards.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function in the mode that the model's own parameters were made in."""
        model = args[0] if args else kwargs.get("model")
        parameters = [value for _, value in own_parameters(model)] if isinstance(model, nn.Module) else []
        inference = any(not is_lazy(value) and value.is_inference() for value in parameters)
        with contextlib.ExitStack() as stack:
            stack.callback(torch.clear_autocast_cache)
            for device in {value.device.type for value in parameters} - {"meta"}:
                stack.enter_context(torch.autocast(device, enabled=False))
            if inference != torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(inference))
            return function(*args, **kwargs)

    return call


def refuse_wrapper(model: nn.Module) -> None:
    """Raise InjectionError for a wrapper (DistributedDataParallel, ...), which does not know parameters added later."""
    wrapper = type(model).__name__
    if wrapper in _WRAPPERS:
        raise InjectionError(f"this is a {wrapper} around a model: inject the model itself, then wrap it")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; put together where ``fully_shard`` has spread it over processes, all of which call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP) has spread some of the model's tensors over processes."""
    return any(hasattr(value, "full_tensor") for _, value in own_parameters(model))


def refuse_sharded(model: nn.Module, what: str, flat_alone: bool = False) -> None:
    """Raise InjectionError for a model whose tensors are spread over processes, so that each holds parts alone.

    Args:
        what: what has to be done before the tensors are spread, for the message.
        flat_alone: let models under ``fully_shard`` pass, whose tensors can be put together; those that
            FullyShardedDataParallel has flattened do not even know that they are parts.
    """
    kinds = nn.Linear | _ConvNd
    managed = [m for m in model.modules() if isinstance(m, kinds) and getattr(m, "_is_fsdp_managed_module", False)]
    if any(module.weight.dim() < 2 for module in managed) or (not flat_alone and is_sharded(model)):
        raise InjectionError(
            f"the model's tensors are spread over processes (FSDP): {what} before that. save_adapter puts them "
            "together after fully_shard, called in every process, or within FullyShardedDataParallel.summon_full_params"
        )


def without_values(model: nn.Module) -> str:
    """Say that the model, or a part of it, is on the meta device, naming a tensor; "" where nothing is."""
    tensors = [*own_parameters(model), *model.named_buffers()]
    empty = next((name for name, value in tensors if value.is_meta), "")
    return f"the model is on the meta device ({empty} has no values)" if empty else ""


def refuse_meta(model: nn.Module, what: str) -> None:
    """Raise InjectionError where some tensors of the model have no values (meta device), which ``what`` needs."""
    if said := without_values(model):
        raise InjectionError(
            f"{said}, and {what} needs them: model.to_empty(device=...), then load what it held; where a program "
            "offloads modules (accelerate), take its hooks off first"
        )


def no_injection(model: nn.Module) -> str:
    """Why the model has no adapter: nothing was injected, or it holds the injected one, as Lightning's modules do."""
    inside = next((name for name, module in model.named_modules() if ATTRIBUTE in module.__dict__), "")
    if inside:
        return f"{type(model).__name__} only holds the injected model, as its {inside!r}: give that one"
    return f"{type(model).__name__} has no adapter: call inject(model, methods, train) on the whole model first"


def injected(model: nn.Module) -> tuple[nn.Module, Injection]:
    """The module that was injected, and what it remembers.

    Raises:
        InjectionError: nothing was injected.
    """
    root = injected_root(model)
    if root is None:
        raise InjectionError(no_injection(model))
    return root, root.__dict__[ATTRIBUTE]


def get_injection(model: nn.Module) -> Injection | None:
    """What was injected into ``model``; None when nothing was."""
    return injected(model)[1] if injected_root(model) is not None else None


def require_intact(model: nn.Module) -> None:
    """Raise InjectionError where a module or tensor that was there at the injection is no longer in the model."""
    root, injection = injected(model)
    modules = {unwrapped_name(name): module for name, module in root.named_modules(remove_duplicate=False)}
    ours = [(module, "adapted") for module in injection.current.modules]
    ours += [(module, "a norm whose statistics are frozen") for module in injection.statistics]
    gone = [f"{module.peft_name} ({what})" for module, what in ours if modules.get(module.peft_name) is not module]
    for name in injection.current.full:
        path, _, leaf = name.rpartition(".")
        tables = (modules[path]._parameters, modules[path]._buffers) if path in modules else ()
        first, key = injection.full[name].places[0]
        if key not in first or not any(table.get(leaf) is first[key] for table in tables):
            gone.append(f"{name} (trained in full)")
    here = {name for name, _ in own_parameters(root)} | set(injection.current.full)
    gone += [f"{name} (of the base)" for name in injection.was_trainable if name not in here]
    if gone:
        raise no_longer_there(gone)


@dataclass(frozen=True)
class TrainedParameter:
    """One trained parameter: ``kind`` is "injected" or "full", ``name`` as in an adapter file."""

    name: str
    param: nn.Parameter
    kind: Literal["injected", "full"]


def trained_parameters(model: nn.Module) -> Iterator[TrainedParameter]:
    """Every parameter that the active adapter trains, each once; after an optimizer step only these have changed."""
    injection = injected(model)[1]
    for name, tensor in injected_tensors(injection, injection.active).items():
        if isinstance(tensor, nn.Parameter):
            yield TrainedParameter(name, tensor, "injected")
    for name in injection.current.values:
        tensor = injection.full[name].get()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            yield TrainedParameter(name, tensor, "full")


def warn_of_strays(model: nn.Module) -> None:
    """Warn of parameters that require gradients and belong to no adapter: no file would hold what they learn.

    And of those of the adapter that an optimizer of ``model.parameters()`` would not be given.
    """
    trained, given = list(trained_parameters(model)), {id(value) for value in model.parameters()}
    own = {id(item.param) for item in trained}
    if hidden := [item.name for item in trained if id(item.param) not in given]:
        logger.warning(
            "%s.parameters() leaves out %d parameters of the adapter, from %s on: an optimizer that is made of it does "
            "not train them. Give it peft_d2.peft.trained_parameters(model), or choose other target modules.",
            *(type(model).__name__, len(hidden), hidden[0]),
        )
    strays = [name for name, value in own_parameters(model) if value.requires_grad and id(value) not in own]
    if strays:
        logger.warning(
            "%d parameters require gradients and are in no adapter, from %s on (requires_grad_(True) after inject?): "
            "once they are trained, the adapter does not fit its base. Name them in TRAIN, or freeze them.",
            *(len(strays), strays[0]),
        )


def check_name(name: str) -> None:
    """Raise InjectionError for what cannot name an adapter. Its name also names a module, and is part of keys."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w\-]+", name):
        reason = "expected letters, digits, _ and -"
        if isinstance(name, str) and (proposal := re.sub(r"[^\w\-]+", "_", name).strip("_")):
            reason += f", such as {proposal!r}"
    elif hasattr(nn.ModuleDict(), name):
        reason = f"torch's modules have an attribute of that name; choose another, such as {name + '_1'!r}"
    else:
        return
    raise InjectionError(f"{name!r} cannot name an adapter: {reason}")


def unstorable(names: Iterable[str]) -> str:
    """Why one of these names of tensors cannot be stored in an adapter's files; "" when all can."""
    theirs = tuple(SUFFIXES.values())
    for name in names:
        if name.endswith(theirs) or not NAME.fullmatch(name):
            return (
                f"the tensor name {name!r} cannot be stored in an adapter file: it holds control characters, or ends "
                "as the factors of a LoRA do there. Rename the module, or choose another place"
            )
    return ""


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """All tensors of one adapter, detached: injected ones as ``<path>.<local name>``, and parameters and buffers of
    what it trains in full. Paths are first names in the model; neither a wrapper nor the adapter's name is in them.
    """
    return {key: whole(value.detach()) for key, value in _tensors(injected(model)[1], name).items()}


@in_own_mode
@torch.no_grad()
def load_adapter_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], name: str = "default", other_classes: bool = False
) -> None:
    """Copy ``state`` into the adapter ``name``.

    ``other_classes`` takes other first sizes of what it trains in full (heads of another class count), as long as the
    adapter is not the active one.

    Raises:
        AdapterStateError: names or shapes differ; each is listed, and nothing is changed.
        InjectionError: there is no such adapter.
    """
    injection = injected(model)[1]
    own = _tensors(injection, name)
    if injection.merged and injection.active == name:
        raise AdapterStateError(f"adapter {name!r} is merged into the weights: call unmerge(model) first")
    values = injection.adapters[name].values if other_classes and injection.installed != name else {}
    for key in values.keys() & state.keys():
        own_shape, shape = values[key].shape, state[key].shape
        if own_shape != shape and own_shape[1:] == shape[1:] and len(shape):
            own[key] = values[key] = _like(values[key], state[key])
    problems = [f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state]
    problems += [f"unexpected: {key} {tuple(state[key].shape)}" for key in state if key not in own]
    problems += [
        f"shape of {key}: {tuple(state[key].shape)} given, {tuple(own[key].shape)} expected"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        raise AdapterStateError(
            f"the tensors do not fit adapter {name!r} (other methods, ranks, target modules or classes?):\n  "
            + shortened(problems, 20, "\n  ")
        )
    for key, value in own.items():
        value.copy_(state[key])


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """A copy of ``other`` with what ``tensor`` is: a parameter or not, its dtype, its device, whether it is trained."""
    copy = other.to(tensor.device, tensor.dtype, copy=True)
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def injected_tensors(injection: Injection, name: str) -> dict[str, Tensor]:
    """Tensors of the adapter's layers by their names in a file, shared ones under their first name alone."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for module in injection.adapter(name).modules:
        for local, value in module.peft_tensors(name).items():
            if id(value) not in seen:
                seen.add(id(value))
                tensors[join(module.peft_name, local)] = value
    return tensors


def low_ranks(injection: Injection, name: str) -> dict[str, LowRank]:
    """All pairs of LoRA factors of one adapter, by their path in a file."""
    return {
        join(module.peft_name, local).removesuffix("."): item
        for module in injection.adapters[name].modules
        for layer in module.peft_layers(name).values()
        for local, item in layer.named_modules()
        if isinstance(item, LowRank)
    }


def _tensors(injection: Injection, name: str) -> dict[str, Tensor]:
    """All tensors of one adapter by their names in a file: those of its layers, and what it trains in full."""
    tensors = injected_tensors(injection, name)
    kept = {
        id(module.get_parameter(leaf)): value
        for module in injection.current.modules
        for leaf, value in module.peft_backup.items()
    }
    for key in injection.adapters[name].values:
        own = injection.own_value(name, key)
        tensors[key] = kept.get(id(own), own)  # what was trained, without what is merged into it
    return tensors


def start_hashes(injection: Injection, name: str) -> dict[str, str]:
    """Hashes of an adapter's tensors by name. Those taken at its start tell later whether it was trained or loaded."""
    return {key: tensor_hash(value) for key, value in _tensors(injection, name).items()}


def is_untrained(model: nn.Module) -> bool:
    """Whether no adapter of the model was trained or loaded since it was injected."""
    injection = injected(model)[1]
    return all(start_hashes(injection, name) == item.start for name, item in injection.adapters.items())


def tensor_hash(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes; empty for one without values (on the meta device)."""
    if tensor.is_meta:
        return ""
    value = whole(tensor.detach())
    value = (value.int_repr() if value.is_quantized else value).cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` without injected keys: the names of the base model, the values as they are now."""
    root, added = injected_root(model), injected_keys(model)
    return {k: value for k, value in (model if root is None else root).state_dict().items() if k not in added}


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """The base's tensors by name, whichever adapter is active or merged. The model is not changed for it.

    Where TRAIN is "*" no values of the base are kept: these are then the trained ones.
    """
    root, injection = injected(model)
    state = base_state_dict(model)
    for name, value in injection.base.items():
        state.update(dict.fromkeys(injection.full[name].names, value))
    for path, module in walk_adapted(root):
        state.update({join(path, leaf): value for leaf, value in module.peft_backup.items()})
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def counters(model: nn.Module) -> set[str]:
    """Names of buffers that hold a single number, such as ``num_batches_tracked``.

    Training moves them, so they tell nothing about which base it is.
    """
    buffers = own_buffers(model, remove_duplicate=False)
    return {name for name, value in buffers if value.numel() == 1 or name.endswith("num_batches_tracked")}


def injected_keys(model: nn.Module) -> set[str]:
    """Keys of ``model.state_dict()`` that injection added."""
    root = injected_root(model)
    return set() if root is None else {*layer_tensors(root), *_not_installed(injected(root)[1])}


def layer_tensors(root: nn.Module) -> dict[str, Tensor]:
    """All tensors of all adapter layers by their keys in a state dict, shared modules under each of their names."""
    return {
        join(path, f"{STORE}.{key}"): value
        for path, module in walk_adapted(root)
        if STORE in module._modules
        for key, value in module.peft.state_dict(keep_vars=True).items()
    }


def _not_installed(injection: Injection) -> dict[str, Tensor]:
    """Values of what is trained in full that are not installed now, by their keys in a state dict.

    There are none where the only adapter injects no layers: the model's state dict then has the form of its base's.
    """
    records = injection.adapters
    if len(records) == 1 and not injection.current.injected:
        return {}
    kept = {f"{KEPT_BASE}.{name}": value for name, value in injection.base.items()}
    for adapter, record in records.items():
        if adapter != injection.installed:
            kept.update({f"{KEPT_VALUES}.{adapter}.{name}": value for name, value in record.values.items()})
    return kept


def after_state_dict(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """torch's hook after ``state_dict()``: add values that are not installed, drop layers merged into the weights."""
    injection = injected(root)[1]
    for path, module in walk_adapted(root):
        for method in module.peft_merged:
            merged = f"{prefix}{join(path, STORE)}.{injection.active}.{method}."
            for key in [key for key in state if key.startswith(merged)]:
                del state[key]
    if not injection.merged:
        state.update({prefix + key: value.detach() for key, value in _not_installed(injection).items()})
