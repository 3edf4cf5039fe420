"""Checks of a config before anything is built: its numbers, names and folders, and the class count against the data."""

from __future__ import annotations

import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from peft_d2.data.classes import class_names
from peft_d2.data.config import CLASS_COUNT_KEYS, published_name
from peft_d2.data.prompts import check_prompts
from peft_d2.data.proposals import proposal_files
from peft_d2.data.registration import COCO_SETS, require_registered
from peft_d2.data.validation import DatasetError, check_datasets
from peft_d2.engine.config import leaves
from peft_d2.engine.errors import ConfigError
from peft_d2.evaluation.augmented import check_augmentation
from peft_d2.evaluation.build import check_evaluators
from peft_d2.models.checks import expect
from peft_d2.peft.errors import shortened

logger = logging.getLogger(__name__)

_RATES = (
    *("BASE_LR", "WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_EMBED", "WEIGHT_DECAY_BIAS", "MOMENTUM", "GAMMA"),
    *("WARMUP_FACTOR", "BACKBONE_MULTIPLIER", "BIAS_LR_FACTOR", "POLY_LR_POWER", "POLY_LR_CONSTANT_ENDING"),
    "LAYER_DECAY",
)
_FINITE = (*(f"SOLVER.{name}" for name in _RATES), "MODEL.PEFT.LR_FACTOR", "MODEL.PEFT.TRAIN_LR_FACTOR")
_COUNTS = {
    **dict.fromkeys(("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.ACCUMULATE"), (1, 2**31 - 1)),
    **dict.fromkeys(("SOLVER.WARMUP_ITERS", "SOLVER.REFERENCE_IMS", "SOLVER.CHECKPOINTS_TO_KEEP"), (0, 2**31 - 1)),
    **dict.fromkeys(("SOLVER.BACKBONE_WARMUP_ITERS", "SOLVER.LAYER_DECAY_SPARED"), (0, 2**31 - 1)),
    "DATALOADER.NUM_WORKERS": (0, 1024),
    "INPUT.MIN_SIZE_TEST": (0, 2**31 - 1),  # 0: as they are
    "INPUT.MAX_SIZE_TEST": (1, 2**31 - 1),
}
_IMAGENET = (124, 116, 104)  # means of red, green and blue


def check_run(cfg: Any, evaluate: bool, writes: bool = True) -> None:
    """Refuse a run that would fail only after the model was built or the training had begun.

    Args:
        cfg: the run's config; the data sets of its ``DATASETS.REGISTER`` are registered already.
        evaluate: the run evaluates and trains nothing.
        writes: it writes to ``OUTPUT_DIR``.

    Raises:
        ConfigError: no, unknown or defective data sets, or such that nothing can evaluate; impossible numbers; a folder
            that cannot be written.
    """
    _check_numbers(cfg)
    _check_names(cfg, "TEST" if evaluate else "TRAIN")
    if not evaluate:
        check_batch(cfg)
        check_class_count(cfg)
    try:
        check_augmentation(cfg)
        check_evaluators(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        check_datasets(cfg)
        check_prompts(cfg)
        for split in ("TEST",) if evaluate else ("TRAIN", "TEST"):
            proposal_files(cfg, split)
    except DatasetError as error:
        raise ConfigError(str(error)) from error
    if writes:
        _check_writable(cfg.OUTPUT_DIR)


def _check_numbers(cfg: Any) -> None:
    known = dict(leaves(cfg))
    for key in _FINITE:
        value = known[key]
        if value is not None and not 0 <= value < math.inf:  # those of biases may be None
            raise ConfigError(f"{key} is {value}; expected a number of 0 or more.")
    for key, (least, most) in _COUNTS.items():
        if not least <= known[key] <= most:
            raise ConfigError(f"{key} is {known[key]}; expected {least} or more, and no more than {most}.")
    if not 0 < cfg.MODEL.PEFT.BUDGET <= 100:
        raise ConfigError(f"MODEL.PEFT.BUDGET is {cfg.MODEL.PEFT.BUDGET}; expected above 0 and at most 100 (percent).")
    if cfg.MODEL.DEVICE == "meta":
        raise ConfigError("MODEL.DEVICE is 'meta', whose tensors hold no values; expected 'cpu', 'cuda' or 'cuda:0'.")
    if 0 < max(cfg.MODEL.PIXEL_MEAN) <= 1 and max(cfg.MODEL.PIXEL_STD) < 1:
        logger.warning(
            "MODEL.PIXEL_MEAN %s and PIXEL_STD %s seem to be of images from 0 to 1. Detectron2's are from 0 to 255: "
            "multiply both by 255.",
            *(list(cfg.MODEL.PIXEL_MEAN), list(cfg.MODEL.PIXEL_STD)),
        )
    order = {"BGR": "RGB", "RGB": "BGR"}.get(cfg.INPUT.FORMAT)
    if order and tuple(round(value) for value in cfg.MODEL.PIXEL_MEAN[:: 1 if order == "RGB" else -1]) == _IMAGENET:
        logger.warning(
            "MODEL.PIXEL_MEAN %s is ImageNet's in the order %s, but INPUT.FORMAT is %s: reverse it and PIXEL_STD, or "
            "set INPUT.FORMAT %s, as the base was trained.",
            *(list(cfg.MODEL.PIXEL_MEAN), order, cfg.INPUT.FORMAT, order),
        )
    if cfg.TEST.PRECISE_BN.ENABLED:
        logger.warning(
            "TEST.PRECISE_BN is not done here: predictions use the statistics that norms have from training."
        )
    if cfg.TEST.TILES.ENABLED:
        tiles = cfg.TEST.TILES
        for key, low, high in (("SIZE", 1, 2**31), ("SCALE", 0.001, 1000), ("OVERLAP", 0, tiles.SIZE - 1)):
            expect(low <= tiles[key] <= high, f"TEST.TILES.{key}", tiles[key], f"{low} to {high}")
    if cfg.SEED >= 2**63:
        raise ConfigError(f"SEED is {cfg.SEED}; expected less than 2**63, or -1 to draw one.")


def check_batch(cfg: Any) -> None:
    """Refuse a batch that cannot be dealt out to processes and pieces.

    Raises:
        ConfigError: with the numbers.
    """
    batch, pieces, world = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE, comm.get_world_size()
    if pieces < 1:
        raise ConfigError(f"SOLVER.ACCUMULATE is {pieces}; expected 1 or more.")
    if batch < 1 or batch % (world * pieces):
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be dealt out evenly to {world} process(es) with SOLVER.ACCUMULATE "
            f"{pieces}: choose a multiple of {world * max(pieces, 1)}."
        )


