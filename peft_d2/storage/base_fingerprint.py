"""A fingerprint of a base model: which tensors it has, and a hash of the values of those that a run leaves as they are.

An adapter is a difference. On other base weights it is noise that loads without complaint, so its file carries this
fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2**22
_ROW = 2**13  # bytes that are summed up together
_HALVES = ("float16", "bfloat16")
_NAMED = 6
_ENTRY = re.compile(r"(?P<shape>|\d{1,12}(x\d{1,12}){0,15})(:(?P<hash>[0-9a-f]{16}))?")


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a base model is.

    Attributes:
        tensors: name -> "64x3x7x7:0123456789abcdef" (shape and start of the value's sha256), or the shape alone for a
            tensor that the run trains in full and whose value therefore is no property of the base.
        halves: name -> "float16" or "bfloat16" of the tensors that are held so: their values are rounded.
    """

    tensors: Mapping[str, str]
    halves: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def structure(self) -> str:
        """sha256 over all names and shapes."""
        return _digest(f"{name} {entry.partition(':')[0]}" for name, entry in sorted(self.tensors.items()))

    @property
    def weights(self) -> str:
        """sha256 over the names and value hashes of the tensors that are not trained."""
        return _digest(f"{name} {entry}" for name, entry in sorted(self.tensors.items()) if ":" in entry)

    def to_json(self) -> dict[str, Any]:
        """A plain record; `from_json` reverses it."""
        record: dict[str, Any] = {"structure": self.structure, "weights": self.weights, "count": len(self.tensors)}
        record["tensors"] = dict(self.tensors)
        return record | ({"halves": dict(self.halves)} if self.halves else {})

    @classmethod
    def from_json(cls, record: Any) -> Fingerprint:
        """Read a record written by `to_json`.

        Raises:
            ValueError: the record has another form, or contradicts itself.
        """
        tensors = record.get("tensors") if isinstance(record, dict) else None
        if not isinstance(tensors, dict) or not all(
            isinstance(v, str) and _ENTRY.fullmatch(v) for v in tensors.values()
        ):
            raise ValueError("the base's fingerprint has another form than expected")
        halves = record.get("halves", {})
        if not isinstance(halves, dict) or not all(halves[name] in _HALVES and name in tensors for name in halves):
            raise ValueError("the base's fingerprint has another form than expected")
        result = cls(tensors, halves)
        if record != result.to_json():
            raise ValueError("the base's fingerprint contradicts itself")
        return result


def fingerprint(
    state: Mapping[str, Tensor], trained: Collection[str] = (), memo: dict[str, Any] | None = None
) -> Fingerprint:
    """Fingerprint of a base model's state dict (without injected tensors).

    Values are hashed as float32 or int64, so a model has the same fingerprint on any device and, as long as the
    values are equal, in any dtype. Rounding to half precision changes values and so changes the fingerprint.

    Args:
        state: all tensors of the base model.
        trained: names in `state` whose values do not count, while their names and shapes do: what is trained in full,
            and counters that every step moves.
        memo: filled with what was hashed. Given again, a tensor is hashed once more only where the sums of its bits
            (a tenth of the work, and on its own device) have changed, by whatever means.
    """
    left_out, memo = set(trained), {} if memo is None else memo
    entries, halves = {}, {}
    for name, tensor in state.items():
        entries[name] = "x".join(map(str, tensor.shape))
        if name in left_out:
            continue
        if tensor.dtype in (torch.float16, torch.bfloat16):
            halves[name] = str(tensor.dtype).removeprefix("torch.")
        sums = _sums(tensor)
        if name not in memo or memo[name][0] != sums:
            memo[name] = sums, _hash(tensor)[:16]
        entries[name] += f":{memo[name][1]}"
    return Fingerprint(entries, halves)


def difference(expected: Fingerprint, found: Fingerprint) -> str:
    """Say in one line how the base `found` differs from the `expected` one; empty when an adapter of one fits the
    other.

    A value is compared where both sides hash it: a tensor that either side trains in full is no property of the base.
    """
    shape, value = _parts(expected)
    other_shape, other_value = _parts(found)
    missing = sorted(shape.keys() - other_shape.keys())
    added = sorted(other_shape.keys() - shape.keys())
    common = sorted(shape.keys() & other_shape.keys())
    reshaped = [f"{n} ({shape[n]} -> {other_shape[n]})" for n in common if shape[n] != other_shape[n]]
    changed = [
        n for n in common if value[n] and other_value[n] and shape[n] == other_shape[n] and value[n] != other_value[n]
    ]
    parts = [
        f"{len(names)} {what}: {_some(names)}"
        for names, what in ((missing, "tensors missing"), (added, "tensors not expected"), (reshaped, "other shapes"))
        if names
    ]
    if parts:
        return "; ".join(parts)
    rounded = [n for n in changed if expected.halves.get(n) != found.halves.get(n)]
    if rounded:
        here, there = (base.halves.get(rounded[0], "float32") for base in (found, expected))
        return (
            f"same structure, other dtype: {len(rounded)} tensors that were {there} when the adapter was saved are "
            f"{here} here, so their values are rounded differently: {_some(rounded)}"
        )
    if changed:
        compared = sum(bool(value[n] and other_value[n]) for n in common)
        return f"same structure, other weights: {len(changed)} of {compared} tensors differ: {_some(changed)}"
    return ""


def _parts(base: Fingerprint) -> tuple[dict[str, str], dict[str, str]]:
    split = {name: entry.partition(":") for name, entry in base.tensors.items()}
    return {name: part[0] for name, part in split.items()}, {name: part[2] for name, part in split.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _digest(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sums(tensor: Tensor) -> Any:
    """A cheap checksum of a tensor: its type, its shape and a hash of sums over its bits."""
    raw = tensor.detach().contiguous().reshape(-1)
    raw = (torch.view_as_real(raw).reshape(-1) if raw.is_complex() else raw).view(torch.uint8)
    whole = len(raw) // _ROW * _ROW
    words = raw[:whole] if raw.storage_offset() % 8 == 0 else raw[:whole].clone()
    digest = hashlib.sha256(words.view(torch.int64).view(-1, _ROW // 8).sum(1).cpu().numpy().data)
    digest.update(raw[whole:].cpu().numpy().data)
    return tensor.dtype, tuple(tensor.shape), digest.digest()


def _hash(tensor: Tensor) -> str:
    """sha256 of a tensor's values in row-major order; converted chunk by chunk, so that no second copy is held."""
    digest = hashlib.sha256()
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    kind = torch.float32 if flat.is_floating_point() else torch.int64
    for chunk in flat.split(_CHUNK):
        digest.update(chunk.to(device="cpu", dtype=kind).contiguous().numpy())
    return digest.hexdigest()
