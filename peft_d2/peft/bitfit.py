"""BitFit: only the biases are trained.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL
2022, arXiv 2106.10199. It adds nothing: the chosen parameters are trained in place and stored with the adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .method import Method, MethodError, Options, Selection, Site
from .runtime import walk


@dataclass(frozen=True)
class SelectOptions(Options):
    """``TARGETS`` default to the whole model."""

    targets: list[str] = field(default_factory=lambda: ["**"])


class BitFit(Method):
    """``{NAME: bitfit, TARGETS: [backbone]}``: all biases in the targets, at any depth."""

    name = "bitfit"
    options_class = SelectOptions
    selects = True

    def select(self, sites: Sequence[Site]) -> Selection:
        names = {
            f"{path}.{leaf}" if path else leaf: None
            for site in sites
            for path, module, _ in walk(site.module, site.name)
            for leaf, parameter in module.named_parameters(recurse=False)
            if leaf == "bias" or leaf.endswith("_bias")
        }
        if not names:
            raise MethodError(f"bitfit: there are no biases in {', '.join(site.name for site in sites[:5])}")
        return Selection(parameters=list(names))
