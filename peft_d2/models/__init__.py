"""Models for Detectron2's registries. A new one is a file, and a line here: its module says what is registered."""

from __future__ import annotations

from importlib import import_module

from peft_d2.compat import require_detectron2

require_detectron2()

from peft_d2.models.registration import add_models_config, register  # noqa: E402

for _module in (
    "mask2former.model",
    "mask_dino.model",
    "seem.model",
    "sam.model",
    "sam2.model",
    "eomt.model",
    "backbones.swin",
    "backbones.focalnet",
    "backbones.davit",
    "backbones.sam_vit",
    "backbones.fpn",
    "backbones.timm",
):
    import_module(f"{__name__}.{_module}")

__all__ = ["add_models_config", "register"]
