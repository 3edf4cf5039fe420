"""Files and folders that are either the old one or the new one, whole, whenever the process is killed.

Everything is written to a hidden sibling of the target (`.<name>.<host>-<pid>-<random>.tmp`), flushed to the disk,
and renamed. A reader that lists a directory can therefore ignore names that begin with a dot, and what it sees under
its own name is complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM}
_TORCH_WRITE_SIGNS = ("inline_container", "PytorchStreamWriter", "iostream error", "file write failed")
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_FOREIGN_STALE_SECONDS = 24 * 3600
# Temporaries that this process is writing now. A restarted container often has the process number of the killed one.
_LIVE: set[str] = set()


class StorageError(OSError):
    """Something could not be stored; what was stored before under that name is untouched."""


@contextlib.contextmanager
def file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; on leaving, it replaces `path` in one step.

    Args:
        path: the file to create or replace; missing parent directories are made.

    Raises:
        StorageError: the disk is full or a quota or size limit is reached, or `path` is empty; the old file stays.
    """
    target = _target(path)
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        temporary = _sibling(target, "tmp")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
            _LIVE.discard(temporary.name)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` in one step.

    Raises:
        StorageError: the disk is full or a quota or size limit is reached; the old file stays.
    """
    with file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def folder(path: str | os.PathLike[str], replaces: Collection[str]) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; on leaving, it replaces the folder `path` as a whole.

    Args:
        path: the folder to create or replace; missing parent directories are made. A folder that an outer `folder` has
            just yielded is filled as it is.
        replaces: names, or globs, of the files that a folder written by this caller consists of. A folder that holds
            anything else is somebody's and is never replaced.

    Raises:
        StorageError: the folder holds something else, `path` is empty, the disk is full, or a quota or size limit is
            reached; the old folder stays.
        NotADirectoryError: `path` exists and is a file.
    """
    target = _target(path)
    if target.name in _LIVE:  # inside another `folder` of this process, which will sync and rename it
        yield target
        return
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(
                f"{target} is a file, but a folder is to be written there: move it or choose another name"
            )
        require_own(target, replaces)
        temporary = _sibling(target, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            require_own(target, replaces)  # somebody may have put a file there meanwhile
            _replace_folder(temporary, target)
            _sync(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            _LIVE.discard(temporary.name)


def foreign_entry(path: Path, own: Collection[str]) -> str | None:
    """The name of an entry of the folder `path` that is not a regular file named by `own`; None where there is none."""
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if not entry.is_file(follow_symlinks=False) or not any(fnmatch.fnmatchcase(entry.name, name) for name in own):
            return entry.name
    return None


def require_own(path: Path, own: Collection[str]) -> None:
    """Refuse to replace or delete a folder that holds more than the files named by `own`.

    Raises:
        StorageError: with the first entry that is not one of them; nothing was touched.
    """
    found = foreign_entry(path, own) if path.is_dir() else None
    if found is not None:
        raise StorageError(
            errno.ENOTEMPTY,
            f"cannot store {path}: that folder would be replaced as a whole, and it holds {found!r}, which was not "
            "written here. Nothing was touched. Give a new folder, an empty one, or one saved there before",
        )


def recover(path: str | os.PathLike[str]) -> None:
    """Undo what a killed writer of `path` left behind.

    Temporaries of dead processes are deleted. Where the file system cannot exchange two folders in one step, a kill
    between the two renames leaves the old folder under a hidden name: it is put back.
    """
    target = _target(path)
    pattern = re.compile(re.escape(f".{target.name}.") + r"(?P<host>.*)-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>tmp|old)")
    if not target.parent.is_dir():
        return
    for entry in os.scandir(target.parent):
        found = pattern.fullmatch(entry.name)
        if found is None or not _is_stale(entry, found["host"], int(found["pid"])):
            continue
        if found["kind"] == "old" and not target.exists():
            os.rename(entry.path, target)
        elif entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            Path(entry.path).unlink(missing_ok=True)


def _target(path: str | os.PathLike[str]) -> Path:
    if not os.fspath(path):  # would be the current folder
        raise StorageError(errno.EINVAL, "the path to store something at is empty. Name a file or folder")
    return Path(os.path.realpath(path))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", platform.node())[:32] or "host"


def _sibling(target: Path, kind: str) -> Path:
    name = f".{target.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}"
    _LIVE.add(name)
    return target.with_name(name)


def _is_stale(entry: os.DirEntry[str], host: str, pid: int) -> bool:
    """A temporary is stale when its writer is dead; a writer on another machine is given a day."""
    if host != _host():
        with contextlib.suppress(FileNotFoundError):
            return time.time() - entry.stat(follow_symlinks=False).st_mtime > _FOREIGN_STALE_SECONDS
        return False
    if pid == os.getpid():
        return entry.name not in _LIVE
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _replace_folder(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
    elif _exchange(new, target):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = _sibling(target, "old")
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        _LIVE.discard(old.name)


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


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            _sync(Path(directory, name))
        _sync(Path(directory))


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turn "no space" in its several forms into one StorageError that names the target and the remedy.

    Raises:
        StorageError: the disk is full or a quota or size limit is reached while something is written to `target`.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _full(target, os.strerror(error.errno), error.errno) from error
    except RuntimeError as error:
        # torch.save reports a failed write as a RuntimeError of its C++ stream writer.
        if not any(sign in str(error) for sign in _TORCH_WRITE_SIGNS):
            raise
        raise _full(target, "the write failed, most likely no space left on device", errno.ENOSPC) from error


def _full(target: Path, reason: str, code: int) -> StorageError:
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free there)"
    kept = "what was stored there before is kept" if target.exists() else "nothing was stored under that name"
    return StorageError(
        code, f"cannot store {target}: {reason}{free}; {kept}. Free some space or write to another disk, then run again"
    )
