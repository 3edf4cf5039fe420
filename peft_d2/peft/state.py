"""An adapter as tensors, the base as tensors, and what is trained of both.

``state_dict()`` of an injected model holds the base's keys, the adapter layers, and, where an adapter could not be had
back without them, the values that are not installed now: the base's of what is trained in full, and other adapters'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapted import STORE, Adapted, walk
from .errors import AdapterStateError, InjectionError
from .record import AdaptedModel, get_adapted, get_root, injected_root

_BASE, _VALUES = f"{STORE}_base.", f"{STORE}_values."  # keys of values that are not installed


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
    there = {id(module) for module in root.modules()}
    tables = {id(table) for module in root.modules() for table in (module._parameters, module._buffers)}
    gone = [f"{m.peft_name} (adapted)" for m in adapted.modules[adapted.record.active] if id(m) not in there]
    gone += [f"{m.peft_name} (a norm whose statistics are frozen)" for m, _ in adapted.statistics if id(m) not in there]
    for name, tensor in adapted.full.items():
        if name in adapted.values[adapted.record.active] and not all(id(t) in tables for t, _ in tensor.places):
            gone.append(f"{name} (trained in full)")
    gone += _moved(adapted, root) if not gone else []
    if gone:
        more = f" and {len(gone) - 8} more" if len(gone) > 8 else ""
        raise InjectionError(
            f"what was injected is no longer in the model: {', '.join(gone[:8])}{more}. Modules were replaced after "
            "inject (a new head, SyncBatchNorm, fused or quantised layers): change the model first, then inject it"
        )


def _moved(adapted: AdaptedModel, root: nn.Module) -> list[str]:
    """Adapted modules and tensors that are in the model under other names than before."""
    modules = dict(root.named_modules(remove_duplicate=False))
    moved = [m for m in adapted.modules[adapted.record.active] if modules.get(m.peft_name) is not m]
    found = [f"{module.peft_name} (adapted)" for module in moved]
    for name, tensor in adapted.full.items():
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path)
        table = owner._parameters if owner is not None and leaf in owner._parameters else getattr(owner, "_buffers", {})
        if name in adapted.values[adapted.record.active] and table.get(leaf) is not tensor.get():
            found.append(f"{name} (trained in full)")
    return found
