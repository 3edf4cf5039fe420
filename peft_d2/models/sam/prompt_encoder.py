"""Prompts of Segment Anything: read from an image's dict and checked, and as embeddings.

Kirillov et al., ICCV 2023, section 3 and appendix A; positions are random Fourier features (Tancik et al., NeurIPS
2020). Parameter names are the published ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from peft_d2.data.images import DatasetError
from peft_d2.models.layers.transformer import LayerNorm2d, pixel_centres

NOT_A_POINT, BACKGROUND, FOREGROUND = -1, 0, 1
_TOP_LEFT, _BOTTOM_RIGHT = 2, 3
_KEYS = ("boxes", "point_coords", "point_labels", "mask_inputs")
_OTHER_NAMES = {"box": "boxes", "points": "point_coords", "labels": "point_labels", "mask_input": "mask_inputs"}


class PromptError(DatasetError):
    """An image or a prompt that the model cannot take; the message names the image."""


@dataclass(frozen=True)
class Prompts:
    """N prompts, each made of all kinds that are given; with none given, a single prompt without content.

    Boxes are (N, 4), x0 y0 x1 y1; points coordinates (N, P, 2), x before y, and labels (N, P): 1 on the object, 0
    beside it, -1 padding; masks logits (N, 1, 4 G, 4 G) of an earlier prediction.
    """

    boxes: Tensor | None = None
    points: tuple[Tensor, Tensor] | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        given = [x for x in (self.boxes, self.points and self.points[0], self.masks) if x is not None]
        return len(given[0]) if given else 1

    def split(self, size: int) -> Iterator[Prompts]:
        """Parts of at most ``size`` prompts, in order; of no prompts, no parts."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def __getitem__(self, part: slice) -> Prompts:
        points = self.points and (self.points[0][part], self.points[1][part])
        boxes, masks = (None if given is None else given[part] for given in (self.boxes, self.masks))
        return Prompts(boxes, points, masks)


def read_prompts(item: Mapping[str, Any], size: tuple[int, int], mask_side: int, device: torch.device) -> Prompts:
    """The prompts of an input dict: any of ``boxes``, ``point_coords`` with ``point_labels``, ``mask_inputs``.

    Boxes that reach over the border of the image, of ``size`` (H, W) without padding, are clipped; boxes without area
    are taken as they are. ``mask_side`` is that of ``mask_inputs``.

    Raises:
        PromptError: no numbers, a wrong shape, different numbers of prompts, not finite, a box the wrong way round, a
            prompt outside of the image, or a mask that is no logits; naming the image and the prompt.
    """
    name = str(item.get("file_name", "an image"))
    if other := _OTHER_NAMES.keys() & item.keys():
        wrong = min(other)
        raise PromptError(f"{name}: {wrong!r} is no prompt here, {_OTHER_NAMES[wrong]!r} is")
    plain = {key: getattr(item[key], "tensor", item[key]) for key in _KEYS if item.get(key) is not None}  # of Boxes
    given = {key: _tensor(value, key, name).to(device) for key, value in plain.items()}
    for key, value in given.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise PromptError(f"{name}: {key} holds values that are not finite")
    if ("point_coords" in given) != ("point_labels" in given):
        raise PromptError(f"{name}: point_coords and point_labels go together, but only {list(given)} are given")
    counts = {key: len(value) for key, value in given.items()}
    if len(set(counts.values())) > 1:
        raise PromptError(f"{name}: each kind of prompt must be there equally often, not {counts}")
    boxes, points, masks = given.get("boxes"), None, given.get("mask_inputs")
    _warn_of_shares(given, size, name)
    if boxes is not None:
        boxes = _checked_boxes(boxes.float(), size, name)
    if "point_coords" in given:
        points = given["point_coords"].float(), given["point_labels"]
        _check_points(*points, size, name)
    if masks is not None and tuple(masks.shape[1:]) != (1, mask_side, mask_side):
        raise PromptError(f"{name}: mask_inputs are {tuple(masks.shape)}, expected (N, 1, {mask_side}, {mask_side})")
    return Prompts(boxes, points, None if masks is None else masks.float())


