# ruff: noqa: F401  the imports are for type checkers
"""Parameter-efficient fine-tuning for any Detectron2 model.

Importing this package imports torch alone. The names below are looked up on first use; those that need Detectron2
import it then, and say how to get it where it is missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_EXPORTS = {
    "add_config": "engine.config",
    "register": "engine.factory",
    "load_base": "adapters",
    "inject": "peft",
    "prove_live": "peft",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "load_adapters": "adapters",
    "load_trained": "adapters",
    "save_merged": "adapters",
    "take_adapter": "engine.convert",
    "push_to_hub": "storage.hub",
    "set_adapter": "peft",
    "merge": "peft",
    "unmerge": "peft",
    "disabled": "peft",
    "fit_memory": "memory",
    "ms_deform_attn": "ops",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from peft_d2.adapters import load_adapter, load_adapters, load_base, load_trained, save_adapter, save_merged
    from peft_d2.engine.config import add_config
    from peft_d2.engine.convert import take_adapter
    from peft_d2.engine.factory import register
    from peft_d2.memory import fit_memory
    from peft_d2.ops import ms_deform_attn
    from peft_d2.peft import disabled, inject, merge, prove_live, set_adapter, unmerge
    from peft_d2.storage.hub import push_to_hub


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
