"""What the command-line tools report as one line instead of a traceback."""

from __future__ import annotations

import traceback


class ConfigError(ValueError):
    """A config that cannot be right; the message names the key, what was expected and the remedy."""


class LossNotFinite(FloatingPointError):
    """A loss or gradient is NaN or infinite; the message names the losses and the images of the batch."""


class WorkerDied(RuntimeError):
    """A process that loads data was killed; the message says what to do."""


def named(error: Exception) -> Exception:
    """The error, or the `WorkerDied` that stands for what torch says of a loader's worker that was killed.

    torch says so from a signal handler, out of any line of the training; where the loader is just then taking a batch
    from that worker, the connection fails first.
    """
    said = str(error).partition(". ")[0].rstrip(".")
    if isinstance(error, ConnectionError | EOFError) and _passed(error, "torch.utils.data.dataloader"):
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    elif not (isinstance(error, RuntimeError) and said.startswith("DataLoader worker (pid")):
        return error
    return WorkerDied(
        f"a process that loads data was killed ({said}): most often, the machine is out of memory. "
        "The last checkpoint is good: run again with --resume, and with fewer DATALOADER.NUM_WORKERS."
    )


def _passed(error: Exception, module: str) -> bool:
    """Whether the error came through a function of `module`."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == module for frame in frames)


def message_of(error: Exception) -> str:
    """The error's message; of one that a data loader's worker passed on, without that process's traceback."""
    text = str(error)
    return text.strip().rpartition("\n")[2].partition(": ")[2] if text.startswith("Caught ") else text
