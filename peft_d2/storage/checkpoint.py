"""Base weights: files of any usual form, read without executing anything in them and loaded with every tensor named.

Works on any nn.Module. Into an injected model it loads the base that the adapters are on, which changes nothing, and
refuses any other; injected tensors are no part of a base checkpoint and are never missing.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_d2.peft import injected_keys
from peft_d2.peft.adapted import own_buffers
from peft_d2.peft.errors import shortened
from peft_d2.peft.loading import older_names
from peft_d2.peft.targets import ModelIndex
from peft_d2.storage import adapter_file, torch_file
from peft_d2.storage.disk import Defect, load_tensors, not_finite
from peft_d2.storage.foreign import newest_in_run
from peft_d2.storage.names import FROM_TORCHVISION, TORCHVISION, from_caffe2, renamed, torchvision_misfit, written_by

# Tensors whose first dimension counts classes. One of these with another first dimension, all others equal, belongs
# to a head of another class count: it keeps the model's initial values. Any other difference of shape is an error.
CLASS_HEADS = (
    "*class_embed.*", "*criterion.empty_weight", "*label_enc.weight",  # Mask2Former, Mask DINO, DETR-like
    "*box_predictor*.cls_score.*", "*box_predictor*.bbox_pred.*", "*mask_head.predictor.*",  # R-CNN
    "*head.cls_score.*", "*head.bbox_pred.*",  # RetinaNet, FCOS
    "sem_seg_head.predictor.weight", "sem_seg_head.predictor.bias",  # semantic FPN
)  # fmt: skip
# The same of tensors whose other dimensions count classes, too: Keypoint R-CNN's keypoints, PointRend's point heads.
_CLASS_SIZED = (
    "*keypoint_head.score_lowres.*", "*coarse_head.prediction.*", "*point_head.predictor.*", "*point_head.fc*.weight",
)  # fmt: skip

# Buffers that the constructor computes from the config or from nothing: harmless when a file lacks them or has them
# in excess.
_COMPUTED = (
    "pixel_mean", "pixel_std", "*.cell_anchors.*", "*num_batches_tracked", "*relative_position_index", "*.attn_mask",
    "*criterion.empty_weight",
)  # fmt: skip
_ADDED_TO_BACKBONE = ("norm[0-9].weight", "norm[0-9].bias")  # Swin's output norms, which no published backbone has
_BACKBONES = ("backbone.bottom_up.", "backbone.net.", "backbone.")
# What training programs put before every name: wrappers of torch, lightning modules, self-distillation.
_LAYER, _BASE = re.compile(r"(^|\.)peft\.[\w-]+\.\w+\.|^peft_(base|values)\."), "peft_base."
_WRAPPERS = ("module", "_orig_mod", "model", "student", "net", "network", "ema", "model_ema", "ema_model", "teacher",
             "detector", "_forward_module", "online", "params", "params_ema", "weights", "state_dict", "state_dict_ema",
             "ema_state_dict", "checkpoint")  # fmt: skip
_NESTS = ("model", "state_dict", "model_state", "model_state_dict", "blobs", "module")  # around the state dict itself
_USUAL = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")

logger = logging.getLogger(__name__)
_REMEDY = "Download or copy it again; if it is meant to hold more than tensors, save its state dict alone and use that"
GIVE_ADAPTER = "MODEL.WEIGHTS takes the weights of a whole model; an adapter's folder goes into MODEL.PEFT.WEIGHTS"
SYSTEM_ERRORS = {errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM}


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or does not fit the model."""


class CheckpointDamaged(CheckpointError):
    """A checkpoint is not as it was written, so that an earlier one should be tried. ``defect`` says what is wrong."""

    def __init__(self, defect: str, message: str = "") -> None:
        self.defect = defect
        super().__init__(message or defect)


@dataclasses.dataclass
class Checkpoint:
    """What a checkpoint file holds: tensors by name, on the CPU, and plain values beside them ("__author__", ...)."""

    state: dict[str, Tensor]
    metadata: dict[str, Any]
    path: str


