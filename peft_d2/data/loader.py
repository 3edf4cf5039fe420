"""Loaders on Detectron2's data sets. A resumed run sees exactly the data of one that was never stopped.

Which images make up which batch is a pure function of the seed, so that it can be taken up at any iteration. Batches
are formed for all ranks together and then dealt out: one process and many see the same, if their total batch is.
"""

from __future__ import annotations

import logging
import random
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.queues import Queue
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, get_worker_info

from peft_d2.data.images import DatasetError, reading, set_pixel_limit
from peft_d2.data.mappers import build_mapper, build_test_mapper
from peft_d2.data.proposals import proposal_files
from peft_d2.data.registration import register_from_config

Mapper = Callable[[dict[str, Any]], "dict[str, Any] | None"]
logger = logging.getLogger(__name__)
_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class Draw(NamedTuple):
    """A sample to come: which record it is of, and its number in the stream of all samples."""

    record: int  # index in the data set
    number: int  # of the sample, counted over all batches and ranks from 0


class BatchOrder:
    """Endless batches of :class:`Draw` for one rank.

    Args:
        groups: group of every record; a batch is of one group (portrait or landscape, to save padding).
        batch_size: images of one batch over all ranks.
        seed: of the shuffles.
        repeats: how often each record comes in an epoch, fractions by chance; None is once.
        start: batches to pass over.
        rank, world: this rank's part of every batch.
    """

    def __init__(
        self, groups: Sequence[int], batch_size: int, seed: int, *,
        repeats: Sequence[float] | None = None, start: int = 0, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if not len(groups):
            raise ValueError("there is no image to train on.")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"SOLVER.IMS_PER_BATCH {batch_size} cannot be dealt out evenly to {world} processes.")
        self.groups, self.batch_size, self.seed = np.asarray(groups), batch_size, seed
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=np.float64)
        self.start, self.rank, self.share = start, rank, batch_size // world

    def __iter__(self) -> Iterator[list[Draw]]:
        first = self.rank * self.share
        for batch_number, batch in enumerate(self._batches()):
            if batch_number >= self.start:
                mine = range(first, first + self.share)
                yield [Draw(batch[i], batch_number * self.batch_size + i) for i in mine]

    def _batches(self) -> Iterator[list[int]]:
        """Endless batches of record indices; images that do not fill a batch of their group wait for the next epoch."""
        waiting: dict[int, list[int]] = {int(group): [] for group in np.unique(self.groups)}
        epoch = 0
        while True:
            for index in self._epoch(epoch).tolist():
                group = waiting[int(self.groups[index])]
                group.append(index)
                if len(group) == self.batch_size:
                    yield list(group)
                    group.clear()
            epoch += 1

    def _epoch(self, epoch: int) -> np.ndarray:
        """Indices of the records in the order of an epoch, each as often as it comes in it."""
        rng = np.random.default_rng([self.seed, epoch])
        indices = np.arange(len(self.groups))
        if self.repeats is not None:
            whole = np.floor(self.repeats)
            extra = rng.random(len(indices)) < self.repeats - whole
            indices = np.repeat(indices, (whole + extra).astype(int))
        return rng.permutation(indices)


@contextmanager
def sample_seed(seed: int, number: int) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's random numbers depend on (seed, number) alone; outside nothing changes."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence([seed, number]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    torch.random.default_generator.manual_seed(int(words[3]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class TrainLoader(DataLoader):
    """A loader whose worker processes end when it is closed, even if an error's traceback still holds an iterator."""

    def __iter__(self) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until a worker knows what to do about them
        try:
            iterator = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._running = weakref.WeakSet([*getattr(self, "_running", ()), iterator])
        return iterator

    def close(self) -> None:
        """End the workers of all iterators; each ends the sample that it works at."""
        for iterator in getattr(self, "_running", ()):
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()


def build_train_loader(
    cfg: Any, start_iter: int = 0, mapper: Mapper | None = None, closed: bool = False
) -> TrainLoader:
    """Endless loader of this rank's batches (lists of samples), beginning with iteration ``start_iter``.

    What iteration i sees depends on ``cfg.SEED``, the data set and ``SOLVER.IMS_PER_BATCH`` alone, not on the number
    of workers or ranks. ``SEED: -1`` draws a seed, so that order is not restored on resuming.

    Args:
        cfg: data sets, batch and workers.
        start_iter: the first batch's number.
        mapper: in place of the config's.
        closed: the caller is sure to call ``close()``: workers go on after Ctrl-C, and for a while after a SIGTERM, for
            the whole job, so that a training can end its step.

    Raises:
        DatasetError: no image is left to train on; unknown sampler, or mapper, see
            :func:`peft_d2.data.mappers.build_mapper`.
        ValueError: the batch cannot be dealt out.
    """
    register_from_config(cfg)
    records = training_records(cfg)
    seed = cfg.SEED
    if seed < 0:
        seed = comm.shared_random_seed()
        logger.info("SEED is -1: the order of the data is random, and resuming does not restore it. Set SEED.")
    wide = [int(cfg.DATALOADER.ASPECT_RATIO_GROUPING and r.get("width", 0) > r.get("height", 0)) for r in records]
    order = BatchOrder(
        wide, cfg.SOLVER.IMS_PER_BATCH, seed, repeats=_repeats(cfg, records),
        start=start_iter, rank=comm.get_rank(), world=comm.get_world_size(),
    )  # fmt: skip
    feed = _NamesFiles(mapper or build_mapper(cfg, records), cfg.INPUT.get("MAX_PIXELS", 0))
    return TrainLoader(
        _Samples(DatasetFromList(records, copy=False), feed, seed),
        batch_sampler=order,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        worker_init_fn=partial(_begin_worker, closed),
        collate_fn=_as_list,
        generator=torch.Generator().manual_seed(seed),  # or iter() would draw from the training's random numbers
    )


