"""No process that loads data outlives its training, whoever made the loader and however the training ends."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from peft_d2 import data
from peft_d2.data.images import DatasetError
from peft_d2.data.loader import build_train_loader
from peft_d2.engine.errors import LimitReached, named
from peft_d2.engine.step import LazyLoader
from peft_d2.engine.trainer import Trainer

Mapper = Callable[[dict[str, Any]], dict[str, Any]]


class OneNumber(nn.Module):
    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.zeros(1))

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {"loss": self.number.sum() * len(batch)}


class Unsendable:
    """As tensors are where there is no more shared memory, which docker gives little of, or TMPDIR is too long."""

    def __reduce__(self) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_samples_that_cannot_be_sent_are_an_error(make_cfg: Callable[..., Any]) -> None:
    """The training waited for them without end."""
    loader = build_train_loader(make_cfg("DATALOADER.NUM_WORKERS", 1), mapper=lambda record: {"image": Unsendable()})
    loader.timeout = 60
    with contextlib.closing(loader), pytest.raises(RuntimeError, match="unable to allocate") as raised:
        next(iter(loader))
    told = named(raised.value)
    assert isinstance(told, LimitReached) and "no more shared memory (RuntimeError: unable to allocate" in str(told)


def own(cfg: Any, mapper: Mapper) -> Iterable[Any]:
    return build_train_loader(cfg, mapper=mapper)


def detectron2s(cfg: Any, mapper: Mapper) -> Iterable[Any]:
    """A chain of generators and ``map`` around torch's iterator."""
    records = data.loader.training_records(cfg)
    sampler = TrainingSampler(len(records), seed=0)
    return build_detection_train_loader(
        records, mapper=mapper, sampler=sampler, total_batch_size=2, num_workers=2, aspect_ratio_grouping=True
    )


def any_iterable(cfg: Any, mapper: Mapper) -> Iterator[Any]:
    for batch in own(cfg, mapper):
        yield batch[::-1]


WAITING = "it is interrupted while it waits for data"
LOADERS = (own, detectron2s, any_iterable)


class Ending(HookBase):
    """Ends the training as ``how`` says."""

    def __init__(self, how: str) -> None:
        self.how = how

    def before_step(self) -> None:
        if self.how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)

    def after_step(self) -> None:
        if self.how == "a step fails":
            raise ArithmeticError
        if self.how == WAITING and self.trainer.iter == 0:
            # All workers have been forked: Python's logging would keep its lock where an interrupt breaks into a fork.
            self.handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
            signal.setitimer(signal.ITIMER_REAL, 0.2)

    def after_train(self) -> None:
        if self.how == WAITING:
            signal.signal(signal.SIGALRM, self.handler)


def mapped(record: dict[str, Any], how: str) -> dict[str, Any]:
    if how == "the data fails":
        raise DatasetError("defective")
    if how == WAITING:
        time.sleep(0.4)
    return record


ENDINGS: dict[str, type[BaseException] | None] = {
    "it succeeds": None,
    "the data fails": DatasetError,
    WAITING: KeyboardInterrupt,
    "a step fails": ArithmeticError,
    "SIGTERM": SystemExit,
}


def trainer_of(cfg: Any, build: Callable[[Any], Iterable[Any]], *hooks: HookBase) -> Trainer:
    if "OneNumber" not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(OneNumber)

    class WithLoader(Trainer):
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Iterable[Any]:
            return build(cfg)

    cfg.MODEL.META_ARCHITECTURE = "OneNumber"
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST = 2, 3, ()
    trainer = WithLoader(cfg)
    trainer.register_hooks(list(hooks))
    return trainer


@pytest.mark.parametrize("how", ENDINGS)
@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
def test_no_worker_outlives_its_training(
    make_cfg: Callable[..., Any], loader: Callable[[Any, Mapper], Iterable[Any]], how: str
) -> None:
    started = []

    def build(cfg: Any) -> Iterator[Any]:
        for batch in loader(cfg, partial(mapped, how=how)):
            started.append(len(set(multiprocessing.active_children()) - before))
            yield batch

    before = set(multiprocessing.active_children())  # another test's may still be ending
    expected = ENDINGS[how]
    with pytest.raises(expected) if expected else contextlib.nullcontext() as error:  # which holds the traceback
        trainer_of(make_cfg(), build, Ending(how)).train()
    assert not set(multiprocessing.active_children()) - before, error
    assert all(number == 2 for number in started)
    assert started or how == "the data fails"


def test_a_closed_loader_is_built_anew() -> None:
    numbers = iter(range(10, 100, 10))
    loader = LazyLoader(lambda: itertools.count(next(numbers)))
    assert [loader.first(), next(loader), next(loader), loader.first()] == [10, 10, 11, 12]
    loader.close()
    assert [loader.first(), next(loader), next(loader)] == [20, 20, 21]


def test_a_loader_that_ends_is_named(make_cfg: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="no more batches: it must go on without end"):
        trainer_of(make_cfg(), lambda cfg: [[{}], [{}]]).train()


def test_resuming_with_a_loader_that_begins_anew_is_said(
    make_cfg: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(make_cfg(), lambda cfg: [[{}]] * 3)
    trainer.start_iter = 1
    trainer.train()
    assert "WithLoader.build_train_loader takes no start_iter: the order of the data begins anew" in caplog.text


def test_a_failed_training_exits_at_once(make_cfg: Callable[..., Any], tmp_path: Path) -> None:
    """The program that ends with a traceback keeps all that its frames hold until it has exited."""
    cfg = make_cfg(output=tmp_path / "run")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import peft_d2, torch
from functools import partial
from peft_d2.engine.config import load_config
from tests.engine.test_loader_workers import any_iterable, mapped, trainer_of
peft_d2.register()
cfg = load_config({str(tmp_path / "config.yaml")!r}).cfg
trainer = trainer_of(cfg, partial(any_iterable, mapper=partial(mapped, how="the data fails")))
try:
    trainer.train()
finally:
    print("ended at", time.time(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    now = time.time()
    assert done.returncode == 1 and "DatasetError" in done.stderr, done
    assert now - float(done.stdout.rpartition("ended at ")[2]) < 20
