"""The models' entries in Detectron2's registries: own names, and upstream's names on loan."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from fvcore.common.registry import Registry

from peft_d2.models.backbones.davit import DaViT
from peft_d2.models.backbones.focalnet import DepthwiseFocalNet, FocalNet
from peft_d2.models.backbones.fpn import build_fpn
from peft_d2.models.backbones.sam_vit import SAMViT
from peft_d2.models.backbones.seem_vit import SEEMViT
from peft_d2.models.backbones.swin import SwinTransformer
from peft_d2.models.layers.decoder_registry import TRANSFORMER_DECODER_REGISTRY
from peft_d2.models.mask2former.head import MaskFormerHead
from peft_d2.models.mask2former.model import MaskFormer
from peft_d2.models.mask2former.pixel_decoder import MSDeformAttnPixelDecoder
from peft_d2.models.mask2former.transformer_decoder import MultiScaleMaskedTransformerDecoder
from peft_d2.models.mask2former.transformer_fpn import TransformerEncoderPixelDecoder
from peft_d2.models.mask_dino.model import MaskDINO, MaskDINOHead
from peft_d2.models.mask_dino.pixel_decoder import MaskDINOEncoder
from peft_d2.models.mask_dino.transformer_decoder import MaskDINODecoder
from peft_d2.models.sam.model import SegmentAnything
from peft_d2.models.seem.model import SEEM
from peft_d2.models.seem.transformer_decoder import SEEMDecoder

_logger = logging.getLogger(__name__)

# registry, class or function, own name, upstream's name ("" where Detectron2's users know none)
_ENTRIES: tuple[tuple[Registry, Callable[..., Any], str, str], ...] = (
    (META_ARCH_REGISTRY, MaskFormer, "PD2MaskFormer", "MaskFormer"),
    (SEM_SEG_HEADS_REGISTRY, MaskFormerHead, "PD2MaskFormerHead", "MaskFormerHead"),
    (SEM_SEG_HEADS_REGISTRY, MSDeformAttnPixelDecoder, "PD2MSDeformAttnPixelDecoder", "MSDeformAttnPixelDecoder"),
    (
        TRANSFORMER_DECODER_REGISTRY,
        MultiScaleMaskedTransformerDecoder,
        "PD2MultiScaleMaskedTransformerDecoder",
        "MultiScaleMaskedTransformerDecoder",
    ),
    (META_ARCH_REGISTRY, MaskDINO, "PD2MaskDINO", "MaskDINO"),
    (SEM_SEG_HEADS_REGISTRY, MaskDINOHead, "PD2MaskDINOHead", "MaskDINOHead"),
    (SEM_SEG_HEADS_REGISTRY, MaskDINOEncoder, "PD2MaskDINOEncoder", "MaskDINOEncoder"),
    (TRANSFORMER_DECODER_REGISTRY, MaskDINODecoder, "PD2MaskDINODecoder", "MaskDINODecoder"),
    (BACKBONE_REGISTRY, SwinTransformer, "PD2SwinTransformer", "D2SwinTransformer"),
    (META_ARCH_REGISTRY, SegmentAnything, "PD2SegmentAnything", ""),
    (BACKBONE_REGISTRY, SAMViT, "PD2SAMViT", ""),
    (
        SEM_SEG_HEADS_REGISTRY,
        TransformerEncoderPixelDecoder,
        "PD2TransformerEncoderPixelDecoder",
        "TransformerEncoderPixelDecoder",
    ),
    (META_ARCH_REGISTRY, SEEM, "PD2SEEM", "GeneralizedSEEM"),
    (TRANSFORMER_DECODER_REGISTRY, SEEMDecoder, "PD2SEEMDecoder", "SEEMDecoder"),
    (BACKBONE_REGISTRY, SEEMViT, "PD2SEEMViT", "D2ViT"),
    (BACKBONE_REGISTRY, FocalNet, "PD2FocalNet", "focal"),
    (BACKBONE_REGISTRY, DepthwiseFocalNet, "PD2DepthwiseFocalNet", "focal_dw"),
    (BACKBONE_REGISTRY, DaViT, "PD2DaViT", "davit"),
    (BACKBONE_REGISTRY, build_fpn, "PD2FPN", ""),
)


class _LendingRegistry(Registry):
    """A registry in which some names are only lent: whoever registers one of them afterwards gets it."""

    _lent: dict[str, Any]

    def _do_register(self, name: str, obj: Any) -> None:
        if name in self._lent and self._obj_map.get(name) is self._lent.pop(name):
            del self._obj_map[name]
            _logger.info("%s now serves %r in registry %s", getattr(obj, "__module__", obj), name, self._name)
        super()._do_register(name, obj)


def _lend(registry: Registry, name: str, obj: Any) -> None:
    """Register ``obj`` under ``name`` where that is free, until someone else wants the name."""
    if name in registry:
        return
    if not isinstance(registry, _LendingRegistry):
        # In place, as other modules hold this very object.
        registry.__class__ = _LendingRegistry
        vars(registry)["_lent"] = {}
    registry._do_register(name, obj)
    vars(registry)["_lent"][name] = obj


def register(upstream_names: bool = False) -> None:
    """Make the models known to Detectron2; calling it again changes nothing.

    Args:
        upstream_names: also serve the official packages' names where they are free, so that published yaml files
            run as they are. An official package that is imported later takes its names back.
    """
    for registry, cls, name, upstream in _ENTRIES:
        if name not in registry:
            registry._do_register(name, cls)
        if upstream_names and upstream:
            _lend(registry, upstream, cls)
