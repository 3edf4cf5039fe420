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

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .adapted import AdapterLayer, base_class, join, walk
from .errors import MethodError
from .method import Method, Options, Positive
from .targets import Target

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class SelectOptions(Options):
    """``TARGETS`` default to the whole model."""

    targets: list[str] = field(default_factory=lambda: ["**"])


class _Selecting(Method):
    """Trains what :meth:`select` names, and has no layers."""

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        return []


class _ByParameter(_Selecting):
    """Trains the parameters in the targets, at any depth, for which :meth:`wants`."""

    options_class = SelectOptions
    nothing: str  # what is said where there are none

    def wants(self, module: nn.Module, name: str) -> bool:
        """Whether the parameter ``name`` of ``module`` itself is trained."""
        raise NotImplementedError

    def select(self, targets: Sequence[Target]) -> list[str]:
        names = [
            join(path, leaf)
            for target in targets
            for path, module, _ in walk(target.module, target.name)
            for leaf, _ in module.named_parameters(recurse=False)
            if self.wants(module, leaf)
        ]
        if not names:
            raise MethodError(f"{self.name}: {self.nothing} in {', '.join(target.name for target in targets[:5])}")
        return names


class BitFit(_ByParameter):
    """``{NAME: bitfit, TARGETS: [backbone]}``: all biases in the targets, fused ones such as ``in_proj_bias`` too."""

    name = "bitfit"
    nothing = "there are no biases"

    def wants(self, module: nn.Module, name: str) -> bool:
        return name == "bias" or name.endswith("_bias")


class NormTuning(_ByParameter):
    """``{NAME: norm, TARGETS: [backbone]}``: gains and biases of all norms in the targets, whose name has Norm in it.

    Running statistics stay frozen.
    """

    name = "norm"
    nothing = "no norm has parameters (a FrozenBatchNorm2d holds buffers: MODEL.RESNETS.NORM BN)"

    def wants(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _NORMS) or "Norm" in base_class(module).__name__


@dataclass(frozen=True)
class LastBlocksOptions(Options):
    """``TARGETS`` choose the blocks of a stack, ``NUM`` is how many of the last of them are trained."""

    num: Positive = 1


class LastBlocks(_Selecting):
    """``{NAME: last_blocks, TARGETS: ["backbone.layers.*.blocks.*"], NUM: 2}``: the last ones in the model's order."""

    name = "last_blocks"
    options_class = LastBlocksOptions
    options: LastBlocksOptions

    def select(self, targets: Sequence[Target]) -> list[str]:
        """The last blocks with all that they contain; MethodError where there are fewer, or one holds nothing."""
        if len(targets) < self.options.num:
            raise MethodError(f"last_blocks: NUM is {self.options.num}, but TARGETS choose {len(targets)} blocks")
        for target in (chosen := targets[-self.options.num :]):
            if next(target.module.parameters(), None) is None:
                raise MethodError(f"last_blocks: {target.name} has no parameters; choose the blocks that hold them")
        return [target.name for target in chosen]
