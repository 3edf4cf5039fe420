"""Loaders on Detectron2's data sets. A resumed run sees exactly the data of one that was never stopped."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from peft_d2.data.images import DatasetError, reading
from peft_d2.data.mappers import build_mapper, build_test_mapper
from peft_d2.data.order import BatchOrder, Draw, sample_seed
from peft_d2.data.registration import register_from_config

Mapper = Callable[[dict[str, Any]], "dict[str, Any] | None"]
_WORKERS_ARE_ENDED: ContextVar[bool] = ContextVar("workers are ended", default=False)
logger = logging.getLogger(__name__)


def build_train_loader(cfg: Any, start_iter: int = 0, mapper: Mapper | None = None) -> DataLoader:
    """Endless loader of this rank's batches (lists of samples), beginning with iteration ``start_iter``.

    What iteration i sees depends on ``cfg.SEED``, the data set and ``SOLVER.IMS_PER_BATCH`` alone, not on the number
    of workers or ranks. ``SEED: -1`` draws a seed, so that order is not restored on resuming.

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
    order = BatchOrder(
        _groups(cfg, records), cfg.SOLVER.IMS_PER_BATCH, seed, repeats=_repeats(cfg, records),
        start=start_iter, rank=comm.get_rank(), world=comm.get_world_size(),
    )  # fmt: skip
    return DataLoader(
        _Samples(DatasetFromList(records, copy=False), mapper or build_mapper(cfg, records), seed),
        batch_sampler=order,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        worker_init_fn=_outlive_sigterm if _WORKERS_ARE_ENDED.get() else None,
        collate_fn=_as_list,
        generator=torch.Generator().manual_seed(seed),  # or iter() would draw from the training's random numbers
    )


def build_test_loader(cfg: Any, name: str) -> DataLoader:
    """Loader of one data set in order, one image at a time, dealt out to the ranks."""
    register_from_config(cfg)
    return build_detection_test_loader(cfg, name, mapper=_NamesFiles(build_test_mapper(cfg, name)))


@contextmanager
def workers_ended() -> Iterator[None]:
    """At its end, by an error too, the processes end that torch's loaders started inside, whoever made the loaders.

    To let go of a loader is not enough: an error's traceback may hold its iterator, and its processes with it. As they
    are sure to end, those of :func:`build_train_loader` go on after a SIGTERM, so that a training can end its step.
    """
    before = weakref.WeakSet(_alive(_MultiProcessingDataLoaderIter))
    token = _WORKERS_ARE_ENDED.set(True)
    try:
        yield
    finally:
        _WORKERS_ARE_ENDED.reset(token)
        loaders = _alive(DataLoader)
        ended = {iterator for iterator in _alive(_MultiProcessingDataLoaderIter) if iterator not in before}
        for iterator in ended:
            iterator._shutdown_workers()  # each ends the sample that it works at
        for loader in loaders:
            if loader._iterator in ended:  # of persistent workers: the loader can still be used, with new ones
                loader._iterator = None


def training_records(cfg: Any) -> list[dict[str, Any]]:
    """Dataset dicts of ``DATASETS.TRAIN``; images without objects stay unless ``FILTER_EMPTY_ANNOTATIONS``."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    records = get_detection_dataset_dicts(
        list(cfg.DATASETS.TRAIN),
        filter_empty=False,  # Detectron2 fails with a bare assertion when nothing is left
        min_keypoints=keypoints,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
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
    """Another mapper, whose errors name the file."""

    def __init__(self, mapper: Mapper) -> None:
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        with reading(record):
            return self.mapper(record)


class _Samples(Dataset):
    """Maps a :class:`Draw` to its sample."""

    def __init__(self, records: Any, mapper: Mapper, seed: int) -> None:
        self.records, self.mapper, self.seed = records, _NamesFiles(mapper), seed

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        with sample_seed(self.seed, draw.number):
            index = draw.record
            for _ in range(1000):
                sample = self.mapper(self.records[index])
                if sample is not None:
                    return sample
                # A mapper may refuse an image; which one replaces it is part of the sample's random numbers.
                index = int(np.random.randint(len(self.records)))
        raise RuntimeError("the mapper refused 1000 images in a row. Check INPUT and the data set.")


def _alive(kind: type) -> list[Any]:
    """All objects of a class, where this process has started others at all."""
    if not multiprocessing.active_children():
        return []
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def _outlive_sigterm(worker: int) -> None:
    """Let a worker go on for a while: where a whole job gets the signal, the training needs data to end its step."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


def _as_list(batch: list[Any]) -> list[Any]:
    return batch


def _groups(cfg: Any, records: Sequence[dict[str, Any]]) -> list[int]:
    if not cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        return [0] * len(records)
    return [int(r.get("width", 0) > r.get("height", 0)) for r in records]


def _repeats(cfg: Any, records: Sequence[dict[str, Any]]) -> Sequence[float] | None:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return None
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return factors.tolist()
    raise DatasetError(
        f"DATALOADER.SAMPLER_TRAIN {name!r} is not known. Expected TrainingSampler or RepeatFactorTrainingSampler."
    )
