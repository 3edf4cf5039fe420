"""What a method is: its options (upper-case keys in a config), the modules it goes on, the layers it makes."""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from .adapted import AdapterLayer, adapt_problem
from .errors import MethodError, PatternError, PeftError
from .probe import Outputs
from .targets import ModelIndex, Target, is_literal, names_outright, nearest, resolve

logger = logging.getLogger(__name__)
_LARGEST = {"NUM": 1024, "EXPERTS": 1024}  # largest whole numbers by key, else 2**16: more is a typing error


@dataclass(frozen=True)
class Allowed:
    """Which values an option may have: ``Annotated[int, Allowed(lambda value: value > 0, "a positive integer")]``."""

    holds: Callable[[Any], Any]
    expected: str


def one_of(*values: str) -> Allowed:
    """Allow one of these texts, or of an option that is a list some of them."""
    expected = f"one of {', '.join(values)}"
    return Allowed(lambda given: {*([given] if isinstance(given, str) else given)} <= {*values}, expected)


Positive = Annotated[int, Allowed(lambda value: value > 0, "a positive integer")]
Factor = Annotated[float, Allowed(lambda value: value > 0, "a positive number")]
Probability = Annotated[float, Allowed(lambda value: 0 <= value < 1, "a probability below 1")]


@dataclass(frozen=True)
class Options:
    """Keys of every method: ``TARGETS`` are patterns of module names, ``EXCLUDE`` those of modules to leave out."""

    targets: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise :class:`MethodError` where values do not go together: COBOT_MIX, say, needs ``COBOT: true``."""
        if not self.targets:
            raise MethodError("TARGETS is empty: name at least one pattern of module names")
        for item in dataclasses.fields(self):
            switch, _, of_switch = item.name.partition("_")
            is_off = of_switch and getattr(self, switch, None) is False
            is_unset = not is_off or getattr(self, item.name) == item.default
            expect(is_unset, switch.upper(), False, f"true where another {switch.upper()}_ key is set")


def expect(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise a :class:`MethodError` about the value of ``key`` unless ``condition`` holds."""
    if not condition:
        raise MethodError(f"{key} is {value!r}: expected {expected}")


class Method:
    """Base of all methods. One instance is one entry of METHODS."""

    name: ClassVar[str]
    options_class: ClassVar[type[Options]] = Options
    layer_class: ClassVar[Any]  # makes the AdapterLayer of a target module from (target, options)

    def __init__(self, options: Any) -> None:
        self.options = options

    def redirect(self, target: Target, targets: Mapping[int, Target]) -> Target:
        """The target that a layer goes on in place of ``target``, out of ``targets`` by module id; mostly itself."""
        return target

    def refusal(self, target: Target) -> str:
        """Why this method cannot go on ``target``; empty when it can."""
        return ""

    def only_by_name(self, target: Target) -> str:
        """Why a pattern that ends in a wildcard passes over ``target``; empty when it does not."""
        return ""

    def unsure(self, targets: Sequence[Target]) -> list[Target]:
        """The targets of which only a forward pass can show what their layers must know of the output."""
        return []

    def learn(self, targets: Sequence[Target], seen: Outputs) -> None:
        """Take over what a forward pass has shown of the outputs of the :meth:`unsure` targets."""

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        """The adapter layer of each target, in order.

        Raises:
            MethodError: an option does not suit a target, or what a layer must know of one is not known.
        """
        return [(target, self.layer_class(target, self.options)) for target in targets]

    def select(self, targets: Sequence[Target]) -> list[str]:
        """Names of what is to be trained in full in place: parameters of the base, or modules with all they contain."""
        return []


def parse(entry: Mapping[str, Any], registry: Mapping[str, type[Method]]) -> Method:
    """Make the method of a config entry ``{NAME: ..., TARGETS: [...], ...}``; MethodError where it is wrong."""
    if not isinstance(entry, Mapping):
        raise MethodError(f"expected a method like {{NAME: lora, TARGETS: [...]}}, got {entry!r}")
    if not isinstance(entry.get("NAME"), str):
        raise MethodError(f"the method {dict(entry)!r} has no NAME: expected one of {', '.join(sorted(registry))}")
    name = entry["NAME"].lower()
    if name not in registry:
        raise MethodError(f"method NAME {entry['NAME']!r} does not exist.{closest(name, list(registry))}")
    method = registry[name]
    known = {item.name.upper(): item for item in dataclasses.fields(method.options_class)}
    types = typing.get_type_hints(method.options_class, include_extras=True)
    values = {}
    for key, value in entry.items():
        if key == "NAME":
            continue
        if key not in known:
            raise MethodError(f"method {name!r} has no key {key!r}.{closest(str(key).upper(), list(known))}")
        values[key.lower()] = _convert(name, key, value, types[key.lower()])
    options = method.options_class(**values)
    try:
        options.check()
    except MethodError as error:
        raise MethodError(f"method {name!r}: {error}") from error
    return method(options)


def normalised(method: Method) -> dict[str, Any]:
    """The config entry of a method with every key filled in, as a file keeps it."""
    values = dataclasses.asdict(method.options)
    return {"NAME": method.name, **{key.upper(): value for key, value in values.items()}}


