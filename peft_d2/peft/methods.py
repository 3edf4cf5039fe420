"""The methods by their config name."""

from __future__ import annotations

from .adapter import Adapter
from .adaptformer import AdaptFormer
from .conv_lora import ConvLora
from .huggingface import HuggingFaceTuner
from .lora import Lora
from .method import Method
from .mona import Mona
from .selective import BitFit, LastBlocks, NormTuning
from .side import E3va

# A new method is added here. The order is that of adapter layers on one module, innermost first.
_INNERMOST_FIRST: tuple[type[Method], ...] = (
    *(Lora, HuggingFaceTuner),  # change weights
    *(ConvLora, AdaptFormer, Mona, Adapter, E3va),  # add to an output
    *(BitFit, NormTuning, LastBlocks),  # train what is there
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _INNERMOST_FIRST}
