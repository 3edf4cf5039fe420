"""Make an adapter's folder of somebody else's checkpoint, and one checkpoint of a base with its adapter."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from peft_d2 import adapters, peft
from peft_d2.data.config import PEFT_ARCHITECTURE, base_architecture
from peft_d2.engine.config import leaves, read_top, with_values
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.factory import build_model
from peft_d2.storage import disk


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
    beside = merged_place(merged, checkpoint, True) if merged else None
    model = build_model(with_values(cfg, {"MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": os.fspath(checkpoint)}))
    adapters.load_trained(model, checkpoint)
    if merged:
        peft.merge_whole(model)
    if adapter:
        adapters.save_adapter(model, adapter)
    written = [os.fspath(adapter)] if adapter else []
    return written + (write_merged(model, cfg, merged, beside) if merged else [])


def merged_place(merged: str | os.PathLike[str], base: str | os.PathLike[str], with_config: bool) -> Path | None:
    """Where the config of the checkpoint ``merged`` of ``base`` goes: beside it, if ``with_config``.

    Raises:
        ConfigError: the checkpoint or its config would be written over what was read, or is somebody's.
    """
    adapters.require_torch_name(merged)
    if os.path.exists(merged) and os.path.exists(base) and os.path.samefile(merged, base):
        raise ConfigError(f"{merged} is what is read, and would be written over: choose another name.")
    beside = Path(merged).with_suffix(".yaml")
    before = {}
    with contextlib.suppress(ConfigError):
        before = dict(leaves(read_top(str(beside))))
    if with_config and beside.exists() and before.get("MODEL.WEIGHTS") != os.fspath(merged):
        raise ConfigError(f"{beside} is of something else and would be written over: choose another name for {merged}.")
    return beside if with_config else None


def write_merged(model: nn.Module, cfg: Any, merged: str | os.PathLike[str], beside: Path | None) -> list[str]:
    """Write the merged checkpoint and, unless ``beside`` is None, its config there; returns what was written."""
    adapters.save_merged(model, merged)
    if beside is None:
        return [os.fspath(merged)]
    plain = with_values(cfg, {"MODEL.META_ARCHITECTURE": base_architecture(cfg), "MODEL.WEIGHTS": os.fspath(merged)})
    del plain.MODEL["PEFT"]
    disk.write_bytes(beside, plain.dump().encode())
    return [os.fspath(merged), str(beside)]
