"""Patterns of names, and the target modules and tensors of a model that they choose.

A pattern is one of

``re:<expression>``
    a regular expression that must match the whole name;
anything else
    a dotted suffix with shell wildcards: it matches a name, or the end of a name that begins after a dot.
    ``value_proj`` matches ``encoder.layers.0.self_attn.value_proj``. In it

    ======== ==============================================================================================
    ``*``    any characters, dots included; at the end of a pattern it stays within one level of names, so
             ``blocks.*`` are the blocks and not what is in them. Standing alone between dots it is at least
             one level: ``decoder.*.self_attn`` reaches any depth.
    ``**``   any characters, dots included, at the end of a pattern too: ``blocks.**`` is all that is in blocks
    ``?``    one character that is not a dot
    ``[ab]`` one of these characters
    ``{a,b}`` one of these; each alternative must match something
    ======== ==============================================================================================

    The single pattern ``*`` means everything.

Every pattern must match: a mistyped name is an error that lists the nearest names, never a silent nothing.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapted import join, walk
from .errors import PatternError, no_longer_there

EVERYTHING, REGEX_PREFIX = "*", "re:"
T = TypeVar("T")
_WILDCARDS = re.compile(r"[*?\[]")
_DIGITS = re.compile(r"\d+")
_GLOB_PARTS = re.compile(r"\*+|\[[^\]]*\]|[*?\[]|[^*?\[]+")
_MOST_ALTERNATIVES = 10_000


def is_literal(pattern: str) -> bool:
    """Whether a pattern spells names or ends of names, without wildcards; braces are allowed."""
    return not pattern.startswith(REGEX_PREFIX) and _WILDCARDS.search(pattern) is None


def names_outright(pattern: str, name: str) -> bool:
    """Whether a pattern spells the last level of the module's name, or, if it is an expression, the whole name."""
    if pattern.startswith(REGEX_PREFIX):
        return pattern.removeprefix(REGEX_PREFIX).replace("\\", "") == name
    return "*" not in pattern.rpartition(".")[2]


def resolve(patterns: Sequence[str] | str, names: Iterable[str], what: str = "module") -> dict[str, list[str]]:
    """Which of ``names`` each pattern chooses, in the order of ``names``.

    Raises:
        PatternError: a pattern, or one alternative of its braces, matches no name.
    """
    if isinstance(patterns, str):
        raise PatternError(f"expected a list of patterns, got the string {patterns!r}: write [{patterns!r}]")
    ordered = list(dict.fromkeys(names))
    return {pattern: match(pattern, ordered, what) for pattern in patterns}


def match(pattern: str, names: Sequence[str], what: str = "module") -> list[str]:
    """The ``names`` that one pattern chooses; see :func:`resolve`."""
    if not isinstance(pattern, str) or not pattern:
        raise PatternError(f"expected a pattern (a non-empty string), got {pattern!r}")
    matched: set[str] = set()
    used: set[tuple[int, str]] = set()
    unused: set[tuple[int, str]] = set()
    for expression, chosen in _expressions(pattern):
        hits = set(filter(expression.fullmatch, names))
        matched |= hits
        (used if hits else unused).update(chosen)
    if not matched:
        raise PatternError(f"pattern {pattern!r} matches no {what}.{_hint(pattern, names)}")
    if dead := sorted(unused - used):
        option = dead[0][1]
        raise PatternError(
            f"in pattern {pattern!r} the alternative {option!r} matches no {what}.{_hint(option, names)}"
        )
    return [name for name in names if name in matched]


def first_match(rules: Mapping[str, T], name: str) -> T | None:
    """The value of the first of the patterns in ``rules`` that matches ``name``; None where none does."""
    for pattern, value in rules.items():
        if any(expression.fullmatch(name) for expression, _ in _expressions(pattern)):
            return value
    return None


def nearest(wanted: str, names: Iterable[str]) -> list[str]:
    """The three names that resemble ``wanted`` most, compared over as many trailing levels as it has."""
    levels = wanted.count(".") + 1
    tails: dict[str, str] = {}
    for name in names:
        if name:
            tails.setdefault(_DIGITS.sub("0", ".".join(name.split(".")[-levels:])), name)
    query = _DIGITS.sub("0", wanted)
    return [tails[tail] for tail in difflib.get_close_matches(query, list(tails), n=3, cutoff=0.4)]


def _hint(pattern: str, names: Sequence[str]) -> str:
    plain = re.sub(r"[*?\[\]{}\\^$()|+]+|^re:", "", pattern.replace(",", ".")).strip(".")
    plain = re.sub(r"\.{2,}", ".", plain)
    found = nearest(plain, names) or nearest(plain.rsplit(".", 1)[-1], names)
    return f" Nearest names: {', '.join(found)}." if found else " No name resembles it."


def _expressions(pattern: str) -> Iterator[tuple[re.Pattern[str], tuple[tuple[int, str], ...]]]:
    """Yield an expression for each text that the braces stand for, and the alternatives chosen: (group, text) pairs."""
    short = repr(pattern) if len(pattern) <= 200 else f"{pattern[:200]!r}..."
    is_regex = pattern.startswith(REGEX_PREFIX)
    for text, chosen in [(pattern.removeprefix(REGEX_PREFIX), ())] if is_regex else _expand(pattern, short):
        try:
            yield re.compile(text if is_regex else _glob(text, pattern)), chosen
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"pattern {short} is not a regular expression: {error}") from error


