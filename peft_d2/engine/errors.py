"""What the command-line tools report as one line instead of a traceback."""

from __future__ import annotations

import errno
import re
import traceback


class ConfigError(ValueError):
    """A config that cannot be right; the message names the key, what was expected and the remedy."""


class LossNotFinite(FloatingPointError):
    """A loss or gradient is NaN or infinite; the message names the losses and the images of the batch."""


class EvaluationFailed(RuntimeError):
    """An evaluation inside a training failed; the training itself was saved before it."""


class WorkerDied(RuntimeError):
    """A process that loads data was killed; the message says what to do."""


class LimitReached(RuntimeError):
    """The machine, or a limit set for the process, has no more memory or file handles; the message says what to do."""


_NO_MEMORY = r"can't allocate memory|cannot allocate memory|not enough memory|out of memory|can't start new thread"
_NO_FILES = r"too many open files|received \d+ items of ancdata"


def named(error: Exception) -> Exception:
    """The error, or the `WorkerDied` or `LimitReached` that stands for what torch or Python say in many ways.

    torch says that a loader's worker was killed from a signal handler, out of any line of the training; where the
    loader is just then taking a batch from that worker, the connection fails first.
    """
    if isinstance(error, (ConfigError, EvaluationFailed, LimitReached, WorkerDied)):
        return error
    text, number = str(error), error.errno if isinstance(error, OSError) else None
    resume = "The last checkpoint is good: run again with --resume"
    if number in (errno.EMFILE, errno.ENFILE) or re.search(_NO_FILES, text, re.IGNORECASE):
        return LimitReached(
            f"no more file handles ({_last_line(text)}). {resume}, with a higher limit (ulimit -n) or fewer "
            "DATALOADER.NUM_WORKERS."
        )
    no_memory = isinstance(error, MemoryError) or number == errno.ENOMEM or text.startswith("Caught MemoryError")
    if no_memory or (isinstance(error, RuntimeError | OSError) and re.search(_NO_MEMORY, text, re.IGNORECASE)):
        return LimitReached(
            f"no more memory ({_last_line(text) or type(error).__name__}). {resume}, with more memory, fewer "
            "DATALOADER.NUM_WORKERS, smaller images or a higher SOLVER.ACCUMULATE."
        )
    said = text.partition(". ")[0].rstrip(".")
    if isinstance(error, ConnectionError | EOFError) and _passed(error, "torch.utils.data.dataloader"):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    elif not (isinstance(error, RuntimeError) and said.startswith("DataLoader worker (pid")):
        return error
    return WorkerDied(
        f"a process that loads data was killed ({said}): most often, the machine is out of memory. "
        f"{resume}, and with fewer DATALOADER.NUM_WORKERS."
    )


def _passed(error: Exception, module: str) -> bool:
    """Whether the error came through a function of `module`."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == module for frame in frames)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip().partition(". ")[0].rstrip(".")[:200] if lines else ""


def message_of(error: BaseException) -> str:
    """The error's message; of one that a data loader's worker passed on, without that process's traceback."""
    text = str(error)
    return text.strip().rpartition("\n")[2].partition(": ")[2] if text.startswith("Caught ") else text
