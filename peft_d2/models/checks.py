"""Values of a config that no model can be built with: named with what is expected, before anything is built."""

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
    """The smallest value that each key of the config node ``path`` may have, or the smallest and the largest."""
    for key, bound in least.items():
        value, name = node[key], f"{path}.{key}"
        if isinstance(bound, tuple):
            expect(bound[0] <= value <= bound[1], name, value, f"between {bound[0]} and {bound[1]}")
        else:
            expect(value >= bound, name, value, f"a number of at least {bound}")


def expect_some_of(key: str, names: Sequence[str], known: Collection[str], whose: str) -> None:
    """``names``, the value of ``key``, is not empty and names only what is ``known``; ``whose`` says what that is."""
    unknown = [name for name in names if name not in known]
    some = f"some of {list(known)}, {whose}"
    expect(not unknown, key, list(names), f"{some}; {unknown} {'is' if len(unknown) == 1 else 'are'} not among them")
    expect(len(names) > 0, key, list(names), some)


def expect_multiple(key: str, value: int, of: int, source: str = "{}") -> None:
    """``value``, that of ``key``, is a multiple of ``of``, above 0; ``source`` says with {} where that comes from."""
    expect(value > 0 and value % of == 0, key, value, f"a multiple of {source.format(of)}")


def expect_heads(key: str, channels: int, heads_key: str, heads: int) -> None:
    """``channels``, the value of ``key``, can be shared out among the ``heads`` of an attention."""
    expect(heads >= 1, heads_key, heads, "a number of at least 1")
    expect_multiple(key, channels, heads, heads_key + ", {}")


def expect_width(path: str, node: Any) -> None:
    """``HIDDEN_DIM`` and ``NHEADS`` of the transformer decoder in ``node`` go together, and with sine positions."""
    expect_multiple(f"{path}.HIDDEN_DIM", node.HIDDEN_DIM, 4, "{}, for its sine positions")
    expect_heads(f"{path}.HIDDEN_DIM", node.HIDDEN_DIM, f"{path}.NHEADS", node.NHEADS)


def expect_norm(key: str, norm: str) -> None:
    """``norm``, the value of ``key``, is in Detectron2's spelling."""
    try:
        get_norm(norm, 32)
    except KeyError:
        expect(False, key, norm, "a norm that Detectron2 knows, such as 'GN', 'LN', 'BN', 'SyncBN', 'FrozenBN' or ''")


def expect_lengths(path: str, node: Any, first: str, *others: str) -> None:
    """The lists ``others`` of the config node ``path`` are as long as its list ``first``."""
    for key in others:
        expected = f"a list of {len(node[first])} entries, as {first}: one for each stage"
        expect(len(node[key]) == len(node[first]), f"{path}.{key}", node[key], expected)
