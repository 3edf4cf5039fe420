"""The methods by their config name, and what a list of their entries means for a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import AdapterLayer, adapt_problem
from .adapter import Adapter
from .adaptformer import AdaptFormer
from .conv_lora import ConvLora
from .errors import InjectionError, MethodError, PatternError, PeftError
from .huggingface import HuggingFaceTuner
from .lora import Lora
from .method import Method, parse
from .mona import Mona
from .selective import BitFit, LastBlocks, NormTuning
from .targets import ModelIndex, Target, is_literal, names_outright, resolve

EVERYTHING = "*"
logger = logging.getLogger(__name__)

# Their order is the order of adapter layers on one module.
_INNERMOST_FIRST: tuple[type[Method], ...] = (
    *(Lora, HuggingFaceTuner),  # change weights
    *(ConvLora, AdaptFormer, Mona, Adapter),  # add to an output
    *(BitFit, NormTuning, LastBlocks),  # train what is there
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _INNERMOST_FIRST}


class Plan:
    """All that can be wrong, found before anything is changed: methods, their layers, what is trained in full."""

    def __init__(self, index: ModelIndex, entries: Sequence[Mapping[str, Any]], train: Sequence[str]) -> None:
        self.methods = [parse(entry, METHODS) for entry in entries]
        self.train = list(train)
        self.layers: list[tuple[Method, Target, AdapterLayer]] = []
        full, self.full_modules = resolve_train(index, train)
        taken: dict[tuple[int, str], int] = {}
        for number, method in enumerate(self.methods):
            targets = choose_targets(index, method)
            if method.selects:
                selection = method.select(targets)
                full += [index.first_name[parameter] for parameter in selection.parameters]
                for target in selection.modules:
                    full += index.tensors_under(target.name)
                    self.full_modules += target.module.modules()
                continue
            for target in targets:
                other = taken.setdefault((id(target.module), method.name), number)
                if other != number:
                    raise MethodError(
                        f"{target.name} is chosen by two {method.name!r} entries ({other} and {number}); EXCLUDE it in "
                        "one"
                    )
            self.layers += layers_of(method, targets)
        _refuse_two_changes(self.layers)
        chosen = set(full)
        self.full = [first for first in index.tensors if first in chosen]
        if EVERYTHING not in train:
            _say_thawed(index, self.full)
        _refuse_half(index, self.full, EVERYTHING in train)


def layers_of(method: Method, targets: Sequence[Target]) -> list[tuple[Method, Target, AdapterLayer]]:
    try:
        made = method.make_layers(targets)
    except PeftError:
        raise
    except Exception as error:  # out of memory, a package's own error
        raise MethodError(f"method {method.name!r}: {type(error).__name__}: {error}") from error
    for target, _ in made:
        problem = adapt_problem(target.module)
        if problem:
            raise MethodError(f"method {method.name!r} cannot go on {target.name}: {problem}")
    return [(method, target, layer) for target, layer in made]


def _refuse_two_changes(layers: Sequence[tuple[Method, Target, AdapterLayer]]) -> None:
    """Of two layers that compute a module's output from changed weights, the inner one would have no effect."""
    changing: dict[int, Method] = {}
    for method, target, layer in layers:
        if layer.changes_weights:
            other = changing.setdefault(id(target.module), method)
            if other is not method:
                raise MethodError(
                    f"{other.name!r} and {method.name!r} both change the weights of {target.name}: EXCLUDE it in one"
                )


def _refuse_half(index: ModelIndex, full: Sequence[str], everything: bool) -> None:
    """Steps of 1e-4 vanish in half precision, and loss scaling refuses its gradients."""
    for name in full:
        tensor = index.tensors[name].get()
        trained = isinstance(tensor, nn.Parameter) and (tensor.requires_grad or not everything)
        if trained and tensor.dtype in (torch.float16, torch.bfloat16):
            raise InjectionError(
                f"{name} is {tensor.dtype}, and what is trained in full must be float32: call model.float() before "
                "inject (and train under autocast), or .half() after the adapter was loaded for inference"
            )


def _say_thawed(index: ModelIndex, full: Sequence[str]) -> None:
    parameters = [tensor.get() for tensor in index.tensors.values()]
    thawed = [name for name in full if _is_frozen(index.tensors[name].get())]
    if thawed and any(isinstance(value, nn.Parameter) and value.requires_grad for value in parameters):
        logger.warning(
            "TRAIN and the methods train %d tensors that the model itself had frozen (as FREEZE_AT does), from %s to "
            "%s. Name the parts that are to be trained instead, if they should stay frozen.",
            *(len(thawed), thawed[0], thawed[-1]),
        )


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def choose_targets(index: ModelIndex, method: Method) -> list[Target]:
    """The modules of one method: patterns resolved, exclusions taken out, redirected, and all of them possible."""
    names = index.module_names()
    try:
        exclude = resolve(method.options.exclude, names)
    except PatternError as error:
        raise PatternError(f"method {method.name!r}, EXCLUDE: {error}") from error
    excluded = set().union(*exclude.values())
    chosen: dict[int, Target] = {}
    wanted = resolve(method.options.targets, names)
    for pattern, taken_back in exclude.items():
        if not set(taken_back) & set().union(*wanted.values()):
            logger.warning("Method %r: EXCLUDE %r takes back none of what TARGETS choose.", method.name, pattern)
    for pattern, found in wanted.items():
        refused: dict[str, str] = {}
        for name in found:
            own = index.targets[id(index.modules[name])]
            if name in excluded or own.name in excluded:
                continue
            target = method.redirect(own, index.targets)
            reason = method.refusal(target)
            if not reason and not names_outright(pattern, name):
                reason = method.only_by_name(target)
            if reason:
                refused[own.name] = reason
                continue
            before = chosen.get(id(target.module))
            if before is None:
                chosen[id(target.module)] = target
            elif before.parts:
                parts = tuple(dict.fromkeys(before.parts + target.parts)) if target.parts else ()
                chosen[id(target.module)] = replace(before, parts=parts)
        _check_refused(method, pattern, found, refused)
    if not chosen:
        raise MethodError(f"method {method.name!r}: EXCLUDE takes back everything that TARGETS choose")
    order = {key: position for position, key in enumerate(index.targets)}
    return sorted(chosen.values(), key=lambda target: order[id(target.module)])


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


def resolve_train(index: ModelIndex, train: Sequence[str]) -> tuple[list[str], list[nn.Module]]:
    """First names of the tensors that TRAIN chooses, and the modules among them (with all they contain)."""
    if EVERYTHING in train:
        return list(index.tensors), list(index.modules.values())
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
        if not any(isinstance(index.tensors[first].get(), nn.Parameter) for first in under):
            raise PatternError(f"TRAIN pattern {pattern!r} matches {found[0]}, which has no parameters")
        tensors += under
    return tensors, modules


def listed(items: Any, what: str, error: type[PeftError]) -> list[Any]:
    """Any iterable as a list; None is an empty one."""
    if items is None:
        return []
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        example = "[{NAME: ...}]" if isinstance(items, Mapping) else f"[{items!r}]"
        kind = "one mapping" if isinstance(items, Mapping) else f"{type(items).__name__} {items!r}"
        raise error(f"{what}: expected a list of {what}, got {kind}: write {example}")
    return list(items)
