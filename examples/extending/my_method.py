"""A method of one's own: a learnt gain for each channel of a module's output, after (IA)^3 (arXiv 2205.05638)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import peft_d2
from peft_d2.peft.adapted import AdapterLayer
from peft_d2.peft.method import Method
from peft_d2.peft.methods import METHODS
from peft_d2.peft.outputs import OutputOptions, Width, check_width, map_first_tensor, output_width
from peft_d2.peft.targets import Target


class GainLayer(AdapterLayer):
    """What is stored for one target module: its tensors are the file's tensors."""

    def __init__(self, target: Target, width: Width) -> None:
        super().__init__()
        # Zero, so that the adapted model starts as the base; with the device and dtype of the target module.
        self.gain = nn.Parameter(torch.zeros(width.channels, **target.factory_kwargs()))
        self.width, self.name = width, target.name

    def adapted_forward(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output, adapted; ``forward`` computes the one without this layer."""
        return map_first_tensor(forward(*args, **kwargs), self, self.name)

    def forward(self, x: Tensor) -> Tensor:
        """x * (1 + gain), for channels last or first."""
        check_width(x, self.width, self.name)
        gain = self.gain.view(-1, *[1] * (x.dim() - 2)) if self.width.channels_first else self.gain
        return x * (1 + gain)


class Gain(Method):
    """``{NAME: gain, TARGETS: [...]}``."""

    name = "gain"
    options_class = OutputOptions  # TARGETS and EXCLUDE; DIM and LAYOUT where a module does not say its width

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        """One layer for each target module."""
        return [(target, GainLayer(target, output_width(target, self.options))) for target in targets]


METHODS[Gain.name] = Gain  # the one line: configs, inject, files and merging know it now


def main() -> nn.Module:
    """Inject it into a small model and train one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    print(peft_d2.inject(model, [{"NAME": "gain", "TARGETS": ["0"]}]))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model


if __name__ == "__main__":
    main()
