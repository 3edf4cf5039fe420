"""IoU and Dice of masks that belong together, as in segmentation with box prompts: no matching, no scores.

Per class and as the mean over the classes that occur: a class without objects is left out, it does not count as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class _Sums:
    """What one class has seen so far, in px or as sums over its objects."""

    count: int = 0
    iou: float = 0.0
    dice: float = 0.0
    intersection: int = 0
    areas: int = 0  # of truth and prediction together


@dataclass
class MaskMetrics:
    """Collects pairs of masks and gives their metrics.

    Attributes:
        classes: names, the mean is over those that occur.
        smoothing: added to intersections and unions of the per-object measures; 1 is what COBOT's evaluation of
            remote-sensing images uses. Without it, two empty masks agree (1.0).
        columns: (first, last) columns of the masks that are compared, the last one exclusive; None compares all.
    """

    classes: Sequence[str]
    smoothing: float = 0.0
    columns: tuple[int, int] | None = None
    _sums: dict[int, _Sums] = field(default_factory=dict)

    def add(self, truth: np.ndarray | torch.Tensor, found: np.ndarray | torch.Tensor, label: int) -> None:
        """One object: (H, W) masks, or the (D, H, W) stack of a volume, and its class index.

        Raises:
            ValueError: masks of different sizes, or a class that is not listed.
        """
        if tuple(truth.shape) != tuple(found.shape):
            raise ValueError(f"the masks are of {tuple(truth.shape)} and {tuple(found.shape)} px: they must agree.")
        if not 0 <= label < len(self.classes):
            raise ValueError(f"class {label} is not listed, there are {len(self.classes)} classes.")
        pair = [np.asarray(torch.as_tensor(m).cpu()).astype(bool) for m in (truth, found)]
        if self.columns is not None:
            pair = [mask[..., slice(*self.columns)] for mask in pair]
        intersection, union = int((pair[0] & pair[1]).sum()), int((pair[0] | pair[1]).sum())
        areas = intersection + union
        sums = self._sums.setdefault(label, _Sums())
        sums.count += 1
        sums.iou += _ratio(intersection, union, self.smoothing)
        sums.dice += _ratio(2 * intersection, areas, self.smoothing)
        sums.intersection += intersection
        sums.areas += areas

    def merge(self, other: MaskMetrics) -> None:
        """Take over what another process collected."""
        for label, theirs in other._sums.items():
            mine = self._sums.setdefault(label, _Sums())
            for name in ("count", "iou", "dice", "intersection", "areas"):
                setattr(mine, name, getattr(mine, name) + getattr(theirs, name))

    def results(self) -> dict[str, float]:
        """In per cent: ``mIoU``, ``mDice`` (means over classes of the means over their objects), ``DSC`` (mean over
        classes of the Dice of all their pixels together, as volumes are measured), and each by class, ``IoU-<name>``.

        nan where nothing was added, and for the ``DSC`` of a class whose masks are all empty.
        """
        table: dict[str, dict[str, float]] = {"IoU": {}, "Dice": {}, "DSC": {}}
        for label, sums in sorted(self._sums.items()):
            name = self.classes[label]
            table["IoU"][name] = 100 * sums.iou / sums.count
            table["Dice"][name] = 100 * sums.dice / sums.count
            table["DSC"][name] = 100 * 2 * sums.intersection / sums.areas if sums.areas else float("nan")
        figures = {"mIoU": _mean(table["IoU"]), "mDice": _mean(table["Dice"]), "DSC": _mean(table["DSC"])}
        for measure, by_class in table.items():
            figures |= {f"{measure}-{name}": value for name, value in by_class.items()}
        return figures


def _ratio(numerator: int, denominator: int, smoothing: float) -> float:
    if denominator + smoothing == 0:
        return 1.0
    return (numerator + smoothing) / (denominator + smoothing)


def _mean(by_class: dict[str, float]) -> float:
    values = [v for v in by_class.values() if not np.isnan(v)]
    return float(np.mean(values)) if values else float("nan")
