"""Patterns that choose places in a model by name.

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
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from .errors import PeftError

REGEX_PREFIX = "re:"
T = TypeVar("T")
_WILDCARDS = re.compile(r"[*?\[]")
_DIGITS = re.compile(r"\d+")


class PatternError(PeftError, ValueError):
    """A pattern is malformed or matches nothing."""


def is_literal(pattern: str) -> bool:
    """Whether a pattern names places outright (a suffix, braces allowed) instead of sweeping over them."""
    return not pattern.startswith(REGEX_PREFIX) and _WILDCARDS.search(pattern) is None


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
    if pattern.startswith(REGEX_PREFIX):
        matched = list(filter(_regex(pattern).fullmatch, names))
        if not matched:
            raise PatternError(f"pattern {pattern!r} matches no {what}.{_hint(pattern, names)}")
        return matched
    found: set[str] = set()
    used: set[tuple[int, str]] = set()
    choices: set[tuple[int, str]] = set()
    for text, chosen in _expand(pattern):
        hits = list(filter(_glob(text, pattern).fullmatch, names))
        choices.update(chosen)
        if hits:
            found.update(hits)
            used.update(chosen)
    if not found:
        raise PatternError(f"pattern {pattern!r} matches no {what}.{_hint(pattern, names)}")
    dead = sorted(choices - used)
    if dead:
        option = dead[0][1]
        raise PatternError(
            f"in pattern {pattern!r} the alternative {option!r} matches no {what}.{_hint(option, names)}"
        )
    return [name for name in names if name in found]


def first_match(rules: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern in ``rules`` that chooses ``name``; None when none does."""
    for pattern, value in rules.items():
        if pattern.startswith(REGEX_PREFIX):
            hit = _regex(pattern).fullmatch(name) is not None
        else:
            hit = any(_glob(text, pattern).fullmatch(name) for text, _ in _expand(pattern))
        if hit:
            return value
    return None


def nearest(wanted: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names that resemble ``wanted`` most, compared over as many trailing levels as it has."""
    levels = wanted.count(".") + 1
    tails: dict[str, str] = {}
    for name in names:
        if name:
            tails.setdefault(_DIGITS.sub("0", ".".join(name.split(".")[-levels:])), name)
    query = _DIGITS.sub("0", wanted)
    return [tails[tail] for tail in difflib.get_close_matches(query, list(tails), n=count, cutoff=0.4)]


def _hint(pattern: str, names: Sequence[str]) -> str:
    plain = re.sub(r"[*?\[\]{}\\^$()|+]+|^re:", "", pattern.replace(",", ".")).strip(".")
    plain = re.sub(r"\.{2,}", ".", plain)
    found = nearest(plain, names) or nearest(plain.rsplit(".", 1)[-1], names)
    return f" Nearest names: {', '.join(found)}." if found else " No name resembles it."


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[len(REGEX_PREFIX) :])
    except re.error as error:
        raise PatternError(f"pattern {pattern!r} is not a regular expression: {error}") from error


def _expand(pattern: str) -> list[tuple[str, tuple[tuple[int, str], ...]]]:
    """Each string that the braces stand for, with the (group number, alternative) pairs that made it."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if any("{" in piece or "}" in piece for piece in pieces):
        raise PatternError(f"pattern {pattern!r} has an unbalanced or nested brace")
    groups = [[(number, option) for option in text.split(",")] for number, text in enumerate(pieces[1::2])]
    expanded = []
    for chosen in itertools.product(*groups):
        parts = list(pieces)
        parts[1::2] = [option for _, option in chosen]
        expanded.append(("".join(parts), chosen))
    return expanded


def _glob(text: str, pattern: str) -> re.Pattern[str]:
    """A brace-free glob as a regular expression for whole names."""
    out = ["" if text in ("*", "**") else r"(?:.*\.)?"]
    position = 0
    while position < len(text):
        character = text[position]
        if character == "*":
            run = len(text) - position - len(text[position:].lstrip("*"))
            end = position + run
            alone = (position == 0 or text[position - 1] == ".") and (end == len(text) or text[end] == ".")
            any_character = "[^.]" if end == len(text) and run == 1 and text != "*" else "."
            out.append(any_character + ("+" if alone and text not in ("*", "**") else "*"))
            position = end
            continue
        if character == "[":
            end = text.find("]", position + 1)
            if end < 0:
                raise PatternError(f"pattern {pattern!r} has an unclosed bracket")
            out.append("[" + text[position + 1 : end].replace("!", "^", 1).replace("\\", r"\\") + "]")
            position = end + 1
            continue
        out.append("[^.]" if character == "?" else re.escape(character))
        position += 1
    return re.compile("".join(out))
