"""The transformer decoder of Mask DINO: queries chosen from the encoder's maps, refined as boxes, read out as masks.

In training it also restores queries made of disturbed ground truth, without any matching. Sources: Li et al., Mask
DINO, CVPR 2023, sections 3.2 to 3.4; Zhang et al., DINO, ICLR 2023, sections 3.3 to 3.5; Li et al., DN-DETR, CVPR 2022,
section 4; Zhu et al., Deformable DETR, ICLR 2021, section 4 and appendix A.4; Liu et al., DAB-DETR, ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import Tensor, nn

from peft_d2.models.checks import expect, expect_numbers, expect_width
from peft_d2.models.layers.boxes import inverse_sigmoid, mask_boxes, to_centres
from peft_d2.models.layers.criterion import Match, Target, autocast_type, masks_of, of_queries, predicted
from peft_d2.models.layers.transformer import (
    MLP,
    Levels,
    MSDeformAttn,
    init_transformer,
    input_projections,
    pixel_centres,
    sine_code,
)
from peft_d2.models.registration import TRANSFORMER_DECODER_REGISTRY, entry

_DENOISING = ("no", "standard", "seg")
_BOX_STARTS = ("no", "bitmask", "mask2box")
_FINEST_PROPOSAL = 0.05  # side of a proposal on the first level, relative to the image; it doubles by level


class DeformableDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and a feed-forward network, each with residual and norm.

    The norms are numbered as published: ``norm2`` follows the self-attention, ``norm1`` the cross-attention.
    """

    def __init__(self, d_model: int, d_ffn: int, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Levels, blocked: Tensor | None = None
    ) -> Tensor:
        """Let the queries see each other, then the maps, each around its ``reference`` box (N, Q, 4) in [0, 1].

        ``position`` is added to the queries x (N, Q, C) for attending; ``blocked`` (Q, Q) is True where a query must
        not see another.
        """
        query = x + position
        x = self.norm2(x + self.self_attn(query, query, x, attn_mask=blocked, need_weights=False)[0])
        references = reference[:, :, None].expand(-1, -1, len(memory.sizes), -1)
        x = self.norm1(x + self.cross_attn(x + position, references, memory.values, memory.shapes, memory.starts))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class DeformableDecoder(nn.Module):
    """A stack of :class:`DeformableDecoderLayer` that refines its reference boxes. Sequences are (N, length, C).

    ``norm`` is applied to each layer's output that is returned, not to what the next layer gets. ``bbox_embed`` must be
    set before a call: for each layer a module (..., d_model) -> (..., 4), whose output is added to the boxes' logits.
    """

    bbox_embed: nn.ModuleList

    def __init__(self, n_layers: int, d_model: int, d_ffn: int, norm: nn.LayerNorm, **layer_options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DeformableDecoderLayer(d_model, d_ffn, **layer_options) for _ in range(n_layers))
        self.norm = norm
        self.ref_point_head = MLP(2 * d_model, d_model, d_model, 2)
        self.coordinate_channels = d_model // 2
        init_transformer(self)

    def forward(
        self, x: Tensor, box_logits: Tensor, memory: Levels, blocked: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Refine the boxes of queries x (N, Q, C), ``box_logits`` (N, Q, 4), layer by layer, in float32.

        Returns:
            Each layer's normalised hidden states (N, Q, C), and the boxes (N, Q, 4) that each layer started from and,
            last, those that the last layer arrived at. A layer starts from a detached copy; what is returned still
            depends on the layer that made it.
        """
        with torch.autocast(x.device.type, enabled=False):
            x, reference = x.float(), box_logits.float().sigmoid()
            hidden, references = [], [reference]
            for layer, box_head in zip(self.layers, self.bbox_embed, strict=True):
                # Codes of boxes (x, y, width, height) are in the order y, x, width, height (DAB-DETR, equation 4).
                code = sine_code(reference[..., [1, 0, 2, 3]], self.coordinate_channels).flatten(-2)
                position = self.ref_point_head(code)
                x = layer(x, position, reference, memory, blocked)
                references.append((box_head(x) + inverse_sigmoid(reference)).sigmoid())
                reference = references[-1].detach()
                hidden.append(self.norm(x))
        return hidden, references


@entry(TRANSFORMER_DECODER_REGISTRY, "PD2MaskDINODecoder", upstream="MaskDINODecoder")
class MaskDINODecoder(nn.Module):
    """Predicts classes, masks and boxes, as ``MODEL.MaskDINO`` says, but for DROPOUT, which is the encoder's.

    ``bbox_embed`` is one perceptron under many names, and ``decoder_norm`` the decoder's own ``norm``, as published.
    With TWO_STAGE, queries start from the encoder's maps (LEARN_TGT: their boxes alone do); otherwise they are learned.
    Their boxes start from the chosen places' own (``box_start`` "no"), or around these places' masks ("bitmask", or
    "mask2box", one pixel smaller). ``denoising`` restores masks too ("seg"), boxes and classes alone, or nothing.
    """

    def __init__(self, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> None:
        super().__init__()
        dino, head = cfg.MODEL.MaskDINO, cfg.MODEL.SEM_SEG_HEAD
        path = "MODEL.MaskDINO"
        for key, known in (("DN", _DENOISING), ("INITIALIZE_BOX_TYPE", _BOX_STARTS)):
            expect(dino[key] in known, f"{path}.{key}", dino[key], f"one of {list(known)}")
        starts = dino.INITIALIZE_BOX_TYPE == "no" or (dino.TWO_STAGE and dino.INITIAL_PRED)
        box_type = "'no'; boxes around predicted masks: that needs TWO_STAGE and INITIAL_PRED True"
        expect(starts, f"{path}.INITIALIZE_BOX_TYPE", dino.INITIALIZE_BOX_TYPE, box_type)
        expect_numbers(path, dino, DEC_LAYERS=1, NUM_OBJECT_QUERIES=1, DIM_FEEDFORWARD=1, DN_NUM=0)
        expect_width(path, dino)
        channels, levels = dino.HIDDEN_DIM, head.TOTAL_NUM_FEATURE_LEVELS
        self.num_queries = dino.NUM_OBJECT_QUERIES
        self.box_start = dino.INITIALIZE_BOX_TYPE
        self.initial_prediction = dino.INITIAL_PRED
        self.denoising, self.denoising_count, self.noise_scale = dino.DN, dino.DN_NUM, dino.DN_NOISE_SCALE
        learned = dino.LEARN_TGT or not dino.TWO_STAGE
        self.query_feat = nn.Embedding(self.num_queries, channels) if learned else None
        self.query_embed = None if dino.TWO_STAGE else nn.Embedding(self.num_queries, 4)
        if dino.TWO_STAGE:
            self.enc_output = nn.Linear(channels, channels)
            self.enc_output_norm = nn.LayerNorm(channels)
        self.input_proj = input_projections(in_channels, channels, levels, dino.ENFORCE_INPUT_PROJ)
        self.class_embed = nn.Linear(channels, head.NUM_CLASSES + softmax_classes(cfg))
        self.label_enc = nn.Embedding(head.NUM_CLASSES, channels)
        self.mask_embed = MLP(channels, channels, head.MASK_DIM, 3)
        self.decoder_norm = nn.LayerNorm(channels)
        layers = dino.DEC_LAYERS
        self.decoder = DeformableDecoder(
            layers, channels, dino.DIM_FEEDFORWARD, self.decoder_norm, n_levels=levels, n_heads=dino.NHEADS
        )
        self._bbox_embed = MLP(channels, channels, 4, 3)
        for parameter in self._bbox_embed.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.bbox_embed = self.decoder.bbox_embed = nn.ModuleList([self._bbox_embed] * layers)

    def forward(
        self,
        features: Sequence[Tensor],
        mask_features: Tensor,
        mask: Tensor | None = None,
        targets: Sequence[Target] | None = None,
    ) -> dict[str, Any]:
        """``pred_logits`` (N, Q, K), ``pred_masks`` (N, Q, H, W) and ``pred_boxes`` (N, Q, 4) of the last layer.

        Boxes are relative to the padded image. In training masks are made when somebody asks for them, and there are
        besides: ``aux_outputs``, the same of the queries themselves and of every layer but the last; with two stages
        ``interm_outputs`` of the chosen places; ``denoising``: the denoising queries and their predictions by layer,
        or None.

        ``features`` are maps (N, C, H_l, W_l) in the pixel decoder's order, which is reversed; ``mask_features`` are
        (N, mask_dim, H, W). ``mask`` is ignored: padding is looked at. Denoising needs ``targets`` with boxes.
        """
        # In float32, as the decoder is, also where the maps come in the autocast type.
        projected = [projection(feature).float() for projection, feature in zip(self.input_proj, features, strict=True)]
        memory = Levels(projected[::-1])
        mask_features = autocast_type(mask_features)
        content, box_logits, chosen = self.queries(memory, mask_features)
        noisy = blocked = None
        if self.training and self.denoising != "no":
            if targets is None:
                raise ValueError("MaskDINODecoder: denoising needs the targets; pass them, or set DN to 'no'")
            noisy = denoising_queries(targets, self.label_enc, self.denoising_count, self.noise_scale)
        if noisy is not None:
            content = torch.cat([noisy.content, content], dim=1)
            box_logits = torch.cat([noisy.box_logits, box_logits], dim=1)
            blocked = noisy.blocked(len(content[0]) - len(noisy))
        hidden, references = self.decoder(content, box_logits, memory, blocked)
        if not self.training:
            return self.predict(hidden[-1], mask_features, self._boxes(hidden[-1], references[-2]))
        predictions = [self.predict(content, mask_features, references[0])] if self.initial_prediction else []
        for x, reference in zip(hidden, references[:-1], strict=True):
            predictions.append(self.predict(x, mask_features, self._boxes(x, reference)))
        return self._training_outputs(predictions, noisy, chosen)

    def _training_outputs(
        self, predictions: list[dict], noisy: DenoisingQueries | None, chosen: dict[str, Any] | None
    ) -> dict[str, Any]:
        """What :meth:`forward` gives in training; the denoising queries come first in every prediction."""
        if noisy is None:
            # The label embedding takes part all the same, so that every worker has the same graph.
            predictions[-1]["pred_logits"] = predictions[-1]["pred_logits"] + 0.0 * self.label_enc.weight.sum()
        first = 0 if noisy is None else len(noisy)
        matching = [of_queries(p, slice(first, None)) for p in predictions]
        outputs = matching[-1]
        outputs.update(aux_outputs=matching[:-1], denoising=None)
        if chosen is not None:
            outputs["interm_outputs"] = chosen
        if noisy is not None:
            outputs["denoising"] = (noisy, [of_queries(p, slice(first)) for p in predictions])
        return outputs

    def queries(self, memory: Levels, mask_features: Tensor) -> tuple[Tensor, Tensor, dict[str, Any] | None]:
        """Content (N, Q, C) and box logits (N, Q, 4) to start from; with two stages the chosen places' prediction.

        The places are those with the highest class logits (DINO, section 3.4, "mixed query selection" with learned
        content). What the queries start from is detached; the prediction is supervised by itself.
        """
        n = memory.values.shape[0]
        if self.query_embed is not None and self.query_feat is not None:
            return self.query_feat.weight.expand(n, -1, -1), self.query_embed.weight.expand(n, -1, -1), None
        proposals, valid = proposal_logits(memory.sizes, memory.values.device)
        encoded = self.enc_output_norm(self.enc_output(memory.values * valid[:, None]))
        count = min(self.num_queries, encoded.shape[1])  # a small image has fewer places
        index = self.class_embed(encoded).amax(-1).topk(count, dim=1).indices[..., None]
        content = encoded.gather(1, index.expand(-1, -1, encoded.shape[-1]))
        box_logits = self._bbox_embed(content).float() + proposals[index.squeeze(-1)]
        chosen = self.predict(content, mask_features, box_logits.sigmoid())
        start = box_logits.detach()
        if self.box_start != "no":
            with torch.no_grad():
                start = inverse_sigmoid(self._boxes_of(masks_of(chosen) > 0))
        content = content.detach() if self.query_feat is None else self.query_feat.weight[:count].expand(n, -1, -1)
        return content, start, chosen

    def predict(self, x: Tensor, mask_features: Tensor, boxes: Tensor) -> dict[str, Any]:
        """Class logits and masks of hidden states (N, Q, C), which are normalised here, next to their boxes."""
        hidden = self.decoder_norm(x)
        others = {"pred_logits": self.class_embed(hidden), "pred_boxes": boxes}
        return predicted(self.mask_embed(hidden), mask_features, kept=not self.training, **others)

    def _boxes(self, x: Tensor, reference: Tensor) -> Tensor:
        """Boxes from a layer's normalised output and its starting boxes, which are not detached (DINO, section 3.5)."""
        with torch.autocast(x.device.type, enabled=False):
            return (self._bbox_embed(x.float()) + inverse_sigmoid(reference)).sigmoid()

    def _boxes_of(self, masks: Tensor) -> Tensor:
        """Boxes (N, Q, 4) around masks (N, Q, H, W), as centre and size; empty masks' depend on ``box_start``."""
        height, width = masks.shape[-2:]
        flat = masks.flatten(0, 1)
        corners = mask_boxes(flat)
        if self.box_start == "mask2box":
            corners[:, 2:] -= 1
            corners[~flat.flatten(1).any(1)] = corners.new_tensor([2.0 * width, 2.0 * height, 0, 0])  # -> (1, 1, 0, 0)
        return (to_centres(corners) / corners.new_tensor([width, height] * 2)).view(*masks.shape[:2], 4)


@dataclass
class DenoisingQueries:
    """Denoising queries of a batch: ``groups`` copies of an image's targets, each padded with zeros to ``group_size``.

    ``content`` (N, D, C), D = groups * group_size, one group after the other; ``box_logits`` (N, D, 4).
    """

    content: Tensor
    box_logits: Tensor
    groups: int
    group_size: int

    def __len__(self) -> int:
        return self.groups * self.group_size

    def matches(self, targets: Sequence[Target]) -> list[Match]:
        """Which query restores which target, by image."""
        starts = torch.arange(self.groups)[:, None] * self.group_size
        objects = [torch.arange(len(target.labels)) for target in targets]
        return [((starts + indices).flatten(), indices.repeat(self.groups)) for indices in objects]

    def blocked(self, matching: int) -> Tensor:
        """(D + matching, D + matching), True where a query must not see another.

        A group sees itself and the ``matching`` queries that follow all groups; those see each other alone.
        """
        device = self.content.device
        group = torch.arange(len(self) + matching, device=device) // max(self.group_size, 1)
        group[len(self) :] = self.groups
        return (group[:, None] != group[None]) & (group[None] != self.groups)


def denoising_queries(
    targets: Sequence[Target], label_embedding: nn.Embedding, count: int, noise_scale: float
) -> DenoisingQueries | None:
    """Disturb labels and boxes of the targets: each label is replaced with probability noise_scale / 2.

    A box's centre moves by up to noise_scale / 2 of its size, its sides change by up to noise_scale of themselves. With
    T targets in the largest image there are ``count // T`` groups; None if there are no targets, or T > ``count``.
    """
    group_size = max((len(target.labels) for target in targets), default=0)
    groups = count // group_size if group_size else 0
    if groups == 0:
        return None
    device = label_embedding.weight.device
    content = torch.zeros(len(targets), groups, group_size, label_embedding.embedding_dim, device=device)
    box_logits = torch.zeros(len(targets), groups, group_size, 4, device=device)
    for image, target in enumerate(targets):
        labels = target.labels.expand(groups, -1)
        replaced = torch.rand(labels.shape, device=device) < noise_scale / 2
        labels = torch.where(replaced, torch.randint_like(labels, label_embedding.num_embeddings), labels)
        boxes = target.centre_boxes().expand(groups, -1, -1)
        reach = torch.cat([boxes[..., 2:] / 2, boxes[..., 2:]], dim=-1) * noise_scale
        boxes = (boxes + (2 * torch.rand_like(boxes) - 1) * reach).clamp(0, 1)
        content[image, :, : len(target.labels)] = label_embedding(labels).to(content.dtype)
        box_logits[image, :, : len(target.labels)] = inverse_sigmoid(boxes)
    return DenoisingQueries(content.flatten(1, 2), box_logits.flatten(1, 2), groups, group_size)


def proposal_logits(sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """A box at every pixel of every level, twice as large on each next level, and whether it is well inside the image.

    (S, 4) logits of (centre x, centre y, width, height), infinite where not valid, and (S,) bool. Valid are boxes all
    of whose numbers are in (0.01, 0.99) (Zhu et al., Deformable DETR, appendix A.4, two-stage).
    """
    parts = []
    for level, size in enumerate(sizes):
        centres = pixel_centres(*size, device)
        parts.append(torch.cat([centres, torch.full_like(centres, _FINEST_PROPOSAL * 2.0**level)], dim=-1))
    boxes = torch.cat(parts)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    return (boxes / (1 - boxes)).log().masked_fill(~valid[:, None], float("inf")), valid


def softmax_classes(cfg: CfgNode) -> bool:
    """Whether classes have a softmax with no-object, not sigmoids: in semantic segmentation, if the config asks."""
    test = cfg.MODEL.MaskDINO.TEST
    return bool(test.SEMANTIC_ON and cfg.MODEL.MaskDINO.SEMANTIC_CE_LOSS and not test.PANOPTIC_ON)