@dataclasses.dataclass
class LoadReport:
    """What `load_base` did; `str(report)` is the log text.

    Attributes:
        path: the file.
        loaded: names of the model's tensors that were loaded.
        reinitialised: (name, shape in the file, shape in the model) of heads of another class count.
        initial: tensors that the file lacks and that rightly keep their initial values.
        unexpected: names in the file that the model has no use for.
        backbone: the prefix of the only part that the file covers ("backbone."), or "" for a file of the whole model.
        removed: what was taken away before the names in the file ("student."), or "".
    """

    path: str
    loaded: list[str]
    reinitialised: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    initial: list[str]
    unexpected: list[str]
    backbone: str
    removed: str = ""

    def __str__(self) -> str:
        lines = [f"base weights {self.path}: {len(self.loaded)} tensors loaded"]
        if self.backbone:
            lines[0] += f"; the file holds a backbone alone ({self.backbone}*), all else keeps its initial values"
        heads = [f"{name} {old} -> {new}" for name, old, new in self.reinitialised]
        rest = (
            ("not in the file, initial values kept", [] if self.backbone else self.initial),
            ("taken off the file's names, those without it left out", [repr(self.removed)] if self.removed else []),
            ("another class count, initial values kept", heads),
            ("in the file, not in the model", self.unexpected),
        )  # fmt: skip
        return "\n".join(lines + [f"  {what}: {shortened(names)}" for what, names in rest if names])


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read `.pkl` (Detectron2's zoo and Caffe2), `.pth`, `.pt`, `.bin` (torch), or `.safetensors`.

    Nothing in the file is executed: see `torch_file`. A state dict under "model", "state_dict" and the like is taken
    out, "module." and "_orig_mod." before every name removed; `load_base` knows more such prefixes.

    Raises:
        CheckpointError: the file is missing, cut short, damaged, holds no tensors, is an adapter, or wants to run code.
    """
    content = read_file(path)
    if isinstance(content, Checkpoint):
        return content
    if not isinstance(content, Mapping):
        raise CheckpointError(f"the checkpoint {path} holds a {type(content).__name__}, not a state dict. {_REMEDY}")
    metadata = {str(k): v for k, v in content.items() if isinstance(v, (str, int, float, bool)) and len(str(k)) < 100}
    inner = next((content[key] for key in _NESTS if isinstance(content.get(key), Mapping)), content)
    if isinstance(inner.get("model"), Mapping):  # {"model": {"model": ...}}, as some trainers nest it
        inner = inner["model"]
    state = _tensors(inner, depth=1) or _tensors(content, depth=3)
    if not state:
        keys = ", ".join(sorted(str(key)[:80] for key in content)[:8])
        raise CheckpointError(f"the checkpoint {path} holds no tensors (found: {keys or 'nothing'}). {_REMEDY}")
    _refuse_adapter(state, path)
    averaged = (k for k, v in content.items() if re.search("(^|_)ema(_|$)", str(k), re.I) and isinstance(v, Mapping))
    if inner is not content and (name := next(averaged, None)):
        logger.warning(
            "The checkpoint %s also holds %r, averaged weights, which are not taken. To use them, save them alone.",
            *(path, name),
        )
    of_caffe2 = all("." not in str(name) for name in inner) and any(name.endswith(("_w", "_b")) for name in state)
    if "__author__" not in metadata and of_caffe2:
        metadata.update({"__author__": "Caffe2", "matching_heuristics": True})
        state = {name: value for name, value in state.items() if not name.endswith("_momentum")}
    wrapped = re.match(r"((module|_orig_mod)\.)*", os.path.commonprefix(list(state)))
    prefix = wrapped[0] if wrapped else ""
    return Checkpoint({name.removeprefix(prefix): value for name, value in state.items()}, metadata, str(path))


def _tensors(content: Mapping[Any, Any], depth: int) -> dict[str, Tensor]:
    """The tensors in a dict and in dicts inside it, ``depth`` levels deep; the keys on the way stand before a name."""
    found: dict[str, Tensor] = {}
    for key, value in content.items() if depth else ():
        if isinstance(key, str) and isinstance(value, Mapping):
            found |= {f"{key}.{name}": tensor for name, tensor in _tensors(value, depth - 1).items()}
        elif isinstance(key, str) and (tensor := torch_file.as_tensor(value)) is not None:
            found[key] = tensor.detach()
    return found


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
            inside = newest_in_run(file)
            kind = ", an adapter's" if (file / "adapter_config.json").is_file() else ""
            kind = kind or (f", that of a run: give {inside}" if inside else "")
            usual = [name for name in _USUAL if (file / name).is_file()]
            kind = kind or (f", that of a model of the hub: give {file / usual[0]}" if usual else "")
            raise CheckpointError(f"{file} is a folder{kind}. {GIVE_ADAPTER}")
        if not file.exists():
            raise CheckpointError(f"there is no checkpoint {file}: correct MODEL.WEIGHTS, or download the file first")
        if file.name.endswith(".index.json"):
            raise CheckpointError(
                f"{file} lists the parts of a checkpoint that was saved in several: put them into one, "
                "safetensors.torch.save_file({key: value for part in parts for key, value in load_file(part).items()}, "
                "'whole.safetensors'), and give that"
            )
        if not file.is_file():
            raise CheckpointError(f"{file} is no regular file, so it cannot be a checkpoint")
        if file.suffix != ".safetensors":
            return torch_file.read(file, values)
        state, metadata = load_tensors(file.read_bytes())
    except Defect as error:
        raise CheckpointDamaged(str(error), f"cannot read the checkpoint {file}: {error}. {_REMEDY}") from error
    except MemoryError as error:
        size = file.stat().st_size / 2**20
        raise CheckpointError(
            f"cannot read the checkpoint {file}: its {size:.0f} MiB do not fit into this process's memory ({error})"
        ) from error
    except OSError as error:
        message = f"cannot read the checkpoint {str(file)[:300]}: {error.strerror or error}"
        raise CheckpointError(message) if error.errno in SYSTEM_ERRORS else CheckpointDamaged(message) from error
    _refuse_adapter(state, file)
    return Checkpoint(state, dict(metadata), str(file))


def _refuse_adapter(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    if any(name.startswith(adapter_file.PREFIX) for name in state):
        raise CheckpointError(f"{path} is the file of an adapter. {GIVE_ADAPTER}")


def is_layer(name: str) -> bool:
    """Whether a name in a state dict is one that an injection has added, see :mod:`peft_d2.peft.state`."""
    return _LAYER.search(name) is not None


def load_base(
    model: nn.Module, checkpoint: Checkpoint | str | os.PathLike[str], of_injected: bool = False
) -> LoadReport:
    """Load base weights; what is not loaded is named in the report, which is logged, or in the error.

    Args:
        model: any module; its own `upgrade_state_dict(state) -> state` is applied first where it has one.
        checkpoint: a file, or what `read_checkpoint` returned.
        of_injected: the file may be the state dict of an injected model, of which the base is taken.

    Raises:
        CheckpointError: a tensor of the model is not in the file, or has another shape there, or would mean something
            else. The model is then unchanged.
    """
    file = checkpoint if isinstance(checkpoint, Checkpoint) else read_checkpoint(checkpoint)
    aliases = {name: tensor.names for tensor in ModelIndex.of(model).tensors.values() for name in tensor.names}
    injected = injected_keys(model)
    own = {name: value for name, value in model.state_dict().items() if name not in injected}
    state, removed = unwrapped(model, file, own)
    state, prefix = _named_as_in_model(model, dataclasses.replace(file, state=state), own)
    state = _without_layers(state, own, file.path, of_injected)
    renamed = older_names(model, state, own)
    state = {renamed.get(name, name): value for name, value in state.items()}
    matched, heads, misshaped = _compared(state, own, aliases)

    backbone = prefix or next((b for b in _BACKBONES if matched and all(name.startswith(b) for name in state)), "")
    missing = sorted(name for name in own if not any(alias in state for alias in aliases.get(name, [name])))
    required = [name for name in missing if not _any(name, _COMPUTED)]
    if backbone:
        inside = [name for name in missing if name.startswith(backbone)]
        required = [name for name in inside if not _any(name.removeprefix(backbone), _ADDED_TO_BACKBONE)]
    unexpected = sorted(name for name in state if name not in own and not _any(name, _COMPUTED))
    if required or misshaped or not matched:
        raise CheckpointError(_refusal(file, required, misshaped, unexpected, own, bool(matched)))
    if defect := not_finite(matched, {name for name, _ in own_buffers(model, remove_duplicate=False)}):
        raise CheckpointError(
            f"the checkpoint {file.path} holds {defect}. Nothing was loaded. It comes from a training that diverged, "
            "or is damaged: use an earlier one"
        )
    if lost := load_named_as_now(model, matched, strict=False):
        raise CheckpointError(f"the model's own loading hooks lost tensors of {file.path}: {shortened(sorted(lost))}")
    report = LoadReport(file.path, sorted(matched), heads, missing, unexpected, backbone, removed)
    logger.info("%s", report)
    return report


def load_named_as_now(model: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> list[str]:
    """Load tensors that have the model's present names; returns the names that its own loading hooks have lost.

    The present versions of all modules are given with them: otherwise modules that rename the tensors of older versions
    of themselves (the official Mask2Former's head) would rename these.
    """
    state = OrderedDict(tensors)
    state._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    return list(model.load_state_dict(state, strict=strict).unexpected_keys)


def _without_layers(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str, allowed: bool
) -> dict[str, Tensor]:
    """The base's tensors of a state dict; CheckpointError where it holds adapter layers and that is not ``allowed``."""
    layers = {name for name in state if is_layer(name) and name not in own}
    if layers and not allowed:
        raise CheckpointError(
            f"the checkpoint {path} is the state dict of a model with adapters, not a base: it holds "
            f"{len(layers)} tensors such as {min(layers)}. Give the config that it was trained with (MODEL.PEFT), load "
            "it by model.load_state_dict after inject, or write a file without adapters from there, save_merged"
        )
    base = {name.removeprefix(_BASE): state[name] for name in layers if name.startswith(_BASE)}
    return {name: value for name, value in (dict(state) | base).items() if name not in layers}


def _compared(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], aliases: Mapping[str, list[str]]
) -> tuple[dict[str, Tensor], list[tuple[str, tuple[int, ...], tuple[int, ...]]], list[str]]:
    """Compare file and model by name: tensors to load, heads of another class count, and what has a wrong shape."""
    matched, heads, misshaped = {}, [], []
    for name in sorted(state.keys() & own.keys()):
        old, new = tuple(state[name].shape), tuple(own[name].shape)
        patterns = (*CLASS_HEADS, *_CLASS_SIZED) if old[1:] == new[1:] else _CLASS_SIZED
        is_head = any(_any(alias, patterns) for alias in aliases.get(name, [name]))
        if old == new:
            matched[name] = state[name]
        elif len(old) == len(new) > 0 and is_head:
            heads.append((name, old, new))
        else:
            misshaped.append(f"{name} {old} -> {new}")
    return matched, heads, misshaped


def unwrapped(model: nn.Module, file: Checkpoint, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The file's tensors without the prefix that a training program has put before their names, and that prefix.

    A prefix is what all names begin with, or one of the usual words where some begin with it. Of several ("student."
    and "teacher.") the one counts after which most names are the model's, in doubt the first of ``_WRAPPERS``. Without
    such a prefix nothing is taken off.
    """
    split = [name.split(".") for name in file.state]
    shared = len(os.path.commonprefix([parts[:-1] for parts in split]))
    prefixes = {""}
    for parts in split:
        count = next((i for i, part in enumerate(parts) if i >= shared and part not in _WRAPPERS), len(parts) - 1)
        prefixes.update(".".join([*parts[:i], ""]) for i in range(1, count + 1))
    if len(prefixes) == 1:
        return dict(file.state), ""

    def stripped(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in file.state.items() if name.startswith(prefix)}

    def fits(prefix: str) -> tuple[int, list[int]]:
        renamed, _ = _named_as_in_model(model, dataclasses.replace(file, state=stripped(prefix)), own)
        order = [-_WRAPPERS.index(part) if part in _WRAPPERS else -99 for part in prefix.split(".")[:-1]]
        return sum(name in own and value.shape == own[name].shape for name, value in renamed.items()), order

    best = max(sorted(prefixes, key=len), key=fits)
    return (stripped(best), best) if fits(best)[0] > fits("")[0] else (dict(file.state), "")


def _named_as_in_model(model: nn.Module, file: Checkpoint, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The file's tensors under the model's names, and the prefix, "backbone." say, that was added for it."""
    state = dict(file.state)
    if file.metadata.get("__author__") == "Caffe2":
        state = from_caffe2(state)
    elif state.keys() >= TORCHVISION and not any(name.endswith("layer1.0.conv1.weight") for name in own):
        if problem := torchvision_misfit(model):
            raise CheckpointError(f"{file.path} is a ResNet of torchvision's make, and {problem}")
        state = {renamed(name, FROM_TORCHVISION): value for name, value in state.items()}
    upgrade: Any = getattr(model, "upgrade_state_dict", None)
    if upgrade is not None:
        state = upgrade(state)
    counts = {prefix: sum(prefix + name in own for name in state) for prefix in ("", *_BACKBONES)}
    best = max(counts, key=counts.__getitem__)  # the first of equals
    return {best + name: value for name, value in state.items()}, best


def _refusal(
    file: Checkpoint, missing: list[str], misshaped: list[str], unexpected: list[str], own: Mapping[str, Tensor],
    any_match: bool,
) -> str:  # fmt: skip
    """The message of a checkpoint that does not fit the model."""
    if any_match or misshaped:
        problem = "does not fit the model"
        rows = (
            (missing if any_match else [], "tensors of the model are not in the file"),
            (misshaped, "have another shape (file -> model)"),
            (unexpected, "tensors of the file are not in the model"),
        )
        lines = [f"{len(names)} {what}: {shortened(names)}" for names, what in rows if names]
    else:
        problem = "has no tensor of the model"
        lines = [f"the {of} has: {shortened(sorted(names), 5)}" for of, names in (("model", own), ("file", file.state))]
    if not any_match and (program := written_by(file.state)):
        lines.append(f"its names are those of {program}: take the weights that the model's authors published")
    else:
        lines.append("use the config that belongs to this file (backbone, depth, queries), or the file of this config")
    return "\n  ".join([f"the checkpoint {file.path} {problem}; nothing was loaded", *lines])


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
