"""The registry entry ``PEFTModel``: builds any registered model, injects into it, and returns that very object."""

from __future__ import annotations

import difflib
import logging
from typing import Any

from torch import nn

from peft_d2.compat import require_detectron2
from peft_d2.engine.config import PEFT_ARCHITECTURE
from peft_d2.engine.errors import ConfigError

logger = logging.getLogger(__name__)


def register(upstream_names: bool = False) -> None:
    """Register the models and ``PEFTModel`` in Detectron2's registries; safe to call twice.

    Args:
        upstream_names: also take the names of the official implementations where they are still free, so that
            published config files run as they are.
    """
    require_detectron2()
    from detectron2.modeling import META_ARCH_REGISTRY

    from peft_d2 import models

    models.register(upstream_names=upstream_names)
    if PEFT_ARCHITECTURE not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(PEFTModel)


def PEFTModel(cfg: Any) -> nn.Module:  # noqa: N802  the registry knows it by this name
    """Build ``MODEL.PEFT.META_ARCHITECTURE``, inject ``MODEL.PEFT.METHODS`` and ``TRAIN``, return that model.

    With ``MODEL.PEFT.WEIGHTS`` the adapter is loaded too; without ``METHODS`` and ``TRAIN`` the adapter says itself
    where it goes. The base's weights usually follow later, through any checkpointer: they leave the adapter alone.

    Raises:
        ConfigError: no or an unknown base architecture, nothing to inject, or a place whose name no file can hold.
    """
    from detectron2.modeling import META_ARCH_REGISTRY

    from peft_d2 import adapters, peft

    node = cfg.MODEL.PEFT
    base_cfg = cfg.clone()
    base_cfg.defrost()
    base_cfg.MODEL.META_ARCHITECTURE = _base_architecture(node.META_ARCHITECTURE, META_ARCH_REGISTRY)
    base_cfg.freeze()
    model = META_ARCH_REGISTRY.get(node.META_ARCHITECTURE)(base_cfg)
    if node.METHODS or node.TRAIN:
        peft.inject(model, [dict(method) for method in node.METHODS], train=tuple(node.TRAIN))
        _require_storable(model)
    elif not node.WEIGHTS:
        raise ConfigError(
            "MODEL.META_ARCHITECTURE is PEFTModel but MODEL.PEFT.METHODS, TRAIN and WEIGHTS are all empty. "
            "Name a method, modules to train in full, or an adapter folder."
        )
    if node.WEIGHTS:
        adapters.load_adapter(model, node.WEIGHTS, allow_other_base=node.ALLOW_OTHER_BASE, base_follows=True)
    return model


def _require_storable(model: nn.Module) -> None:
    """Refuse before the training what could not be saved after it."""
    from peft_d2 import peft
    from peft_d2.storage import adapter_file

    try:
        adapter_file.require_storable(peft.adapter_state_dict(model))
    except ValueError as error:
        raise ConfigError(f"MODEL.PEFT: {error}.") from error


def _base_architecture(name: str, registry: Any) -> str:
    if not name or name == PEFT_ARCHITECTURE:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is PEFTModel and MODEL.PEFT.META_ARCHITECTURE is {name!r}. "
            "It must name the model to build, e.g. 'PD2MaskFormer' or 'GeneralizedRCNN'."
        )
    if name not in registry:
        known = sorted(key for key, _ in registry)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
        raise ConfigError(
            f"MODEL.PEFT.META_ARCHITECTURE {name!r} is not registered; the nearest names are {near}. "
            "Call peft_d2.register(), or import the package that defines it, before building."
        )
    return name
