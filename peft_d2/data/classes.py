"""The classes of data sets: those that a model is trained on, and those of its test sets, paired by name."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

from peft_d2.data.config import CLASS_COUNT_KEYS, PROMPTED, published_name
from peft_d2.data.images import DatasetError
from peft_d2.data.registration import read_categories, register_from_config, require_registered
from peft_d2.peft.errors import shortened
from peft_d2.storage import CheckpointError, adapter_file

_BY_CATEGORY = ("coco", "lvis")  # kinds of sets whose predictions are judged by category ids
logger = logging.getLogger(__name__)


def class_names(cfg: Any) -> list[str]:
    """Thing class names of the training sets, of the first test set where there are none.

    Raises:
        ValueError: the training sets of the config do not agree, or a name is not registered.
    """
    register_from_config(cfg)
    names = list(cfg.DATASETS.TRAIN) or list(cfg.DATASETS.TEST)
    for name in names:
        require_registered(name)
    found = [list(_metadata(name).get("thing_classes", [])) for name in names]
    for name, classes in zip(names, found, strict=True):
        if cfg.DATASETS.TRAIN and classes != found[0]:
            raise ValueError(
                f"data sets {names[0]!r} and {name!r} have different classes: {found[0]} and {classes}. "
                "Sets that are trained on together need the same categories in the same order."
            )
    return found[0] if found else []


def category_indices(cfg: Any, name: str) -> dict[int, int] | None:
    """The model's class index of each category id of a test set, paired by name with the classes trained on.

    None where the set's own order holds: the classes are the same, those trained on are not known, or the model is told
    its classes otherwise (Segment Anything by boxes, SEEM by names).

    Raises:
        DatasetError: a class of the test set that the model is not trained on, or a name that two classes have.
    """
    names = _category_names(name) or {}
    trained, labels = _trained_classes(cfg, names), list(names.values())
    if not labels or not trained or trained == labels:
        return None
    if unknown := _unknown(name, names, trained):
        near = difflib.get_close_matches(unknown[0], trained, n=1, cutoff=0.4)
        hint = f" The nearest to {unknown[0]!r} is {near[0]!r}." if near else ""
        raise DatasetError(
            f"test set {name!r} has {len(unknown)} class(es) that the model is not trained on: {_few(unknown)}; it is "
            f"trained on {_few(trained)}.{hint} Classes are paired by name: rename the categories of one of the jsons, "
            "or remove those classes."
        )
    paired = {category: label for category, label in names.items() if label in trained}
    twice = [label for label in paired.values() if labels.count(label) > 1 or trained.count(label) > 1]
    if twice:
        raise DatasetError(
            f"the classes of test set {name!r} cannot be paired by name with those that the model is trained on: "
            f"several have the name {twice[0]!r}. Merge them or rename one."
        )
    if left_out := [label for label in trained if label not in labels]:
        logger.info("Test set %r lacks the class(es) %s: predictions of them are not judged.", name, _few(left_out))
    return {category: trained.index(label) for category, label in paired.items()}


def check_classes(cfg: Any) -> None:
    """Refuse test sets whose classes cannot be paired with those that the model is trained on.

    Raises:
        DatasetError: as :func:`category_indices`; or classes that are judged by their numbers, in another order.
    """
    for name in cfg.DATASETS.TRAIN:
        _metadata(name)
    for name in cfg.DATASETS.TEST:
        kind = _metadata(name).get("evaluator_type")
        if kind in _BY_CATEGORY:
            category_indices(cfg, name)
        elif cfg.DATASETS.TRAIN and published_name(cfg) not in ("SEEM", *PROMPTED):
            key = "thing_classes" if kind in ("pascal_voc", "cityscapes_instance") else "stuff_classes"
            trained, tested = (_metadata(n).get(key) for n in (cfg.DATASETS.TRAIN[0], name))
            if trained and tested and list(trained) != list(tested):
                raise DatasetError(
                    f"test set {name!r} has other classes, or the same in another order, than {cfg.DATASETS.TRAIN[0]!r}"
                    f": {_few(tested)} and {_few(trained)}. It is judged by class numbers, which must agree."
                )


def class_order(cfg: Any) -> list[str]:
    """Names of the classes trained on, by the model's indices; none where they are not known yet, are given to the
    model otherwise (Segment Anything, SEEM), or are not as many as the model has: the training set is another's then.
    """
    if not cfg.DATASETS.TRAIN or published_name(cfg) in ("SEEM", *PROMPTED):
        return []
    name, count = cfg.DATASETS.TRAIN[0], _class_count(cfg)
    known, of_json = _metadata(name), _category_names(name) or {}
    lists = [list(known.get(key, ())) for key in ("thing_classes", "stuff_classes")] + [list(of_json.values())]
    return next((names for names in lists if names and count in (None, len(names))), [])


def check_order(before: Any, cfg: Any) -> list[str]:
    """Refuse classes that have changed places since ``before``, as in another export of the annotations; name others.

    Args:
        before: what :func:`class_order` gave when a checkpoint was written; none in those that do not say.

    Returns:
        the model's classes from now on: the config's where they are known, else those of before.

    Raises:
        CheckpointError: they are the same in another order.
    """
    now = class_order(cfg)
    if not before or not now or before == now:
        return now or list(before or ())
    if sorted(before) == sorted(now):
        raise CheckpointError(
            f"it was trained on the classes {before}, and {cfg.DATASETS.TRAIN[0]!r} has them in another order, {now}: "
            "what was learnt would be taken for other classes. Give the categories the ids that they had."
        )
    logger.warning("The classes were %s in the checkpoint and are %s now: is that a renaming?", before, now)
    return now


def _trained_classes(cfg: Any, tested: Mapping[int, str]) -> list[str]:
    """What the indices of a model's predictions stand for; nothing where that is not known."""
    architecture = published_name(cfg)
    if architecture == "SEEM":
        return list(cfg.MODEL.SEEM.CLASS_NAMES)
    first = next(iter([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]), None)
    if first is None or architecture in PROMPTED or "panoptic" in _metadata(first).get("evaluator_type", ""):
        return []
    found = list((_category_names(first) or {}).values()) or list(_metadata(first).get("thing_classes", ()))
    count = _class_count(cfg)
    other_model = count not in (None, len(found)) and count == len(tested)  # the config's training set is not its own
    if other_model or not cfg.DATASETS.TRAIN:
        return adapter_file.classes_of(cfg.MODEL.PEFT.WEIGHTS) or ([] if other_model else found)
    return found


