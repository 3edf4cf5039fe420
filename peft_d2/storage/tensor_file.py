"""Reading and writing of safetensors files, every defect in words. The library checks headers, offsets and sizes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_MAX_NAME_CHARACTERS = 1024


class TensorFileDefect(ValueError):
    """What is wrong with the tensors' file, in words; the caller adds the file and the remedy."""


def dumps(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file: equal input, equal bytes; shared memory is written once per name."""
    whole = {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in sorted(tensors)}
    data = save(whole, {"format": "pt", **(metadata or {})})
    # The library writes metadata in random order: the header is put in order, so that equal files have equal hashes.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(data)[start:]))


def loads(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file given as bytes.

    Raises:
        TensorFileDefect: the bytes are not a whole safetensors file.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        raise TensorFileDefect(f"it is cut short, damaged, or not safetensors ({str(error)[:200]})") from None
    for name in tensors:
        if len(name) > _MAX_NAME_CHARACTERS or not name.isprintable():
            raise TensorFileDefect(f"the tensor name {name[:60]!r} is too long or has unprintable characters")
    return tensors, header.get("__metadata__", {})


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        TensorFileDefect: it is not a whole safetensors file.
        OSError: it cannot be opened.
    """
    return loads(Path(path).read_bytes())
