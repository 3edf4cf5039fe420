"""Freeze a model, put adapter layers into its target modules in place, and report.

After ``inject`` the model is the same object with the same base keys; in eval mode its outputs are the base's. What is
trained is what the methods put in, and what TRAIN names; nothing else, running statistics of norms included.

The order is: build, load the base, inject, load the adapter. Loading the same base again later changes nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .adapted import (
    STORE,
    ActiveAdapter,
    Adapted,
    adapt,
    adapt_problem,
    adapted_modules,
    add_layer,
    base_class,
    guard,
    has_statistics,
    join,
    own_parameters,
    remove_layers,
    restore,
    walk,
)
from .errors import InjectionError, MethodError, PatternError, PeftError
from .loading import before_load
from .method import Method, choose_targets, layers_of, normalised, parse
from .methods import METHODS
from .probe import watch
from .state import (
    ATTRIBUTE,
    BASE,
    AdapterRecord,
    Injection,
    LayerRecord,
    after_state_dict,
    check_name,
    get_injection,
    in_own_mode,
    injected,
    injected_keys,
    injected_root,
    refuse_sharded,
    refuse_wrapper,
    start_hashes,
    unstorable,
)
from .targets import EVERYTHING, ModelIndex, match, resolve_train

logger = logging.getLogger(__name__)

Entries = Iterable[Mapping[str, Any]] | None
Patterns = Iterable[str] | None


def match_targets(model: nn.Module, pattern: str) -> list[str]:
    """Names of the model's modules that a pattern chooses; PatternError where there are none."""
    return match(pattern, ModelIndex.of(model).module_names())


@in_own_mode
def inject(
    model: nn.Module, methods: Entries = (), train: Patterns = (), name: str = "default", example: Any = None
) -> Report:
    """Make ``model`` train only what ``methods`` put into it and what ``train`` names. In place; returns the report.

    Args:
        model: any nn.Module; the whole model, as it will be trained, with its base's weights.
        methods: entries such as ``{"NAME": "lora", "TARGETS": ["self_attn.value_proj"], "RANK": 8}``.
        train: patterns of modules or parameters to train in full; ``"*"`` is full fine-tuning, as the base would.
        name: the first adapter's name.
        example: what the model is called with to predict, its argument or a tuple of them. A forward pass on it shows
            the width of outputs that modules do not tell; by default it is a small image or some tokens.

    Raises:
        MethodError: an unknown method, key or value, or a module that a method cannot go on.
        PatternError: a pattern that matches nothing.
        InjectionError: the model or a part of it is injected, it is wrapped or lazy, nothing would be trained, or the
            name of what would be trained cannot be stored.
    On an error the model is as it was.
    """
    _check_model(model)
    check_name(name)
    entries, patterns = _listed(methods, "methods", MethodError), _listed(train, "TRAIN", PatternError)
    plan = Plan(model, entries, patterns, name == BASE, example)
    everything = EVERYTHING in patterns
    injection = Injection({name: plan.record}, ActiveAdapter(name), installed=name)
    injection.was_trainable = {key: value.requires_grad for key, value in own_parameters(model)}
    with _undone_on_error(lambda: undo(model, injection)):
        for key in plan.full:
            injection.full[key] = plan.index.tensors[key]
            injection.original[key] = tensor = injection.full[key].get()
            if not everything:
                injection.base[key] = _frozen_copy(tensor)
        injection.current.values.update(injection.original)
        if not everything:
            for _, parameter in own_parameters(model):
                parameter.requires_grad_(False)
            for tensor in injection.original.values():
                _set_trainable(tensor)
        _place(model, injection, name, plan, freeze_statistics=not everything)
        model.__dict__[ATTRIBUTE] = injection
        model._register_load_state_dict_pre_hook(before_load, with_module=True)
        model._register_state_dict_hook(after_state_dict)
        injection.current.start = start_hashes(injection, name)
        _refuse_renamed(model, name)
    for _, parameter in own_parameters(model):
        if not parameter.requires_grad:
            parameter.grad = None  # optimizers move whatever has a gradient, zero with weight decay, too
    if torch.is_inference_mode_enabled():
        logger.warning("The model was made under torch.inference_mode(): it can predict, and never be trained.")
    return make_report(model)


