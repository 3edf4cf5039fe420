"""Errors that the command-line tools report as one line instead of a traceback."""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import re
import select
import sys
import traceback
from collections.abc import Callable
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be right; the message names the key, what was expected and the remedy."""


class LossNotFinite(FloatingPointError):
    """A loss or gradient is NaN or infinite; the message names the losses and the images of the batch."""


class EvaluationFailed(RuntimeError):
    """An evaluation inside a training failed; the training itself was saved before it."""


class WorkerDied(RuntimeError):
    """A process that loads data was killed."""


class LimitReached(RuntimeError):
    """The machine, or a limit of it, has no more memory, shared memory or file handles for the process."""


class Unusable(OSError):
    """A file or folder that the system does not let this process use."""


_SYSTEM = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP,
           errno.ENAMETOOLONG, errno.ENOTDIR, errno.ESTALE}  # fmt: skip
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
_RESUME = "The last checkpoint is good: run again with --resume"
_LIMITS = {
    r"too many open files|received \d+ items of ancdata": "no more file handles ({said}). " + _RESUME + ", with a "
    "higher limit (ulimit -n) or fewer DATALOADER.NUM_WORKERS.",
    r"MemoryError|(can't|cannot) allocate memory|not enough memory|out of memory|can't start new thread": "no more "
    "memory ({said}). " + _RESUME + ", with more memory, fewer DATALOADER.NUM_WORKERS, smaller images or a higher "
    "SOLVER.ACCUMULATE.",
    "shared memory|</torch_|on device: .?/dev/shm|bus error": "no more shared memory ({said}). " + _RESUME + ", with "
    "more of it (docker run --shm-size 8g), or DATALOADER.NUM_WORKERS 0.",
    "AF_UNIX path too long": "the folder of temporary files has too long a name for the processes that load data to "
    "meet there ({said}). Set TMPDIR to a shorter one, or DATALOADER.NUM_WORKERS 0.",
}


def bounded(kind: Callable[[str], float], least: float, most: float = math.inf) -> Callable[[str], float]:
    """A ``type`` for argparse: a number of ``kind``, int or float, from ``least`` to ``most``."""

    def read(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:
            bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def is_expected(error: BaseException) -> bool:
    """Whether an error is of a class of this package: the user can put it right, and its message says how."""
    return any(kind.__module__.startswith("peft_d2.") for kind in type(error).__mro__)


def named(error: Exception) -> Exception:
    """The error itself, or a `WorkerDied`, `LimitReached` or `Unusable` in place of one of Python's or torch's.

    That a loader's worker was killed torch raises from a signal handler, in any line of the training; or the connection
    to that worker fails first, where the loader is just taking a batch from it.
    """
    if isinstance(error, ConfigError | EvaluationFailed | LimitReached | WorkerDied):
        return error
    name, text = type(error).__name__, str(error).strip()
    passed = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if "multiprocessing.synchronize" in passed:  # locks of data-loading processes, which are files there
        text = f"{text}: /dev/shm"
    if isinstance(error, MemoryError | OSError | RuntimeError):
        said = text.rpartition("\n")[2].strip().partition(". ")[0].rstrip(".")[:200] or name
        for pattern, told in _LIMITS.items():
            if re.search(pattern, f"MemoryError {text}" if isinstance(error, MemoryError) else text, re.IGNORECASE):
                return LimitReached(told.format(said=said))
    if isinstance(error, OSError) and error.errno in _SYSTEM and not is_expected(error):
        remedy = "Let it be used, or name another." if error.errno in (errno.EACCES, errno.EPERM) else "Name another."
        return Unusable(f"{error.filename or 'a file'}: {error.strerror}. {remedy}")
    said = text.partition(". ")[0].rstrip(".")
    if isinstance(error, ConnectionError | EOFError) and "torch.utils.data.dataloader" in passed:
        said = f"{name}: {said}" if said else name
    elif not (isinstance(error, RuntimeError) and said.startswith("DataLoader worker (pid")):
        return error
    return WorkerDied(
        f"a process that loads data was killed ({said}): most often, the machine is out of memory. {_RESUME}, and with "
        "fewer DATALOADER.NUM_WORKERS."
    )


def message_of(error: BaseException) -> str:
    """The error's message; of one that a data loader's worker has passed on, without the traceback in it."""
    text = str(error)
    text = text.strip().rpartition("\n")[2].partition(": ")[2] if text.startswith("Caught ") else text
    return printable(text)


def printable(text: str) -> str:
    """The text without codes that colour or clear a terminal, which names and Detectron2's tables may hold."""
    return _CONTROL.sub("", text)


def one_line_errors(function: Callable[[], Any]) -> Any:
    """Call ``function`` and return its result; errors that the user can put right, and Ctrl-C, end the program with
    one line instead of a traceback.

    Characters that the terminal's encoding lacks are printed as codes. Where the reader of the output has gone, as
    ``head`` does, the program ends without a word.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        result = function()
        if sys.stdout is not None:  # it is closed
            sys.stdout.flush()
        return result
    except KeyboardInterrupt:
        print("error: interrupted. A training goes on from its newest checkpoint with --resume.", file=sys.stderr)
        raise SystemExit(130) from None  # 128 and the signal's number, as shells have it
    except Exception as error:
        told = named(error)
        if isinstance(told, BrokenPipeError) and _nobody_reads():
            raise SystemExit(141) from None  # 128 and SIGPIPE's number, as shells have it
        gone = isinstance(error.__context__ or error, FileNotFoundError) and not _has_folder()
        if not is_expected(told) and not gone:
            raise
        here = "the current folder does not exist any more. Change to another one (cd), and run again."
        print(f"error: {here if gone else message_of(told)}", file=sys.stderr)
        raise SystemExit(1) from error


def _nobody_reads() -> bool:
    """Whether the reader of stdout has gone; what is left to print is then dropped."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # poll reports a closed pipe whatever it is asked for
    gone = bool(poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _has_folder() -> bool:
    """Whether the folder that this process is in still exists."""
    try:
        return bool(os.getcwd())
    except OSError:
        return False
