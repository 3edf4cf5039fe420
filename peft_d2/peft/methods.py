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

_ALL: tuple[type[Method], ...] = (
    *(Adapter, AdaptFormer, BitFit, ConvLora, LastBlocks, Lora, Mona, NormTuning, HuggingFaceTuner),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
