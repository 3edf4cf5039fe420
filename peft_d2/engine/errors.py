"""What the command-line tools report as one line instead of a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config that cannot be right; the message names the key, what was expected and the remedy."""


class LossNotFinite(FloatingPointError):
    """A loss or gradient is NaN or infinite; the message names the losses and the images of the batch."""


def message_of(error: Exception) -> str:
    """The error's message; of one that a data loader's worker passed on, without that process's traceback."""
    text = str(error)
    return text.strip().rpartition("\n")[2].partition(": ")[2] if text.startswith("Caught ") else text
