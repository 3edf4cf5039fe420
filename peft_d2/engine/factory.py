"""Building a config's model, and the registry entry ``PEFTModel``, which injects into any registered model."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from torch import nn

from peft_d2.compat import require_detectron2
from peft_d2.data.config import PEFT_ARCHITECTURE
from peft_d2.engine.config import AUTO, leaves, with_values
from peft_d2.engine.errors import ConfigError
from peft_d2.peft.errors import alike

logger = logging.getLogger(__name__)
_RESNET_BUILDERS = {"build_resnet_backbone", "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"}
_RESNETS = [18, 34, 50, 101, 152]
_RESNET_MAPS = ["stem", "res2", "res3", "res4", "res5"]


def register(upstream_names: bool = False) -> None:
    """Register the models and ``PEFTModel`` in Detectron2's registries; safe to call twice.

    Args:
        upstream_names: also take the names of the official implementations where they are still free, so that
            published config files run as they are.
    """
    require_detectron2()
    from detectron2.modeling import META_ARCH_REGISTRY

    from peft_d2 import models
    from peft_d2.engine.checkpointer import teach_safetensors

    models.register(upstream_names=upstream_names)
    teach_safetensors()
    if PEFT_ARCHITECTURE not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(PEFTModel)


def PEFTModel(cfg: Any) -> nn.Module:  # noqa: N802  the registry knows it by this name
    """Build ``MODEL.PEFT.META_ARCHITECTURE``, load ``MODEL.WEIGHTS``, inject ``MODEL.PEFT.METHODS`` and ``TRAIN``, load
    the adapter ``MODEL.PEFT.WEIGHTS``, and return that very model.

    Without ``METHODS`` and ``TRAIN`` the adapter says itself where it goes. A checkpointer that loads the same base
    again afterwards, as Detectron2's programs do, changes nothing.

    Raises:
        ConfigError: no or an unknown base architecture, or nothing to inject.
        CheckpointError: the base's weights do not exist or do not fit, or the adapter was trained on the classes in
            another order.
    """
    from detectron2.modeling import META_ARCH_REGISTRY

    from peft_d2 import adapters, peft
    from peft_d2.data.classes import check_order

    node = cfg.MODEL.PEFT
    _check(node, META_ARCH_REGISTRY)
    base_cfg = with_values(cfg, {"MODEL.META_ARCHITECTURE": node.META_ARCHITECTURE})
    model = META_ARCH_REGISTRY.get(node.META_ARCHITECTURE)(base_cfg)
    report, layers = adapters.load_base_of_any(model, cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else (None, {})
    if node.METHODS or node.TRAIN:
        peft.inject(model, node.METHODS, train=node.TRAIN)
    if layers and not node.WEIGHTS:
        adapters.load_layers(model, cfg.MODEL.WEIGHTS, layers)
    if node.WEIGHTS:
        adapters.load_adapter(model, node.WEIGHTS, allow_other_base=node.ALLOW_OTHER_BASE)
    injection = peft.get_injection(model)
    assert injection is not None
    injection.current.classes = check_order(injection.current.classes, cfg)
    injection.base_file = cfg.MODEL.WEIGHTS
    if report is not None:
        adapters.require_trained(model, report)
    elif not (node.WEIGHTS or cfg.MODEL.get("TIMM", {}).get("WEIGHTS")) and not any(
        value.is_meta for value in model.parameters()
    ):
        logger.warning(
            "MODEL.WEIGHTS is empty: the base is random%s. An adapter that is trained on it fits no other base, and is "
            "worth nothing without it.",
            f" (SEED {cfg.SEED})" if cfg.SEED >= 0 else " and no SEED fixes it",
        )
    return model


def build_model(cfg: Any) -> nn.Module:
    """Build the config's model by Detectron2's ``build_model``, with errors that name the key.

    Where ``MODEL.WEIGHTS`` is empty and the config has a ``SEED``, the random weights are those of the training.

    Raises:
        ConfigError: the config names something that is not registered.
        ModelConfigError: values that one of our models, or a ResNet, cannot be built with.
    """
    from detectron2 import modeling

    from peft_d2.engine.hooks import seed_everything

    _check_resnet(cfg)
    if cfg.SEED >= 0 and not cfg.MODEL.WEIGHTS:
        seed_everything(cfg.SEED, 0, 0)
    try:
        return modeling.build_model(cfg)
    except AssertionError as error:
        if "log2 contiguous" not in str(error):
            raise
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES is {cfg.MODEL.FPN.IN_FEATURES} ([]: all maps of the backbone); expected the finest "
            f"first, and each of twice the stride of the one before ({error})."
        ) from error
    except KeyError as error:
        absent = str(error).strip("'")
        if readers := [key for key, value in leaves(cfg) if key.endswith("IN_FEATURES") and absent in value]:
            raise ConfigError(
                f"the backbone gives no map {absent!r}, which is in {', '.join(readers)}. A backbone's maps are its "
                "OUT_FEATURES; those of a pyramid are p2 where MODEL.FPN.IN_FEATURES has res2, and so on."
            ) from error
        found = re.search(r"No object named '(.*)' found in '(.*)' registry", str(error))
        if not found:
            raise
        name, kind = found.groups()
        registry: Any = getattr(modeling, f"{kind}_REGISTRY", ())
        keys = [key for key, value in leaves(cfg) if value == name]
        near = alike(name, (known for known, _ in registry))
        remedy = f"the nearest names are {near}" if near else "import the package that defines it"
        where = " and ".join(keys) or "the config"
        raise ConfigError(f"{where}: {name!r} is not registered as {kind}; {remedy}.") from None


def build_without_weights(cfg: Any) -> nn.Module:
    """Build the config's model on torch's meta device, which takes a moment: its tensors have shapes and no values.

    A model that cannot be built there is built on the CPU.
    """
    cfg = with_values(cfg, {"MODEL.WEIGHTS": "", "MODEL.PEFT.WEIGHTS": "", "MODEL.DEVICE": "cpu"})
    try:
        with torch.device("meta"):
            return build_model(with_values(cfg, {"MODEL.DEVICE": "meta"}))
    except (NotImplementedError, RuntimeError) as error:
        logger.info("The model cannot be built on the meta device (%s): building it on the CPU.", error)
    return build_model(cfg)


def _check_resnet(cfg: Any) -> None:
    """Refuse a ResNet that Detectron2 cannot build: it would say so by a bare KeyError or assertion.

    Raises:
        ModelConfigError: a depth, a norm or a map that there is not.
    """
    from peft_d2.models.checks import expect, expect_norm, expect_some_of

    node, path = cfg.MODEL.RESNETS, "MODEL.RESNETS"
    if not {cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.get("BOTTOM_UP", "")} & _RESNET_BUILDERS:
        return
    expect(node.DEPTH in _RESNETS, f"{path}.DEPTH", node.DEPTH, f"one of {_RESNETS}")
    narrow = node.DEPTH >= 50 or node.RES2_OUT_CHANNELS == 64
    expect(narrow, f"{path}.RES2_OUT_CHANNELS", node.RES2_OUT_CHANNELS, f"64 for DEPTH {node.DEPTH}")
    expect_norm(f"{path}.NORM", node.NORM)
    expect_some_of(f"{path}.OUT_FEATURES", node.OUT_FEATURES, _RESNET_MAPS, "a ResNet's maps")


def _check(node: Any, registry: Any) -> None:
    """Refuse a ``MODEL.PEFT`` that names no model to build, or nothing to inject."""
    name = node.META_ARCHITECTURE
    if not name or name == PEFT_ARCHITECTURE:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is PEFTModel and MODEL.PEFT.META_ARCHITECTURE is {name!r}. "
            "It must name the model to build, e.g. 'PD2MaskFormer' or 'GeneralizedRCNN'."
        )
    if name not in registry:
        near = alike(name, (known for known, _ in registry))
        raise ConfigError(
            f"MODEL.PEFT.META_ARCHITECTURE {name!r} is not registered; the nearest names are {near}. "
            "Call peft_d2.register(), or import the package that defines it, before building."
        )
    if not (node.METHODS or node.TRAIN or node.WEIGHTS):
        raise ConfigError(
            "MODEL.META_ARCHITECTURE is PEFTModel but MODEL.PEFT.METHODS, TRAIN and WEIGHTS are all empty. "
            "Name a method, modules to train in full, or an adapter folder."
        )
    if AUTO in node.METHODS:
        raise ConfigError(
            "MODEL.PEFT.METHODS auto is settled on training data: by tools/train_net.py, or by tools/recommend.py, "
            "whose file replaces it."
        )