def _tensor(value: Any, key: str, name: str) -> Tensor:
    """The item's value under ``key`` as a tensor of numbers; labels may be bool."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(
            f"{name}: {key} are no tensor, array or lists of equal lengths ({error}): stack tensors, fill up shorter "
            "lists of points with points whose label is -1"
        ) from None
    if key == "mask_inputs" and not tensor.is_floating_point():
        raise PromptError(
            f"{name}: mask_inputs are {tensor.dtype}, and expected are logits of an earlier prediction: of a binary "
            "mask give 20 * mask.float() - 10, say"
        )
    if tensor.is_complex() or (tensor.dtype == torch.bool and key != "point_labels"):
        raise PromptError(f"{name}: {key} are {tensor.dtype}, expected numbers in pixels")
    if tensor.is_meta:
        raise PromptError(f"{name}: {key} are on the meta device and have no values: give them on the CPU")
    return tensor.long() if tensor.dtype == torch.bool else tensor


def _warn_of_shares(given: Mapping[str, Tensor], size: tuple[int, int], name: str) -> None:
    """Warn once if all prompts of an image lie in its first pixel: then they were probably relative coordinates."""
    for key in ("boxes", "point_coords"):
        values = given.get(key)
        if values is None or not values.numel() or max(size) < 8 or not values.is_floating_point():
            continue
        fractions = values.min() >= 0 and values.max() <= 1 and (key == "boxes" or (values % 1 > 0).any())
        if fractions:
            example = [round(value, 3) for value in values.flatten(0, -2)[0].tolist()]
            log_first_n(
                logging.WARNING,
                f"{name}: all {key} lie in 0..1, as {example}, and are taken as pixels of an image of {size[1]} x "
                f"{size[0]} px: if they are shares of it, multiply x by {size[1]} and y by {size[0]}",
                name=__name__,
            )


def _checked_boxes(boxes: Tensor, size: tuple[int, int], name: str) -> Tensor:
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise PromptError(f"{name}: boxes are {tuple(boxes.shape)}, expected (N, 4): x0, y0, x1, y1")
    height, width = size
    x0, y0, x1, y1 = boxes.unbind(1)
    _refuse(boxes, (x1 < x0) | (y1 < y0), name, "box", "is the wrong way round; expected x0, y0, x1, y1 in this order")
    outside = (x1 < 0) | (y1 < 0) | (x0 > width) | (y0 > height)
    _refuse(boxes, outside, name, "box", f"lies outside of the image of {width} x {height} px")
    return clip_boxes_to_image(boxes, size)


def _check_points(points: Tensor, labels: Tensor, size: tuple[int, int], name: str) -> None:
    if points.dim() != 3 or points.shape[2] != 2 or labels.shape != points.shape[:2]:
        raise PromptError(
            f"{name}: point_coords are {tuple(points.shape)} and point_labels {tuple(labels.shape)}, "
            "expected (N, P, 2) and (N, P)"
        )
    if not torch.isin(labels, labels.new_tensor([NOT_A_POINT, BACKGROUND, FOREGROUND])).all():
        raise PromptError(f"{name}: point_labels must be 1 (object), 0 (not the object) or -1 (padding)")
    limit = points.new_tensor([size[1], size[0]])
    outside = ((points < 0) | (points > limit)).any(2) & (labels != NOT_A_POINT)
    where = f"lies outside of the image of {size[1]} x {size[0]} px"
    _refuse(points.flatten(0, 1), outside.flatten(), name, "point", where)


def _refuse(prompts: Tensor, bad: Tensor, name: str, kind: str, what: str) -> None:
    if bad.any():
        i = int(bad.nonzero()[0])
        values = [round(v, 2) for v in prompts[i].tolist()]
        more = f" ({int(bad.sum())} such)" if bad.sum() > 1 else ""
        raise PromptError(f"{name}: {kind} {i} {values} {what}{more}")


class FourierPositions(nn.Module):
    """Places (..., 2) in [0, 1] x [0, 1], x before y, as ``2 n`` sines and cosines of random projections."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, n))

    def forward(self, places: Tensor) -> Tensor:
        with torch.autocast(places.device.type, enabled=False):  # half precision would move the places by pixels
            matrix = self.positional_encoding_gaussian_matrix
            angles = 2 * math.pi * ((2 * places.to(matrix.dtype) - 1) @ matrix)
            return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Points, boxes and masks as embeddings of ``dim`` channels; the image's embedding has ``grid`` pixels a side.

    ``pads_boxes`` adds a padding token ("no point") after each box.
    """

    def __init__(self, dim: int, grid: int, image_size: int, mask_channels: int, pads_boxes: bool) -> None:
        super().__init__()
        self.dim, self.grid, self.image_size, self.pads_boxes = dim, grid, image_size, pads_boxes
        self.pe_layer = FourierPositions(dim // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dim) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dim)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, dim, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, dim)

    def dense_positions(self) -> Tensor:
        """Codes of the pixels of the image's embedding: (1, C, G, G)."""
        centres = pixel_centres(self.grid, self.grid, self.pe_layer.positional_encoding_gaussian_matrix.device)
        return self.pe_layer(centres).t().unflatten(1, (self.grid, self.grid))[None]

    def forward(
        self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None, masks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) for points and boxes, T = 0 without any, and what is added to the pixels (B, C, G, G).

        Coordinates are in pixels of the padded image.
        """
        given = [x for x in (boxes, points and points[0], masks) if x is not None]
        count = given[0].shape[0] if given else 1  # no len(): an export keeps the number open
        tokens = [self.no_mask_embed.weight.new_zeros(count, 0, self.dim)]
        if points is not None:
            tokens.append(self.embed_points(*points, alone=boxes is None))
        if boxes is not None:
            corners = torch.cat([self._kind(_TOP_LEFT), self._kind(_BOTTOM_RIGHT)])
            tokens.append(self._places(boxes.reshape(-1, 2, 2)) + corners)
            if self.pads_boxes:
                tokens.append(self.not_a_point_embed.weight.expand(count, 1, -1))
        if masks is not None:
            dense = self.mask_downscaling(masks)
        else:
            dense = self.no_mask_embed.weight[:, :, None, None].expand(count, -1, self.grid, self.grid)
        return torch.cat(tokens, dim=1), dense

    def _places(self, coordinates: Tensor) -> Tensor:
        """Position codes of the centres of the pixels at ``coordinates``."""
        return self.pe_layer((coordinates.float() + 0.5) / self.image_size)

    def embed_points(self, coordinates: Tensor, labels: Tensor, alone: bool) -> Tensor:
        """Tokens (B, P, C) of points (B, P, 2) and labels (B, P); ``alone`` adds one where a box would stand."""
        if alone:  # where a box would stand
            coordinates = torch.cat([coordinates, torch.zeros_like(coordinates[:, :1])], dim=1)
            labels = torch.cat([labels, torch.full_like(labels[:, :1], NOT_A_POINT)], dim=1)
        labels = labels[..., None]
        tokens = torch.where(labels == NOT_A_POINT, self.not_a_point_embed.weight, self._places(coordinates))
        for label in (BACKGROUND, FOREGROUND, _TOP_LEFT, _BOTTOM_RIGHT):  # a graph takes boxes as two such points
            tokens = torch.where(labels == label, tokens + self._kind(label), tokens)
        return tokens

    def _kind(self, index: int) -> Tensor:
        """The learned vector (1, C) of a kind: background, foreground, or one of a box's two corners."""
        return self.point_embeddings[index].get_parameter("weight")
