"""Parameter-efficient fine-tuning for any Detectron2 model.

Importing this package imports torch alone. The names below are looked up on first use; those that need Detectron2
import it then, and say how to get it where it is missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "add_config": "engine.config",
    "register": "engine.factory",
    "inject": "peft",
    "merge": "peft",
    "unmerge": "peft",
    "disabled": "peft",
    "set_adapter": "peft",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "ms_deform_attn": "ops",
}

__all__ = [
    "__version__",
    "add_config",
    "disabled",
    "inject",
    "load_adapter",
    "merge",
    "ms_deform_attn",
    "register",
    "save_adapter",
    "set_adapter",
    "unmerge",
]

if TYPE_CHECKING:
    from peft_d2.adapters import load_adapter, save_adapter
    from peft_d2.engine.config import add_config
    from peft_d2.engine.factory import register
    from peft_d2.ops import ms_deform_attn
    from peft_d2.peft import disabled, inject, merge, set_adapter, unmerge


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
