"""Predictions, matching and losses of mask classification.

Sources: Cheng et al., Mask2Former, CVPR 2022, sections 3.3 and 4.1; Carion et al., DETR, ECCV 2020, section 3.1; losses
at points: Kirillov et al., PointRend, CVPR 2020, section 3.1.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

Match = tuple[Tensor, Tensor]  # (query indices, target indices), both int64 on the CPU, sorted by target
Counts = Sequence[Sequence[int]]  # how many objects each image holds, by the parts of a batch: workers or pieces
_FORBIDDEN = 1e6  # replaces a cost that is not finite: far above any real one, small enough to be summed exactly


class MaskProduct(NamedTuple):
    """The factors of mask logits that are not computed yet: queries (N, Q, C) and pixel features (N, C, H, W)."""

    embedded: Tensor
    features: Tensor

    def masks(self) -> Tensor:
        """Mask logits (N, Q, H, W)."""
        return torch.einsum("bqc,bchw->bqhw", self.embedded, self.features)


class Prediction(dict[str, Any]):
    """What a layer predicts, by name: ``pred_logits`` (N, Q, K + 1), ``pred_masks`` (N, Q, H, W), and what else it has.

    The losses need the masks of matched queries, and a few points of the others. So in training ``pred_masks`` holds a
    :class:`MaskProduct`, of which only these are computed: that takes far less memory. To all other code this is a
    plain dict: whoever reads ``pred_masks``, or iterates over the dict, gets all masks, which are computed then.
    """

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, MaskProduct):
            # As where the layer predicted: the first to ask may be a matcher, without gradients or autocast.
            modes = torch.inference_mode(value.features.is_inference()), torch.enable_grad()
            with modes[0], modes[1], torch.autocast(value.features.device.type, enabled=False):
                value = self[name] = value.masks()
        return value

    def __iter__(self) -> Iterator[str]:  # what has one of its own is copied by way of __getitem__, by ** too
        return super().__iter__()

    get, pop, setdefault = MutableMapping.get, MutableMapping.pop, MutableMapping.setdefault  # type: ignore[assignment]
    values, items = MutableMapping.values, MutableMapping.items  # type: ignore[assignment]


# torch.utils._pytree knows dicts by their exact type; of others it would see no tensor. Recomputing, say, looks at all
# tensors and wants no masks.
register_pytree_node(
    Prediction,
    lambda given: (list(dict.values(given)), list(given)),
    lambda values, names: Prediction(zip(names, values, strict=True)),
)


def predicted(embedded: Tensor, features: Tensor, kept: bool, **others: Any) -> dict[str, Any]:
    """A layer's prediction: a dict with the masks if they are to be ``kept``, else a :class:`Prediction` without."""
    if kept:
        return {**others, "pred_masks": MaskProduct(embedded, features).masks()}
    prediction = Prediction(others)
    prediction.setdefault("pred_masks", MaskProduct(autocast_type(embedded), autocast_type(features)))
    return prediction


def masks_or_product(prediction: dict[str, Any]) -> Tensor | MaskProduct:
    """``pred_masks`` as they are stored: a :class:`MaskProduct` as long as nobody has read or replaced them."""
    get = dict.__getitem__ if isinstance(prediction, Prediction) else operator.getitem
    return get(prediction, "pred_masks")


def masks_of(prediction: dict[str, Any]) -> Tensor:
    """``pred_masks``, computed if need be, but then not stored in the prediction."""
    found = masks_or_product(prediction)
    return found.masks() if isinstance(found, MaskProduct) else found


def of_queries(prediction: dict[str, Any], part: slice) -> dict[str, Any]:
    """The same prediction, but only of the queries in ``part``."""
    return type(prediction)(
        (name, MaskProduct(x.embedded[:, part], x.features) if isinstance(x, MaskProduct) else x[:, part])
        for name, x in dict.items(prediction)
    )


def autocast_type(x: Tensor) -> Tensor:
    """``x`` in autocast's type if autocast is on: converted once here, not again by each product that uses it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


@dataclass
class Target:
    """Ground truth of an image: labels (T,) int64, masks (T, H, W) of 0 and 1, H and W those of the padded batch.

    ``boxes`` (T, 4), where a model asks for them: (centre x, centre y, width, height), relative to the image.
    """

    labels: Tensor
    masks: Tensor
    boxes: Tensor | None = None

    def centre_boxes(self) -> Tensor:
        """``boxes``, which have to be there."""
        if self.boxes is None:
            raise ValueError("this target has no boxes; call add_boxes on what prepare_targets returns")
        return self.boxes


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (N, C, P) of ``maps`` (N, C, H, W) at ``points`` (N, P, 2), (x, y) in [0, 1]; zero outside."""
    if maps.shape[0] == 0:  # grid_sample refuses empty batches; this keeps the result attached to the graph
        return maps.flatten(2)[..., :1].expand(-1, -1, points.shape[1])
    return F.grid_sample(maps, 2.0 * points[:, :, None] - 1.0, align_corners=False).squeeze(3)


