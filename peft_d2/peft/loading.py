"""What ``load_state_dict`` does on a model that is injected: the base again, another base, or all with the adapters."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import join, walk
from .errors import InjectionError, shortened
from .method import choose_targets, layers_of, parse
from .methods import METHODS
from .state import (
    ATTRIBUTE,
    KEPT_BASE,
    KEPT_VALUES,
    Injection,
    base_values,
    counters,
    injected,
    injected_keys,
    is_untrained,
    layer_tensors,
    start_hashes,
    tensor_hash,
)
from .targets import ModelIndex

logger = logging.getLogger(__name__)


@torch.no_grad()
def before_load(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """torch's hook before ``load_state_dict`` of an injected model. It tells by the keys and values what is given:

    - With injected keys it is the state dict of an injected model, and all of it is loaded.
    - Without them it is a base's. The base that the adapters are on changes nothing, not what is trained in full
      either. Another base is taken as long as nothing was trained or loaded: the adapters then start anew on it.
    - Where the adapters train modules in full and inject nothing, and just these modules differ from the base, theirs
      are the trained values, and are loaded.

    Raises:
        InjectionError: these are the weights of another base; or the model is merged.
    """
    injection, index = injected(root)[1], ModelIndex.of(root)
    base, layers = base_values(root), layer_tensors(root)
    inside = (key for key in state if key.startswith(prefix) and isinstance(state[key], Tensor))
    tensors = {key.removeprefix(prefix): state[key] for key in inside}
    is_injected = any(key in tensors for key in injected_keys(root))
    renamed = {} if is_injected else older_names(root, tensors, base)
    there = {renamed.get(key, key): prefix + key for key in tensors}
    given = {key: state[there[key]] for key in base if key in there}
    if given and injection.merged:
        raise InjectionError("the adapter is merged into the weights: call unmerge(model) before loading others")
    if is_injected:
        return _take_not_installed(injection, state, prefix)
    if not given:
        return None
    if any(value.is_meta for value in base.values()):
        raise InjectionError(
            "the model was on the meta device when it was injected, so what is trained has no values: give the model "
            "its weights first, then inject"
        )
    fits = {key for key, value in given.items() if value.shape == base[key].shape}
    different = [
        key for key in sorted(fits - counters(root)) if not _is_base(injection, index, key, given[key], base[key])
    ]
    own = {alias for key in injection.current.values for alias in injection.full[key].names}
    if different:
        open_to_others = is_untrained(root) and not injection.base_file
        if own.issuperset(different) and not layers and (fits - own or not open_to_others):
            return None  # only what is trained in full
        if not open_to_others:
            raise _other_base(injection, different, len(fits))
        _start_anew(injection, index, {key: given[key] for key in fits})
    else:
        logger.info(
            "These weights are the base's, which the model has: all %d tensors of adapter %r stay in effect.",
            *(len(injection.current.start), injection.active),
        )
        fits |= own  # a head of another class count is not missing either
    known = [key for key in fits if key in index.first_name]
    state.update({there.get(key, prefix + key): index.tensors[index.first_name[key]].get() for key in known})
    state.update({prefix + key: value for key, value in layers.items()})
    return None


def older_names(model: nn.Module, state: Mapping[str, Tensor], known: Collection[str]) -> dict[str, str]:
    """{name in ``state``: name now} of tensors that modules of the model rename as they load their older versions.

    PointRend's heads and the official Mask2Former's do. Here modules load into copies of themselves: the model is not
    changed. Empty where ``state`` has no others than the ``known`` names, or all of these, or no others become known.
    """
    if state.keys() <= set(known) or state.keys() >= set(known):
        return {}
    renamed = dict(state)
    for path, module, _ in walk(model):
        is_own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        if ATTRIBUTE not in module.__dict__ and (is_own or module._load_state_dict_pre_hooks):
            shell = copy.copy(module)
            for table in ("_parameters", "_buffers"):
                held = getattr(module, table).items()
                setattr(shell, table, {leaf: None if value is None else value.detach().clone() for leaf, value in held})
            try:
                shell._load_from_state_dict(renamed, join(path, ""), {}, False, [], [], [])
            except Exception:  # of their own code, with a file that may not be of their model
                return {}
    if len(renamed.keys() & known) <= len(state.keys() & known):
        return {}
    before = {id(value): name for name, value in state.items()}
    return {before[id(value)]: name for name, value in renamed.items() if name not in state and id(value) in before}


@torch.no_grad()
def _take_not_installed(injection: Injection, state: dict[str, Any], prefix: str) -> None:
    """Load the values that :func:`after_state_dict` had added to ``state``, and take them out of it.

    The adapter that was active when ``state`` was made may be another than the active one here.

    Raises:
        InjectionError: the model is within ``disabled``, where it holds the base's values.
    """
    injection.require_plain()
    tables = {"": injection.base} | {name: record.values for name, record in injection.adapters.items()}
    kept: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key in [key for key in state if key.startswith((f"{prefix}{KEPT_VALUES}.", f"{prefix}{KEPT_BASE}."))]:
        kind, _, name = key.removeprefix(prefix).partition(".")
        adapter, _, name = name.partition(".") if kind == KEPT_VALUES else ("", "", name)
        known = tables.get(adapter, {}).get(name)
        if known is not None and state[key].shape == known.shape:
            kept[adapter][name] = state.pop(key)
    if injection.active in kept:  # another adapter was active there: its values are under the model's own names
        other = next((values for name, values in tables.items() if name and values and name not in kept), {})
        for name, own in other.items():
            aliases = [prefix + alias for alias in injection.full[name].names if prefix + alias in state]
            if aliases:
                own.copy_(state[aliases[0]])
                state.update(dict.fromkeys(aliases, injection.base[name]))
        for name, value in kept.pop(injection.active).items():
            state.update({prefix + alias: value for alias in injection.full[name].names})
    for adapter, values in kept.items():
        for name, value in values.items():
            tables[adapter][name].copy_(value)


def _is_base(injection: Injection, index: ModelIndex, key: str, given: Tensor, base: Tensor) -> bool:
    """Whether ``given`` has the values of the base's tensor ``key``, compared in the base's dtype."""
    same_kind = given.to(base.device, base.dtype)
    if injection.base or not injection.full:
        equal = same_kind == base
        return bool(equal.all()) or bool((equal | (same_kind.isnan() & base.isnan())).all())
    start = injection.current.start.get(index.first_name.get(key, ""))
    return start in (tensor_hash(given), tensor_hash(same_kind))


def _other_base(injection: Injection, different: list[str], count: int) -> InjectionError:
    file = f" (from {injection.base_file})" if injection.base_file else ""
    return InjectionError(
        f"these are the weights of another base than the one{file} under adapter {injection.active!r}: "
        f"{len(different)} of {count} tensors differ, {shortened(different, 4)}; nothing was loaded. Load the base "
        "before you inject: peft_d2.load_base(model, path), then inject(model, ...) or load_adapter(model, folder); "
        "with PEFTModel it is MODEL.WEIGHTS"
    )


def _start_anew(injection: Injection, index: ModelIndex, weights: Mapping[str, Tensor]) -> None:
    """Load another base under adapters that are untrained, and give their layers new start values, in place."""
    for key, value in weights.items():
        first = index.first_name.get(key, key)
        kept = [injection.base.get(first), *(record.values.get(first) for record in injection.adapters.values())]
        for tensor in (index.tensors[first].get(), *kept):
            if tensor is not None:
                tensor.copy_(value)
    for name, record in injection.adapters.items():
        for method in (parse(entry, METHODS) for entry in record.methods):
            for _, target, layer in layers_of(method, choose_targets(index, method)):
                target.module.peft_layers(name)[method.name].load_state_dict(layer.state_dict())  # type: ignore[operator]
        record.start = start_hashes(injection, name)
    logger.info("The base's weights came after inject, before anything was trained: the adapters start anew on them.")