def _check_names(cfg: Any, needed: str) -> None:
    if not cfg.DATASETS[needed]:
        split = {"TRAIN": "train", "TEST": "val"}[needed]
        raise ConfigError(
            f"DATASETS.{needed} is empty: there is nothing to {'train' if split == 'train' else 'evaluate'} on. Give "
            f"--{split}-json and --{split}-images, or name registered data sets."
        )
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            try:
                require_registered(name)
            except ValueError as error:
                raise ConfigError(f"DATASETS.{key}: {error}") from error


def _check_writable(folder: str) -> None:
    if re.search("[\ud800-\udfff]", folder):  # bytes that Python could not decode: TensorBoard cannot name them
        encoding = sys.getfilesystemencoding()
        raise ConfigError(f"OUTPUT_DIR {folder!r} is no text in this environment's {encoding}. Set PYTHONUTF8=1.")
    if "://" in folder:
        raise ConfigError(f"OUTPUT_DIR {folder!r} is an address. Name a folder of this machine, and copy it there.")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        why = "it is a link to nothing" if os.path.islink(folder) else error.strerror
        raise ConfigError(f"OUTPUT_DIR {folder!r} cannot be made: {why}. Choose another folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"OUTPUT_DIR {folder!r} cannot be written to. Choose another folder.")


def class_count_key(cfg: Any) -> str:
    """The config key that holds the number of thing classes of this config's model."""
    return CLASS_COUNT_KEYS.get(published_name(cfg), "MODEL.SEM_SEG_HEAD.NUM_CLASSES")


def apply_class_count(cfg: Any, explicit: Mapping[str, int] | None = None) -> None:
    """Set the model's class count to that of the data sets in ``DATASETS.REGISTER``, with one line.

    Args:
        cfg: changed in place. Sets that Detectron2 registers itself leave it as it is; those of
            :mod:`peft_d2.data.registration` set it where they are instances whose classes are known.
        explicit: keys that the user wrote himself, see :class:`peft_d2.engine.config.LoadedConfig`.

    Raises:
        ConfigError: a count contradicts the json, and was written where the data set was named or later. A count that
            came with a config's own data sets says nothing about those that replace them on the command line.
    """
    own = {entry["NAME"] for entry in cfg.DATASETS.REGISTER if "NAME" in entry} | COCO_SETS.keys()
    split = "TRAIN" if cfg.DATASETS.TRAIN else "TEST"
    used = list(cfg.DATASETS[split])
    if not used or used[0] not in own:
        return
    names = class_names(cfg)
    if not names:  # a built-in set whose json is not there yet
        return
    explicit = explicit or {}
    named_at = max(explicit.get(f"DATASETS.{key}", 0) for key in (split, "REGISTER"))
    key = class_count_key(cfg)
    count = dict(leaves(cfg)).get(key)
    if count in (None, len(names)):
        return
    if explicit.get(key, -1) >= min(named_at, 2):  # arguments and KEY VALUE pairs are on one line
        raise ConfigError(
            f"{key} is {count} but the json of data set {used[0]!r} lists {len(names)} categories "
            f"({shortened(names, 5)}). Leave the key out, or correct it or the json."
        )
    logger.info("%s: %d -> %d, the categories of data set %r.", key, count, len(names), used[0])
    cfg.merge_from_list([key, len(names)])


def check_class_count(cfg: Any) -> None:
    """Refuse a model with fewer classes than a registered training set has: it would learn the others as nothing.

    Raises:
        ConfigError: for Mask2Former, Mask DINO and Detectron2's detectors; of other models nobody knows.
    """
    if (key := CLASS_COUNT_KEYS.get(published_name(cfg))) is None:
        return
    count = dict(leaves(cfg))[key]
    for name in cfg.DATASETS.TRAIN:
        classes = list(MetadataCatalog.get(name).get("thing_classes", []))
        if count < len(classes):
            raise ConfigError(f"{key} is {count}, but data set {name!r} has {len(classes)} ({shortened(classes, 5)}).")
