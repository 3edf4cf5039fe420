"""Files and folders that are either the old one or the new one, whole, whenever the process is killed.

Everything is written to a hidden sibling of the target (`.<name>.<random>.tmp`), flushed to the disk, and renamed. A
reader that lists a directory can therefore ignore names that begin with a dot, and what it sees under its own name is
complete. A writer holds a lock (flock) on its temporary as long as it lives: the next writer of the same name removes
what it can lock, so nothing of a live one, on any machine. Readers remove nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no Unix: temporaries are not locked, and those of killed writers stay
    fcntl = None  # type: ignore[assignment]

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}
_TORCH_WRITE_SIGNS = ("PytorchStreamWriter", "unexpected pos", "iostream error", "file write failed")
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_MAX_NAME = 230  # bytes; file systems allow 255


class StorageError(OSError):
    """Something could not be stored; what was stored before under that name is untouched."""


class NotAFolderError(StorageError, NotADirectoryError):
    """A folder is to be written where a file is."""


class Defect(ValueError):
    """What is wrong with a file that was read, in words; the caller adds the file and the remedy."""


@contextlib.contextmanager
def file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of an empty temporary file to write to; on leaving, it replaces `path` in one step.

    Missing parent directories are made.

    Raises:
        StorageError: it cannot be stored (no space, no permission, an empty or impossible name...); the old file stays.
    """
    target = _target(path)
    with explained(target), _temporary(target) as temporary:
        yield temporary
        with explained(target, everything=True):
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` in one step; errors as in `file`."""
    with file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def folder(path: str | os.PathLike[str], replaces: Collection[str]) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; on leaving, it replaces the folder `path` as a whole.

    Args:
        path: the folder to create or replace; missing parent directories are made.
        replaces: names, or globs, of the files that a folder written by this caller consists of. A folder that holds
            anything else is somebody's and is never replaced.

    Raises:
        StorageError: the folder holds something else, or cannot be stored; the old folder stays.
        NotAFolderError: `path` exists and is a file.
    """
    target = _target(path)
    with explained(target), _temporary(target, replaces) as temporary:
        yield temporary
        with explained(target, everything=True):
            for directory, _, names in os.walk(temporary):
                for name in [*names, ""]:
                    _sync(Path(directory, name))
            _require_own(target, replaces)  # somebody may have put a file there meanwhile
            _replace_folder(temporary, target)
            _sync(target.parent)


def foreign_entry(path: Path, own: Collection[str]) -> str | None:
    """The name of an entry of the folder `path` that is not a regular file named by `own`; None where there is none."""
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
    if not os.fspath(path):  # would be the current folder
        raise StorageError(errno.EINVAL, "the path to store something at is empty. Name a file or folder")
    return Path(os.path.realpath(os.path.expanduser(path)))


def _short(target: Path) -> str:
    name = os.fsencode(target.name)
    return target.name if len(name) <= _MAX_NAME else hashlib.sha256(name).hexdigest()


def _require_own(path: Path, own: Collection[str]) -> None:
    """Refuse to replace a folder that holds more than the files named by `own`."""
    found = foreign_entry(path, own) if path.is_dir() else None
    if found is not None:
        raise StorageError(
            errno.ENOTEMPTY,
            f"cannot store {path}: that folder would be replaced as a whole, and it holds {found!r}, which was not "
            "written here. Nothing was touched. Give a new folder, an empty one, or one saved there before",
        )


@contextlib.contextmanager
def _temporary(target: Path, replaces: Collection[str] | None = None) -> Iterator[Path]:
    """A locked, empty file (or folder, with `replaces`) beside the target, removed on leaving if it is still there."""
    lock = None
    with explained(target, everything=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        if replaces is None and target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder, but a file is to be written there")
        if replaces is not None and target.exists() and not target.is_dir():
            reason = f"{target} is a file, but a folder is to be written there: move it or choose another name"
            raise NotAFolderError(errno.ENOTDIR, reason)
        _require_own(target, replaces or ())
        for _ in range(100):  # a cleaner may take it before it is locked
            temporary = target.with_name(f".{_short(target)}.{secrets.token_hex(4)}.tmp")
            temporary.touch(exist_ok=False) if replaces is None else temporary.mkdir()
            lock = _lock(temporary)
            if lock is not None:
                break
    try:
        yield temporary
    finally:
        _remove(temporary)
        _unlock(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that locks a file or folder while it is open; None where another has it; -1 where nothing can."""
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
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _replace_folder(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_DIRECTORY_SYNC):
            raise
    finally:
        os.close(descriptor)
