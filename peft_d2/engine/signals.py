"""Signals that a run takes over: SIGTERM and Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

# What a handler writes to stderr.
INTERRUPTED = b"\nCtrl-C: the step is finished and saved first; a second one leaves at once.\n"
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def handled(handlers: dict[int, Any]) -> Iterator[None]:
    """Have signals handled so, those that are not ignored, as SIGINT is in the background; in the main thread alone."""
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    else:
        logger.debug("not in the main thread: signals keep their meaning")
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
