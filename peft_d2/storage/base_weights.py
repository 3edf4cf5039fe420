"""Loading base weights into a model, every tensor that is not loaded by name.

Works on any nn.Module. Into an injected model it loads the base that the adapters are on, which changes nothing, and
refuses any other; injected tensors are no part of a base checkpoint and are never missing.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from peft_d2.peft import injected_keys
from peft_d2.storage import published_names
from peft_d2.storage.checkpoint import Checkpoint, CheckpointError, read_checkpoint

__all__ = [
    "CLASS_HEADS",
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "load_base",
    "read_checkpoint",
]

# Tensors whose first dimension counts classes. One of these with another first dimension, all others equal, belongs
# to a head of another class count: it keeps the model's initial values. Any other difference of shape is an error.
CLASS_HEADS = (
    "*class_embed.*", "*criterion.empty_weight", "*label_enc.weight",  # Mask2Former, Mask DINO, DETR-like
    "*box_predictor*.cls_score.*", "*box_predictor*.bbox_pred.*", "*mask_head.predictor.*",  # R-CNN
    "*head.cls_score.*", "*head.bbox_pred.*",  # RetinaNet, FCOS
    "sem_seg_head.predictor.weight", "sem_seg_head.predictor.bias",  # semantic FPN
)  # fmt: skip

# Buffers that the constructor computes from the config or from nothing: harmless when a file lacks them or has them
# in excess.
_COMPUTED = (
    "pixel_mean", "pixel_std", "*.cell_anchors.*", "*num_batches_tracked", "*relative_position_index", "*.attn_mask",
    "*criterion.empty_weight",
)  # fmt: skip

# What a detector adds to a published backbone below the backbone's own name: Swin's output norms.
_ADDED_TO_BACKBONE = ("norm[0-9].weight", "norm[0-9].bias")

# What training programs put before every name: wrappers of torch, lightning modules, self-distillation.
_WRAPPERS = ("module", "_orig_mod", "model", "student", "net", "network", "ema", "model_ema", "ema_model", "teacher",
             "detector", "_forward_module", "online")  # fmt: skip
_BACKBONES = ("backbone.bottom_up.", "backbone.net.", "backbone.")
_NAMED = 20


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
        elif self.initial:
            lines.append(f"  not in the file, initial values kept: {_some(self.initial)}")
        if self.removed:
            lines.append(f"  of the file's names, those with {self.removed!r} before them are used, without it")
        if self.reinitialised:
            heads = [f"{name} {old} -> {new}" for name, old, new in self.reinitialised]
            lines.append(f"  another class count, initial values kept: {_some(heads)}")
        if self.unexpected:
            lines.append(f"  in the file, not in the model: {_some(self.unexpected)}")
        return "\n".join(lines)


def load_base(
    model: nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    resizable: Sequence[str] = CLASS_HEADS,
    logger: logging.Logger | None = None,
) -> LoadReport:
    """Load base weights; what is not loaded is named in the report, which is logged, or in the error.

    Args:
        model: any module; its own `upgrade_state_dict(state) -> state` is applied first where it has one.
        checkpoint: a file, or what `read_checkpoint` returned.
        resizable: glob patterns of tensors whose first dimension counts classes. Where only that dimension differs,
            the model's
            initial values are kept and listed.
        logger: where the report goes; the module's own logger when None.

    Raises:
        CheckpointError: a tensor of the model is not in the file, or has another shape there, or would mean something
            else. The model is then unchanged.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint)
    injected, aliases = injected_keys(model), _aliases(model)
    current = model.state_dict()
    own = {name: value for name, value in current.items() if name not in injected}
    state, removed = _unwrapped(model, checkpoint, own)
    state, prefix = _named_as_in_model(model, Checkpoint(state, checkpoint.metadata, checkpoint.path), own)
    matched, heads, misshaped = _compared(state, own, resizable, aliases)
    backbone = prefix or _only_part(state, own)
    missing = sorted(name for name in own if not any(alias in state for alias in aliases.get(name, [name])))
    if backbone:
        required = [
            n for n in missing if n.startswith(backbone) and not _any(n.removeprefix(backbone), _ADDED_TO_BACKBONE)
        ]
    else:
        required = [n for n in missing if not _any(n, _COMPUTED)]
    unexpected = sorted(n for n in state if n not in own and not _any(n, _COMPUTED))
    if required or misshaped or not matched:
        raise CheckpointError(_refusal(checkpoint, required, misshaped, unexpected, own, bool(matched)))
    _require_finite(model, matched, checkpoint.path)
    named_as_now = OrderedDict(matched)
    # Modules that rename what an older version of them saved would do so without a version to go by.
    named_as_now._metadata = getattr(current, "_metadata", {})  # type: ignore[attr-defined]
    lost = model.load_state_dict(named_as_now, strict=False).unexpected_keys
    if lost:
        raise CheckpointError(f"the model's own loading hooks lost tensors of {checkpoint.path}: {_some(sorted(lost))}")
    report = LoadReport(checkpoint.path, sorted(matched), heads, missing, unexpected, backbone, removed)
    (logger or logging.getLogger(__name__)).info("%s", report)
    return report


