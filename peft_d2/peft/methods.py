"""The methods by their config name."""

from __future__ import annotations

from .adapter import Adapter
from .adaptformer import AdaptFormer
from .bitfit import BitFit
from .conv_experts import ConvLora
from .huggingface_tuner import HuggingFaceTuner
from .last_blocks import LastBlocks
from .lora import Lora
from .method import Method
from .mona import Mona
from .norm_tuning import NormTuning

_ALL: tuple[type[Method], ...] = (
    *(Adapter, AdaptFormer, BitFit, ConvLora, LastBlocks, Lora, Mona, NormTuning, HuggingFaceTuner),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
