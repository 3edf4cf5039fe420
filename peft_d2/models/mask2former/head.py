"""The head of mask-classification models: pixel decoder and transformer decoder, each found by its registered name."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from peft_d2.models.checks import expect, expect_at_least
from peft_d2.models.layers.decoder_registry import TRANSFORMER_DECODER_REGISTRY
from peft_d2.models.mask2former.old_keys import upgrade_head

_FEATURES = "multi_scale_pixel_decoder"


class MaskFormerHead(nn.Module):
    """Pixel decoder, then transformer decoder.

    Args:
        num_classes: K, without no-object.
        pixel_decoder: its ``forward_features`` gives mask features, one encoded map and multi-scale maps.
        predictor: takes the multi-scale maps and the mask features.
        ignore_value: class id of pixels that count nowhere, in semantic maps.
    """

    # The published code tells old keys from new ones by this number in a state dict's metadata.
    _version = 2

    pixel_decoder: Any
    predictor: Any

    @configurable
    def __init__(
        self, *, num_classes: int, pixel_decoder: nn.Module, predictor: nn.Module, ignore_value: int = 255
    ) -> None:
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.num_classes = num_classes
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build both parts from their names in the config.

        Raises:
            ModelConfigError: for another source of the decoder's features than the multi-scale pixel decoder.
        """
        source = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
        expect(source == _FEATURES, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", source, f"{_FEATURES!r} for this head")
        return cls.parts(cfg, input_shape, cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME)

    @staticmethod
    def parts(cfg: CfgNode, input_shape: dict[str, ShapeSpec], decoder: str) -> dict[str, Any]:
        """The arguments, both parts built: the pixel decoder that the config names, and the decoder of that name.

        Raises:
            ModelConfigError: values that are out of range or do not go together.
        """
        head = cfg.MODEL.SEM_SEG_HEAD
        expect_at_least("MODEL.SEM_SEG_HEAD", head, NUM_CLASSES=1, MASK_DIM=1)
        return {
            "num_classes": head.NUM_CLASSES,
            "pixel_decoder": SEM_SEG_HEADS_REGISTRY.get(head.PIXEL_DECODER_NAME)(cfg, input_shape),
            "predictor": TRANSFORMER_DECODER_REGISTRY.get(decoder)(cfg, head.CONVS_DIM, mask_classification=True),
            "ignore_value": head.IGNORE_VALUE,
        }

    def forward(self, features: dict[str, Tensor], mask: Tensor | None = None) -> dict[str, Any]:
        """The backbone's maps by name -> the predictor's outputs."""
        mask_features, _, multi_scale_features = self.pixel_decoder.forward_features(features)
        return self.predictor(multi_scale_features, mask_features, mask)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        upgraded = upgrade_head(state_dict, prefix)
        state_dict.clear()
        state_dict.update(upgraded)
        super()._load_from_state_dict(state_dict, prefix, *args)
