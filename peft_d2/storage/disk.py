"""Files that can be trusted: written whole or not at all, read within bounds, tied by hashes to what they belong to.

Everything is written to a hidden sibling of the target (`.<name>.<random>.tmp`), flushed to the disk, and renamed. What
a reader sees under a name without a dot at its beginning is therefore complete. A writer holds a lock (flock) on its
temporary file as long as it lives. The next writer of the same name removes the temporaries that it can lock itself:
those of dead writers, never one of a live writer, on whatever machine that is. Readers remove nothing.

In order: writing; tensors and JSON as bytes and back; the fingerprint of a base model.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fnmatch
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from peft_d2.peft.errors import shortened
from peft_d2.peft.state import whole
from peft_d2.storage import foreign

try:
    import fcntl
except ImportError:  # no Unix: temporaries are not locked, and those of killed writers stay
    fcntl = None  # type: ignore[assignment]

MAX_JSON = 32 * 2**20  # bytes
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}
_TORCH_WRITE_SIGNS = ("PytorchStreamWriter", "unexpected pos", "iostream error", "file write failed")
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave in folders that they show
_MAX_FILE_NAME = 230  # bytes; file systems allow 255
_MAX_DEPTH, _MAX_DIGITS, _MAX_NAME = 100, 40, 1024
_CHUNK = 2**22  # values that are hashed at once
_ROW = 2**13  # bytes that are summed up together
_NAMED = 6
_ENTRY = re.compile(r"(?P<shape>|\d{1,12}(x\d{1,12}){0,15})(:(?P<hash>[0-9a-f]{16}))?")


class StorageError(OSError):
    """Something could not be stored; what was stored before under that name is untouched."""


class NotAFolderError(StorageError, NotADirectoryError):
    """A folder is to be written where a file is."""


class Defect(ValueError):
    """What is wrong with a file that was read, in words; whoever catches it adds the file's name and the remedy."""


