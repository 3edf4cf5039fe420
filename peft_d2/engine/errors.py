"""What the command-line tools report as one line instead of a traceback."""

from __future__ import annotations


class ConfigError(ValueError):
    """A config that cannot be right; the message names the key, what was expected and the remedy."""


class LossNotFinite(FloatingPointError):
    """A loss or gradient is NaN or infinite; the message names the losses and the images of the batch."""
