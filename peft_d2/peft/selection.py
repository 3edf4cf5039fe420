"""What the methods share that train parameters of the model in place and add nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from .method import Options, Site
from .runtime import walk


@dataclass(frozen=True)
class SelectOptions(Options):
    """``TARGETS`` default to the whole model."""

    targets: list[str] = field(default_factory=lambda: ["**"])


def parameters_where(sites: Sequence[Site], wanted: Callable[[nn.Module, str], bool]) -> list[str]:
    """Names of the parameters in the sites, at any depth, for which ``wanted(owner, own name)``; each name once."""
    names = {
        f"{path}.{leaf}" if path else leaf: None
        for site in sites
        for path, module, _ in walk(site.module, site.name)
        for leaf, _ in module.named_parameters(recurse=False)
        if wanted(module, leaf)
    }
    return list(names)