def sample_shared_points(masks: Tensor, points: Tensor) -> Tensor:
    """Values (M, P) of all ``masks`` (M, H, W) at the same ``points`` (P, 2), whose weights are computed only once."""
    if masks.shape[0] == 0:
        return masks.new_zeros(0, points.shape[0])
    return sample_points(masks[None], points[None])[0]


@torch.no_grad()
def uncertain_points(logits: Tensor, count: int, oversample_ratio: float, importance_ratio: float) -> Tensor:
    """Random points (N, P, 2), (x, y) in [0, 1], of which a share lies where mask logits (N, H, W) are nearest to 0.

    For each of the ``count`` = P points there are ``oversample_ratio`` candidates; ``importance_ratio`` is the share
    taken from these by uncertainty, the others are uniform.
    """
    n = logits.shape[0]
    candidates = torch.rand(n, int(count * oversample_ratio), 2, device=logits.device)
    certainty = sample_points(logits[:, None], candidates).squeeze(1).abs()
    chosen = int(importance_ratio * count)
    # The order among the chosen does not matter: every loss sums over them.
    index = certainty.topk(chosen, dim=1, largest=False, sorted=False).indices
    points = candidates.gather(1, index[..., None].expand(-1, -1, 2))
    if chosen == count:
        return points
    return torch.cat([points, torch.rand(n, count - chosen, 2, device=logits.device)], dim=1)


def mask_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy of every prediction with every target: (..., Q, P), (T, P) -> (..., Q, T).

    With s = softplus: -[t log p + (1 - t) log(1 - p)] = s(x) - x t, so one product serves all pairs.
    """
    return (F.softplus(logits).sum(-1, keepdim=True) - logits @ labels.T) / labels.shape[1]


def dice_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - (2 |p t| + 1) / (|p| + |t| + 1) of every prediction with every target; shapes as in :func:`mask_cost`."""
    probability = logits.sigmoid()
    overlap = 2 * (probability @ labels.T)
    return 1 - (overlap + 1) / (probability.sum(-1, keepdim=True) + labels.sum(-1) + 1)


