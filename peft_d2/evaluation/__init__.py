"""Evaluation with Detectron2's evaluators and result dicts, fast and without holding all masks at once.

Names are looked up on first use, as they need Detectron2.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "build_evaluator": "build",
    "check_evaluators": "build",
    "FastCOCOEvaluator": "coco",
    "FastLVISEvaluator": "lvis",
    "PanopticQualityEvaluator": "panoptic",
    "MaskMetrics": "mask_metrics",
    "PromptedMaskEvaluator": "prompted",
    "augmented_model": "augmented",
    "check_augmentation": "augmented",
    "AugmentedModel": "augmented",
    "inference_model": "tiling",
    "TiledModel": "tiling",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
