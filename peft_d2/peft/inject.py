"""Freeze a model, specialise the chosen places in place, and report.

After ``inject`` the model is the same object with the same base keys; at the start its outputs are the base's. What
is trained is what the methods put in, and what TRAIN names; nothing else, running statistics of norms included.

Base weights may be loaded before or after: a state dict without injected keys leaves the injected parts as they are,
also with ``strict=True``. Parts whose start depends on the base weights (PiSSA, DoRA) follow the loaded ones as long
as they are untrained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .guards import close_fast_paths, freeze_statistics, has_statistics
from .match import PatternError, is_literal, match, resolve
from .method import Method, MethodError, Placement, Site, normalised, parse
from .methods import METHODS
from .report import Report, make_report
from .runtime import (
    AdapterRecord,
    Injection,
    InjectionError,
    Place,
    Runtime,
    Slot,
    attach,
    get_runtime,
    injected_root,
    refuse_wrapper,
    walk,
)
from .specialise import Specialised, Switch, add_part, base_class, specialise, specialise_problem
from .state import protect_on_load

EVERYTHING = "*"


class Index:
    """All names of a model: modules and parameters, shared ones under each name, injected parts left out."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.sites: dict[int, Site] = {}
        self.slots: dict[str, Slot] = {}  # by first name: parameters and persistent buffers
        self.first_name: dict[str, str] = {}
        firsts: dict[int, str] = {}
        for name, module, parent in walk(model):
            self.modules[name] = module
            self.sites.setdefault(id(module), Site(name, module, parent))
            for leaf, tensor in _own_tensors(module):
                alias = f"{name}.{leaf}" if name else leaf
                first = firsts.setdefault(id(tensor), alias)
                self.first_name[alias] = first
                slot = self.slots.setdefault(first, Slot([], []))
                slot.names.append(alias)
                if not any(owner is module and key == leaf for owner, key in slot.owners):
                    slot.owners.append((module, leaf))

    def module_names(self) -> list[str]:
        """Names that patterns of places are matched against; the model itself has none."""
        return [name for name in self.modules if name]

    def parameter_names(self) -> list[str]:
        """Every name of every parameter."""
        return [alias for alias, first in self.first_name.items() if isinstance(self.slots[first].get(), nn.Parameter)]

    def tensors_under(self, name: str) -> list[str]:
        """First names of all parameters and persistent buffers of one module."""
        prefix = f"{name}." if name else ""
        return list(dict.fromkeys(first for alias, first in self.first_name.items() if alias.startswith(prefix)))


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield leaf, parameter
    for leaf, buffer in module._buffers.items():
        if buffer is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer


def match_targets(model: nn.Module, pattern: str) -> list[str]:
    """Module names that a pattern chooses.

    Raises:
        PatternError: none.
    """
    return match(pattern, Index(model).module_names())


def inject(
    model: nn.Module, methods: Sequence[Mapping[str, Any]] = (), train: Sequence[str] = (), name: str = "default"
) -> Report:
    """Make ``model`` train only what ``methods`` put into it and what ``train`` names. In place; returns the report.

    Args:
        model: any nn.Module; the whole model, as it will be trained.
        methods: entries such as ``{"NAME": "lora", "TARGETS": ["self_attn.value_proj"], "RANK": 8}``.
        train: patterns of modules or parameters to train in full; ``"*"`` is full fine-tuning, as the base would.
        name: the first adapter's name.

    Raises:
        MethodError: an unknown method, key or value, or a place that a method cannot go on.
        PatternError: a pattern that matches nothing.
        InjectionError: the model or a part of it is injected, it is wrapped or lazy, or nothing would be trained.
    On an error the model is as it was.
    """
    _check_model(model)
    if not methods and not train:
        raise InjectionError("nothing would be trained: METHODS and TRAIN are both empty")
    _check_adapter_name(name)
    index = Index(model)
    parsed, placements, full, full_modules = _plan(index, methods, train)
    everything = EVERYTHING in train
    runtime = Runtime(Injection({}, name), Switch(name))
    runtime.was_trainable = {key: value.requires_grad for key, value in model.named_parameters()}
    if not everything:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for first in full:
        slot = runtime.slots[first] = index.slots[first]
        tensor = slot.get()
        if not everything:
            runtime.base[first] = _frozen_copy(tensor)
            _set_trainable(tensor)
    runtime.values[name] = {first: runtime.slots[first].get() for first in full}
    runtime.installed = name
    _apply(runtime, name, placements)
    runtime.record.adapters[name] = _record(parsed, train, placements, full)
    if not everything:
        runtime.statistics = freeze_statistics(model, runtime.switch)
        _train_statistics(full_modules, name)
    close_fast_paths(model, runtime.switch)
    attach(model, runtime)
    protect_on_load(model)
    model.train(model.training)
    return make_report(model)