def choose_targets(index: ModelIndex, method: Method) -> list[Target]:
    """The modules that a method goes on, in the model's order: those of TARGETS without those of EXCLUDE, redirected.

    Raises:
        PatternError: a pattern matches nothing.
        MethodError: the method cannot go on a module that a pattern names, or nothing is left.
    """
    names = index.module_names()
    try:
        exclude = resolve(method.options.exclude, names)
    except PatternError as error:
        raise PatternError(f"method {method.name!r}, EXCLUDE: {error}") from error
    excluded = set().union(*exclude.values())
    wanted = resolve(method.options.targets, names)
    for pattern, taken_back in exclude.items():
        if not set(taken_back) & set().union(*wanted.values()):
            logger.warning("Method %r: EXCLUDE %r takes back none of what TARGETS choose.", method.name, pattern)
    chosen: dict[int, Target] = {}
    for pattern, matched in wanted.items():
        refused: dict[str, str] = {}
        for name in matched:
            own = index.targets[id(index.modules[name])]
            if name in excluded or own.name in excluded:
                continue
            target = method.redirect(own, index.targets)
            reason = method.refusal(target)
            if not reason and not names_outright(pattern, name):
                reason = method.only_by_name(target)
            before = chosen.get(id(target.module))
            if reason:
                refused[own.name] = reason
            elif before is None:
                chosen[id(target.module)] = target
            elif before.parts:
                parts = tuple(dict.fromkeys(before.parts + target.parts)) if target.parts else ()
                chosen[id(target.module)] = replace(before, parts=parts)
        has_levels = any(any(index.modules[name].children()) for name in refused)
        _check_refused(method, pattern, matched, refused, has_levels)
    if not chosen:
        raise MethodError(f"method {method.name!r}: EXCLUDE takes back everything that TARGETS choose")
    order = {key: position for position, key in enumerate(index.targets)}
    return sorted(chosen.values(), key=lambda target: order[id(target.module)])


def _check_refused(method: Method, pattern: str, matched: list[str], refused: dict[str, str], has_levels: bool) -> None:
    """Raise MethodError where the method can go on none of the modules, or not on one that the pattern names outright.

    A pattern with wildcards may pass over some of them. ``has_levels``: there are modules in those that are refused.
    """
    if not refused or (not is_literal(pattern) and len(refused) < len(matched)):
        return
    name, reason = next(iter(refused.items()))
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    reaches = has_levels and not is_literal(pattern) and not pattern.endswith("**")
    deeper = f"; {pattern.rstrip('*')}** reaches deeper levels" if reaches else ""
    raise MethodError(
        f"method {method.name!r} cannot go on {name}{more}, which pattern {pattern!r} chooses: {reason}{deeper}"
    )


def layers_of(method: Method, targets: Sequence[Target]) -> list[tuple[Method, Target, AdapterLayer]]:
    """The adapter layers of one method; errors of other packages become a MethodError."""
    try:
        made = method.make_layers(targets)
    except PeftError:
        raise
    except Exception as error:  # out of memory, a package's own error
        raise MethodError(f"method {method.name!r}: {type(error).__name__}: {error}") from error
    for target, _ in made:
        if problem := adapt_problem(target.module):
            raise MethodError(f"method {method.name!r} cannot go on {target.name}: {problem}")
    return [(method, target, layer) for target, layer in made]


def closest(wanted: str, known: list[str]) -> str:
    """The end of an error about an unknown name: the names nearest to it, and all that are known."""
    near = nearest(wanted, known)
    return (f" Nearest: {', '.join(near)}." if near else "") + f" Known: {', '.join(sorted(known))}."


def _convert(method: str, key: str, value: Any, hint: Any) -> Any:
    """Return a value if it is of its option's type ``hint``; ints become floats and tuples lists, nothing else."""
    options = typing.get_args(hint) if typing.get_origin(hint) not in (list, dict, Annotated) else ()
    if value is None and type(None) in options:
        return None
    plain = next((item for item in options if item is not type(None)), hint)
    if typing.get_origin(plain) is Annotated:
        inner, allowed = typing.get_args(plain)
        value = _convert(method, key, value, inner)
        if not allowed.holds(value):
            raise MethodError(f"method {method!r}: {key} is {value!r}: expected {allowed.expected}")
        return value
    origin = typing.get_origin(plain) or plain
    if origin is list and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return list(value)
    if origin is dict and isinstance(value, Mapping) and all(isinstance(item, str) for item in value):
        inner = typing.get_args(plain)[1]
        return {name: item if inner is Any else _convert(method, key, item, inner) for name, item in value.items()}
    if origin is float and isinstance(value, int | float) and not isinstance(value, bool):
        if value != 0 and not 1e-6 <= abs(value) <= 1e6:  # nan, too; beyond that a file would not hold it exactly
            raise MethodError(f"method {method!r}: {key} is {value!r}, expected a number of 1e-6 to 1e6 in size, or 0")
        return float(value)
    most = _LARGEST.get(key, 2**16)
    if origin is int and type(value) is int and abs(value) > most:
        raise MethodError(f"method {method!r}: {key} is {value!r}, expected a number of at most {most}")
    if origin in (int, bool, str) and type(value) is origin:
        return value
    kind = origin.__name__
    label = {"list": "a list of strings", "dict": "a mapping"}.get(kind, f"a value of type {kind}")
    raise MethodError(f"method {method!r}: {key} is {value!r}, expected {label}")