def dice_loss(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """Sum over masks of 1 - (2 |p t| + 1) / (|p| + |t| + 1), divided by ``count``; logits and labels (M, P)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * labels).sum(-1)
    loss = 1 - (overlap + 1) / (probability.sum(-1) + labels.sum(-1) + 1)
    return loss.sum() / count


def mask_loss(logits: Tensor, labels: Tensor, count: float) -> Tensor:
    """Sum over masks of the mean binary cross-entropy, divided by ``count``; logits and labels (M, P)."""
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1).sum() / count


def assign(cost: Tensor) -> Match:
    """The cheapest one-to-one assignment for ``cost`` (Q, T) on the CPU; pairs whose cost is not finite come last."""
    finite = torch.nan_to_num(cost, nan=_FORBIDDEN, posinf=_FORBIDDEN, neginf=_FORBIDDEN)
    queries, targets = (torch.as_tensor(i, dtype=torch.int64) for i in linear_sum_assignment(finite.numpy()))
    order = targets.argsort()
    return queries[order], targets[order]


class HungarianMatcher(nn.Module):
    """Matches by class probability, mask cross-entropy and dice, in float32 whatever the autocast type.

    All predictions of an image (one per decoder layer) are compared with its targets at one random set of
    ``num_points`` points. All costs of a batch leave the device in one copy, and all pairs go there in another, as
    each copy makes the host wait for the device.
    """

    def __init__(self, cost_class: float, cost_mask: float, cost_dice: float, num_points: int) -> None:
        super().__init__()
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(self, predictions: Sequence[dict[str, Any]], targets: Sequence[Target]) -> list[list[Match]]:
        """The pairs as ``[layer][image]``, min(Q, T) of each; every layer's prediction is matched by itself."""
        device = predictions[0]["pred_logits"].device
        with torch.autocast(device.type, enabled=False):
            costs = [self.costs(predictions, image, target) for image, target in enumerate(targets)]
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().split([cost.numel() for cost in costs])
        by_image = [map(assign, values.view(cost.shape)) for cost, values in zip(costs, flat, strict=True)]
        matches = [list(layer) for layer in zip(*by_image, strict=True)]
        indices = [index for layer in matches for match in layer for index in match]
        moved = iter(torch.cat(indices).to(device).split([len(index) for index in indices]))
        return [[(next(moved), next(moved)) for _ in layer] for layer in matches]

    def costs(self, predictions: Sequence[dict[str, Any]], image: int, target: Target) -> Tensor:
        """Costs (layers, Q, T) of one image in float32, computed layer by layer to save memory."""
        class_logits = torch.stack([p["pred_logits"][image] for p in predictions]).float()
        points = torch.rand(self.num_points, 2, device=class_logits.device)
        labels = sample_shared_points(target.masks, points)
        of_masks = []
        sampled: dict[int, Tensor] = {}  # values at the points of each map, which the layers share
        for masks in map(masks_or_product, predictions):
            if isinstance(masks, MaskProduct):
                key = id(masks.features)
                if key not in sampled:
                    sampled[key] = sample_shared_points(masks.features[image].float(), points)
                logits = masks.embedded[image].float() @ sampled[key]
            else:
                logits = sample_shared_points(masks[image].float(), points)
            of_masks.append(self.cost_mask * mask_cost(logits, labels) + self.cost_dice * dice_cost(logits, labels))
        return torch.stack(of_masks) + self.cost_class * self.class_cost(class_logits)[..., target.labels]

    def class_cost(self, logits: Tensor) -> Tensor:
        """Cost of every query for every class, (..., classes) -> the same: 1 - probability, without the constant 1."""
        return -logits.softmax(-1)


# What losses are divided by. A worker's share divided by its own counts would weigh every part alike, however many
# objects it holds. Divided by the counts' averages, the mean over workers (DistributedDataParallel) and over pieces
# (gradient accumulation) is the loss of the joined batch. The training step tells a model's inputs these counts
# (``batch_objects`` of the first one); other trainers do not, and the workers ask each other.
def objects_of_all(targets: Sequence[Target]) -> list[list[int]]:
    """The objects of each image, by worker: those of ``targets``, and of the other workers where there are any."""
    own = [len(target.labels) for target in targets]
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def average_count(objects: Counts) -> float:
    """Objects of the average part of a batch; 1 where there is none."""
    return sum(map(sum, objects)) / len(objects) or 1.0


class Matched(NamedTuple):
    """An image's target, and which of the queries is matched with which of its objects, both on the target's device."""

    target: Target
    queries: Tensor
    objects: Tensor


def pair_up(targets: Sequence[Target], matches: Sequence[Match]) -> list[Matched]:
    """Each image's target with its match, which is brought to the target's device (other matchers give CPU tensors)."""
    return [
        Matched(target, *(indices.to(target.labels.device) for indices in match))
        for target, match in zip(targets, matches, strict=True)
    ]


def matched_masks(prediction: dict[str, Any], matched: Sequence[Matched]) -> Tensor:
    """The mask logits (M, H, W) of all images' matched queries."""
    found = masks_or_product(prediction)
    if isinstance(found, MaskProduct):
        most, embedded = max(len(m.queries) for m in matched), found.embedded
        padded = torch.stack([F.pad(m.queries, (0, most - len(m.queries))) for m in matched])
        embedded = embedded.gather(1, padded[..., None].expand(-1, -1, embedded.shape[-1]))
        masks = MaskProduct(embedded, found.features).masks()
        return torch.cat([of_image[: len(m.queries)] for of_image, m in zip(masks, matched, strict=True)])
    return torch.cat([x.index_select(0, m.queries) for x, m in zip(found, matched, strict=True)])


class MaskLosses(nn.Module):
    """The losses of matched masks at sampled points; ``points`` are the arguments of :func:`uncertain_points`.

    It is a module so that a memory budget can recompute it like a block: it keeps several numbers for each point.
    """

    is_memory_block = True

    def __init__(self, points: tuple[int, float, float]) -> None:
        super().__init__()
        self.points = points

    def forward(self, prediction: dict[str, Any], matched: Sequence[Matched], count: float) -> dict[str, Tensor]:
        """Cross-entropy and dice of the matched masks at points chosen by uncertainty, divided by ``count``.

        Without any target both are 0 and still depend on the masks, so that every worker has the same graph.
        """
        logits = matched_masks(prediction, matched).float()
        if not len(logits):
            return {"loss_mask": logits.sum(), "loss_dice": logits.sum()}
        points = uncertain_points(logits, *self.points)
        labels = [
            # Without a copy where every mask is matched: matches are sorted by target.
            sample_points((t.masks if len(objects) == len(t.masks) else t.masks[objects])[:, None], part).squeeze(1)
            for (t, _, objects), part in zip(matched, points.split([len(m.queries) for m in matched]), strict=True)
        ]
        pair = sample_points(logits[:, None], points).squeeze(1), torch.cat(labels)
        return {"loss_mask": mask_loss(*pair, count), "loss_dice": dice_loss(*pair, count)}


class SetCriterion(nn.Module):
    """Matches each decoder layer's predictions to the targets and computes its losses, in float32.

    There are ``num_classes`` without no-object. ``weight_dict``: loss name -> weight; a loss that is not named is
    neither computed nor returned. ``points``: what :func:`uncertain_points` takes.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: dict[str, float],
        no_object_weight: float,
        points: tuple[int, float, float],
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.no_object_weight = no_object_weight
        self.register_buffer("empty_weight", torch.tensor([1.0] * num_classes + [no_object_weight]))
        self.mask_losses = MaskLosses(points)

    def forward(self, outputs: dict, targets: Sequence[Target], objects: Counts | None = None) -> dict[str, Tensor]:
        """``loss_ce``, ``loss_mask``, ``loss_dice`` of the last layer and, with ``_0``, ``_1``..., of the others.

        ``outputs`` are the last layer's :class:`Prediction`, or any dict with the same, and ``aux_outputs``: a list of
        the others'. ``objects``: how many each image of the whole batch has, by the parts whose losses are averaged;
        where it is not known, ``targets`` and those of the other workers are the batch.
        """
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            return self.matched_losses(outputs, targets, objects or objects_of_all(targets))

    def matched_losses(self, outputs: dict, targets: Sequence[Target], objects: Counts) -> dict[str, Tensor]:
        """As :meth:`forward`, outside of autocast; ``objects`` are known."""
        predictions = self.supervised(outputs)
        matches = self.matcher(list(predictions.values()), targets)
        losses = {}
        for (suffix, prediction), match in zip(predictions.items(), matches, strict=True):
            values = self.layer_losses(prediction, pair_up(targets, match), average_count(objects), objects, True)
            losses.update({name + suffix: value for name, value in values.items()})
        return losses

    def supervised(self, outputs: dict) -> dict[str, dict[str, Any]]:
        """The predictions that get losses; the keys are the suffixes of the losses' names."""
        auxiliary = {f"_{i}": layer for i, layer in enumerate(outputs.get("aux_outputs", ()))}
        wanted = {suffix: layer for suffix, layer in auxiliary.items() if f"loss_ce{suffix}" in self.weight_dict}
        return {"": outputs, **wanted}

    def layer_losses(
        self, prediction: dict[str, Any], matched: Sequence[Matched], count: float, objects: Counts | None, masks: bool
    ) -> dict[str, Tensor]:
        """The losses of one layer, or of its classes without ``masks``: see :meth:`class_loss`, :class:`MaskLosses`."""
        losses = {"loss_ce": self.class_loss(prediction["pred_logits"].float(), matched, objects)}
        return {**losses, **(self.mask_losses(prediction, matched, count) if masks else {})}

    def class_loss(self, logits: Tensor, matched: Sequence[Matched], objects: Counts | None) -> Tensor:
        """Cross-entropy of the classes over all queries; the unmatched ones should say no-object.

        It is divided by the sum of the class weights, averaged over the parts of the batch; that follows from
        ``objects``, as each object is matched with one query. Without ``objects``, by the sum for these queries.
        """
        logits, labels = logits.transpose(1, 2), self.wanted_labels(logits, matched)
        weights = self.empty_weight.to(logits.dtype)  # not so on a base in half precision
        if objects is None:
            return F.cross_entropy(logits, labels, weights)
        total = F.cross_entropy(logits, labels, weights, reduction="sum")
        queries = labels.shape[1]
        found = [min(count, queries) for part in objects for count in part]
        weight = sum(found) + self.no_object_weight * (len(found) * queries - sum(found))
        return total / (weight / len(objects))

    def wanted_labels(self, logits: Tensor, matched: Sequence[Matched]) -> Tensor:
        """Each query's class (N, Q) int64; ``num_classes`` where it is matched with nothing."""
        labels = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        for row, (target, queries, objects) in zip(labels, matched, strict=True):
            row[queries] = target.labels[objects]
        return labels