def build_test_loader(cfg: Any, name: str) -> DataLoader:
    """Loader of one data set in order, one image at a time, dealt out to the ranks."""
    register_from_config(cfg)
    if name in cfg.DATASETS.TEST:
        proposal_files(cfg, "TEST")
    return build_detection_test_loader(
        cfg, name, mapper=_NamesFiles(build_test_mapper(cfg, name), cfg.INPUT.get("MAX_PIXELS", 0))
    )


def training_records(cfg: Any) -> list[dict[str, Any]]:
    """Dataset dicts of ``DATASETS.TRAIN``; images without objects stay unless ``FILTER_EMPTY_ANNOTATIONS``."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    records = get_detection_dataset_dicts(
        list(cfg.DATASETS.TRAIN),
        filter_empty=False,  # Detectron2 fails with a bare assertion when nothing is left
        min_keypoints=keypoints,
        proposal_files=proposal_files(cfg, "TRAIN"),
    )
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and "annotations" in records[0]:
        before = len(records)
        records = [r for r in records if any(not a.get("iscrowd", 0) for a in r["annotations"])]
        if len(records) < before:
            logger.info("%d of %d images have no object and are left out.", before - len(records), before)
    if not records:
        raise DatasetError(
            f"{list(cfg.DATASETS.TRAIN)}: no image with annotations is left to train on. "
            "Check the annotations, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS False to train on empty images."
        )
    return records


class _NamesFiles:
    """Calls another mapper, so that its errors name the file and the config's limit of pixels holds in each process.

    In a worker it also sees to it that samples which cannot be sent are an error, see :func:`_send_error`.
    """

    def __init__(self, mapper: Mapper, max_pixels: int) -> None:
        self.mapper, self.max_pixels = mapper, max_pixels

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        set_pixel_limit(self.max_pixels)
        if get_worker_info() is not None:
            Queue._on_queue_feeder_error = _send_error  # type: ignore[attr-defined]
        with reading(record):
            return self.mapper(record)


def _send_error(queue: Any, error: Exception, sent: Any) -> None:
    """Send the error in place of samples that cannot be sent (no shared memory, an unusable TMPDIR).

    Python prints it and forgets the samples, for which torch would wait without end; there is no public place to say
    otherwise.
    """
    queue.put((sent[0], ExceptionWrapper(where="in a DataLoader worker")))


class _Samples(Dataset):
    """The data set of the loader: gives the sample of a :class:`Draw`."""

    def __init__(self, records: Any, mapper: Mapper, seed: int) -> None:
        self.records, self.mapper, self.seed = records, mapper, seed

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        with sample_seed(self.seed, draw.number):
            index = draw.record
            for _ in range(1000):
                if (sample := self.mapper(self.records[index])) is not None:
                    return sample
                # A mapper may refuse an image; which one replaces it is part of the sample's random numbers.
                index = int(np.random.randint(len(self.records)))
        raise RuntimeError("the mapper refused 1000 images in a row. Check INPUT and the data set.")


def _begin_worker(closed: bool, worker: int) -> None:
    """Start a worker: if the loader is sure to be closed, it ignores Ctrl-C and survives SIGTERM for a minute."""
    if closed:
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _as_list(batch: list[Any]) -> list[Any]:
    """The batch as it is: Detectron2's models take lists of samples."""
    return batch


def _repeats(cfg: Any, records: Sequence[dict[str, Any]]) -> Sequence[float] | None:
    """How often each record comes in an epoch, by ``DATALOADER.SAMPLER_TRAIN``; None: once."""
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name not in ("TrainingSampler", "RepeatFactorTrainingSampler"):
        raise DatasetError(
            f"DATALOADER.SAMPLER_TRAIN {name!r} is not known. Expected TrainingSampler or RepeatFactorTrainingSampler."
        )
    if name == "TrainingSampler":
        return None
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    return factors(records, cfg.DATALOADER.REPEAT_THRESHOLD).tolist()
