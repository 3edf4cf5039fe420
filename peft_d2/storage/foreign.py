"""For messages: what a file or folder is that was given for something else."""

from __future__ import annotations

import os
import re
from pathlib import Path

_KINDS = (
    (rb"version https://git-lfs", "a pointer of Git LFS in place of the file (`git lfs pull` fetches it)"),
    (rb"(?i)\s*(<!--.*?-->\s*)?<(!doctype html|html|head|script)", "a web page in place of the file"),
    (rb"(?i)\s*(<\?xml.*?>\s*)?<error>|\s*\{\s*\"(error|message)\"|\s*(404|403|not found|access denied)",
     "a server's error message in place of the file"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|.{257}ustar", "a packed archive (unpack it first)"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"GGUF", "a GGUF file"),
    (rb"\x08[\x01-\x20][\x12\x1a:B]", "an ONNX graph"),
    (rb"\x00+\Z", "nothing but zeros (copied in part, or the disk was full)"),
)  # fmt: skip
LENGTH = 512  # how many bytes of a file tell


def kind_of(start: bytes) -> str:
    """What a file is by its first `LENGTH` bytes, if it is one of the kinds that nothing here reads; else ""."""
    if not start:
        return "empty"
    return next((kind for pattern, kind in _KINDS if re.match(pattern, start[:LENGTH], re.DOTALL)), "")


def kind_of_file(path: str | os.PathLike[str]) -> str:
    """`kind_of` the file at `path`; "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return kind_of(file.read(LENGTH))
    except OSError:
        return ""


def newest_in_run(folder: Path) -> str:
    """The checkpoint to name where the folder of a run was given: its last one, "" where it holds none."""
    found = [folder / "adapter_final", folder / "model_final.pth"]
    for pattern in ("adapter_[0-9]*", "model_[0-9]*.pth"):
        found += sorted(folder.glob(pattern), reverse=True)
    return next((str(path) for path in found if path.exists()), "")
