"""JSON from strangers: bounded in size and depth, one spelling only; and records that carry their own checksum.

Files of ours are written in one canonical form, so that a reader can tell any change of a byte, even one that JSON
would forgive.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

MAX_BYTES = 32 * 2**20
_MAX_DIGITS = 20


class JSONDefect(ValueError):
    """What is wrong with a JSON text, in words; the caller adds the file and the remedy."""


def loads(data: bytes) -> dict[str, Any]:
    """Parse a JSON object; refuse duplicate keys, NaN and infinities, over-long numbers, and deep nesting.

    Raises:
        JSONDefect: the bytes are not such an object.
    """
    if len(data) > MAX_BYTES:
        raise JSONDefect(f"it has {len(data)} bytes, more than the {MAX_BYTES} that such a file may have")
    hooks: dict[str, Any] = {"parse_constant": _constant, "parse_float": _float, "parse_int": _int}
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, **hooks)
    except RecursionError:
        raise JSONDefect("it is nested too deeply") from None
    except JSONDefect:
        raise
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise JSONDefect(f"it is not valid JSON ({error}): the file is damaged or cut short") from None
    if not isinstance(parsed, dict):
        raise JSONDefect(f"it holds a {type(parsed).__name__}, not an object")
    return parsed


def dumps(value: dict[str, Any]) -> bytes:
    """The canonical form: sorted keys, two spaces, no NaN, a final newline; what `loads` reads.

    Raises:
        JSONDefect: it is nested too deeply.
    """
    try:
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=True)
    except RecursionError:
        raise JSONDefect("it is nested too deeply") from None
    return (text + "\n").encode("ascii")


def signed(record: dict[str, Any]) -> bytes:
    """A record in the canonical form, with a checksum of itself.

    Raises:
        JSONDefect: `loads` would not accept it: it is too long, too deep, or holds too long a number.
    """
    data = dumps({**record, "checksum": hashlib.sha256(dumps(record)).hexdigest()})
    loads(data)
    return data


def is_signed(data: bytes, record: dict[str, Any]) -> bool:
    """Whether `data`, of which `loads` gave `record`, is what `signed` wrote."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return record.get("checksum") == hashlib.sha256(dumps(rest)).hexdigest() and data == dumps(record)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise JSONDefect("a key occurs twice in one object")
    return result


def _constant(name: str) -> Any:
    raise JSONDefect(f"it holds the number {name}")


def _float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise JSONDefect(f"the number {text[:40]} is too large")
    return number


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise JSONDefect(f"the number {text[:_MAX_DIGITS]}... has {len(text)} digits")
    return int(text)