@in_own_mode
def add_adapter(
    model: nn.Module, name: str, methods: Entries = None, train: Patterns = None, example: Any = None
) -> Report:
    """Add another adapter, not active yet. Methods and TRAIN are the active adapter's unless given.

    Its layers start anew and its fully trained modules start from the base's values.

    Raises:
        InjectionError: the name is taken, the model is merged, or everything is trained (no base values are kept then).
        MethodError, PatternError: as in :func:`inject`.
    On an error the model is as it was.
    """
    root, injection = injected(model)
    check_name(name)
    if name in injection.adapters:
        raise InjectionError(f"there is an adapter {name!r} already")
    injection.require_plain()
    refuse_sharded(root, "add adapters")
    entries = injection.methods if methods is None else _listed(methods, "methods", MethodError)
    patterns = injection.current.train if train is None else _listed(train, "TRAIN", PatternError)
    if any(EVERYTHING in item for item in (patterns, *(record.train for record in injection.adapters.values()))):
        raise InjectionError("TRAIN '*' trains the base itself; it cannot be one of several adapters")
    plan = Plan(root, entries, patterns, name == BASE, example)
    with _undone_on_error(lambda: forget_adapter(root, name)):
        record = injection.adapters[name] = plan.record
        for key in plan.full:
            if key not in injection.full:
                injection.full[key] = plan.index.tensors[key]
                injection.base[key] = injection.original[key] = injection.full[key].get()
            own = record.values[key] = _frozen_copy(injection.base[key])
            _set_trainable(own)
        _place(root, injection, name, plan, freeze_statistics=True)
        for parameter in record.injected:
            parameter.requires_grad_(False)
        record.start = start_hashes(injection, name)
    return make_report(root, name)


class Plan:
    """What an injection will do: methods, the layers that they make, what is trained in full.

    Making the plan finds all that can be wrong, before anything in the model is changed.
    """

    def __init__(
        self, model: nn.Module, entries: list[Any], train: list[str], is_base: bool = False, example: Any = None
    ) -> None:
        if is_base and (entries or train):
            raise InjectionError(f"{BASE!r} names the base itself, without an adapter: choose another name")
        if not entries and not train and not is_base:
            raise InjectionError("nothing would be trained: METHODS and TRAIN are both empty")
        self.index = index = ModelIndex.of(model)
        self.methods = [parse(entry, METHODS) for entry in entries]
        full, self.full_modules = resolve_train(index, train)
        chosen = [(method, choose_targets(index, method)) for method in self.methods]
        for method, targets in chosen:
            held, inside = index.within(method.select(targets))
            full += held
            self.full_modules += inside
        unsure = [(method, method.unsure(targets)) for method, targets in chosen]
        if modules := {target.name: target.module for _, targets in unsure for target in targets}:
            seen = watch(model, modules, example)
            for method, targets in unsure:
                method.learn(targets, seen)
        self.layers = [layer for method, targets in chosen for layer in layers_of(method, targets)]
        self._refuse_two_on_one_module()
        in_full = set(full)
        self.full = [first for first in index.tensors if first in in_full]
        self._check_full(EVERYTHING in train, get_injection(model))
        injected_names = [join(target.name, key) for _, target, layer in self.layers for key in layer.state_dict()]
        if problem := unstorable([*injected_names, *self.full]):
            raise InjectionError(problem)
        self.record = AdapterRecord([normalised(method) for method in self.methods], list(train))

    def _refuse_two_on_one_module(self) -> None:
        """Refuse two layers on one module that have the same method, or that both change its weights.

        The first two would be stored under one name; of the other two only one would have an effect.
        """
        by_name: dict[tuple[int, str], Method] = {}
        changing: dict[int, Method] = {}
        for method, target, layer in self.layers:
            other = by_name.setdefault((id(target.module), method.name), method)
            if other is not method:
                numbers = f"{self.methods.index(other)} and {self.methods.index(method)}"
                raise MethodError(
                    f"{target.name} is chosen by two {method.name!r} entries ({numbers}); EXCLUDE it in one"
                )
            other = changing.setdefault(id(target.module), method) if layer.changes_weights else method
            if other is not method:
                raise MethodError(
                    f"{other.name!r} and {method.name!r} both change the weights of {target.name}: EXCLUDE it in one"
                )

    def _check_full(self, everything: bool, before: Injection | None) -> None:
        """Check what is trained in full: refuse half precision, in which small steps vanish, and scripted modules.

        Warn of parameters that the model itself had frozen.
        """
        tensors = {name: tensor.get() for name, tensor in self.index.tensors.items()}
        flags = {name: value.requires_grad for name, value in tensors.items() if isinstance(value, nn.Parameter)}
        full = [name for name in self.full if name in flags]
        flags |= before.was_trainable if before is not None else {}
        thawed = [name for name in full if not flags[name]]
        if thawed and not everything and any(flags.values()):
            logger.warning(
                "TRAIN and the methods train %d tensors that the model itself had frozen (as FREEZE_AT does), from %s "
                "to %s. Name the parts that are to be trained instead, if they should stay frozen.",
                *(len(thawed), thawed[0], thawed[-1]),
            )
        if scripted := [name for name in self.full if not isinstance(self.index.tensors[name].places[0][0], dict)]:
            raise InjectionError(
                f"{scripted[0]} is in a scripted module, whose tensors nothing in Python can hold: build the model "
                "without torch.jit.script, or leave that module out of what is trained in full"
            )
        for name in full:
            dtype = tensors[name].dtype
            if (name not in thawed or not everything) and dtype in (torch.float16, torch.bfloat16):
                raise InjectionError(
                    f"{name} is {dtype}, and what is trained in full must be float32: call model.float() before "
                    "inject (and train under autocast), or .half() after the adapter was loaded for inference"
                )


