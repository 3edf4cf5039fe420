"""Folders of Hugging Face `peft`: read into ours, and ours written for it.

A folder of ours that holds LoRA (or DoRA) alone is already one that `peft` loads; `export` checks that and leaves our
record out. The package itself is not needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_d2.storage import adapter_config, atomic, strict_json, tensor_file
from peft_d2.storage.adapter_file import CONFIG, MARK, RECORD, TENSORS, AdapterFile, AdapterFileError
from peft_d2.storage.adapter_file import read as read_own

_MAX_CONFIG_BYTES = 4 * 2**20
_SAVE_AGAIN = "save it again with peft's save_pretrained"


def is_huggingface(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder was written by Hugging Face peft: it has its two files, and not the marks of ours."""
    root = Path(folder)
    if os.path.lexists(root / RECORD) or not all(os.path.isfile(root / name) for name in (CONFIG, TENSORS)):
        return False
    try:
        return MARK not in tensor_file.read(root / TENSORS)[1]
    except (tensor_file.TensorFileDefect, OSError):
        return False


def read(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read a LoRA or DoRA that Hugging Face `peft` saved.

    Its files carry neither checksums nor the base's fingerprint, so damage that leaves the format valid cannot be
    found, and `base` is None.

    Raises:
        AdapterFileError: a file is missing or damaged, or the adapter is of a kind that is not known here.
    """
    root = Path(folder)
    try:
        if (root / CONFIG).stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterFileError(root / CONFIG, "it is larger than any such file", _SAVE_AGAIN)
        config = strict_json.loads((root / CONFIG).read_bytes())
    except strict_json.JSONDefect as error:
        raise AdapterFileError(root / CONFIG, str(error), _SAVE_AGAIN) from None
    except OSError as error:
        raise AdapterFileError(root / CONFIG, error.strerror or str(error), _SAVE_AGAIN) from error
    try:
        stored, _ = tensor_file.read(root / TENSORS)
    except tensor_file.TensorFileDefect as error:
        raise AdapterFileError(root / TENSORS, str(error), _SAVE_AGAIN) from None
    except OSError as error:
        remedy = _SAVE_AGAIN + " (safe_serialization=True): adapter_model.bin is a pickle and is not read"
        raise AdapterFileError(root / TENSORS, error.strerror or str(error), remedy) from error
    try:
        tensors = _named_as_in_model(stored)
        adapter_config.check(tensors, config)
        scales = adapter_config.scales(tensors, config)
        methods = _methods(tensors, scales, config)
    except ValueError as error:
        raise AdapterFileError(root, str(error), "use a LORA adapter on linear and convolution layers") from None
    return AdapterFile(tensors, methods, _train(tensors, config), None, {}, "", scales)


def export(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Write an adapter of ours as a folder of Hugging Face `peft`, without our record.

    Raises:
        AdapterFileError: the source is damaged, or holds a method that `peft` does not have.
    """
    read_own(source)
    data = {name: Path(source, name).read_bytes() for name in (CONFIG, TENSORS)}
    kind = strict_json.loads(data[CONFIG])["peft_type"]
    if kind != adapter_config.LORA:
        raise AdapterFileError(
            source,
            "it holds methods or places that Hugging Face peft cannot express",
            "export one that has only LoRA or DoRA on linear and convolution layers, or merge it into a checkpoint",
        )
    with atomic.folder(destination, (CONFIG, TENSORS)) as temporary:
        for name, content in data.items():
            (temporary / name).write_bytes(content)


def _named_as_in_model(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = adapter_config.to_model(stored)
    for name in tensors:
        if "lora_" in name and not _is_lora(name):
            raise ValueError(f"the tensor {name[:120]!r} is of a kind that is not known")
    return tensors


def _is_lora(name: str) -> bool:
    return name.endswith((adapter_config.A, adapter_config.B, adapter_config.MAGNITUDE))


def _methods(
    tensors: Mapping[str, Tensor], scales: Mapping[str, float], config: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One entry per combination of rank, alpha and kind; targets name each module outright."""
    if config.get("fan_in_fan_out") or config.get("lora_bias"):
        raise ValueError("fan_in_fan_out and lora_bias are not known")
    groups: dict[tuple[bool, int, float], list[str]] = {}
    for path, rank in adapter_config.lora_ranks(tensors).items():
        dora = path + adapter_config.MAGNITUDE in tensors
        groups.setdefault((dora, rank, scales[path] * rank), []).append(path)
    dropout = config.get("lora_dropout") or 0.0
    if not isinstance(dropout, (int, float)):
        raise ValueError(f"adapter_config.json: lora_dropout is {dropout!r}, not a number")
    return [
        {
            "NAME": "lora",
            "TARGETS": [f"re:{re.escape(path)}" for path in paths],
            "RANK": rank,
            "ALPHA": alpha,
            "DROPOUT": float(dropout),
            "DORA": dora,
        }
        for (dora, rank, alpha), paths in groups.items()
    ]


def _train(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules trained in full: what `modules_to_save` names of each remaining tensor, or the tensor itself."""
    wanted = tuple(name for name in config.get("modules_to_save") or () if isinstance(name, str) and name)
    found: dict[str, None] = {}
    for name in sorted(name for name in tensors if not _is_lora(name)):
        parts = name.split(".")
        prefixes = [".".join(parts[:count]) for count in range(1, len(parts))]
        chosen = next((prefix for prefix in prefixes if wanted and prefix.endswith(wanted)), name)
        found[f"re:{re.escape(chosen)}"] = None
    return tuple(found)