def file(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Path]:
    """Give the path of an empty temporary file to write to; on leaving, it replaces `path` in one step.

    Missing parent directories are made.

    Raises:
        StorageError: it cannot be stored (no space, no permission, an empty or impossible name...); the old file stays.
    """
    return _replacing(path, None)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` in one step; errors as in `file`."""
    with file(path) as temporary:
        temporary.write_bytes(data)


def folder(path: str | os.PathLike[str], replaces: Collection[str]) -> contextlib.AbstractContextManager[Path]:
    """Give an empty temporary folder to fill; on leaving, it replaces the folder `path` as a whole.

    Args:
        path: the folder to create or replace; missing parent directories are made.
        replaces: names, or globs, of the files that a folder written by this caller consists of. A folder that holds
            anything else is somebody's and is never replaced.

    Raises:
        StorageError: the folder holds something else, or cannot be stored; the old folder stays.
        NotAFolderError: `path` exists and is a file.
    """
    return _replacing(path, replaces)


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str], replaces: Collection[str] | None) -> Iterator[Path]:
    """Give a locked, empty file beside the target, or a folder if `replaces` is given; without an error in the block
    it then replaces the target.
    """
    target, lock = _target(path), None
    with explained(target, everything=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        if replaces is None and target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, but a file is to be written there")
        if replaces is not None and target.exists() and not target.is_dir():
            reason = f"{target} is a file, but a folder is to be written there: move it or choose another name"
            raise NotAFolderError(errno.ENOTDIR, reason)
        require_own(target, replaces or ())
        for _ in range(100):  # a cleaner may take it before it is locked
            temporary = target.with_name(f".{_short(target)}.{secrets.token_hex(4)}.tmp")
            temporary.touch(exist_ok=False) if replaces is None else temporary.mkdir()
            lock = _lock(temporary)
            if lock is not None:
                break
    with explained(target):
        try:
            yield temporary
            with explained(target, everything=True):
                for written in (*temporary.rglob("*"), temporary):
                    _sync(written)
                require_own(target, replaces or ())  # somebody may have put a file there meanwhile
                _replace(temporary, target)
                _sync(target.parent)
        finally:
            _remove(temporary)
            _unlock(lock)


def foreign_entry(path: Path, own: Collection[str]) -> str | None:
    """The name of an entry of the folder `path` that is not a regular file named by `own`; None where there is none."""
    own = {*own, *_LITTER}
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if not entry.is_file(follow_symlinks=False) or not any(fnmatch.fnmatchcase(entry.name, name) for name in own):
            return entry.name
    return None


def recover(path: str | os.PathLike[str], only_put_back: bool = False) -> None:
    """Undo what a killed writer of `path` left behind.

    Where the file system cannot exchange two folders in one step, a kill between the two renames leaves the old folder
    under a hidden name: it is put back. Temporaries of dead writers are deleted unless `only_put_back`.
    """
    target = _target(path)
    pattern = re.compile(re.escape(f".{_short(target)}.") + r"[0-9a-f]{8}\.(tmp|old)")
    for entry in os.scandir(target.parent) if target.parent.is_dir() else ():
        found = pattern.fullmatch(entry.name)
        if found is None or (only_put_back and found[1] == "tmp") or (lock := _lock(Path(entry.path))) in (None, -1):
            continue
        with contextlib.suppress(OSError):
            if found[1] == "old" and not target.exists():
                os.rename(entry.path, target)
            elif not only_put_back:
                _remove(Path(entry.path))
        _unlock(lock)


@contextlib.contextmanager
def explained(target: Path, everything: bool = False) -> Iterator[None]:
    """Turn "no space" in its several forms, or `everything` the system refuses, into one StorageError with the remedy.

    Raises:
        StorageError: the disk is full or a quota or size limit is reached while something is written to `target`.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if not everything and error.errno not in _DISK_FULL:
            raise
        raise _refusal(target, error) from error
    except RuntimeError as error:
        # torch.save to a path reports a failed write as a RuntimeError of its C++ stream writer.
        if not any(sign in str(error) for sign in _TORCH_WRITE_SIGNS) or "Reader" in str(error):
            raise
        raise _refusal(target, OSError(errno.ENOSPC, "the write failed, most likely for lack of space")) from error


def _refusal(target: Path, error: OSError) -> StorageError:
    """The error to raise where something cannot be stored: what is kept, how much room there is, what to do."""
    kept, free, remedy = "nothing was stored under that name", "", "Choose another place, or correct its name or rights"
    with contextlib.suppress(OSError):
        kept = "what was stored there before is kept" if target.exists() else kept
    if error.errno in _DISK_FULL:
        place = Path(os.fsdecode(error.filename)) if error.filename is not None else target
        if not place.is_relative_to(target.parent):
            free, remedy = f" at {place}", f"Free some space there: {place.parent} is full"
        else:
            with contextlib.suppress(OSError):
                free = f" ({shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free there)"
            remedy = "Free some space or write to another disk, then run again"
    reason = error.strerror or str(error)
    return StorageError(error.errno or errno.EIO, f"cannot store {str(target)[:400]}: {reason}{free}; {kept}. {remedy}")


def _target(path: str | os.PathLike[str]) -> Path:
    """The real path that is to be written; StorageError for an empty path and for addresses."""
    name = os.fsdecode(path)
    if not name:  # would be the current folder
        raise StorageError(errno.EINVAL, "the path to store something at is empty. Name a file or folder")
    if re.match(r"[A-Za-z][\w+.-]+://", name):  # would be a folder called "s3:" below the current one
        raise StorageError(errno.EINVAL, f"{name} is an address. Name a file or folder here, and copy it there")
    return Path(os.path.realpath(os.path.expanduser(name)))


def _short(target: Path) -> str:
    """The target's name as a part of its temporaries' names, or a hash of it where these would be too long."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= _MAX_FILE_NAME else hashlib.sha256(name).hexdigest()


def require_own(path: Path, own: Collection[str]) -> None:
    """Refuse to replace a folder that holds more than the files named by `own`.

    Raises:
        StorageError: it does.
    """
    found = foreign_entry(path, own) if path.is_dir() else None
    if found is not None:
        raise StorageError(
            errno.ENOTEMPTY,
            f"cannot store {path}: that folder would be replaced as a whole, and it holds {found!r}, which was not "
            "written here. Nothing was touched. Give a new folder, an empty one, or one saved there before",
        )


def _lock(path: Path) -> int | None:
    """Lock a file or folder; returns the open descriptor that holds the lock.

    None where another process has locked it or it is gone, -1 where the system knows no locks.
    """
    if fcntl is None:
        return -1
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            return descriptor
        taken = True
    except OSError as error:
        taken = error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOENT)
    os.close(descriptor)
    return None if taken else -1


def _unlock(lock: int | None) -> None:
    if lock is not None and lock >= 0:
        os.close(lock)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # which leaves a file or a link to the next line
    with contextlib.suppress(OSError):
        path.unlink()


def _replace(new: Path, target: Path) -> None:
    """Rename `new` to `target`, in one step wherever the system can; an old folder there is removed."""
    if new.is_file() or not target.exists():
        os.replace(new, target)
    elif not _exchange(new, target):  # after an exchange, the old folder is removed under the temporary's name
        old, lock = new.with_suffix(".old"), _lock(target)
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old, target)
            raise
        finally:
            _unlock(lock)
        _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux `renameat2`); False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk; file systems that cannot do so with folders are let be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_DIRECTORY_SYNC):
            raise
    finally:
        os.close(descriptor)


def not_finite(tensors: Mapping[str, Tensor], buffers: Collection[str]) -> str:
    """Say which tensor holds NaN or infinity, and how often; "" for none. In `buffers` (masks) infinity is allowed."""
    for name, value in tensors.items():
        if (value.is_floating_point() or value.is_complex()) and not value.is_meta:
            value = value.float() if value.element_size() == 1 else value
            wrong = value.isnan() if name in buffers else ~value.isfinite()
            if wrong.any():
                return f"NaN or infinity: {int(wrong.sum())} of {value.numel()} values of {name}"
    return ""


def dump_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file with these tensors; equal input gives equal bytes. Shared tensors are copied."""
    whole = {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in sorted(tensors)}
    data = save(whole, {"format": "pt", **(metadata or {})})
    # The library writes metadata in random order: the header is put in order, so that equal files have equal hashes.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(data)[start:]))


def load_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file given as bytes; the library checks header, offsets and sizes.

    Raises:
        Defect: the bytes are not a whole safetensors file.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        said = foreign.kind_of(data) or f"cut short, damaged, or not safetensors ({str(error)[:200]})"
        raise Defect(f"it is {said}") from None
    if strange := next((name for name in tensors if len(name) > _MAX_NAME or not name.isprintable()), ""):
        raise Defect(f"the tensor name {strange[:60]!r} is too long or has unprintable characters")
    return tensors, header.get("__metadata__", {})


def load_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object of unknown origin, within bounds of size, depth and digits; no key twice, no NaN.

    Raises:
        Defect: the bytes are not such an object.
    """
    if len(data) > MAX_JSON:
        raise Defect(f"it has {len(data)} bytes, more than the {MAX_JSON} that such a file may have")
    numbers: dict[str, Any] = {"parse_constant": _number, "parse_float": _number, "parse_int": _number}
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, **numbers)
    except RecursionError:
        raise Defect("it is nested too deeply") from None
    except Defect:
        raise
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        kind = foreign.kind_of(data)
        raise Defect(f"it is {kind or f'not valid JSON ({error}): the file is damaged or cut short'}") from None
    if not isinstance(parsed, dict):
        raise Defect(f"it holds a {type(parsed).__name__}, not an object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dict; Defect where a key occurs twice, of which `json` would take the last."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Defect("a key occurs twice in one object")
    return result


def _number(text: str) -> int | float:
    """A number of JSON; Defect where it is not finite or longer than any that is written here."""
    if len(text) > _MAX_DIGITS or not math.isfinite(number := float(text)):
        raise Defect(f"it holds the number {text[:_MAX_DIGITS]}, which is not finite or has too many digits")
    return number if set(".eE") & set(text) else int(text)


def dump_json(value: Mapping[str, Any]) -> bytes:
    """JSON in the one form that is written here (sorted keys, two spaces, a final newline): any changed byte is seen.

    Raises:
        Defect: it is nested too deeply.
    """
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
    except RecursionError:
        raise Defect("it is nested too deeply") from None


def sign(record: dict[str, Any]) -> bytes:
    """The bytes of a record to which a checksum of all the rest was added.

    Raises:
        Defect: `load_json` would not accept it: it is too long, too deep, or holds too long a number.
    """
    data = dump_json({**record, "checksum": sha256(dump_json(record))})
    load_json(data)
    return data


def is_signed(data: bytes, record: Mapping[str, Any]) -> bool:
    """Whether `data`, of which `load_json` gave `record`, is what `sign` wrote."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return record.get("checksum") == sha256(dump_json(rest)) and data == dump_json(record)


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` made of plain JSON values; numbers that JSON cannot hold (an AP that is NaN) become null.

    Raises:
        ValueError: about `where`: it holds something that cannot be stored, or is nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} are nested more than {_MAX_DEPTH} deep, or hold themselves")
    if isinstance(value, Mapping):
        return {str(key): plain(entry, where, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, where, depth + 1) for entry in value]
    if callable(getattr(value, "tolist", None)):  # numbers and arrays of NumPy and torch
        return plain(value.tolist(), where, depth + 1)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise ValueError(f"{where} hold a {type(value).__name__}; only numbers, texts, lists and dicts can be stored")


