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


def _lend(registry: Registry, names: dict[str, Callable[..., Any]]) -> None:
    """Serve ``names`` where they are free, until somebody else registers them: an official package imported later.

    Detectron2 leaves one way to know of that: the registry object's own ``_do_register``. Its class stays as it is.
    """
    lent = {name: obj for name, obj in names.items() if name not in registry}
    if not lent:
        return
    registry._obj_map.update(lent)
    register_plainly = registry._do_register

    def give_back_first(name: str, obj: Any) -> None:
        if name in lent and registry._obj_map.get(name) is lent.pop(name):
            del registry._obj_map[name]
            _logger.info("%s now serves %r in registry %s", getattr(obj, "__module__", obj), name, registry._name)
        register_plainly(name, obj)

    registry._do_register = give_back_first


def register(upstream_names: bool = False) -> None:
    """Make the models known to Detectron2; calling it again changes nothing.

    Args:
        upstream_names: also serve the official packages' names where they are free, so that published yaml files
            run as they are. An official package that is imported later takes its names back.
    """
    for registry, cls, name, _ in _ENTRIES:
        if name not in registry:
            registry._do_register(name, cls)
    if upstream_names:
        for registry in {id(entry[0]): entry[0] for entry in _ENTRIES}.values():
            _lend(registry, {entry[3]: entry[1] for entry in _ENTRIES if entry[0] is registry and entry[3]})