def _class_count(cfg: Any) -> int | None:
    """How many classes the config says that its model has; None where no key is known to say it."""
    key = CLASS_COUNT_KEYS.get(published_name(cfg))
    return None if key is None else reduce(getitem, key.split("."), cfg)


def _unknown(name: str, names: Mapping[int, str], trained: Sequence[str]) -> list[str]:
    """Classes that the model does not know; those without objects do no harm if there are others."""
    unknown = {category: label for category, label in names.items() if label not in trained}
    path = _metadata(name).get("json_file", "")
    if unknown and _metadata(name).get("evaluator_type") == "coco" and os.path.isfile(path):
        objects = {category.id: category.objects for category in read_categories(path)}
        if any(objects.values()):
            unknown = {category: label for category, label in unknown.items() if objects.get(category)}
    return list(unknown.values())


def _category_names(name: str) -> dict[int, str] | None:
    """Name of each category id of a set that is judged by them, in the order of its own class indices."""
    meta = _metadata(name)
    indices, labels = meta.get("thing_dataset_id_to_contiguous_id"), meta.get("thing_classes")
    if meta.get("evaluator_type") not in _BY_CATEGORY:
        return None
    if indices and labels and max(indices.values()) < len(labels):
        return {category: labels[i] for category, i in sorted(indices.items(), key=lambda pair: pair[1])}
    if meta["evaluator_type"] == "coco" and os.path.isfile(meta.get("json_file", "")):
        return {category.id: category.name for category in read_categories(meta["json_file"])}
    return dict(enumerate(labels)) if labels and "json_file" not in meta else None


def _metadata(name: str) -> dict[str, Any]:
    """A set's metadata; a DatasetError where its classes are no lists."""
    from detectron2.data import MetadataCatalog

    found = dict(MetadataCatalog.get(name).as_dict())
    for key in ("thing_classes", "stuff_classes"):
        if not isinstance(found.get(key, ()), list | tuple):
            raise DatasetError(f"data set {name!r}: its {key} are {found[key]!r:.80}. Expected a list of names.")
    return found


def _few(names: Sequence[str]) -> str:
    return shortened([repr(name) for name in names], 5)
