"""Checks of a config's values before a model is built; the errors name the key, its value and what is expected."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from detectron2.layers import get_norm


class ModelConfigError(ValueError):
    """A value of the config that no model can be built with; the message names the key, the value and the remedy."""


def expect(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise a :class:`ModelConfigError` about the config key ``key`` unless ``condition`` holds."""
    if not condition:
        raise ModelConfigError(f"{key} is {value!r}; it should be {expected}")


def expect_numbers(path: str, node: Any, **least: float | tuple[float, float]) -> None:
    """Check numbers in the config node ``path``: by key the smallest allowed value, or the smallest and the largest."""
    for key, bound in least.items():
        value, name = node[key], f"{path}.{key}"
        if isinstance(bound, tuple):
            expect(bound[0] <= value <= bound[1], name, value, f"between {bound[0]} and {bound[1]}")
        else:
            expect(value >= bound, name, value, f"a number of at least {bound}")


def expect_some_of(key: str, names: Sequence[str], known: Collection[str], whose: str) -> None:
    """Check that ``names``, the value of ``key``, is not empty and lies in ``known``, the names of ``whose``."""
    unknown = [name for name in names if name not in known]
    some = f"some of {list(known)}, {whose}"
    expect(not unknown, key, list(names), f"{some}; {unknown} {'is' if len(unknown) == 1 else 'are'} not among them")
    expect(len(names) > 0, key, list(names), some)


def expect_multiple(key: str, value: int, of: int, source: str = "{}") -> None:
    """Check that ``value`` of ``key`` is a positive multiple of ``of``; ``source`` is a text with {} for ``of``."""
    expect(value > 0 and value % of == 0, key, value, f"a multiple of {source.format(of)}")


def expect_heads(key: str, channels: int, heads_key: str, heads: int) -> None:
    """Check that ``channels``, the value of ``key``, is a multiple of the ``heads`` of an attention."""
    expect(heads >= 1, heads_key, heads, "a number of at least 1")
    expect_multiple(key, channels, heads, heads_key + ", {}")


def expect_width(path: str, node: Any) -> None:
    """Check that ``HIDDEN_DIM`` of a transformer decoder suits its ``NHEADS``, and sine positions (a multiple of 4)."""
    expect_multiple(f"{path}.HIDDEN_DIM", node.HIDDEN_DIM, 4, "{}, for its sine positions")
    expect_heads(f"{path}.HIDDEN_DIM", node.HIDDEN_DIM, f"{path}.NHEADS", node.NHEADS)


def expect_norm(key: str, norm: str) -> None:
    """Check that ``norm``, the value of ``key``, is a name of a norm that Detectron2 knows."""
    try:
        get_norm(norm, 32)
    except KeyError:
        expect(False, key, norm, "a norm that Detectron2 knows, such as 'GN', 'LN', 'BN', 'SyncBN', 'FrozenBN' or ''")


def expect_lengths(path: str, node: Any, first: str, *others: str) -> None:
    """Check that in the config node ``path`` the lists ``others`` are as long as the list ``first``."""
    for key in others:
        expected = f"a list of {len(node[first])} entries, as {first}: one for each stage"
        expect(len(node[key]) == len(node[first]), f"{path}.{key}", node[key], expected)
