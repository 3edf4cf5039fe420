"""The head of mask-classification models: pixel decoder and transformer decoder, each found by its registered name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from peft_d2.models.checks import expect, expect_at_least
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY, entry

T = TypeVar("T")
_FEATURES = "multi_scale_pixel_decoder"
_PARTS = ("pixel_decoder.", "predictor.")
_OLD_QUERIES, _QUERIES = "predictor.static_query.", "predictor.query_feat."


@entry(SEM_SEG_HEADS_REGISTRY, "PD2MaskFormerHead", upstream="MaskFormerHead")
class MaskFormerHead(nn.Module):
    """Pixel decoder, then transformer decoder, both named in the config.

    The pixel decoder's ``forward_features`` gives mask features, one encoded map and multi-scale maps; the predictor
    takes the multi-scale maps and the mask features. Pixels of ``ignore_value`` count nowhere, in semantic maps.

    Raises:
        ModelConfigError: values that are out of range, or another source of the decoder's features than the maps.
    """

    # The published code tells old keys from new ones by this number in a state dict's metadata.
    _version = 2
    config_node = "MASK_FORMER"

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        super().__init__()
        head, node = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL[self.config_node]
        source = node.get("TRANSFORMER_IN_FEATURE", _FEATURES)
        expect(source == _FEATURES, "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", source, f"{_FEATURES!r} for this head")
        expect_at_least("MODEL.SEM_SEG_HEAD", head, NUM_CLASSES=1, MASK_DIM=1)
        self.pixel_decoder: Any = SEM_SEG_HEADS_REGISTRY.get(head.PIXEL_DECODER_NAME)(cfg, input_shape)
        decoder = TRANSFORMER_DECODER_REGISTRY.get(node.TRANSFORMER_DECODER_NAME)
        self.predictor: Any = decoder(cfg, head.CONVS_DIM, mask_classification=True)
        self.num_classes = head.NUM_CLASSES
        self.ignore_value = head.IGNORE_VALUE

    def forward(self, features: dict[str, Tensor], mask: Tensor | None = None, **targets: Any) -> dict[str, Any]:
        """The backbone's maps by name -> the predictor's outputs; ``mask`` of padding is ignored."""
        mask_features, _, multi_scale_features = self.pixel_decoder.forward_features(features)
        return self.predictor(multi_scale_features, mask_features, mask, **targets)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        upgraded = upgrade_head(state_dict, prefix)
        state_dict.clear()
        state_dict.update(upgraded)
        super()._load_from_state_dict(state_dict, prefix, *args)


def upgrade_head(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """``state`` in its order, the head at ``prefix`` with today's names instead of those of earlier releases.

    Early files hold the pixel decoder's weights directly in the head, and call the query features ``static_query``.
    Each key is judged by itself, not by version metadata: files that lost theirs, or that mix both forms, load as well.
    Where a new name is taken, the old key stays, and is unexpected.
    """
    upgraded: dict[str, T] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            renamed = key
        elif not name.startswith(_PARTS):
            renamed = f"{prefix}pixel_decoder.{name}"
        elif name.startswith(_OLD_QUERIES):
            renamed = prefix + _QUERIES + name.removeprefix(_OLD_QUERIES)
        else:
            renamed = key
        upgraded[key if renamed != key and renamed in state else renamed] = value
    return upgraded
