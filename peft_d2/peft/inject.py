"""Freeze a model, put adapter layers into its target modules in place, and report.

After ``inject`` the model is the same object with the same base keys; in eval mode its outputs are the base's. What is
trained is what the methods put in, and what TRAIN names; nothing else, running statistics of norms included.

The order is: build, load the base, inject, load the adapter. Loading the same base again later changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .adapted import (
    ActiveAdapter,
    Adapted,
    adapt,
    adapt_problem,
    adapted_modules,
    add_layer,
    base_class,
    guard,
    has_statistics,
    remove_layers,
    restore,
    walk,
)
from .errors import InjectionError, MethodError, PatternError, PeftError
from .method import normalised, parse
from .methods import EVERYTHING, METHODS, Plan, choose_targets, layers_of, listed
from .state import (
    AdaptedModel,
    AdapterRecord,
    Injection,
    LayerRecord,
    after_state_dict,
    attach,
    base_values,
    counters,
    detach,
    get_adapted,
    get_root,
    injected_keys,
    injected_root,
    layer_tensors,
    refuse_wrapper,
    start_hashes,
    take_not_installed,
    tensor_hash,
)
from .targets import ModelIndex, match

logger = logging.getLogger(__name__)

Entries = Iterable[Mapping[str, Any]] | None
Patterns = Iterable[str] | None


def match_targets(model: nn.Module, pattern: str) -> list[str]:
    """Module names that a pattern chooses.

    Raises:
        PatternError: none.
    """
    return match(pattern, ModelIndex.of(model).module_names())


def inject(model: nn.Module, methods: Entries = (), train: Patterns = (), name: str = "default") -> Report:
    """Make ``model`` train only what ``methods`` put into it and what ``train`` names. In place; returns the report.

    Args:
        model: any nn.Module; the whole model, as it will be trained, with its base's weights.
        methods: entries such as ``{"NAME": "lora", "TARGETS": ["self_attn.value_proj"], "RANK": 8}``.
        train: patterns of modules or parameters to train in full; ``"*"`` is full fine-tuning, as the base would.
        name: the first adapter's name.

    Raises:
        MethodError: an unknown method, key or value, or a module that a method cannot go on.
        PatternError: a pattern that matches nothing.
        InjectionError: the model or a part of it is injected, it is wrapped or lazy, or nothing would be trained.
    On an error the model is as it was.
    """
    _check_model(model)
    entries, patterns = listed(methods, "methods", MethodError), listed(train, "TRAIN", PatternError)
    if not entries and not patterns:
        raise InjectionError("nothing would be trained: METHODS and TRAIN are both empty")
    _check_adapter_name(name)
    everything = EVERYTHING in patterns
    index = ModelIndex.of(model)
    plan = Plan(index, entries, patterns)
    adapted = AdaptedModel(Injection({}, ActiveAdapter(name)), installed=name)
    adapted.was_trainable = {key: value.requires_grad for key, value in model.named_parameters()}
    with _undone_on_error(lambda: _undo(model, adapted)):
        for key in plan.full:
            adapted.full[key] = index.tensors[key]
            adapted.original[key] = tensor = adapted.full[key].get()
            if not everything:
                adapted.base[key] = _frozen_copy(tensor)
        adapted.values[name] = dict(adapted.original)
        for parameter in () if everything else model.parameters():
            parameter.requires_grad_(False)
        for tensor in () if everything else adapted.original.values():
            _set_trainable(tensor)
        _place(model, adapted, name, plan, freeze_statistics=not everything)
        attach(model, adapted)
        model._register_load_state_dict_pre_hook(before_load, with_module=True)
        model._register_state_dict_hook(after_state_dict)
        adapted.start[name] = start_hashes(adapted, name)
    return make_report(model)


def add_adapter(model: nn.Module, name: str, methods: Entries = None, train: Patterns = None) -> Report:
    """Add another adapter, not active yet. Methods and TRAIN are the active adapter's unless given.

    Its layers start anew and its fully trained modules start from the base's values.

    Raises:
        InjectionError: the name is taken, the model is merged, or everything is trained (no base values are kept then).
        MethodError, PatternError: as in :func:`inject`.
    On an error the model is as it was.
    """
    adapted, root = get_adapted(model), get_root(model)
    _check_adapter_name(name)
    if name in adapted.record.adapters:
        raise InjectionError(f"there is an adapter {name!r} already")
    adapted.require_plain()
    entries = adapted.record.methods if methods is None else listed(methods, "methods", MethodError)
    patterns = adapted.record.train if train is None else listed(train, "TRAIN", PatternError)
    if not entries and not patterns:
        raise InjectionError("nothing would be trained: METHODS and TRAIN are both empty")
    if any(EVERYTHING in item for item in (patterns, *(record.train for record in adapted.record.adapters.values()))):
        raise InjectionError("TRAIN '*' trains the base itself; it cannot be one of several adapters")
    index = ModelIndex.of(root)
    plan = Plan(index, entries, patterns)
    with _undone_on_error(lambda: forget_adapter(root, name)):
        adapted.values[name] = {}
        for key in plan.full:
            if key not in adapted.full:
                adapted.full[key] = index.tensors[key]
                adapted.base[key] = adapted.original[key] = adapted.full[key].get()
            own = adapted.values[name][key] = _frozen_copy(adapted.base[key])
            _set_trainable(own)
        _place(root, adapted, name, plan, freeze_statistics=True)
        for parameter in adapted.injected[name]:
            parameter.requires_grad_(False)
        adapted.start[name] = start_hashes(adapted, name)
    return make_report(root, name)


@torch.no_grad()
def forget_adapter(root: nn.Module, name: str) -> None:
    """Drop one adapter that is not active, and what nobody else needs."""
    adapted = get_adapted(root)
    for module in adapted_modules(root):
        remove_layers(module, name)
        if module.peft_trained_by is not None:
            module.peft_trained_by -= {name}
    per_adapter: list[dict[str, Any]] = [adapted.modules, adapted.injected, adapted.values, adapted.start]
    for table in (*per_adapter, adapted.record.adapters):
        table.pop(name, None)
    for key in [key for key in adapted.full if not any(key in values for values in adapted.values.values())]:
        tensor, original = adapted.full.pop(key), adapted.original.pop(key)
        original.data = adapted.base.pop(key).data
        tensor.put(original.requires_grad_(False))
    used = {id(module) for modules in adapted.modules.values() for module in modules}
    used |= {id(module) for module, _ in adapted.statistics}
    for module in adapted_modules(root):
        if id(module) not in used and not any(id(child) in used for child in module.modules()):
            restore(module)


def _undo(model: nn.Module, adapted: AdaptedModel) -> None:
    """Take everything out again: classes, Parameters, flags and modes are those of before the injection."""
    for key, original in adapted.original.items():
        adapted.full[key].put(original)
    norms = {id(module): mode for module, mode in adapted.statistics}
    for item in adapted_modules(model):
        restore(item)
        item.training = norms.get(id(item), item.training)
    hooks: list[tuple[Any, Any]] = [
        (model._load_state_dict_pre_hooks, before_load),
        (model._state_dict_hooks, after_state_dict),
    ]
    for table, ours in hooks:
        for number in [number for number, hook in table.items() if getattr(hook, "hook", hook) is ours]:
            del table[number]
    detach(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(adapted.was_trainable.get(key, parameter.requires_grad))


@torch.no_grad()
def take_out(model: nn.Module, keep_values: bool) -> None:
    """Undo an injection that is whole; ``keep_values`` leaves in what was trained in full, else the base comes back."""
    adapted = get_adapted(model)
    for key, original in adapted.original.items():
        now = adapted.full[key].get() if keep_values or key not in adapted.base else adapted.base[key]
        if now is not original:
            original.data = original.data.to(now.device, now.dtype)
            original.data.copy_(now)
    _undo(model, adapted)


@contextlib.contextmanager
def _undone_on_error(undo: Any) -> Iterator[None]:
    """Run ``undo`` when the block fails, whatever the reason; what is no error of ours becomes one."""
    try:
        yield
    except BaseException as error:
        undo()
        if isinstance(error, PeftError) or not isinstance(error, Exception):
            raise
        raise InjectionError(f"the injection failed and was undone: {type(error).__name__}: {error}") from error


def _place(model: nn.Module, adapted: AdaptedModel, name: str, plan: Plan, freeze_statistics: bool) -> None:
    """Put the layers of one adapter into their modules, innermost first, and write its record."""
    order = list(METHODS)
    modules: dict[int, Adapted] = {}
    for method, target, layer in sorted(plan.layers, key=lambda item: order.index(item[0].name)):
        module = adapt(target.module, adapted.record.running, target.name)
        layer.train(module.training)
        add_layer(module, name, method.name, layer)
    for _, target, _layer in plan.layers:
        assert isinstance(target.module, Adapted)
        modules[id(target.module)] = target.module
    adapted.modules[name] = list(modules.values())
    unique = {id(item): item for module in modules.values() for item in module.peft_parameters(name).values()}
    adapted.injected[name] = list(unique.values())
    adapted.record.adapters[name] = _record(plan)
    known = {id(module): mode for module, mode in adapted.statistics}
    if freeze_statistics:
        modes = {id(module): module.training for module in model.modules() if has_statistics(module)}
        norms = guard(model, adapted.record.running)
        adapted.statistics = [(module, known.get(id(module), modes[id(module)])) for module in norms]
        for inner in plan.full_modules:
            if isinstance(inner, Adapted) and inner.peft_trained_by is not None:
                inner.peft_trained_by |= {name}
        for norm, mode in adapted.statistics:
            norm.train(mode if id(norm) not in known else norm.training)


def _record(plan: Plan) -> AdapterRecord:
    seen: set[int] = set()
    places = []
    for method, target, layer in plan.layers:
        fresh = [item for item in layer.parameters() if id(item) not in seen]
        seen.update(id(item) for item in fresh)
        kind = base_class(target.module).__name__
        places.append(LayerRecord(target.name, method.name, kind, sum(item.numel() for item in fresh)))
    return AdapterRecord([normalised(method) for method in plan.methods], plan.train, places, plan.full)


def _frozen_copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _set_trainable(tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex()):
        tensor.requires_grad_(True)


def _check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be injected as it is."""
    if not isinstance(model, nn.Module):
        raise InjectionError(f"expected the model, an nn.Module, got {type(model).__name__}")
    if injected_root(model) is not None:
        raise InjectionError(
            "this model is injected already: add_adapter(model, name) adds another, remove(model) undoes the first"
        )
    refuse_wrapper(model)
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise InjectionError(
                f"{name or 'this module'} was injected as a part of another model: remove that injection, then inject "
                "the whole model at once"
            )
        if has_statistics(module) and adapt_problem(module):
            raise InjectionError(f"the running statistics of {name} cannot be frozen: {adapt_problem(module)}")
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise InjectionError(f"{lazy[0]} has no shape yet (a lazy module): run the model once, then inject")


