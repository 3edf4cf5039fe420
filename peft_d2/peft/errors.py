"""The root of all errors of this package."""

from __future__ import annotations


class PeftError(Exception):
    """What the caller asked for does not fit; the message says what was expected and what to do."""
