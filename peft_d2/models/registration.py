"""Registers the models and their config keys with Detectron2, and lends them the official packages' names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from detectron2.config import CfgNode
from fvcore.common.registry import Registry

from peft_d2.data.config import add_keys
from peft_d2.models import feature_cache
from peft_d2.models.checks import ModelConfigError
from peft_d2.peft.errors import alike

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders, found by their name in the config. A registered one is called with ``(cfg, in_channels)``, and its
result with the multi-scale features, coarsest first, and the mask features.
"""

T = TypeVar("T", bound=Callable[..., Any])
_ENTRIES: list[tuple[Registry, Callable[..., Any], str, str, str]] = []
_logger = logging.getLogger(__name__)


def entry(registry: Registry, name: str, upstream: str = "", keys: str = "") -> Callable[[T], T]:
    """Decorator: :func:`register` shall put this class or function into ``registry`` under our ``name``.

    ``upstream`` is the official package's name, under which published yaml files ask for it; ``keys`` are its config
    keys with their defaults, as YAML.
    """

    def remember(model: T) -> T:
        _ENTRIES.append((registry, model, name, upstream, keys))
        return model

    return remember


def add_models_config(cfg: CfgNode) -> None:
    """Add the models' config keys to ``cfg``, in place.

    What is there already stays: this can come after upstream's ``add_*_config``, before them, or twice.
    """
    for keys in (*(entry[-1] for entry in _ENTRIES), feature_cache.KEYS):
        add_keys(cfg, keys)


def register(upstream_names: bool = False) -> None:
    """Make the models known to Detectron2; calling it again changes nothing.

    ``upstream_names`` also serves the official packages' names where they are free, so that published yaml files run as
    they are. An official package that is imported later takes its names back.
    """
    for registry, model, name, *_ in _ENTRIES:
        if name not in registry:
            registry._do_register(name, model)
    if upstream_names:
        for registry in {id(entry[0]): entry[0] for entry in _ENTRIES}.values():
            _lend(registry, {entry[3]: entry[1] for entry in _ENTRIES if entry[0] is registry and entry[3]})


def registered(registry: Registry, key: str, name: str) -> Callable[..., Any]:
    """The object that ``registry`` has under ``name``, the value of the config key ``key``.

    Raises:
        ModelConfigError: nothing; the official packages have a registry of decoders of their own.
    """
    if name not in registry:
        known = sorted(known for known, _ in registry)
        near = alike(name, known) or known
        raise ModelConfigError(
            f"{key}: {name!r} is not registered as {registry._name}; the nearest names are {near}. What another "
            f"package keeps in a registry of its own is made known by {registry._name}_REGISTRY.register(the_class) of "
            "peft_d2.models.registration"
        )
    return registry.get(name)


def _lend(registry: Registry, names: dict[str, Callable[..., Any]]) -> None:
    """Register ``names`` where they are free, and remove each when an official package registers it later.

    Detectron2 leaves one way to notice that: replacing ``_do_register`` of this registry object (not of its class).
    """
    lent = {name: model for name, model in names.items() if name not in registry}
    if not lent:
        return
    registry._obj_map.update(lent)
    register_plainly = registry._do_register

    def give_back_first(name: str, obj: Any) -> None:
        if name in lent and registry._obj_map.get(name) is lent.pop(name):
            del registry._obj_map[name]
            _logger.info("%s now serves %r in registry %s", getattr(obj, "__module__", obj), name, registry._name)
        register_plainly(name, obj)

    registry._do_register = give_back_first