def _expand(pattern: str, short: str) -> Iterator[tuple[str, tuple[tuple[int, str], ...]]]:
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if any("{" in piece or "}" in piece for piece in pieces):
        raise PatternError(f"pattern {pattern!r} has an unbalanced or nested brace")
    groups = [[(number, option) for option in text.split(",")] for number, text in enumerate(pieces[1::2])]
    if math.prod(map(len, groups)) > _MOST_ALTERNATIVES:
        raise PatternError(f"pattern {short} stands for more than {_MOST_ALTERNATIVES} names: write several")
    for chosen in itertools.product(*groups):
        pieces[1::2] = [option for _, option in chosen]
        yield "".join(pieces), chosen


def _glob(text: str, pattern: str) -> str:
    """A brace-free glob as a regular expression for whole names."""
    if text in ("*", "**"):
        return ".*"
    out = [r"(?:.*\.)?"]
    for found in _GLOB_PARTS.finditer(text):
        part = found.group()
        if part.startswith("*"):
            before, after = text[: found.start()], text[found.end() :]
            alone = before[-1:] in ("", ".") and after[:1] in ("", ".")
            out.append(("." if after or part != "*" else "[^.]") + ("+" if alone else "*"))
        elif part == "[":
            raise PatternError(f"pattern {pattern!r} has an unclosed bracket")
        elif part.startswith("["):
            out.append("[" + part[1:-1].replace("!", "^", 1).replace("\\", r"\\") + "]")
        else:
            out.append("[^.]" if part == "?" else re.escape(part))
    return "".join(out)


@dataclass(frozen=True)
class Target:
    """A module with its first name in the model and its parent, None for the model itself.

    ``parts`` are those of its projections (q, k, v, out) that a layer is for, where a method was redirected to it.
    """

    name: str
    module: nn.Module
    parent: nn.Module | None
    parts: tuple[str, ...] = ()

    def factory_kwargs(self) -> dict[str, Any]:
        """Device and dtype for new parameters here: the module's own, in float32 where the base has half precision."""
        for source in (self.module, self.parent):
            for value in source.parameters() if source is not None else ():
                if value.is_floating_point():
                    half = value.dtype in (torch.float16, torch.bfloat16)
                    return {"device": value.device, "dtype": torch.float32 if half else value.dtype}
        return {}


@dataclass
class BaseTensor:
    """A parameter or buffer of the base: where modules hold it, as (``_parameters`` or ``_buffers``, key) pairs, and
    all of its names.
    """

    places: list[tuple[dict[str, Any], str]]
    names: list[str]

    def get(self) -> Tensor:
        """The tensor that is installed now; InjectionError where it is computed from others since (weight_norm)."""
        table, leaf = self.places[0]
        if leaf not in table:
            raise no_longer_there(self.names[:1])
        return table[leaf]

    def put(self, tensor: Tensor) -> None:
        """Install another tensor under every name, on the device and in the dtype of the one before."""
        before = self.get()
        if tensor.device != before.device or tensor.dtype != before.dtype:
            tensor.data = tensor.data.to(before.device, before.dtype)
        for table, leaf in self.places:
            table[leaf] = tensor


@dataclass
class ModelIndex:
    """All names of a model: modules, and parameters and persistent buffers; adapter layers are left out."""

    modules: dict[str, nn.Module] = field(default_factory=dict)  # shared ones under each of their names
    targets: dict[int, Target] = field(default_factory=dict)  # by the module's id, under its first name
    tensors: dict[str, BaseTensor] = field(default_factory=dict)  # by first name
    first_name: dict[str, str] = field(default_factory=dict)  # of each name of a tensor

    @classmethod
    def of(cls, model: nn.Module) -> ModelIndex:
        """The index of ``model``, made in one walk over its modules."""
        index, firsts = cls(), dict[int, str]()
        for name, module, parent in walk(model):
            index.modules[name] = module
            index.targets.setdefault(id(module), Target(name, module, parent))
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for table in tables:
                for leaf, tensor in table.items():
                    if tensor is None or leaf in module._non_persistent_buffers_set:
                        continue
                    alias = join(name, leaf)
                    first = index.first_name[alias] = firsts.setdefault(id(tensor), alias)
                    entry = index.tensors.setdefault(first, BaseTensor([], []))
                    entry.names.append(alias)
                    if not any(known is table and key == leaf for known, key in entry.places):
                        entry.places.append((table, leaf))
        return index

    def module_names(self) -> list[str]:
        """Names that patterns of target modules are matched against; the model itself has none."""
        return [name for name in self.modules if name]

    def parameter_names(self) -> list[str]:
        """Every name of every parameter."""
        return [name for name, first in self.first_name.items() if isinstance(self.tensors[first].get(), nn.Parameter)]

    def within(self, names: Iterable[str]) -> tuple[list[str], list[nn.Module]]:
        """First names of the tensors in the modules and parameters of these names, and all modules in these modules."""
        tensors: list[str] = []
        modules: list[nn.Module] = []
        for name in names:
            if name in self.modules:
                prefix = join(name, "")
                tensors += [first for alias, first in self.first_name.items() if alias.startswith(prefix)]
                modules += self.modules[name].modules()
            else:
                tensors.append(self.first_name[name])
        return list(dict.fromkeys(tensors)), modules


def resolve_train(index: ModelIndex, train: Sequence[str]) -> tuple[list[str], list[nn.Module]]:
    """First names of the tensors that the patterns of TRAIN choose, and the modules chosen with all they contain."""
    if EVERYTHING in train:
        return list(index.tensors), list(index.modules.values())
    names = [*index.module_names(), *index.parameter_names()]
    tensors: list[str] = []
    modules: list[nn.Module] = []
    for pattern, matched in resolve(train, names, "module or parameter").items():
        held, inside = index.within(matched)
        if not any(isinstance(index.tensors[first].get(), nn.Parameter) for first in held):
            raise PatternError(f"TRAIN pattern {pattern!r} matches {matched[0]}, which has no parameters")
        tensors += held
        modules += inside
    return tensors, modules
