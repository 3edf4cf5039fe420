"""Last-k-blocks: the last blocks of a stack are trained in full, the classic partial fine-tuning.

Yosinski et al., "How transferable are features in deep neural networks?", NeurIPS 2014, arXiv 1411.1792; a baseline
("Partial-k") in Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .method import Method, MethodError, Options, Selection, Site, expect


@dataclass(frozen=True)
class LastBlocksOptions(Options):
    """``TARGETS`` choose the blocks of a stack, ``NUM`` is how many of the last of them are trained."""

    num: int = 1

    def check(self) -> None:
        super().check()
        expect(self.num > 0, "NUM", self.num, "a positive integer")


class LastBlocks(Method):
    """``{NAME: last_blocks, TARGETS: ["backbone.layers.*.blocks.*"], NUM: 2}``, in the model's order."""

    name = "last_blocks"
    options_class = LastBlocksOptions
    options: LastBlocksOptions
    selects = True

    def select(self, sites: Sequence[Site]) -> Selection:
        if len(sites) < self.options.num:
            raise MethodError(f"last_blocks: NUM is {self.options.num}, but TARGETS choose {len(sites)} blocks")
        chosen = list(sites[-self.options.num :])
        empty = [site.name for site in chosen if next(site.module.parameters(), None) is None]
        if empty:
            raise MethodError(f"last_blocks: {empty[0]} has no parameters; choose the blocks that hold them")
        return Selection(modules=chosen)