def _listed(items: Any, what: str, error: type[PeftError]) -> list[Any]:
    """``items``, any iterable or None, as a list; what is no list at all is refused by ``error``."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable | None):
        example = "[{NAME: ...}]" if isinstance(items, Mapping) else f"[{items!r}]"
        kind = "one mapping" if isinstance(items, Mapping) else f"{type(items).__name__} {items!r}"
        raise error(f"{what}: expected a list of {what}, got {kind}: write {example}")
    return list(items or ())


def _place(model: nn.Module, injection: Injection, name: str, plan: Plan, freeze_statistics: bool) -> None:
    """Put the layers of one adapter into their modules, innermost first, and note in its record where they are."""
    record, order = injection.adapters[name], list(METHODS)
    for method, target, layer in sorted(plan.layers, key=lambda item: order.index(item[0].name)):
        module = adapt(target.module, injection.running, target.name)
        layer.train(module.training)
        add_layer(module, name, method.name, layer)
    modules: Iterable[Any] = (target.module for _, target, _ in plan.layers)
    record.modules = list(dict.fromkeys(modules))
    seen: set[int] = set()
    for method, target, layer in plan.layers:
        fresh = [item for item in layer.parameters() if id(item) not in seen]
        seen.update(map(id, fresh))
        record.injected += fresh
        size = sum(item.numel() for item in fresh)
        record.places.append(LayerRecord(target.name, method.name, base_class(target.module).__name__, size))
    if not freeze_statistics:
        return
    injection.statistics = guard(model, injection.running)
    for inner in plan.full_modules:
        if isinstance(inner, Adapted) and inner.peft_trained_by is not None:
            inner.peft_trained_by |= {name}
    for norm in injection.statistics:
        norm.train(norm.peft_mode)


@torch.no_grad()
def forget_adapter(root: nn.Module, name: str) -> None:
    """Drop one adapter that is not active, with the tensors and the adapted classes that no other adapter needs."""
    injection = injected(root)[1]
    for module in adapted_modules(root):
        remove_layers(module, name)
        if module.peft_trained_by is not None:
            module.peft_trained_by -= {name}
    injection.adapters.pop(name, None)
    records = injection.adapters.values()
    for key in [key for key in injection.full if not any(key in record.values for record in records)]:
        tensor, original = injection.full.pop(key), injection.original.pop(key)
        original.data = injection.base.pop(key).data
        tensor.put(original.requires_grad_(False))
    used = {id(module) for record in records for module in (*record.modules, *injection.statistics)}
    for module in adapted_modules(root):
        if not any(id(child) in used for child in module.modules()):
            restore(module)


def undo(model: nn.Module, injection: Injection) -> None:
    """Undo the whole injection: classes, Parameters and requires_grad are as they were before it."""
    for key, original in injection.original.items():
        injection.full[key].put(original)
    for item in adapted_modules(model):
        restore(item)
    tables: list[dict[int, Any]] = [model._load_state_dict_pre_hooks, model._state_dict_hooks]
    for table in tables:
        for number, hook in list(table.items()):
            if getattr(hook, "hook", hook) in (before_load, after_state_dict):
                del table[number]
    model.__dict__.pop(ATTRIBUTE, None)
    for key, parameter in own_parameters(model):
        parameter.requires_grad_(injection.was_trainable.get(key, parameter.requires_grad))


@contextlib.contextmanager
def _undone_on_error(undo: Callable[[], None]) -> Iterator[None]:
    """Call ``undo`` where the block fails for any reason, and turn errors of others into an InjectionError."""
    try:
        yield
    except BaseException as error:
        undo()
        if isinstance(error, PeftError) or not isinstance(error, Exception):
            raise
        raise InjectionError(f"the injection failed and was undone: {type(error).__name__}: {error}") from error


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
    refuse_sharded(model, "inject")
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            raise InjectionError(
                f"{name or 'this module'} was injected as a part of another model: remove that injection, then inject "
                "the whole model at once"
            )
        if type(module).__name__ == "OptimizedModule":
            raise InjectionError(
                f"{name} was made by torch.compile, whose names no other model has: compile it in place instead, "
                "part.compile(), or the whole model after inject"
            )
        if has_statistics(module) and (problem := adapt_problem(module)):
            raise InjectionError(f"the running statistics of {name} cannot be frozen: {problem}")
    lazy = [name for name, parameter in own_parameters(model) if is_lazy(parameter)]
    if lazy:
        raise InjectionError(f"{lazy[0]} has no shape yet (a lazy module): run the model once, then inject")


def _refuse_renamed(model: nn.Module, name: str) -> None:
    """Refuse a model whose state dict gives adapter layers other names: the adapter would not even fit its own base."""
    renamed = {key for key in model.state_dict() if f".{STORE}.{name}." in f".{key}"} - injected_keys(model)
    if renamed:
        raise InjectionError(
            f"the state dict has other names than the model's modules, such as {min(renamed)} (a hook or a wrapper "
            "that renames), so no adapter could be stored: inject without it, and rename where checkpoints are written"
        )


@dataclass(frozen=True)
class ReportRow:
    """How many parameters a part of the model has, shared ones counted once: in all, injected, trained in full."""

    part: str
    total: int = 0
    injected: int = 0
    full: int = 0

    @property
    def trainable(self) -> int:
        """How many are trained: those injected and those trained in full."""
        return self.injected + self.full

    @property
    def percent(self) -> float:
        """The share that is trained, 0 to 100."""
        return 100 * self.trainable / max(1, self.total)


@dataclass(frozen=True)
class Report(ReportRow):
    """The parameters of an adapted model, in all and by part (``rows``), and where the adapter's layers are."""

    adapter: str = ""
    rows: list[ReportRow] = field(default_factory=list)
    places: list[LayerRecord] = field(default_factory=list)
    train: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = (*self.rows, self)
        width = max(len(row.part) for row in rows)
        lines = [f"{'part':{width}}  {'parameters':>13}  {'injected':>12}  {'in full':>12}  {'trained %':>9}"]
        lines += [
            f"{row.part:{width}}  {row.total:13,}  {row.injected:12,}  {row.full:12,}  {row.percent:9.2f}"
            for row in rows
        ]
        rule = "-" * len(lines[0])
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        groups: defaultdict[tuple[str, str], list[LayerRecord]] = defaultdict(list)
        for place in self.places:
            groups[place.method, place.kind].append(place)
        for (method, kind), places in groups.items():
            size = sum(place.parameters for place in places)
            last = f" ... {places[-1].name}" if len(places) > 1 else ""
            lines.append(f"{method} on {len(places)} {kind}: {size:,} parameters, {places[0].name}{last}")
        if self.train:
            lines.append(f"trained in full: {', '.join(self.train)}")
        return "\n".join(lines)


def make_report(model: nn.Module, adapter: str | None = None) -> Report:
    """The report of one adapter (the active one unless named)."""
    root, injection = injected(model)
    name = injection.active if adapter is None else adapter
    record = injection.adapter(name)
    full = set(record.full)
    counts: dict[str, Counter[str]] = {}
    seen: set[int] = set()
    for path, module, _ in walk(root):
        count = counts.setdefault(".".join(path.split(".")[:2]) or "(top)", Counter())
        layers = module.peft_parameters(name) if isinstance(module, Adapted) else {}
        kinds = [("injected", parameter) for parameter in layers.values()]
        for leaf, parameter in nn.Module.named_parameters(module, recurse=False):
            is_full = join(path, leaf) in full and (parameter.requires_grad or EVERYTHING not in record.train)
            kinds.append(("full" if is_full else "frozen", parameter))
        for kind, parameter in kinds:
            if id(parameter) not in seen:
                seen.add(id(parameter))
                count.update({"total": parameter.numel(), kind: parameter.numel()})
    rows = [ReportRow(part, n["total"], n["injected"], n["full"]) for part, n in counts.items() if n]
    n = sum(counts.values(), Counter[str]())
    return Report("all", n["total"], n["injected"], n["full"], name, rows, record.places, record.train)
