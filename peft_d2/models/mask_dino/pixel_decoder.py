"""The pixel decoder of Mask DINO, with the options of its config."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from peft_d2.models.checks import expect
from peft_d2.models.mask2former.pixel_decoder import MSDeformAttnPixelDecoder

_FINEST_FIRST = {"low2high": True, "high2low": False}  # the published words tell strides, not resolutions


class MaskDINOEncoder(MSDeformAttnPixelDecoder):
    """Mask2Former's pixel decoder with coarser maps besides, of which the transformer decoder gets all.

    Source: Li et al., Mask DINO, CVPR 2023, section 3.
    """

    config_node = "MaskDINO"

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from ``MODEL.SEM_SEG_HEAD`` and ``MODEL.MaskDINO``.

        Raises:
            ModelConfigError: as Mask2Former's; for an unknown order of the maps, or fewer maps than the encoder takes
                from the backbone.
        """
        head = cfg.MODEL.SEM_SEG_HEAD
        order, path = head.FEATURE_ORDER, "MODEL.SEM_SEG_HEAD"
        expect(order in _FINEST_FIRST, f"{path}.FEATURE_ORDER", order, f"one of {list(_FINEST_FIRST)}")
        encoded, total = head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES, head.TOTAL_NUM_FEATURE_LEVELS
        expect(
            total >= len(encoded),
            f"{path}.TOTAL_NUM_FEATURE_LEVELS",
            total,
            f"{len(encoded)} or more, as many as DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES {list(encoded)} and the "
            "coarser maps besides",
        )
        return {
            **super().from_config(cfg, input_shape),
            "decoder_levels": total,
            "extra_levels": total - len(encoded),
            "finest_first": _FINEST_FIRST[order],
            "least_pyramid_levels": 1,
        }
