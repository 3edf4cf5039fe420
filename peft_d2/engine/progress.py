"""Progress bars on a terminal; elsewhere Detectron2's plain lines are all there is."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_LOGGERS = ("", "detectron2", "fvcore", "peft_d2")


def on_terminal() -> bool:
    """Whether this process may draw a bar."""
    return comm.is_main_process() and sys.stderr.isatty()


class Bar:
    """A loader with a bar around its iteration."""

    def __init__(self, loader: Iterable[Any], title: str) -> None:
        self._loader, self._title = loader, title

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        with _redirected():
            yield from tqdm(self._loader, desc=self._title, total=len(self), leave=False, dynamic_ncols=True)


class TrainingBar(HookBase):
    """A bar over the run's iterations with the current loss; log lines pass above it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def before_train(self) -> None:
        """Draw the bar, at the iteration where the run starts."""
        self._stack.enter_context(_redirected())
        bar = tqdm(total=self.trainer.max_iter, initial=self.trainer.start_iter, desc="training", dynamic_ncols=True)
        self._bar = self._stack.enter_context(bar)

    def after_step(self) -> None:
        """Advance it by one, with the total loss where one is recorded."""
        with contextlib.suppress(KeyError):
            self._bar.set_postfix(loss=f"{self.trainer.storage.history('total_loss').latest():.3f}", refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        """Leave the bar as it is and give the loggers their streams back."""
        self._stack.close()


def _redirected() -> contextlib.AbstractContextManager[Any]:
    """Let the loggers that write to the terminal do so above the bar; tqdm would add a handler to any other."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    return logging_redirect_tqdm([log for log in loggers if any(_writes_to_console(h) for h in log.handlers)])


def _writes_to_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