def add_adapter(
    model: nn.Module, name: str, methods: Sequence[Mapping[str, Any]] | None = None, train: Sequence[str] | None = None
) -> Report:
    """Add another adapter, not active yet. Methods and TRAIN are the active adapter's unless given.

    Its injected parts start anew and its fully trained modules start from the base's values.

    Raises:
        InjectionError: the name is taken, the model is merged, or everything is trained (no base values are kept then).
        MethodError, PatternError: as in :func:`inject`.
    """
    runtime = get_runtime(model)
    root = injected_root(model)
    assert root is not None
    _check_adapter_name(name)
    if name in runtime.record.adapters:
        raise InjectionError(f"there is an adapter {name!r} already")
    if runtime.record.merged or not runtime.record.enabled:
        raise InjectionError("adapters are merged or disabled: call unmerge(model), or leave disabled(model), first")
    methods = runtime.record.methods if methods is None else methods
    train = runtime.record.train if train is None else train
    if any(EVERYTHING in item for item in (train, *(record.train for record in runtime.record.adapters.values()))):
        raise InjectionError("TRAIN '*' trains the base itself; it cannot be one of several adapters")
    index = Index(root)
    parsed, placements, full, full_modules = _plan(index, methods, train)
    own = runtime.values[name] = {}
    for first in full:
        slot = runtime.slots.setdefault(first, index.slots[first])
        own[first] = _frozen_copy(runtime.base.setdefault(first, slot.get()))
        _set_trainable(own[first])
    _apply(runtime, name, placements)
    for parameter in runtime.injected[name]:
        parameter.requires_grad_(False)
    runtime.record.adapters[name] = _record(parsed, train, placements, full)
    runtime.statistics = freeze_statistics(root, runtime.switch)
    _train_statistics(full_modules, name)
    close_fast_paths(root, runtime.switch)
    root.train(root.training)
    return make_report(root, name)


_Plan = tuple[list[Method], list[tuple[Method, Placement]], list[str], list[nn.Module]]


def _plan(index: Index, methods: Sequence[Mapping[str, Any]], train: Sequence[str]) -> _Plan:
    """Everything that can fail, before anything is changed: methods, their parts, what is trained in full."""
    if isinstance(methods, Mapping):
        raise MethodError("expected a list of methods, got one mapping: write [{NAME: ...}]")
    parsed = [parse(entry, METHODS) for entry in methods]
    placements: list[tuple[Method, Placement]] = []
    taken: dict[tuple[int, str], int] = {}
    full, full_modules = _resolve_train(index, train)
    for number, method in enumerate(parsed):
        sites = _sites(index, method)
        if method.selects:
            selection = method.select(sites)
            full += [index.first_name[parameter] for parameter in selection.parameters]
            for site in selection.modules:
                full += index.tensors_under(site.name)
                full_modules += site.module.modules()
            continue
        for site in sites:
            other = taken.setdefault((id(site.module), method.name), number)
            if other != number:
                raise MethodError(
                    f"{site.name} is chosen by two {method.name!r} entries ({other} and {number}); EXCLUDE it in one"
                )
        for placement in method.place(sites):
            problem = specialise_problem(placement.site.module)
            if problem:
                raise MethodError(f"method {method.name!r} cannot go on {placement.site.name}: {problem}")
            placements.append((method, placement))
    chosen = set(full)
    return parsed, placements, [first for first in index.slots if first in chosen], full_modules


def _sites(index: Index, method: Method) -> list[Site]:
    """The places of one method: patterns resolved, exclusions taken out, redirected, and all of them possible."""
    names = index.module_names()
    excluded = set().union(*resolve(method.options.exclude, names).values())
    chosen: dict[int, Site] = {}
    for pattern, found in resolve(method.options.targets, names).items():
        refused: dict[str, str] = {}
        for name in found:
            own = index.sites[id(index.modules[name])]
            if name in excluded or own.name in excluded:
                continue
            site = method.redirect(own, index.sites)
            reason = method.refusal(site)
            if reason:
                refused[own.name] = reason
                continue
            before = chosen.get(id(site.module))
            if before is None:
                chosen[id(site.module)] = site
            elif before.parts:
                parts = tuple(dict.fromkeys(before.parts + site.parts)) if site.parts else ()
                chosen[id(site.module)] = replace(before, parts=parts)
        _check_refused(method, pattern, found, refused)
    if not chosen:
        raise MethodError(f"method {method.name!r}: EXCLUDE takes back everything that TARGETS choose")
    order = {key: position for position, key in enumerate(index.sites)}
    return sorted(chosen.values(), key=lambda site: order[id(site.module)])


