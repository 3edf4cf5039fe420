"""BitFit: only the biases are trained.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL
2022, arXiv 2106.10199. It adds nothing: the chosen parameters are trained in place and stored with the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

from .method import Method, MethodError, Selection, Site
from .selection import SelectOptions, parameters_where


class BitFit(Method):
    """``{NAME: bitfit, TARGETS: [backbone]}``: all biases in the targets, at any depth."""

    name = "bitfit"
    options_class = SelectOptions
    selects = True

    def select(self, sites: Sequence[Site]) -> Selection:
        """All biases, fused ones such as ``in_proj_bias`` included; MethodError where there are none."""
        names = parameters_where(sites, lambda _, leaf: leaf == "bias" or leaf.endswith("_bias"))
        if not names:
            raise MethodError(f"bitfit: there are no biases in {', '.join(site.name for site in sites[:5])}")
        return Selection(parameters=names)
