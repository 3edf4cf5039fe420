"""An adapter as tensors, the base as tensors, and what is trained of both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import PeftError
from .runtime import InjectionError, Runtime, get_runtime, injected_root, known_adapter, walk
from .specialise import STORE, Specialised

logger = logging.getLogger(__name__)


class AdapterStateError(PeftError, ValueError):
    """Tensors do not fit the adapter they were given for."""


@dataclass(frozen=True)
class TrainedParameter:
    """One trained parameter: ``kind`` is "injected" or "full", ``name`` as in an adapter file."""

    name: str
    param: nn.Parameter
    kind: Literal["injected", "full"]


def trained_parameters(model: nn.Module) -> Iterator[TrainedParameter]:
    """Every parameter that the active adapter trains, each once; after an optimizer step only these have changed."""
    runtime = get_runtime(model)
    for name, tensor in _injected(runtime, runtime.record.active).items():
        if isinstance(tensor, nn.Parameter):
            yield TrainedParameter(name, tensor, "injected")
    for name in runtime.values[runtime.record.active]:
        tensor = runtime.slots[name].get()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            yield TrainedParameter(name, tensor, "full")


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """All tensors of one adapter: injected ones as ``<path>.<local name>``, and parameters and buffers of what it
    trains in full.

    Paths are first names in the model; neither a wrapper nor the adapter's name is in them. Tensors are detached, not
    copied.
    """
    runtime = get_runtime(model)
    return {key: value.detach() for key, value in _tensors(runtime, name).items()}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy ``state`` into the adapter ``name``. Fully trained values then survive a later loading of base weights.

    Raises:
        AdapterStateError: names or shapes differ; each is listed, and nothing is changed.
        InjectionError: there is no such adapter, or it is merged.
    """
    runtime = get_runtime(model)
    own = _tensors(runtime, name)
    if runtime.record.merged and runtime.record.active == name:
        raise AdapterStateError(f"adapter {name!r} is merged into the weights: call unmerge(model) first")
    problems = [f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state]
    problems += [f"unexpected: {key} {tuple(state[key].shape)}" for key in state if key not in own]
    for key in own:
        if key in state and state[key].shape != own[key].shape:
            problems.append(f"shape of {key}: {tuple(state[key].shape)} given, {tuple(own[key].shape)} expected")
    if problems:
        listed = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise AdapterStateError(
            f"the tensors do not fit adapter {name!r} (other methods, ranks, places or classes?):\n  {listed}"
        )
    for key, value in own.items():
        value.copy_(state[key])
    runtime.loaded[name] = set(runtime.values[name])


def _injected(runtime: Runtime, name: str) -> dict[str, Tensor]:
    """Injected tensors of one adapter by file name, shared ones under their first name."""
    known_adapter(runtime, name)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for module in runtime.places[name]:
        for local, value in module.peft_tensors(name).items():
            if id(value) not in seen:
                seen.add(id(value))
                tensors[f"{module.peft_name}.{local}" if module.peft_name else local] = value
    return tensors


def _tensors(runtime: Runtime, name: str) -> dict[str, Tensor]:
    tensors = _injected(runtime, name)
    kept = {
        id(module.get_parameter(leaf)): value
        for module in runtime.places[runtime.record.active]
        for leaf, value in module.peft_backup.items()
    }
    for key, value in runtime.values[name].items():
        own = runtime.slots[key].get() if runtime.installed == name else value
        tensors[key] = kept.get(id(own), own)  # what was trained, without what is merged into it
    return tensors


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``model.state_dict()`` without injected keys: the names of the base model. After ``merge`` the values are the
    adapted ones.
    """
    root = injected_root(model)
    if root is None:
        return dict(model.state_dict())
    added = injected_keys(root)
    return {key: value for key, value in root.state_dict().items() if key not in added}


def injected_keys(model: nn.Module) -> set[str]:
    """Keys of ``model.state_dict()`` that injection added."""
    keys: set[str] = set()
    for path, module, _ in walk(model):
        if isinstance(module, Specialised) and STORE in module._modules:
            prefix = f"{path}.{STORE}." if path else f"{STORE}."
            keys.update(prefix + key for key in module.peft.state_dict())
    return keys


def frozen_hash(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of everything that the active adapter does not train (buffers
    included).

    It is the same before and after training, merging and unmerging.
    """
    runtime = get_runtime(model)
    root = injected_root(model)
    assert root is not None
    trained = {
        alias for name in runtime.record.adapters[runtime.record.active].full for alias in runtime.slots[name].names
    }
    backups = {}
    for path, module, _ in walk(root):
        if isinstance(module, Specialised):
            backups.update({f"{path}.{leaf}" if path else leaf: value for leaf, value in module.peft_backup.items()})
    digest = hashlib.sha256()
    for key, value in sorted(base_state_dict(root).items()):
        if key not in trained and isinstance(value, Tensor):
            value = backups.get(key, value).detach()
            value = value.int_repr() if value.is_quantized else value
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def protect_on_load(model: nn.Module) -> None:
    """Make ``load_state_dict`` of base weights reach the base: see :func:`_before_load`."""
    model._register_load_state_dict_pre_hook(_before_load, with_module=True)


def unprotect_on_load(model: nn.Module) -> None:
    """Undo :func:`protect_on_load`."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _before_load]:
        del hooks[key]


def _before_load(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict without injected keys is the base's. Of tensors that are trained in full it sets the base values,
    and

    - values that came from an adapter file stay (one line says so);
    - values that still are the base's follow it, in adapters that are not active too;
    - values trained since are overwritten, as load_state_dict promises, and the kept base value stays as it was.
    """
    runtime = get_runtime(model)
    if any(value.is_meta for value in (*runtime.injected[runtime.record.active], *runtime.base.values())):
        raise InjectionError(
            "the model was on the meta device when it was injected, so what is trained has no values: give the model "
            "its weights first, then inject"
        )
    if not runtime.base or any(prefix + key in state for key in injected_keys(model)):
        return
    loaded = runtime.loaded.get(runtime.installed or "", set())
    kept = []
    for name, slot in runtime.slots.items():
        given = next((state[prefix + alias] for alias in slot.names if prefix + alias in state), None)
        current, base = slot.get(), runtime.base[name]
        if not isinstance(given, Tensor) or given.shape != base.shape:
            continue
        untouched = torch.equal(current, base)
        if name in loaded or untouched:
            for adapter, values in runtime.values.items():
                if adapter != runtime.installed and name in values and torch.equal(values[name], base):
                    values[name].data.copy_(given)
            base.data.copy_(given)
        if name in loaded and not untouched:
            kept.append(name)
            state.update({prefix + alias: current for alias in slot.names})
    if kept:
        logger.info(
            "Base weights loaded; %d tensors of adapter %r stay, from %s on.", len(kept), runtime.installed, kept[0]
        )
