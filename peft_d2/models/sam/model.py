"""Segment Anything with prompts (Kirillov et al., ICCV 2023) as a Detectron2 meta-architecture.

Trained as SAM-COBOT does (Peng et al., CVPR 2024, section 4.1): boxes in, binary cross-entropy and Dice of the masks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_d2.data.images import output_size
from peft_d2.models.checks import expect, expect_multiple, expect_numbers
from peft_d2.models.layers.boxes import mask_boxes
from peft_d2.models.layers.criterion import Target, average_count, dice_loss, mask_loss, objects_of_all
from peft_d2.models.layers.mask_classifier import PixelModel, object_masks
from peft_d2.models.layers.postprocess import Canvas
from peft_d2.models.registration import entry
from peft_d2.models.sam.image_encoder import BackboneEncoder, ImageEncoder
from peft_d2.models.sam.mask_decoder import SAMMaskDecoder
from peft_d2.models.sam.prompt_encoder import PromptEncoder, PromptError, Prompts, read_prompts

THRESHOLD = 0.0  # of the mask logits
# The defaults are the published ViT-B.
KEYS = """
MODEL:
  SAM:
    # Channels and positions of the image encoder, the prompt encoder and the mask decoder:
    {IMAGE_SIZE: 1024, PATCH_SIZE: 16, EMBED_DIM: 768, DEPTH: 12, NUM_HEADS: 12, MLP_RATIO: 4.0, WINDOW_SIZE: 14,
     GLOBAL_BLOCKS: [2, 5, 8, 11], OUT_CHANNELS: 256, USE_CHECKPOINT: false, MASK_IN_CHANNELS: 16, DECODER_DEPTH: 2,
     DECODER_HEADS: 8, DECODER_MLP_DIM: 2048, IOU_HEAD_DEPTH: 3, IOU_HEAD_HIDDEN: 256,
     # Inference: three masks per prompt, of which the one with the best expected IoU is taken; prompts in one call.
     MULTIMASK: false, PROMPTS_PER_CALL: 64,
     # What encodes images: "" is Segment Anything's ViT, "backbone" is MODEL.BACKBONE, its maps from stride PATCH_SIZE
     # on joined.
     ENCODER: "",
     # The older name of MODEL.FEATURE_CACHE.
     FEATURE_CACHE: "",
     MASK_WEIGHT: 1.0, DICE_WEIGHT: 1.0, IOU_WEIGHT: 0.0}
