"""Reading checkpoints of any usual form without executing anything that they contain."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_d2.storage import adapter_config, tensor_file, torch_file

# Where training programs put the state dict inside the file.
_NESTS = ("model", "state_dict", "model_state", "model_state_dict", "blobs", "module")
_REMEDY = "Download or copy it again; if it is meant to hold more than tensors, save its state dict alone and use that"
_GIVE_ADAPTER = "MODEL.WEIGHTS takes the weights of a whole model; an adapter's folder goes into MODEL.PEFT.WEIGHTS"
SYSTEM_ERRORS = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM}


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint is not as it was written; another one may be.

    Attributes:
        defect: what is wrong, in words.
    """

    def __init__(self, defect: str, message: str = "") -> None:
        self.defect = defect
        super().__init__(message or defect)


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

    Nothing in the file is executed: see `torch_file`. A state dict under "model", "state_dict" and the like is taken
    out, a "module." before every name removed; `load_base` knows more such prefixes.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, holds no tensors, is an adapter, or wants to run code.
    """
    content = read_file(path)
    if isinstance(content, Checkpoint):
        return content
    return _unpacked(content, str(path))


def read_file(path: str | os.PathLike[str], values: bool = True) -> Any:
    """The content of a file: a `Checkpoint` of a `.safetensors`, else the object that was saved.

    Args:
        path: the file.
        values: False leaves the tensors of a torch file on the meta device.

    Raises:
        CheckpointDamaged: it is not as it was written, or holds more than weights.
        CheckpointError: it is missing, or this process cannot read it.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise CheckpointError(f"{file} is a folder{_kind_of_folder(file)}. {_GIVE_ADAPTER}")
        if not file.exists():
            raise CheckpointError(f"there is no checkpoint {file}: correct MODEL.WEIGHTS, or download the file first")
        if not file.is_file():
            raise CheckpointError(f"{file} is no regular file, so it cannot be a checkpoint")
        if file.suffix != ".safetensors":
            return torch_file.read(file, values)
        state, metadata = tensor_file.read(file)
    except (torch_file.Refused, tensor_file.TensorFileDefect) as error:
        raise CheckpointDamaged(str(error), f"cannot read the checkpoint {file}: {error}. {_REMEDY}") from error
    except MemoryError as error:
        size = file.stat().st_size / 2**20
        raise CheckpointError(
            f"cannot read the checkpoint {file}: its {size:.0f} MiB do not fit into this process's memory ({error})"
        ) from error
    except OSError as error:
        message = f"cannot read the checkpoint {str(file)[:300]}: {error.strerror or error}"
        raise CheckpointError(message) if error.errno in SYSTEM_ERRORS else CheckpointDamaged(message) from error
    if any(name.startswith(adapter_config.PREFIX) for name in state):
        raise CheckpointError(f"{file} is the file of an adapter. {_GIVE_ADAPTER}")
    return Checkpoint(state, dict(metadata), str(file))


def _kind_of_folder(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return ", an adapter's"
    if found := newest_in_run(folder):
        return f", that of a run: give {found}"
    return ""


def newest_in_run(folder: Path) -> str:
    """The checkpoint that stands for the run in a folder, "" where it is none's: for messages."""
    names = [f"{kind}_final{suffix}" for kind, suffix in (("adapter", ""), ("model", ".pth"))]
    found = [folder / name for name in names] + sorted(folder.glob("adapter_[0-9]*"), reverse=True)
    found += sorted(folder.glob("model_[0-9]*.pth"), reverse=True)
    return next((str(path) for path in found if path.exists()), "")


def _unpacked(content: Any, path: str) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"the checkpoint {path} holds a {type(content).__name__}, not a state dict. {_REMEDY}")
    metadata = {str(k): v for k, v in content.items() if isinstance(v, (str, int, float, bool)) and len(str(k)) < 100}
    inner = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), content)
    if isinstance(inner.get("model"), Mapping):  # {"model": {"model": ...}}, as some trainers nest it
        inner = inner["model"]
    state = {}
    for name, value in inner.items():
        tensor = torch_file.as_tensor(value) if isinstance(name, str) else None
        if tensor is not None:
            state[name] = tensor.detach()
    if not state:
        found = ", ".join(sorted(str(key)[:80] for key in content)[:8])
        raise CheckpointError(f"the checkpoint {path} holds no tensors (found: {found or 'nothing'}). {_REMEDY}")
    if any(name.startswith(adapter_config.PREFIX) for name in state):
        raise CheckpointError(f"{path} is the file of an adapter. {_GIVE_ADAPTER}")
    if "__author__" not in metadata and _is_caffe2(inner, state):
        metadata.update({"__author__": "Caffe2", "matching_heuristics": True})
        state = {name: value for name, value in state.items() if not name.endswith("_momentum")}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return Checkpoint(state, metadata, path)


def _is_caffe2(inner: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    return all("." not in str(name) for name in inner) and any(name.endswith(("_w", "_b")) for name in state)
