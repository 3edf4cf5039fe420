"""A method of one's own: a learnt gain for each channel of a module's output, after (IA)^3 (arXiv 2205.05638)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import peft_d2
from peft_d2.peft.methods import METHODS
from peft_d2.peft.outputs import OutputLayer, OutputMethod, OutputOptions
from peft_d2.peft.targets import Target


class GainLayer(OutputLayer):
    """What is stored for one target module: its tensors are the file's tensors."""

    def __init__(self, target: Target, options: OutputOptions) -> None:
        super().__init__(target, options)  # reads the output's width and layout off the module
        # Zero, so that the adapted model starts as the base; with the device and dtype of the target module.
        self.gain = nn.Parameter(torch.zeros(self.channels, **target.factory_kwargs()))

    def change(self, h: Tensor) -> Tensor:
        """The adapted output for the module's output (..., channels)."""
        return h * (1 + self.gain)


class Gain(OutputMethod):
    """``{NAME: gain, TARGETS: [...]}``."""

    name = "gain"
    options_class = OutputOptions  # TARGETS and EXCLUDE; DIM and LAYOUT where a module does not say its width
    layer_class = GainLayer


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
