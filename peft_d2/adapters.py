"""Saving what a model learned and loading it again: where `peft` (what is trained) and `io` (what is stored) meet."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_d2 import peft
from peft_d2.io import adapter_file, huggingface
from peft_d2.io.adapter_file import AdapterFile, AdapterFileError
from peft_d2.io.base_fingerprint import Fingerprint, difference, fingerprint
from peft_d2.io.base_weights import injected_names

logger = logging.getLogger(__name__)

_STATE = "_peft_d2_loaded"
_OWN_STATE = "peft_d2_adapted"  # in a state dict's metadata: it is one of an adapted model, not of a base
_FREE = {"TARGETS", "EXCLUDE", "DROPOUT", "INIT"}  # keys of a method that may differ between the file and the model
_OTHER_BASE = (
    "load the base weights that the adapter was trained on; MODEL.PEFT.ALLOW_OTHER_BASE True (allow_other_base=True) "
    "loads it all the same"
)


@dataclasses.dataclass
class _Loaded:
    """What a model remembers of its loaded adapter, so that base weights that are loaded later leave it alone."""

    folder: str
    full: list[str]  # names of tensors trained in full
    awaited: Fingerprint | None = None  # the base to check once its weights are there
    kept: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # values to put back after a load of base weights


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], metrics: Mapping[str, Any] | None = None, name: str | None = None
) -> None:
    """Write an adapter and the modules trained in full, replacing the folder as a whole.

    Args:
        model: a model that was injected.
        folder: where to write `adapter_model.safetensors`, `adapter_config.json` and `peft_d2.json`.
        metrics: what was measured, stored with it.
        name: which adapter; the active one when None.

    Raises:
        ValueError: the model has no injection, or holds merged weights, whose base is not there to be described.
        peft_d2.io.StorageError: the disk is full; what was there before stays.
    """
    injection = peft.get_injection(model)
    if injection is None:
        raise ValueError("the model has no adapter to save: call peft_d2.inject(model, methods) first")
    if any(getattr(module, "peft_backup", None) for module in model.modules()):
        raise ValueError("the model's adapter is merged into its weights: call peft_d2.unmerge(model) before saving")
    name = name or injection.active
    tensors = peft.adapter_state_dict(model, name)
    base = _base_fingerprint(model, tensors)
    adapter_file.write(
        folder,
        tensors,
        methods=injection.methods,
        train=injection.train,
        base=base,
        metrics=metrics,
        scales=_scales(model, name),
    )


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    allow_other_base: bool = False,
    base_follows: bool = False,
) -> AdapterFile:
    """Load an adapter folder, of ours or of Hugging Face `peft`; a model not injected yet is injected as it says.

    Fully trained modules stay the adapter's when base weights are loaded into the model afterwards.

    Args:
        model: the base model, injected or not.
        folder: written by `save_adapter` or by `peft`'s `save_pretrained`.
        name: the adapter's name in the model.
        allow_other_base: only warn when the base has other tensors than the adapter was made for.
        base_follows: the base's weights are loaded later: names and shapes are checked now, values then.

    Returns:
        what the file holds: methods, metrics, fingerprint.

    Raises:
        AdapterFileError: the files are missing or damaged, or belong to another base, rank, or method.
    """
    is_theirs = huggingface.is_huggingface(folder)
    content = huggingface.read(folder) if is_theirs else adapter_file.read(folder)
    awaited = _check_base(model, content, folder, allow_other_base, base_follows)
    try:
        _inject_as_stored(model, content, name)
        _check_methods(model, content, name, compare_entries=not is_theirs)
        peft.load_adapter_state_dict(model, content.tensors, name)
    except AdapterFileError:
        raise
    except (ValueError, KeyError, RuntimeError) as error:
        remedy = (
            "inject the model as the adapter was trained (its peft_d2.json lists the methods), or let the file do it"
        )
        raise AdapterFileError(folder, f"it does not fit the model: {error}", remedy) from error
    if is_theirs:
        logger.info("%s was written by Hugging Face peft: it does not say for which base", folder)
    _guard(model, _Loaded(str(folder), sorted(_full_names(model, content.tensors)), awaited))
    return content


def _inject_as_stored(model: nn.Module, content: AdapterFile, name: str) -> None:
    injection = peft.get_injection(model)
    if injection is None:
        peft.inject(model, content.methods, train=content.train)
        injection = peft.get_injection(model)
        assert injection is not None
    if name not in injection.adapters:
        peft.add_adapter(model, name)


def _check_methods(model: nn.Module, content: AdapterFile, name: str, compare_entries: bool) -> None:
    """A tensor of the right shape may still mean another thing: compare what the file and the model compute with it."""
    for path, scale in _scales(model, name).items():
        expected = content.scales.get(path, scale)
        if abs(scale - expected) > 1e-6 * expected:
            raise ValueError(f"the LoRA of {path} is scaled by {scale:g} in the model and by {expected:g} in the file")
    injection = peft.get_injection(model)
    if injection is None or not compare_entries:
        return
    own, stored = ([_meaning(entry) for entry in methods] for methods in (injection.methods, content.methods))
    if own != stored:
        pairs = [(a, b) for a, b in zip(own, stored, strict=False) if a != b]
        detail = _first_difference(*pairs[0]) if pairs else f"{len(own)} methods instead of {len(stored)}"
        raise ValueError(f"the model's methods are not the file's ({detail})")


def _meaning(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in _FREE}


def _first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    key = next(key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key))
    return f"{key} is {found.get(key)!r} in the model and {expected.get(key)!r} in the file"


def _check_base(
    model: nn.Module,
    content: AdapterFile,
    folder: str | os.PathLike[str],
    allow_other_base: bool,
    base_follows: bool,
) -> Fingerprint | None:
    """Refuse another base; the fingerprint to compare with later when the base's weights are still to come."""
    if content.base is None:
        return None
    names = {name for name in content.tensors if name in content.base.tensors}
    if base_follows:
        found = fingerprint(_base_state(model), trained=_base_state(model))
    else:
        found = fingerprint(_base_state(model), trained=names)
    _refuse_other_base(difference(content.base, found), folder, allow_other_base)
    return content.base if base_follows and not allow_other_base else None


