"""What can be told of a config before anything is built: that its numbers, names and folders make sense."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from peft_d2 import evaluation
from peft_d2.engine.classes import check_class_count
from peft_d2.engine.config import leaves
from peft_d2.engine.errors import ConfigError

_RESNET_BUILDERS = {"build_resnet_backbone", "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"}
_RESNETS = [18, 34, 50, 101, 152]
_RESNET_MAPS = ["stem", "res2", "res3", "res4", "res5"]


def check_run(cfg: Any, evaluate: bool) -> None:
    """Refuse a run that could only fail later.

    Args:
        cfg: with its own data sets registered.
        evaluate: nothing is trained.

    Raises:
        ConfigError: no, unknown or defective data sets, or such that nothing can evaluate; impossible numbers; a folder
            that cannot be written.
    """
    _check_names(cfg, "TEST" if evaluate else "TRAIN")
    if not evaluate:
        check_batch(cfg)
        check_class_count(cfg)
        for key in ("MAX_ITER", "CHECKPOINT_PERIOD"):
            if cfg.SOLVER[key] < 1:
                raise ConfigError(f"SOLVER.{key} is {cfg.SOLVER[key]}; expected 1 or more.")
        if cfg.SOLVER.BASE_LR < 0:
            raise ConfigError(f"SOLVER.BASE_LR is {cfg.SOLVER.BASE_LR}; expected 0 or more.")
    try:
        evaluation.check_augmentation(cfg)
        evaluation.check_evaluators(cfg)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_annotations(cfg)
    _check_writable(cfg.OUTPUT_DIR)


def check_batch(cfg: Any) -> None:
    """Refuse a batch that cannot be dealt out to processes and pieces.

    Raises:
        ConfigError: with the numbers.
    """
    from detectron2.utils import comm

    batch, pieces, world = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE, comm.get_world_size()
    if pieces < 1:
        raise ConfigError(f"SOLVER.ACCUMULATE is {pieces}; expected 1 or more.")
    if batch < 1 or batch % (world * pieces):
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be dealt out evenly to {world} process(es) with SOLVER.ACCUMULATE "
            f"{pieces}: choose a multiple of {world * max(pieces, 1)}."
        )


def build_model(cfg: Any) -> nn.Module:
    """Detectron2's ``build_model``.

    Raises:
        ConfigError: the config names something that is not registered.
        ModelConfigError: values that one of our models, or a ResNet, cannot be built with.
    """
    from detectron2 import modeling

    from peft_d2.models.layers.decoder_registry import TRANSFORMER_DECODER_REGISTRY

    _check_resnet(cfg)
    try:
        return modeling.build_model(cfg)
    except KeyError as error:
        found = re.search(r"No object named '(.*)' found in '(.*)' registry", str(error))
        if not found:
            raise
        name, kind = found.groups()
        ours = {"TRANSFORMER_DECODER": TRANSFORMER_DECODER_REGISTRY}
        registry: Any = ours.get(kind) or getattr(modeling, f"{kind}_REGISTRY", ())
        keys = [key for key, value in leaves(cfg) if value == name]
        raise ConfigError(
            f"{' and '.join(keys) or 'the config'}: {name!r} is not registered as {kind}"
            f"{_near(name, [known for known, _ in registry]) or '; import the package that defines it'}."
        ) from None


def _check_resnet(cfg: Any) -> None:
    """Detectron2 answers a ResNet that it cannot build with a bare KeyError or assertion."""
    from peft_d2.models.checks import expect, expect_norm, expect_some_of

    node, path = cfg.MODEL.RESNETS, "MODEL.RESNETS"
    if not {cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.get("BOTTOM_UP", "")} & _RESNET_BUILDERS:
        return
    expect(node.DEPTH in _RESNETS, f"{path}.DEPTH", node.DEPTH, f"one of {_RESNETS}")
    narrow = node.DEPTH >= 50 or node.RES2_OUT_CHANNELS == 64
    expect(narrow, f"{path}.RES2_OUT_CHANNELS", node.RES2_OUT_CHANNELS, f"64 for DEPTH {node.DEPTH}")
    expect_norm(f"{path}.NORM", node.NORM)
    expect_some_of(f"{path}.OUT_FEATURES", node.OUT_FEATURES, _RESNET_MAPS, "a ResNet's maps")


def _check_names(cfg: Any, needed: str) -> None:
    from detectron2.data import DatasetCatalog

    if not cfg.DATASETS[needed]:
        split = {"TRAIN": "train", "TEST": "val"}[needed]
        raise ConfigError(
            f"DATASETS.{needed} is empty: there is nothing to {'train' if split == 'train' else 'evaluate'} on. Give "
            f"--{split}-json and --{split}-images, or name registered data sets."
        )
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise ConfigError(
                    f"DATASETS.{key}: data set {name!r} is not registered{_near(name, DatasetCatalog)}. Add your own "
                    "to DATASETS.REGISTER as {NAME, JSON, IMAGES}."
                )


def _check_annotations(cfg: Any) -> None:
    from peft_d2.data.prompts import check_prompts
    from peft_d2.data.validation import DatasetError, check_datasets

    try:
        check_datasets(cfg)
        check_prompts(cfg)
    except DatasetError as error:
        raise ConfigError(str(error)) from error


def _check_writable(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {folder!r} cannot be made: {error.strerror}. Choose another folder.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"OUTPUT_DIR {folder!r} cannot be written to. Choose another folder.")


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.4)
    return f"; the nearest names are {near}" if near else ""
