"""Class counts: taken from the json of one's own data; a count that the user wrote himself must agree with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from peft_d2.engine.config import base_architecture
from peft_d2.engine.errors import ConfigError

logger = logging.getLogger(__name__)

_KEYS = {
    "GeneralizedRCNN": ("MODEL.ROI_HEADS.NUM_CLASSES",),
    "RetinaNet": ("MODEL.RETINANET.NUM_CLASSES",),
    "PanopticFPN": ("MODEL.ROI_HEADS.NUM_CLASSES",),
}
_MASK_CLASSIFIERS = ("PD2MaskFormer", "MaskFormer", "PD2MaskDINO", "MaskDINO")
_DEFAULT = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES",)


def class_count_keys(cfg: Any) -> tuple[str, ...]:
    """The config keys that hold the number of thing classes of this config's model."""
    return _KEYS.get(base_architecture(cfg), _DEFAULT)


def apply_class_count(cfg: Any, explicit: Mapping[str, int] | None = None) -> None:
    """Set the model's class count to that of the data sets in ``DATASETS.REGISTER``, with one line.

    Args:
        cfg: changed in place. Sets that Detectron2 registers itself leave it as it is; those of
            :mod:`peft_d2.data.builtin` set it where they are instances whose classes are known.
        explicit: keys that the user wrote himself, see :class:`peft_d2.engine.config.LoadedConfig`.

    Raises:
        ConfigError: a count contradicts the json, and was written where the data set was named or later. A count that
            came with a config's own data sets says nothing about those that replace them on the command line.
    """
    from peft_d2.data import class_names
    from peft_d2.data.builtin import COCO_SETS

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
    for key in class_count_keys(cfg):
        node, _, leaf = key.rpartition(".")
        parent = _walk(cfg, node)
        if parent is None or leaf not in parent or parent[leaf] == len(names):
            continue
        if explicit.get(key, -1) >= named_at:
            raise ConfigError(
                f"{key} is {parent[leaf]} but the json of data set {used[0]!r} lists {len(names)} categories "
                f"({_some(names)}). Leave the key out, or correct it or the json."
            )
        logger.info("%s: %d -> %d, the categories of data set %r.", key, parent[leaf], len(names), used[0])
        parent[leaf] = len(names)


def check_class_count(cfg: Any) -> None:
    """Refuse a model with fewer classes than a registered training set has: it would learn the others as nothing.

    Raises:
        ConfigError: for Mask2Former, Mask DINO and Detectron2's detectors; of other models nobody knows.
    """
    from detectron2.data import MetadataCatalog

    if base_architecture(cfg) not in (*_KEYS, *_MASK_CLASSIFIERS):
        return
    for name in cfg.DATASETS.TRAIN:
        classes = list(MetadataCatalog.get(name).get("thing_classes", []))
        for key in class_count_keys(cfg):
            node, _, leaf = key.rpartition(".")
            if (count := _walk(cfg, node)[leaf]) < len(classes):
                raise ConfigError(f"{key} is {count}, but data set {name!r} has {len(classes)} ({_some(classes)}).")


def _walk(cfg: Any, path: str) -> Any:
    for part in path.split("."):
        if part not in cfg:
            return None
        cfg = cfg[part]
    return cfg


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
