"""EoMT: a plain ViT whose last blocks attend over queries and patches together, without pixel or transformer decoder.

Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025. Matching, losses and inference are
Mask2Former's, and so is the config node: ``DEC_LAYERS`` counts the predictions, one before each joint block and one at
the end. Tasks are told apart by ``TEST``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage
from torch import Tensor

from peft_d2.models.backbones.timm import timm_of_config
from peft_d2.models.checks import expect, expect_numbers
from peft_d2.models.eomt.names import with_own_names
from peft_d2.models.layers.criterion import Target
from peft_d2.models.layers.postprocess import output_size
from peft_d2.models.mask2former.model import MaskFormer
from peft_d2.models.registration import entry

KEYS = """
MODEL:
  EOMT:
    # When the attention masks of each joint block begin to be left out in training, and when none is left: shares of
    # SOLVER.MAX_ITER, one for each block. [] leaves them as they are. Queries that are frozen keep theirs.
    ANNEALING_START: []
    ANNEALING_END: []
    # Semantic inference by overlapping squares of so many pixels a side; 0 takes the image as a whole.
    WINDOW: 0
    # MODEL.WEIGHTS holds the encoder as a difference to MODEL.TIMM.WEIGHTS, as the authors publish it for DINOv3.
    DELTA: false
SOLVER:
  {LAYER_DECAY: 1.0, LAYER_DECAY_BLOCKS: "backbone.net.blocks.*", LAYER_DECAY_SPARED: 0, BACKBONE_WARMUP_ITERS: 0}
"""


@entry(META_ARCH_REGISTRY, "PD2EoMT", keys=KEYS)
class EoMT(MaskFormer):
    """EoMT: see :class:`~peft_d2.models.layers.mask_classifier.MaskClassifier`; ``MODEL.TIMM`` names the encoder."""

    pads_with_black = True

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        node, joint = cfg.MODEL.EOMT, cfg.MODEL.MASK_FORMER.DEC_LAYERS - 1
        expect_numbers("MODEL.EOMT", node, WINDOW=0)
        for key in ("ANNEALING_START", "ANNEALING_END"):
            fits = len(node[key]) in (0, joint) and len(node[key]) == len(node.ANNEALING_START)
            expect(fits, f"MODEL.EOMT.{key}", node[key], f"{joint} shares of the training, one for each joint block")
        whole = not node.WINDOW or not (self.instance_on or self.panoptic_on)
        expect(whole, "MODEL.EOMT.WINDOW", node.WINDOW, "0 for instances and panoptic results")
        source = cfg.MODEL.TIMM.WEIGHTS
        expect(source or not node.DELTA, "MODEL.TIMM.WEIGHTS", source, "what MODEL.EOMT.DELTA refers to")
        self.annealing = list(node.ANNEALING_START), list(node.ANNEALING_END), cfg.SOLVER.POLY_LR_POWER
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.window = node.WINDOW
        self._delta_to = cfg.clone() if node.DELTA else None

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """As :class:`~peft_d2.models.layers.mask_classifier.MaskClassifier`; by windows where the config says so."""
        if self.training:
            self.anneal()
        elif self.window and not self.is_empty(batched_inputs):
            return [{"sem_seg": self.by_windows(item)} for item in batched_inputs]
        return super().forward(batched_inputs)

    def anneal(self, progress: float | None = None) -> None:
        """Set the share of queries that are masked in each joint block, for the share ``progress`` of a training.

        By default Detectron2's storage of figures says it; without one, and with frozen queries, nothing changes.
        """
        queries = self.sem_seg_head.query_feat
        if not self.annealing[0] or not queries.weight.requires_grad:
            return
        if progress is None:
            try:
                progress = get_event_storage().iter / self.max_iter
            except AssertionError:  # another trainer
                return
        queries.anneal(progress, *self.annealing)

    def to_batch(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """The images, normalised and padded with black, as published."""
        batch = super().to_batch(batched_inputs)
        black = -self.pixel_mean / self.pixel_std
        for image, (height, width) in zip(batch.tensor, batch.image_sizes, strict=True):
            image[:, height:], image[:, :, width:] = black, black
        return batch

    def predict(self, features: dict[str, Any], targets: list[Target] | None = None) -> dict[str, Any]:
        """The last prediction and, as ``aux_outputs``, those before the joint blocks that need or train them."""
        head, encoder = self.sem_seg_head, self.backbone
        tokens, grid, rope = (features[key] for key in ("tokens", "grid", "rope"))
        queries = head.query_feat.weight.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        tokens = torch.cat([queries, tokens], dim=1)
        probabilities = head.query_feat.attn_mask_probs
        # A block that masks nothing needs no prediction before it; a compiled graph cannot depend on that.
        always = self.training or torch.compiler.is_compiling()
        masked = [True] * len(probabilities) if always else (probabilities >= 0.5).tolist()
        predictions = []
        for block, is_masked, probability in zip(encoder.joint_blocks, masked, probabilities.unbind(), strict=True):
            mask = None
            if is_masked:
                predictions.append(head(encoder.normed(tokens), grid))
                mask = head.attention_mask(predictions[-1]["pred_masks"], grid, tokens.shape[1], probability)
            tokens = encoder.run(block, tokens, rope, mask)
        return {**head(encoder.normed(tokens), grid), "aux_outputs": predictions}

    def by_windows(self, item: dict[str, Any]) -> Tensor:
        """The semantic map (K, height, width) of an image: the mean of those of overlapping windows."""
        image, side = item["image"], self.window
        height, width = image.shape[-2:]
        places = [(y, x) for y in window_starts(height, side) for x in window_starts(width, side)]
        crops = [{**item, "image": image[:, y : y + side, x : x + side]} for y, x in places]
        for crop in crops:
            crop["height"], crop["width"] = crop["image"].shape[-2:]
        maps: Any = super().forward(crops)
        total = maps[0]["sem_seg"].new_zeros(self.sem_seg_head.num_classes + 1, height, width)  # and how often
        for (y, x), result in zip(places, maps, strict=True):
            part = total[:, y : y + side, x : x + side]
            part += F.pad(result["sem_seg"], (0, 0, 0, 0, 0, 1), value=1.0)
        wanted = output_size(item, (height, width))
        return F.interpolate((total[:-1] / total[-1])[None], size=wanted, mode="bilinear", align_corners=False)[0]

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A published checkpoint under this model's names; with ``DELTA``, the sum with what it refers to.

        Positions for images of another size are interpolated.
        """
        state, published = with_own_names(state, self.state_dict().keys()), state
        self.backbone.fit_positions(state)
        if self._delta_to is not None and state.keys() != published.keys():
            base = {
                f"backbone.net.{name}": value for name, value in timm_of_config(self._delta_to).state_dict().items()
            }
            state = {name: value + base[name] if name in base else value for name, value in state.items()}
        return state


def window_starts(length: int, side: int) -> list[int]:
    """Where windows of ``side`` begin that cover ``length``, evenly, as few as do."""
    count = -(-length // side)
    return [i * (length - side) // (count - 1) for i in range(count)] if count > 1 else [0]
