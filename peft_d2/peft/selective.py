"""Methods that train chosen parameters of the model in place and add nothing; these are stored with the adapter.

- BitFit: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
  Language-models", ACL 2022, arXiv 2106.10199.
- Norm tuning: Qi et al., "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models", 2022,
  arXiv 2211.08682; for vision Basu et al., "Strong Baselines for Parameter Efficient Few-Shot Fine-tuning", 2023, arXiv
  2304.01917.
- Last-k-blocks: Yosinski et al., "How transferable are features in deep neural networks?", NeurIPS 2014, arXiv
  1411.1792; "Partial-k" in Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from .method import Method, MethodError, Options, Selection, Site, expect
from .runtime import walk
from .specialise import base_class

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


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
        """All biases, fused ones such as ``in_proj_bias`` included; MethodError where there are none."""
        names = _parameters_where(sites, lambda _, leaf: leaf == "bias" or leaf.endswith("_bias"))
        if not names:
            raise MethodError(f"bitfit: there are no biases in {', '.join(site.name for site in sites[:5])}")
        return Selection(parameters=names)


class NormTuning(Method):
    """``{NAME: norm, TARGETS: [backbone]}``: gains and biases of all norms in the targets, whose name has Norm in it.

    Running statistics stay frozen.
    """

    name = "norm"
    options_class = SelectOptions
    selects = True

    def select(self, sites: Sequence[Site]) -> Selection:
        """All parameters of all norms at any depth; MethodError where there are none."""
        names = _parameters_where(
            sites, lambda module, _: isinstance(module, _NORMS) or "Norm" in base_class(module).__name__
        )
        if not names:
            raise MethodError(f"norm: no norm has parameters in {', '.join(site.name for site in sites[:5])}")
        return Selection(parameters=names)


@dataclass(frozen=True)
class LastBlocksOptions(Options):
    """``TARGETS`` choose the blocks of a stack, ``NUM`` is how many of the last of them are trained."""

    num: int = 1

    def check(self) -> None:
        super().check()
        expect(self.num > 0, "NUM", self.num, "a positive integer")


class LastBlocks(Method):
    """``{NAME: last_blocks, TARGETS: ["backbone.layers.*.blocks.*"], NUM: 2}``: the last ones in the model's order."""

    name = "last_blocks"
    options_class = LastBlocksOptions
    options: LastBlocksOptions
    selects = True

    def select(self, sites: Sequence[Site]) -> Selection:
        """The last blocks with all that they contain; MethodError where there are fewer, or one holds nothing."""
        if len(sites) < self.options.num:
            raise MethodError(f"last_blocks: NUM is {self.options.num}, but TARGETS choose {len(sites)} blocks")
        chosen = list(sites[-self.options.num :])
        empty = [site.name for site in chosen if next(site.module.parameters(), None) is None]
        if empty:
            raise MethodError(f"last_blocks: {empty[0]} has no parameters; choose the blocks that hold them")
        return Selection(modules=chosen)


def _parameters_where(sites: Sequence[Site], wanted: Callable[[nn.Module, str], bool]) -> list[str]:
    """Names of the parameters in the sites, at any depth, for which ``wanted(owner, own name)``; each name once."""
    names = {
        f"{path}.{leaf}" if path else leaf: None
        for site in sites
        for path, module, _ in walk(site.module, site.name)
        for leaf, _ in module.named_parameters(recurse=False)
        if wanted(module, leaf)
    }
    return list(names)