def sha256(data: bytes) -> str:
    """The checksum of bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as a record has them."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
        return {"bytes": stream.tell(), "sha256": digest.hexdigest()}


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What tells one base model from another: names and shapes of its tensors, and hashes of those that stay frozen.

    Attributes:
        tensors: name -> "64x3x7x7:0123456789abcdef" (shape and start of the value's sha256), or the shape alone for a
            tensor that the run trains in full and whose value therefore is no property of the base.
        halves: name -> "float16" or "bfloat16" of the tensors of that type, whose values are rounded.
    """

    tensors: Mapping[str, str]
    halves: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def structure(self) -> str:
        """sha256 over all names and shapes."""
        return sha256("\n".join(f"{name} {shape}" for name, (shape, _) in sorted(self.parts().items())).encode())

    @property
    def weights(self) -> str:
        """sha256 over the names and value hashes of the tensors that are not trained."""
        return sha256("\n".join(f"{name} {e}" for name, e in sorted(self.tensors.items()) if ":" in e).encode())

    def parts(self) -> dict[str, tuple[str, str]]:
        """Name -> shape and hash, both as texts; the hash is "" where the value does not count."""
        return {name: entry.partition(":")[::2] for name, entry in self.tensors.items()}

    def without(self, names: Collection[str]) -> Fingerprint:
        """The fingerprint of the other tensors alone."""
        return Fingerprint(*({k: v for k, v in t.items() if k not in names} for t in (self.tensors, self.halves)))

    def to_json(self) -> dict[str, Any]:
        """A plain record; `from_json` reverses it."""
        record = {"structure": self.structure, "weights": self.weights, "count": len(self.tensors)}
        return record | {"tensors": dict(self.tensors)} | ({"halves": dict(self.halves)} if self.halves else {})

    @classmethod
    def from_json(cls, record: Any) -> Fingerprint:
        """Read a record written by `to_json`.

        Raises:
            ValueError: the record has another form, or contradicts itself.
        """
        tensors, halves = record.get("tensors"), record.get("halves", {})
        known = isinstance(tensors, dict) and all(isinstance(v, str) and _ENTRY.fullmatch(v) for v in tensors.values())
        if not known or not isinstance(halves, dict) or not set(halves.values()) <= {"float16", "bfloat16"}:
            raise ValueError("the base's fingerprint has another form than expected")
        result = cls(tensors, halves)
        if record != result.to_json() or not halves.keys() <= tensors.keys():
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
        tensor = whole(tensor)
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
    """Say in one line how the base `found` differs from `expected`; empty where an adapter of one fits the other.

    Values are compared where both have a hash: what either of them trains in full is no property of the base.
    """
    old, new = expected.parts(), found.parts()
    common = sorted(old.keys() & new.keys())
    structure = {
        "tensors missing": sorted(old.keys() - new.keys()),
        "tensors not expected": sorted(new.keys() - old.keys()),
        "other shapes": [f"{n} ({old[n][0]} -> {new[n][0]})" for n in common if old[n][0] != new[n][0]],
    }
    if parts := [f"{len(names)} {what}: {shortened(names, _NAMED)}" for what, names in structure.items() if names]:
        return "; ".join(parts)
    compared = [n for n in common if old[n][1] and new[n][1]]
    changed = [n for n in compared if old[n] != new[n]]
    if rounded := [n for n in changed if expected.halves.get(n) != found.halves.get(n)]:
        here, there = (base.halves.get(rounded[0], "float32") for base in (found, expected))
        return (
            f"same structure, other dtype: {len(rounded)} tensors that were {there} when the adapter was saved are "
            f"{here} here, so their values are rounded differently: {shortened(rounded, _NAMED)}"
        )
    if changed:
        count = f"{len(changed)} of {len(compared)} tensors differ"
        return f"same structure, other weights: {count}: {shortened(changed, _NAMED)}"
    return ""


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
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    kind = torch.float32 if flat.is_floating_point() else torch.int64
    for chunk in flat.split(_CHUNK):
        digest.update(chunk.to(device="cpu", dtype=kind).contiguous().numpy())
    return digest.hexdigest()