def _check_adapter_name(name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w\-]+", name) or hasattr(nn.ModuleDict(), name):
        raise InjectionError(
            f"{name!r} cannot name an adapter: expected letters, digits, _ and -, and no attribute of torch modules"
        )


@torch.no_grad()
def before_load(root: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """torch's hook before ``load_state_dict``: the one place where weights meet a model that is injected.

    - A state dict with injected keys was one of such a model, and all of it is loaded.
    - Without them it is a base's. The base that the adapters are on changes nothing, not what is trained in full
      either. Another one is taken as long as nothing was trained or loaded: the adapters then start anew on it.
    - Where adapters only train modules in full, other values of just these are what was trained, and are loaded.

    Raises:
        InjectionError: these are the weights of another base; or the model is merged.
    """
    adapted, index = get_adapted(root), ModelIndex.of(root)
    base, layers = base_values(root), layer_tensors(root)
    given = {key: state[prefix + key] for key in base if isinstance(state.get(prefix + key), Tensor)}
    if given and adapted.record.merged:
        raise InjectionError("the adapter is merged into the weights: call unmerge(model) before loading others")
    if any(prefix + key in state for key in injected_keys(root)):
        return take_not_installed(adapted, state, prefix)
    if not given:
        return None
    if any(value.is_meta for value in base.values()):
        raise InjectionError(
            "the model was on the meta device when it was injected, so what is trained has no values: give the model "
            "its weights first, then inject"
        )
    fits = {key for key, value in given.items() if value.shape == base[key].shape}
    different = [
        key for key in sorted(fits - counters(root)) if not _is_base(adapted, index, key, given[key], base[key])
    ]
    own = {alias for key in adapted.values[adapted.record.active] for alias in adapted.full[key].names}
    if different:
        only_trained = own.issuperset(different) and not layers
        open_to_others = not adapted.record.base_file and _untouched(adapted)
        if only_trained and (fits - own or not open_to_others):
            return None
        if not open_to_others:
            raise InjectionError(_other_base(adapted, different, len(fits)))
        _start_anew(root, adapted, index, {key: given[key] for key in fits})
    else:
        count = len(adapted.start[adapted.record.active])
        logger.info(
            "These weights are the base's, which the model has: all %d tensors of adapter %r stay in effect.",
            *(count, adapted.record.active),
        )
        fits |= own  # a head of another class count is not missing either
    state.update({prefix + key: index.tensors[index.first_name[key]].get() for key in fits if key in index.first_name})
    state.update({prefix + key: value for key, value in layers.items()})
    return None


def _is_base(adapted: AdaptedModel, index: ModelIndex, key: str, given: Tensor, base: Tensor) -> bool:
    """Whether a given tensor is the base's own of that name, in the base's dtype."""
    same_kind = given.to(base.device, base.dtype)
    if adapted.base or not adapted.full:
        equal = same_kind == base
        return bool(equal.all()) or bool((equal | (same_kind.isnan() & base.isnan())).all())
    start = adapted.start[adapted.record.active].get(index.first_name.get(key, ""))
    return start in (tensor_hash(given), tensor_hash(same_kind))


def _untouched(adapted: AdaptedModel) -> bool:
    """Whether nothing was trained or loaded since the injection."""
    return all(start_hashes(adapted, name) == start for name, start in adapted.start.items())


def _start_anew(root: nn.Module, adapted: AdaptedModel, index: ModelIndex, weights: Mapping[str, Tensor]) -> None:
    """Exchange the base under adapters that are not trained; their layers get new values in the tensors they have."""
    for key, value in weights.items():
        first = index.first_name.get(key, key)
        kept = [adapted.base.get(first), *(values.get(first) for values in adapted.values.values())]
        for tensor in (index.tensors[first].get(), *kept):
            if tensor is not None:
                tensor.copy_(value)
    for name, record in adapted.record.adapters.items():
        for method in (parse(entry, METHODS) for entry in record.methods):
            for _, target, layer in [] if method.selects else layers_of(method, choose_targets(index, method)):
                target.module.peft_layers(name)[method.name].load_state_dict(layer.state_dict())  # type: ignore[operator]
        adapted.start[name] = start_hashes(adapted, name)
    logger.info("The base's weights came after inject, before anything was trained: the adapters start anew on them.")


def _other_base(adapted: AdaptedModel, different: Sequence[str], count: int) -> str:
    more = f" and {len(different) - 4} more" if len(different) > 4 else ""
    file = f" (from {adapted.record.base_file})" if adapted.record.base_file else ""
    return (
        f"these are the weights of another base than the one{file} under adapter {adapted.record.active!r}: "
        f"{len(different)} of {count} tensors differ, {', '.join(different[:4])}{more}; nothing was loaded. Load the "
        "base before you inject: peft_d2.load_base(model, path), then inject(model, ...) or load_adapter(model, "
        "folder); with PEFTModel it is MODEL.WEIGHTS"
    )


@dataclass(frozen=True)
class ReportRow:
    """Parameters of one part of the model: ``total`` counts injected ones too."""

    part: str
    total: int
    injected: int
    full: int

    @property
    def trainable(self) -> int:
        """Injected and fully trained parameters."""
        return self.injected + self.full


@dataclass(frozen=True)
class Report:
    """Parameters by part (shared ones once) and places by method. Percentages have the added parameters in the
    denominator.
    """

    adapter: str
    rows: list[ReportRow]
    places: list[LayerRecord]
    train: list[str]

    @property
    def total(self) -> int:
        """All parameters of the model with this adapter, the injected ones included."""
        return sum(row.total for row in self.rows)

    @property
    def injected(self) -> int:
        """Parameters that the methods added."""
        return sum(row.injected for row in self.rows)

    @property
    def trainable(self) -> int:
        """Parameters that are trained: injected, and in full."""
        return sum(row.trainable for row in self.rows)

    @property
    def percent(self) -> float:
        """100 x trainable / total."""
        return 100 * self.trainable / max(1, self.total)

    def __str__(self) -> str:
        full = sum(row.full for row in self.rows)
        rows = [*self.rows, ReportRow("all", self.total, self.injected, full)]
        table = [("part", "parameters", "injected", "in full", "trained %")]
        for row in rows:
            share = 100 * row.trainable / max(1, row.total)
            table.append((row.part, f"{row.total:,}", f"{row.injected:,}", f"{row.full:,}", f"{share:.2f}"))
        first, *others = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([part.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
            for part, *cells in table
        ]
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        for (method, kind), count in Counter((place.method, place.kind) for place in self.places).items():
            chosen = [place for place in self.places if (place.method, place.kind) == (method, kind)]
            size = sum(place.parameters for place in chosen)
            last = f" ... {chosen[-1].name}" if count > 1 else ""
            lines.append(f"{method} on {count} {kind}: {size:,} parameters, {chosen[0].name}{last}")
        return "\n".join([*lines, *([f"trained in full: {', '.join(self.train)}"] if self.train else [])])


def make_report(model: nn.Module, adapter: str | None = None) -> Report:
    """The report of one adapter (the active one unless named)."""
    adapted, root = get_adapted(model), get_root(model)
    name = adapted.record.active if adapter is None else adapter
    record = adapted.adapter(name)
    full = set(record.full)
    total: Counter[str] = Counter()
    injected: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    seen: set[int] = set()
    own = {id(parameter) for parameter in adapted.injected[name]}
    for path, module, _ in walk(root):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            alias = f"{path}.{leaf}" if path else leaf
            total[_part(path)] += parameter.numel()
            everything = "*" in record.train
            if alias in full and (parameter.requires_grad or not everything):
                trained[_part(path)] += parameter.numel()
        if any(module is item for item in adapted.modules[name]):
            for parameter in module.peft_parameters(name).values():  # type: ignore[operator]
                if id(parameter) in own and id(parameter) not in seen:
                    seen.add(id(parameter))
                    total[_part(path)] += parameter.numel()
                    injected[_part(path)] += parameter.numel()
    rows = [ReportRow(part, total[part], injected[part], trained[part]) for part in total]
    return Report(name, rows, record.places, record.train)


def _part(path: str) -> str:
    """The first two levels of a name."""
    return ".".join(path.split(".")[:2]) or "(top)"
