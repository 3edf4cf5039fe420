"""Detectron2's feature pyramid on any backbone, for its RetinaNet and R-CNN heads."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7

from peft_d2.models.checks import expect, expect_some_of
from peft_d2.models.registration import entry

_TOP_BLOCKS = ("pool", "p6p7", "")
KEYS = """
MODEL:
  FPN:
    # PD2FPN: the backbone under Detectron2's pyramid, and what makes the coarsest maps ("pool", "p6p7" or "").
    BOTTOM_UP: ""
    TOP_BLOCK: pool
"""


@entry(BACKBONE_REGISTRY, "PD2FPN", keys=KEYS)
def build_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The pyramid that ``MODEL.FPN`` describes, on its ``BOTTOM_UP``; maps are named ``p2`` and so on by their stride.

    ``MODEL.FPN.TOP_BLOCK`` makes the coarser maps: ``pool`` gives ``p6`` (R-CNN), ``p6p7`` two of them (RetinaNet).
    """
    node = cfg.MODEL.FPN
    registered = node.BOTTOM_UP in BACKBONE_REGISTRY
    expect(registered, "MODEL.FPN.BOTTOM_UP", node.BOTTOM_UP, "the name of a registered backbone")
    expect(node.TOP_BLOCK in _TOP_BLOCKS, "MODEL.FPN.TOP_BLOCK", node.TOP_BLOCK, f"one of {list(_TOP_BLOCKS)}")
    bottom_up = BACKBONE_REGISTRY.get(node.BOTTOM_UP)(cfg, input_shape)
    shapes = bottom_up.output_shape()
    in_features = list(node.IN_FEATURES) or sorted(shapes, key=lambda name: shapes[name].stride or 0)
    expect_some_of("MODEL.FPN.IN_FEATURES", in_features, shapes, f"the maps of {node.BOTTOM_UP}")
    top = LastLevelMaxPool() if node.TOP_BLOCK == "pool" else None
    if node.TOP_BLOCK == "p6p7":
        top = LastLevelP6P7(shapes[in_features[-1]].channels, node.OUT_CHANNELS, in_feature=in_features[-1])
    return FPN(bottom_up, in_features, node.OUT_CHANNELS, norm=node.NORM, top_block=top, fuse_type=node.FUSE_TYPE)
