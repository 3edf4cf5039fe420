"""Reading checkpoints of any usual form without executing anything that they contain."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peft_d2.storage import restricted_pickle, tensor_file

# Where training programs put the state dict inside the file.
_NESTS = ("model", "state_dict", "model_state", "model_state_dict", "blobs", "module")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model."""


@dataclasses.dataclass
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        state: name -> tensor, on the CPU.
        metadata: plain facts beside it: "__author__", "matching_heuristics", "iteration", ...
        path: the file, for messages.
    """

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    path: str


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read `.pkl` (Detectron2's zoo and Caffe2), `.pth`, `.pt`, `.bin` (torch), or `.safetensors`.

    Nothing in the file is executed: pickles go through a reader that knows arrays and containers alone, torch files
    through `weights_only`. A state dict under "model", "state_dict" and the like is taken out, a "module." before
    every name removed.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, holds no tensors, or wants to run code.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"there is no checkpoint {file}: correct MODEL.WEIGHTS, or download the file first")
    try:
        content = _read(file)
    except (restricted_pickle.PickleRefused, tensor_file.TensorFileDefect) as error:
        raise CheckpointError(f"cannot read the checkpoint {file}: {error}. {_REMEDY}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {file}: {error.strerror or error}") from error
    return _unpacked(content, str(file))


_REMEDY = "Download or copy it again; if it is meant to hold more than tensors, save its state dict alone and use that"


def _read(file: Path) -> Any:
    with file.open("rb") as stream:
        start = stream.read(4)
        stream.seek(0)
        if file.suffix == ".safetensors":
            return tensor_file.read(file)[0]
        if not start:
            raise restricted_pickle.PickleRefused("it is empty")
        if file.suffix == ".pkl" and start != _ZIP:
            return restricted_pickle.load(stream, file.stat().st_size)
    if start == _ZIP:
        _check_archive(file)
    elif start[:1] != _PICKLE:
        # torch would also try tar archives here, whose reader could be made to run code before torch 2.6.
        raise restricted_pickle.PickleRefused("it is neither a torch file nor a pickle, or its beginning is damaged")
    return _torch_load(file)


def _torch_load(file: Path) -> Any:
    # Many published files carry the training program's options; a Namespace only holds attributes.
    allow = getattr(torch.serialization, "safe_globals", None)
    with allow([argparse.Namespace]) if allow else contextlib.nullcontext():
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # damaged files fail in torch's reader in many ways
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise restricted_pickle.PickleRefused(f"torch's safe reader refuses it ({reason[:300]})") from None


def _check_archive(file: Path) -> None:
    """A torch file is a zip of stored members. Compressed ones could unpack to any size; code has no place there."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise restricted_pickle.PickleRefused(f"it is cut short or damaged ({error})") from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise restricted_pickle.PickleRefused("it holds compressed members, which torch never writes")
    if sum(member.file_size for member in members) > file.stat().st_size:
        raise restricted_pickle.PickleRefused("its members claim more bytes than the file has")
    if any(member.filename.endswith(("constants.pkl", ".py")) for member in members):
        raise restricted_pickle.PickleRefused("it is a TorchScript program, not weights")


def _unpacked(content: Any, path: str) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"the checkpoint {path} holds a {type(content).__name__}, not a state dict. {_REMEDY}")
    metadata = {str(k): v for k, v in content.items() if isinstance(v, (str, int, float, bool)) and len(str(k)) < 100}
    inner = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), content)
    if isinstance(inner.get("model"), Mapping):  # {"model": {"model": ...}}, as some trainers nest it
        inner = inner["model"]
    state = {name: _tensor(value, f"{path}: {name}") for name, value in inner.items() if _is_array(value)}
    state = {name: value for name, value in state.items() if isinstance(name, str)}
    if not state:
        found = ", ".join(sorted(map(str, content))[:8])
        raise CheckpointError(f"the checkpoint {path} holds no tensors (found: {found or 'nothing'}). {_REMEDY}")
    if "__author__" not in metadata and _is_caffe2(inner, state):
        metadata.update({"__author__": "Caffe2", "matching_heuristics": True})
        state = {name: value for name, value in state.items() if not name.endswith("_momentum")}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return Checkpoint(state, metadata, path)


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


def _is_caffe2(inner: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    return all("." not in name for name in inner) and any(name.endswith(("_w", "_b")) for name in state)


def _tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if value.layout is torch.strided and value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"cannot read {where}: the tensor of shape {tuple(value.shape)} is larger than its data")
    return value.detach()