def _check_refused(method: Method, pattern: str, found: list[str], refused: dict[str, str]) -> None:
    """A sweeping pattern may pass over modules that a method cannot go on; a plain name must be possible."""
    if not refused or (not is_literal(pattern) and len(refused) < len(found)):
        return
    name, reason = next(iter(refused.items()))
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    deeper = "" if is_literal(pattern) else f"; {pattern.rstrip('*')}** reaches deeper levels"
    raise MethodError(
        f"method {method.name!r} cannot go on {name}{more}, which pattern {pattern!r} chooses: {reason}{deeper}"
    )


def _resolve_train(index: Index, train: Sequence[str]) -> tuple[list[str], list[nn.Module]]:
    """First names of the tensors that TRAIN chooses, and the modules among them (with all they contain)."""
    if isinstance(train, str):
        raise PatternError(f"TRAIN is the string {train!r}: expected a list of patterns, [{train!r}]")
    if EVERYTHING in train:
        return list(index.slots), list(index.modules.values())
    names = [*index.module_names(), *index.parameter_names()]
    tensors: list[str] = []
    modules: list[nn.Module] = []
    for pattern, found in resolve(train, names, "module or parameter").items():
        under: list[str] = []
        for name in found:
            if name in index.modules:
                under += index.tensors_under(name)
                modules += index.modules[name].modules()
            else:
                under.append(index.first_name[name])
        if not any(isinstance(index.slots[first].get(), nn.Parameter) for first in under):
            raise PatternError(f"TRAIN pattern {pattern!r} matches {found[0]}, which has no parameters")
        tensors += under
    return tensors, modules


def _apply(runtime: Runtime, adapter: str, placements: Sequence[tuple[Method, Placement]]) -> None:
    """Put the parts into their modules."""
    places: dict[int, Specialised] = {}
    for method, placement in placements:
        site = placement.site
        module = specialise(site.module, placement.mixin, runtime.switch, site.name)
        placement.part.train(module.training)
        add_part(module, adapter, method.name, placement.part)
        places[id(module)] = module
    runtime.places[adapter] = list(places.values())
    unique = {id(item): item for module in places.values() for item in module.peft_parameters(adapter).values()}
    runtime.injected[adapter] = list(unique.values())


def _record(
    parsed: Sequence[Method], train: Sequence[str], placements: Sequence[tuple[Method, Placement]], full: list[str]
) -> AdapterRecord:
    seen: set[int] = set()
    places = []
    for method, placement in placements:
        fresh = [item for item in placement.part.parameters() if id(item) not in seen]
        seen.update(id(item) for item in fresh)
        kind = base_class(placement.site.module).__name__
        places.append(Place(placement.site.name, method.name, kind, sum(item.numel() for item in fresh)))
    return AdapterRecord([normalised(method) for method in parsed], list(train), places, full)


def _train_statistics(modules: Iterable[nn.Module], adapter: str) -> None:
    for module in modules:
        if has_statistics(module):
            module.__dict__["peft_trained_by"] = module.__dict__["peft_trained_by"] | {adapter}


def _frozen_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _set_trainable(tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex()):
        tensor.requires_grad_(True)


def _check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be injected as it is."""
    if injected_root(model) is not None:
        raise InjectionError(
            "this model is injected already: add_adapter(model, name) adds another, remove(model) undoes the first"
        )
    refuse_wrapper(model)
    for name, module in model.named_modules():
        if isinstance(module, Specialised):
            raise InjectionError(
                f"{name or 'this module'} was injected as a part of another model: remove that injection, then inject "
                "the whole model at once"
            )
        if has_statistics(module) and specialise_problem(module):
            raise InjectionError(f"the running statistics of {name} cannot be frozen: {specialise_problem(module)}")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise InjectionError(f"{lazy[0]} has no shape yet (a lazy module): run the model once, then inject")


def _check_adapter_name(name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w\-]+", name) or hasattr(nn.ModuleDict(), name):
        raise InjectionError(
            f"{name!r} cannot name an adapter: expected letters, digits, _ and -, and no attribute of torch modules"
        )