def _refuse_other_base(differs: str, folder: str | os.PathLike[str], allowed: bool) -> None:
    if differs and not allowed:
        raise AdapterFileError(folder, f"it was made for another base ({differs})", _OTHER_BASE)
    if differs:
        logger.warning("Adapter %s was made for another base (%s); loaded because that is allowed", folder, differs)


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    injected = injected_names(model)
    return {name: value for name, value in model.state_dict().items() if name not in injected}


def _full_names(model: nn.Module, tensors: Collection[str]) -> set[str]:
    """Tensors of the base among an adapter's, under every alias."""
    state = _base_state(model)
    chosen = {state[name].data_ptr() for name in tensors if name in state and state[name].numel()}
    return {name for name, value in state.items() if name in tensors or (value.numel() and value.data_ptr() in chosen)}


def _base_fingerprint(model: nn.Module, tensors: Collection[str]) -> Fingerprint:
    return fingerprint(_base_state(model), trained=_full_names(model, tensors))


def _scales(model: nn.Module, name: str) -> dict[str, float]:
    """Path of each module whose whole weight has one LoRA -> the factor on its branch."""
    scales = {}
    for path, module in model.named_modules():
        parts = getattr(module, "peft", None) if hasattr(module, "peft_parameters") else None
        for part in parts[name].values() if parts is not None and name in parts else ():
            if hasattr(part, "scale") and any(local == "lora_a" for local, _ in part.named_parameters(recurse=False)):
                scales[path] = float(part.scale)
    return scales


def _guard(model: nn.Module, loaded: _Loaded) -> None:
    """Remember what was loaded; on the first call add the hooks that act on it."""
    if _STATE not in model.__dict__:
        model._register_load_state_dict_pre_hook(_before_loading, with_module=True)
        model.register_load_state_dict_post_hook(_after_loading)
        model._register_state_dict_hook(_mark_own_state)
        model.register_forward_pre_hook(_before_forward)
    model.__dict__[_STATE] = loaded


def _mark_own_state(module: nn.Module, state: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    local_metadata[_OWN_STATE] = True


def _before_loading(
    module: nn.Module, state: Mapping[str, Tensor], prefix: str, local_metadata: Mapping[str, Any], *_: Any
) -> None:
    """Keep the fully trained tensors when what comes is a base; a state of the adapted model itself replaces them."""
    loaded: _Loaded = module.__dict__[_STATE]
    is_own = local_metadata.get(_OWN_STATE) or any(prefix + name in state for name in injected_names(module))
    if not is_own:
        own = module.state_dict()
        loaded.kept = {name: own[name].clone() for name in loaded.full if prefix + name in state}


def _after_loading(module: nn.Module, incompatible: Any) -> None:
    loaded: _Loaded = module.__dict__[_STATE]
    if loaded.kept:
        own = module.state_dict()
        with torch.no_grad():
            for name, value in loaded.kept.items():
                own[name].copy_(value)
        logger.info(
            "Kept %d tensors trained in full (adapter %s) over those of the base", len(loaded.kept), loaded.folder
        )
        loaded.kept = {}
    if all(key.endswith(tuple(loaded.full)) for key in incompatible.missing_keys):  # the whole base is there now
        _check_awaited(module, loaded)


def _before_forward(module: nn.Module, arguments: Any) -> None:
    _check_awaited(module, module.__dict__[_STATE])


def _check_awaited(module: nn.Module, loaded: _Loaded) -> None:
    if loaded.awaited is None:
        return
    found = fingerprint(_base_state(module), trained=loaded.full)
    _refuse_other_base(difference(loaded.awaited, found), loaded.folder, False)
    loaded.awaited = None
