"""Detectron2's Cityscapes evaluators, with clear words where their package is missing, on today's NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from detectron2 import evaluation

from peft_d2.compat import require_cityscapes


class _Cityscapes(evaluation.DatasetEvaluator):
    """What both tasks have before Detectron2's own evaluator.

    Raises:
        ModuleNotFoundError: cityscapesscripts is not installed; the message names the extra.
    """

    def __init__(self, dataset_name: str) -> None:
        require_cityscapes()
        super().__init__(dataset_name)

    def evaluate(self) -> Any:
        """Detectron2's figures, None on all but the main process."""
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as instances

        # cityscapesscripts 2.3 calls np.in1d, which NumPy 2.4 has no more; for it np.isin is the same.
        replaced = mock.patch.object(np, "in1d", np.isin, create=True)
        with replaced, mock.patch.object(instances, "writeDict2JSON", _write_json):
            return super().evaluate()


class CityscapesInstanceEvaluator(_Cityscapes, evaluation.CityscapesInstanceEvaluator):
    """AP and AP50 of instances, by cityscapesscripts."""


class CityscapesSemSegEvaluator(_Cityscapes, evaluation.CityscapesSemSegEvaluator):
    """IoU of the semantic classes and categories, by cityscapesscripts."""


def _write_json(content: Any, path: str) -> None:
    """The package's own function fails on NumPy's numbers, and leaves a matches.json in the current folder."""
    if Path(path).is_absolute():
        Path(path).write_text(json.dumps(content, default=lambda o: o.item() if hasattr(o, "item") else vars(o)))
