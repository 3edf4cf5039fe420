"""Reading and writing of safetensors files, every defect in words.

The format is checked here before the library reads it, so that a hostile header can neither allocate more than the
file's own size nor be reported as an unnamed parser error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save

MAX_HEADER_BYTES = 64 * 2**20
MAX_NAME_CHARACTERS = 1024


class TensorFileDefect(ValueError):
    """What is wrong with the tensors' file, in words; the caller adds the file and the remedy."""


def dumps(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file: equal input, equal bytes; shared memory is written once per name."""
    whole = {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in sorted(tensors)}
    data = _save(whole, {"format": "pt", **(metadata or {})})
    # The library writes metadata in random order: the header is put in order, so that equal files have equal hashes.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(data)[start:]))


def loads(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file given as bytes.

    Raises:
        TensorFileDefect: the bytes are not a whole safetensors file.
    """
    metadata = _checked_header(data)
    try:
        return _load(data), metadata
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise TensorFileDefect(f"its tensors cannot be read ({error})") from None


def read(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        TensorFileDefect: it is not a whole safetensors file.
        OSError: it cannot be opened.
    """
    return loads(Path(path).read_bytes())


def _checked_header(data: bytes) -> dict[str, str]:
    if len(data) < 8:
        raise TensorFileDefect(f"it has {len(data)} bytes: it is empty or cut short")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or length > len(data) - 8:
        raise TensorFileDefect(
            f"its header claims {length} of the file's {len(data)} bytes: it is cut short, damaged, or not safetensors"
        )
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
    except (ValueError, RecursionError):
        raise TensorFileDefect("its header is damaged") from None
    if not isinstance(header, dict):
        raise TensorFileDefect("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorFileDefect("its header's metadata are not strings")
    end = 0
    for name, entry in header.items():
        if len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
            raise TensorFileDefect(f"the tensor name {name[:60]!r} is too long or has unprintable characters")
        try:
            begin, stop = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise TensorFileDefect(f"the header's entry {name!r} has no data offsets") from None
        if not (isinstance(begin, int) and isinstance(stop, int) and 0 <= begin <= stop):
            raise TensorFileDefect(f"the header's entry {name!r} has impossible data offsets")
        end = max(end, stop)
    if end != len(data) - 8 - length:
        raise TensorFileDefect(
            f"its header describes {end} bytes of tensors, {len(data) - 8 - length} are there: cut short or damaged"
        )
    return metadata
