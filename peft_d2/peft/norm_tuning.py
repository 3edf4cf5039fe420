"""Norm tuning: only gains and biases of normalisation layers are trained.

Qi et al., "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models", 2022, arXiv
2211.08682; for vision Basu et al., "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning", 2023, arXiv
2304.01917. Running statistics stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .method import Method, MethodError, Selection, Site
from .selection import SelectOptions, parameters_where
from .specialise import base_class

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class NormTuning(Method):
    """``{NAME: norm, TARGETS: [backbone]}``: all norms in the targets, at any depth, of any make called ...Norm..."""

    name = "norm"
    options_class = SelectOptions
    selects = True

    def select(self, sites: Sequence[Site]) -> Selection:
        """All parameters of all norms; MethodError where there are none."""
        names = parameters_where(sites, lambda module, _: _is_norm(module))
        if not names:
            raise MethodError(f"norm: no norm has parameters in {', '.join(site.name for site in sites[:5])}")
        return Selection(parameters=names)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) or "Norm" in base_class(module).__name__
