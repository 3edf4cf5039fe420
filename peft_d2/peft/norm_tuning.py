"""Norm tuning: only gains and biases of normalisation layers are trained.

Qi et al., "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models", 2022, arXiv
2211.08682; for vision Basu et al., "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning", 2023, arXiv
2304.01917. Running statistics stay frozen.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .bitfit import SelectOptions
from .method import Method, MethodError, Selection, Site
from .runtime import walk
from .specialise import base_class

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class NormTuning(Method):
    """``{NAME: norm, TARGETS: [backbone]}``: all norms in the targets, at any depth, of any make called ...Norm..."""

    name = "norm"
    options_class = SelectOptions
    selects = True

    def select(self, sites: Sequence[Site]) -> Selection:
        names = {
            f"{path}.{leaf}" if path else leaf: None
            for site in sites
            for path, module, _ in walk(site.module, site.name)
            if isinstance(module, _NORMS) or "Norm" in base_class(module).__name__
            for leaf, _ in module.named_parameters(recurse=False)
        }
        if not names:
            raise MethodError(f"norm: no norm has parameters in {', '.join(site.name for site in sites[:5])}")
        return Selection(parameters=list(names))
