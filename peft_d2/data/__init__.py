"""Data: registration from the config, loaders whose order survives a restart, mappers, checks, the toy world.

Names are looked up on first use, so that the checks and the toy world work where Detectron2 is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "add_data_config": "config",
    "register_from_config": "registration",
    "register_builtin": "builtin",
    "class_names": "classes",
    "build_train_loader": "loader",
    "build_test_loader": "loader",
    "workers_ended": "loader",
    "build_mapper": "mappers",
    "check_coco": "validation",
    "check_datasets": "validation",
    "Problem": "validation",
    "tile_coco": "tiles",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
