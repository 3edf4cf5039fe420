"""Bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_d2.engine.hooks import Bar, on_terminal
from peft_d2.engine.trainer import Trainer


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_training_and_evaluation(
    make_cfg: Callable[..., Any], base_weights: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    assert on_terminal() == terminal
    trainer = Trainer(make_cfg("MODEL.WEIGHTS", base_weights, "SOLVER.MAX_ITER", 2))
    trainer.resume_or_load(resume=False)
    trainer.train()
    for title in ("training:", "evaluating toy"):
        assert (title in screen.getvalue()) == terminal
    assert ("2/2" in screen.getvalue()) == terminal


def test_log_lines_pass_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    log = logging.getLogger("peft_d2")
    log.addHandler(handler)
    try:
        assert list(Bar([1, 2], "images")) == [1, 2]
        for _ in Bar([1, 2], "images"):
            log.warning("a line")
            assert handler not in log.handlers
        assert handler in log.handlers
    finally:
        log.removeHandler(handler)
    assert len(Bar([1, 2], "images")) == 2
    assert screen.getvalue().count("a line\n") == 2