def _unwrapped(model: nn.Module, checkpoint: Checkpoint, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The file's tensors without what a training program put before the names, and what that was.

    That is what stands before all names, or one of the usual words before some. Of several ("student." and "teacher.")
    the one is taken under which most names are the model's, the first of the list above where they are equal. Names
    that are the model's as they are stay.
    """
    state = checkpoint.state
    split = [name.split(".") for name in state]
    shared = len(os.path.commonprefix([parts[:-1] for parts in split]))
    prefixes = {""}
    for parts in split:
        count = next((i for i, part in enumerate(parts) if i >= shared and part not in _WRAPPERS), len(parts) - 1)
        prefixes.update(".".join([*parts[:i], ""]) for i in range(1, count + 1))
    if len(prefixes) == 1:
        return dict(state), ""

    def stripped(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def fits(prefix: str) -> tuple[int, list[int]]:
        inner = Checkpoint(stripped(prefix), checkpoint.metadata, checkpoint.path)
        renamed, _ = _named_as_in_model(model, inner, own)
        order = [-_WRAPPERS.index(part) if part in _WRAPPERS else -99 for part in prefix.split(".")[:-1]]
        return sum(name in own and value.shape == own[name].shape for name, value in renamed.items()), order

    best = max(sorted(prefixes, key=len), key=fits)
    return (stripped(best), best) if fits(best)[0] > fits("")[0] else (dict(state), "")


def _require_finite(model: nn.Module, matched: Mapping[str, Tensor], path: str) -> None:
    """Refuse NaN and infinity, before they become losses and the images are blamed.

    Raises:
        CheckpointError: with the file, the tensor and the count. Infinity in a buffer, as masks have it, is allowed.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in matched.items():
        if not (value.is_floating_point() or value.is_complex()) or value.is_meta:
            continue
        value = value.float() if value.element_size() == 1 else value
        wrong = (~value.isfinite()) if name in parameters else value.isnan()
        if wrong.any():
            raise CheckpointError(
                f"the checkpoint {path} holds NaN or infinity: {int(wrong.sum())} of {value.numel()} values of {name}. "
                "Nothing was loaded. It comes from a training that diverged, or is damaged: use an earlier one"
            )


def _named_as_in_model(
    model: nn.Module, checkpoint: Checkpoint, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """The file's tensors under the model's names, and the prefix that had to be added."""
    state = dict(checkpoint.state)
    if checkpoint.metadata.get("__author__") == "Caffe2":
        state = published_names.from_caffe2(state)
    elif published_names.is_torchvision(state) and not any(name.endswith("layer1.0.conv1.weight") for name in own):
        if problem := published_names.misfit(model):
            raise CheckpointError(f"{checkpoint.path} is a ResNet of torchvision's make, and {problem}")
        state = published_names.from_torchvision(state)
    upgrade: Any = getattr(model, "upgrade_state_dict", None)
    if upgrade is not None:
        state = upgrade(state)
    counts = {prefix: sum(prefix + name in own for name in state) for prefix in ("", *_BACKBONES)}
    best = max(counts, key=lambda prefix: counts[prefix])  # the first of equals
    return {best + name: value for name, value in state.items()}, best


def _only_part(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The backbone's prefix when the file has the model's names and nothing but its backbone."""
    known = [name for name in state if name in own]
    if not known:
        return ""
    return next((prefix for prefix in _BACKBONES if all(name.startswith(prefix) for name in known + list(state))), "")


def _compared(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    resizable: Sequence[str],
    aliases: Mapping[str, Sequence[str]],
) -> tuple[dict[str, Tensor], list[tuple[str, tuple[int, ...], tuple[int, ...]]], list[str]]:
    matched, heads, misshaped = {}, [], []
    for name in sorted(state.keys() & own.keys()):
        old, new = tuple(state[name].shape), tuple(own[name].shape)
        if old == new:
            matched[name] = state[name]
        elif (
            len(old) == len(new) > 0
            and old[1:] == new[1:]
            and any(_any(alias, resizable) for alias in aliases.get(name, [name]))
        ):
            heads.append((name, old, new))
        else:
            misshaped.append(f"{name} {old} -> {new}")
    return matched, heads, misshaped


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name of each tensor -> all its names: a shared module has several, and one of them in a file is enough."""
    names: dict[int, list[str]] = {}
    for source in (model.named_parameters, model.named_buffers):
        for name, value in source(remove_duplicate=False):
            names.setdefault(id(value), []).append(name)
    return {name: group for group in names.values() for name in group}


def _refusal(
    checkpoint: Checkpoint,
    missing: list[str],
    misshaped: list[str],
    unexpected: list[str],
    own: Mapping[str, Tensor],
    any_match: bool,
) -> str:
    lines = [f"the checkpoint {checkpoint.path} does not fit the model; nothing was loaded"]
    if not any_match and not misshaped:
        lines[0] = f"the checkpoint {checkpoint.path} has no tensor of the model; nothing was loaded"
        lines.append(f"  the model has: {_some(sorted(own), 5)}")
        lines.append(f"  the file has: {_some(sorted(checkpoint.state), 5)}")
    elif missing:
        lines.append(f"  {len(missing)} tensors of the model are not in the file: {_some(missing)}")
    if misshaped:
        lines.append(f"  {len(misshaped)} have another shape (file -> model): {_some(misshaped)}")
    if unexpected and (any_match or misshaped):
        lines.append(f"  {len(unexpected)} tensors of the file are not in the model: {_some(unexpected)}")
    lines.append(
        "  use the config that belongs to this file (backbone, depth, queries), or the file that belongs to this config"
    )
    return "\n".join(lines)


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Sequence[str], limit: int = _NAMED) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
