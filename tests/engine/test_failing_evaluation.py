"""An evaluation that fails inside a training: what was trained is saved, the reason is one line, the run resumes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_d2.engine.errors import EvaluationFailed, LimitReached, is_expected, named
from peft_d2.engine.trainer import Trainer

from .test_training import KINDS, assert_equal, train, trained


def fail_exit() -> None:
    sys.exit("no groundtruth for city x")


def fail_key() -> None:
    raise KeyError(17)


def fail_file() -> None:
    open("/nowhere/at all.json").close()


@KINDS
@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (fail_exit, "no groundtruth for city x"),
        (fail_key, "KeyError: 17"),
        (fail_file, "FileNotFoundError.*at all.json"),
    ],
)
def test_the_training_is_saved_before(
    make_cfg: Callable[..., Any],
    base_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    peft: bool,
    fail: Callable[[], None],
    reason: str,
) -> None:
    opts = ("MODEL.WEIGHTS", base_weights, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 100)
    whole = trained(train(make_cfg(*opts, peft=peft, output=tmp_path / "whole")))
    names = {path.name for path in (tmp_path / "whole").glob("[am]*_*")}
    assert not [name for name in names if name[-1].isdigit()]  # what was saved for the evaluations' sake is gone
    cfg = make_cfg(*opts, peft=peft, output=tmp_path / "failed")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", classmethod(lambda cls, *_: fail()))
        with pytest.raises(EvaluationFailed, match=f"after 2 of 6 iterations failed: .*{reason}.*--resume") as error:
            train(cfg)
    assert is_expected(error.value) and "\n" not in str(error.value)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test_all", classmethod(lambda cls, *_: fail()))
        with pytest.raises(EvaluationFailed, match="after 6 of 6 iterations failed"):
            train(cfg, resume=True)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 6
    assert_equal(whole, trained(resumed))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "no more memory .*--resume"),
        (OSError(12, "Cannot allocate memory"), "no more memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4"), "no more memory"),
        (RuntimeError("unable to mmap 9 bytes from file </x>: Cannot allocate memory (12)"), "no more memory"),
        (RuntimeError("Caught MemoryError in DataLoader worker process 0.\nTraceback\nMemoryError"), "no more memory"),
        (RuntimeError("can't start new thread"), "no more memory"),
        (OSError(24, "Too many open files"), "no more file handles .*ulimit -n"),
        (RuntimeError("received 0 items of ancdata"), "no more file handles"),
        (OSError("Caught OSError in DataLoader worker.\nOSError: [Errno 24] Too many open files: 'a'"), "file handles"),
    ],
    ids=str,
)
def test_limits_of_the_machine_are_one_line(error: Exception, said: str) -> None:
    told = named(error)
    assert isinstance(told, LimitReached) and is_expected(told) and "\n" not in str(told)
    assert re.search(said, str(told)), told