"""


@entry(META_ARCH_REGISTRY, "PD2SegmentAnything", keys=KEYS)
class SegmentAnything(PixelModel):
    """Image encoder, prompt encoder and mask decoder; an image is encoded once for all of its prompts.

    ``weights`` are those of the losses by name, without losses whose weight is 0.
    """

    # The single mask's loss reaches neither the tokens of the other masks nor, without its loss, the expected IoU.
    has_unused_parameters = True
    image_encoders: dict[str, type[nn.Module]] = {"": ImageEncoder, "backbone": BackboneEncoder}  # by ENCODER
    pads_boxes = False  # see :class:`PromptEncoder`
    mask_decoder_class = SAMMaskDecoder

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        node, path = cfg.MODEL.SAM, "MODEL.SAM"
        expect_numbers(path, node, DECODER_HEADS=1, DECODER_DEPTH=1, DECODER_MLP_DIM=1, PROMPTS_PER_CALL=1)
        # Each head has its share of half the channels; masks have an eighth of them.
        shares = math.lcm(2 * node.DECODER_HEADS, 8)
        expect_multiple(
            f"{path}.OUT_CHANNELS", node.OUT_CHANNELS, shares, f"{{}}, with DECODER_HEADS {node.DECODER_HEADS}"
        )
        known = node.ENCODER in self.image_encoders
        expect(known, f"{path}.ENCODER", node.ENCODER, "'', or 'backbone' for PD2SegmentAnything")
        self.image_encoder: Any = self.image_encoders[node.ENCODER](cfg)
        grid = node.IMAGE_SIZE // node.PATCH_SIZE
        prompts = node.OUT_CHANNELS, grid, node.IMAGE_SIZE, node.MASK_IN_CHANNELS
        self.prompt_encoder = PromptEncoder(*prompts, self.pads_boxes)
        self.mask_decoder: Any = self.mask_decoder_class(cfg)
        self.image_size = node.IMAGE_SIZE
        self.multimask = node.MULTIMASK
        self.prompts_per_call = node.PROMPTS_PER_CALL
        weights = {"loss_mask": node.MASK_WEIGHT, "loss_dice": node.DICE_WEIGHT, "loss_iou": node.IOU_WEIGHT}
        self.weights = {name: weight for name, weight in weights.items() if weight}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """The weighted losses by name in training, otherwise a dict per image with ``instances``.

        Args:
            batched_inputs: dicts with ``image`` (3, H, W), not normalised, whose longer side is the model's size at
                most, and prompts in its pixels: any of ``boxes`` (N, 4), ``point_coords`` (N, P, 2) with
                ``point_labels`` (N, P), ``mask_inputs`` (N, 1, h, w). In training ``instances`` with ``gt_masks`` of
                as many objects, whose ``gt_boxes`` are the prompts where there are no others. In inference ``height``
                and ``width`` of the wanted output, and ``box_classes`` (N,) and ``box_scores`` (N,) that the results
                take over.

        Returns:
            There is an instance per prompt, in order, whose score is the expected IoU (times the ``box_scores``).
            Without any prompt there is one mask; with prompts of length 0 there is none.
        """
        if self.is_empty(batched_inputs):
            return []
        images = [self.preprocess(item["image"], item.get("file_name", "an image")) for item in batched_inputs]
        embeddings = self.encode(torch.stack(images))
        if self.training:
            return self.losses(embeddings, batched_inputs)
        return [
            {"instances": self.inference(embedding, item)}
            for embedding, item in zip(embeddings, batched_inputs, strict=True)
        ]

    def encode(self, images: Tensor) -> list[tuple[Tensor, ...]]:
        """For each of the images (N, C, S, S) the maps that :meth:`decode` takes."""
        return list(zip(*(maps.split(1) for maps in self.image_maps(images)), strict=True))

    def image_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The embeddings (N, C, G, G) of images (N, C, S, S), normalised, and their finer maps, if there are any."""
        return (self.image_encoder(images),)

    def preprocess(self, image: Tensor, name: str = "an image") -> Tensor:
        """Normalise (C, H, W), then pad with zeros at the bottom and on the right to (C, S, S)."""
        height, width = self.checked_size(image, name)
        return F.pad(self.normalised(image, name), (0, self.image_size - width, 0, self.image_size - height))

    def checked_size(self, image: Tensor, name: str) -> tuple[int, int]:
        """Height and width of an image, which must not be larger than the model's."""
        height, width = image.shape[-2:]
        if not 0 < min(height, width) <= max(height, width) <= self.image_size:
            raise PromptError(
                f"{name}: the image is {width} x {height} px, but the model takes 1 to {self.image_size} px a side. "
                f"Resize its longer side to {self.image_size} px, e.g. with INPUT.DATASET_MAPPER_NAME sam_prompts."
            )
        return height, width

    def decode(self, maps: tuple[Tensor, ...], prompts: Prompts, multimask: bool = False) -> tuple[Tensor, Tensor]:
        """Logits (N, K, 4 G, 4 G) on the image as it is encoded, and expected IoU (N, K), for one image's ``maps``."""
        embedding, *fine = maps
        tokens, dense = self.prompt_encoder(prompts.points, prompts.boxes, prompts.masks)
        positions = self.prompt_encoder.dense_positions()
        return self.mask_decoder(embedding, positions, tokens, dense, multimask, fine)[:2]

    def losses(self, embeddings: list[tuple[Tensor, ...]], batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The weighted losses, averaged over all objects of the batch."""
        totals = {name: torch.zeros((), device=self.device) for name in self.weights}
        targets = [_target(item, self.device) for item in batched_inputs]
        count = average_count(batched_inputs[0].get("batch_objects") or objects_of_all(targets))
        for embedding, item, target in zip(embeddings, batched_inputs, targets, strict=True):
            labels = target.masks
            size = (item["image"].shape[-2], item["image"].shape[-1])
            if not {"boxes", "point_coords", "mask_inputs"} & item.keys():
                item = {**item, "boxes": item["instances"].gt_boxes.tensor}
            prompts = self._prompts(item, size)
            if not len(labels):
                prompts = Prompts()  # decoded for the gradients' sake, which are zero
            elif len(prompts) != len(labels) or labels.shape[1:] != size:
                raise PromptError(
                    f"{item.get('file_name', 'an image')}: {len(prompts)} prompts on {size} px do not belong to masks "
                    f"{tuple(labels.shape)}; expected a prompt for each mask, and masks of the image's size"
                )
            parts = [slice(0, 0)] if not len(labels) else self._canvas(size).chunks(len(labels))
            for part in parts:
                whole = part.stop - part.start == len(labels)
                pieces = (embedding, prompts if whole else prompts[part], labels[part], size, count)
                # Many objects are decoded a part at a time, and again for the backward pass: nothing of them is kept.
                again = not whole and torch.is_grad_enabled()
                run = partial(checkpoint, self._part_losses, use_reentrant=False) if again else self._part_losses
                for name, value in run(*pieces).items():
                    totals[name] = totals[name] + self.weights[name] * value
        return totals

    def _part_losses(
        self, embedding: tuple[Tensor, ...], prompts: Prompts, labels: Tensor, size: tuple[int, int], count: float
    ) -> dict[str, Tensor]:
        """Sums over these objects of one image, divided by ``count``."""
        logits, quality = (output.float() for output in self.decode(embedding, prompts))
        if not len(labels):
            return dict.fromkeys(self.weights, 0.0 * (logits.sum() + quality.sum()))
        with torch.autocast(self.device.type, enabled=False):
            whole = self._canvas(size).to_padded(logits[:, 0])
            pixels = whole[:, : size[0], : size[1]].flatten(1)
            wanted = labels.flatten(1).to(pixels.dtype)
            found, labels = pixels > THRESHOLD, labels.flatten(1)
            overlap = (found & labels).sum(1) / (found | labels).sum(1).clamp(min=1)
            losses = {
                "loss_mask": mask_loss(pixels, wanted, count),
                "loss_dice": dice_loss(pixels, wanted, count),
                "loss_iou": (quality[:, 0] - overlap).square().sum() / count,
            }
        return {name: losses[name] for name in self.weights}

    def _canvas(self, size: tuple[int, int], output: tuple[int, int] | None = None) -> Canvas:
        """Where the masks of an image of ``size`` (H, W) go, for an ``output`` (H, W), by default its own."""
        return Canvas((self.image_size, self.image_size), size, output or size)

    def _prompts(self, item: dict[str, Any], size: tuple[int, int]) -> Prompts:
        return read_prompts(item, size, 4 * self.prompt_encoder.grid, self.device)

    def inference(self, embedding: tuple[Tensor, ...], item: dict[str, Any]) -> Instances:
        """One instance per prompt of an image, in the size that the item wants."""
        size = (item["image"].shape[-2], item["image"].shape[-1])
        wanted = output_size(item, size)
        canvas, prompts = self._canvas(size, wanted), self._prompts(item, size)
        masks = torch.empty((len(prompts), *wanted), dtype=torch.bool, device=self.device)
        scores, done = [torch.zeros(0, device=self.device)], 0
        for part in prompts.split(self.prompts_per_call):
            logits, quality = self.decode(embedding, part, self.multimask)
            score, best = quality.float().max(1)
            chosen = logits[torch.arange(len(best), device=self.device), best]
            for rows in canvas.chunks(len(chosen), device=self.device.type):
                torch.gt(canvas.upsample(chosen[rows]), THRESHOLD, out=masks[done:][rows])
            scores.append(score)
            done += len(score)
        for key in ("box_scores", "box_classes"):
            if key in item and len(item[key]) != len(prompts):
                name = item.get("file_name", "an image")
                raise PromptError(f"{name}: {key} are {len(item[key])}, and there are {len(prompts)} prompts")
        instances = Instances(wanted)
        instances.pred_masks = masks
        instances.pred_boxes = Boxes(mask_boxes(instances.pred_masks))
        instances.scores = torch.cat(scores)
        if "box_scores" in item:
            instances.scores = instances.scores * torch.as_tensor(item["box_scores"]).to(instances.scores)
        classes = item.get("box_classes", torch.zeros(len(instances), dtype=torch.int64))
        instances.pred_classes = torch.as_tensor(classes).to(self.device)
        return instances


def _target(item: dict[str, Any], device: torch.device) -> Target:
    """Classes and bool masks (N, H, W) of a mapped dict."""
    masks = object_masks(item, *item["image"].shape[-2:])
    return Target(item["instances"].gt_classes.to(device), masks.to(device).bool())
