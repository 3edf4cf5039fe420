"""Out of a run's files come others: of somebody else's checkpoint an adapter's folder, of base and adapter one file."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peft_d2 import adapters, peft
from peft_d2.data.config import PEFT_ARCHITECTURE, base_architecture
from peft_d2.engine.checks import build_model
from peft_d2.engine.config import add_config
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.factory import register
from peft_d2.ops.official import serve_official
from peft_d2.storage import disk


def their_config(config_file: str, adders: Sequence[str], opts: Sequence[str] = ()) -> Any:
    """A config of somebody else's code: Detectron2's defaults, their keys, ``MODEL.PEFT``, then the file and the pairs.

    Args:
        config_file: a yaml of theirs, or the ``config.yaml`` of a run.
        adders: ``PKG.MOD:FN``, functions that add keys to a config, or make one, as their program calls them.
        opts: KEY VALUE pairs.

    Raises:
        ConfigError: a function that cannot be imported, a file that cannot be read, a key that nobody has added.
    """
    from detectron2.config import get_cfg

    cfg = get_cfg()
    serve_official()
    for adder in adders:
        module, _, name = adder.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
            cfg = function() if not inspect.signature(function).parameters else function(cfg) or cfg
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"--import {adder}: {said}. Expected PKG.MOD:FN, a function of a config.") from error
    register()
    add_config(cfg, models=False)
    for where, read in (
        (config_file, lambda: cfg.merge_from_file(config_file, allow_unsafe=False)),
        ("KEY VALUE pairs", lambda: cfg.merge_from_list(list(opts))),
    ):
        try:
            read()
        except (KeyError, OSError, AssertionError, ValueError) as error:
            said = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
            hint = "Name the functions that add its keys: --import; peft_d2:add_config is the one for our own models."
            raise ConfigError(f"{where}: {said}. {hint if isinstance(error, KeyError) else ''}".strip()) from error
    return cfg


def take_adapter(
    cfg: Any, checkpoint: str | os.PathLike[str], adapter: str | os.PathLike[str] = "",
    merged: str | os.PathLike[str] = "",
) -> list[str]:  # fmt: skip
    """Make an adapter's folder, a checkpoint without adapters, or both, of what somebody else's trainer saved.

    Nothing but the checkpoint is read: the base is in it.

    Args:
        cfg: the run's config, with ``MODEL.PEFT`` as it was trained; the models are registered.
        checkpoint: base and adapter in one, such as ``model_final.pth``.
        adapter: the folder to write, as of :func:`peft_d2.save_adapter`.
        merged: the checkpoint to write, as of :func:`peft_d2.save_merged`. Beside ``merged.pth`` comes ``merged.yaml``,
            the config without ``MODEL.PEFT``, which their code reads.

    Returns:
        what was written.

    Raises:
        ConfigError: nothing to write, a config without an adapter, or a file that would be written over.
        CheckpointError: the file was not written of this model with this adapter.
        InjectionError: the adapter cannot be merged. Nothing was written.
    """
    if not (adapter or merged):
        raise ConfigError("there is nothing to write: name an adapter's folder, a merged checkpoint or both.")
    if cfg.MODEL.META_ARCHITECTURE != PEFT_ARCHITECTURE:
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, not {PEFT_ARCHITECTURE}: this run's adapter "
            "is not in its config. Use peft_d2.load_trained in the code that injected it."
        )
    beside = _check_place(merged, checkpoint, True) if merged else None
    model = _build(cfg, {"WEIGHTS": os.fspath(checkpoint)})
    adapters.load_trained(model, checkpoint)
    if merged:
        peft.merge_whole(model)
    if adapter:
        adapters.save_adapter(model, adapter)
    written = [os.fspath(adapter)] if adapter else []
    return written + (_write_merged(model, cfg, merged, beside) if merged else [])


def merge_adapter(
    cfg: Any, adapter: str | os.PathLike[str], merged: str | os.PathLike[str], with_config: bool = False
) -> list[str]:
    """Load a config's model, its base ``MODEL.WEIGHTS`` and an adapter, and write one checkpoint with the base's keys.

    Args:
        cfg: the base's config, or that of a run.
        adapter: a folder, as :func:`peft_d2.load_adapter` takes it.
        merged: the checkpoint to write.
        with_config: write the config without ``MODEL.PEFT`` beside it, ``merged.yaml``.

    Returns:
        what was written.

    Raises:
        ConfigError: no base weights are named, or a file would be written over.
        CheckpointError, AdapterFileError, InjectionError: what cannot be loaded or merged, by name.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty: append MODEL.WEIGHTS and the base checkpoint to the command.")
    beside = _check_place(merged, cfg.MODEL.WEIGHTS, with_config)
    node = {"META_ARCHITECTURE": base_architecture(cfg), "METHODS": [], "TRAIN": [], "WEIGHTS": os.fspath(adapter)}
    model = _build(cfg, {"META_ARCHITECTURE": PEFT_ARCHITECTURE}, node)
    return _write_merged(model, cfg, merged, beside)


def _build(cfg: Any, of_model: dict[str, Any], of_peft: dict[str, Any] | None = None) -> nn.Module:
    """The config's model on the CPU, with these keys of ``MODEL`` and ``MODEL.PEFT``."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.update(of_model)
    cfg.MODEL.PEFT.update(of_peft or {})
    cfg.freeze()
    return build_model(cfg)


def _check_place(merged: str | os.PathLike[str], base: str | os.PathLike[str], with_config: bool) -> Path | None:
    """Where the config of a merged checkpoint goes, if anywhere.

    Raises:
        ConfigError: the checkpoint or its config would be written over what was read, or is somebody's.
    """
    adapters.require_torch_name(merged)
    if Path(merged).exists() and Path(base).exists() and os.path.samefile(merged, base):
        raise ConfigError(f"{merged} is what is read, and would be written over: choose another name.")
    beside = Path(merged).with_suffix(".yaml")
    if (
        with_config
        and beside.exists()
        and f"  WEIGHTS: {os.fspath(merged)}\n" not in beside.read_text(errors="replace")
    ):
        raise ConfigError(f"{beside} is of something else and would be written over: choose another name for {merged}.")
    return beside if with_config else None


def _write_merged(model: nn.Module, cfg: Any, merged: str | os.PathLike[str], beside: Path | None) -> list[str]:
    """Write the merged checkpoint, and the config that belongs to it where ``beside`` says so."""
    adapters.save_merged(model, merged)
    if beside is None:
        return [os.fspath(merged)]
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.META_ARCHITECTURE, plain.MODEL.WEIGHTS = base_architecture(cfg), os.fspath(merged)
    del plain.MODEL["PEFT"]
    disk.write_bytes(beside, plain.dump().encode())
    return [os.fspath(merged), str(beside)]
