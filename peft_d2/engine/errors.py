"""What the command-line tools report as one line instead of a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config that cannot be right; the message names the key, what was expected and the remedy."""


class LossNotFinite(FloatingPointError):
    """A loss or gradient is NaN or infinite; the message names the losses and the images of the batch."""


class WorkerDied(RuntimeError):
    """A process that loads data was killed; the message says what to do."""


def named(error: Exception) -> Exception:
    """The error, or the `WorkerDied` that stands for torch's message about a loader's worker.

    torch raises it from a signal handler, so it may come out of any line of the training.
    """
    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")):
        return error
    return WorkerDied(
        f"a process that loads data was killed ({str(error).partition('. ')[0].rstrip('.')}): most often, the machine "
        "is out of memory. The last checkpoint is good: run again with --resume, and with fewer DATALOADER.NUM_WORKERS."
    )


def message_of(error: Exception) -> str:
    """The error's message; of one that a data loader's worker passed on, without that process's traceback."""
    text = str(error)
    return text.strip().rpartition("\n")[2].partition(": ")[2] if text.startswith("Caught ") else text
