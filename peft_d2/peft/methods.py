"""The methods by their config name."""

from __future__ import annotations

from .adapter import Adapter
from .lora import Lora
from .method import Method

METHODS: dict[str, type[Method]] = {method.name: method for method in (Adapter, Lora)}
