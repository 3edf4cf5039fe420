"""Saving what a model learned and loading it again: where `peft` (what is trained) and `io` (what is stored) meet."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_d2 import peft
from peft_d2.peft.lora import LowRank
from peft_d2.peft.runtime import walk
from peft_d2.storage import adapter_file, atomic, huggingface
from peft_d2.storage.adapter_file import AdapterFile, AdapterFileError
from peft_d2.storage.base_fingerprint import Fingerprint, difference, fingerprint

logger = logging.getLogger(__name__)

_AWAITED = "_peft_d2_awaited_base"
_FREE = {"TARGETS", "EXCLUDE", "DROPOUT", "INIT"}  # keys of a method that may differ between the file and the model
_OTHER_BASE = (
    "load the base weights that the adapter was trained on; MODEL.PEFT.ALLOW_OTHER_BASE True (allow_other_base=True) "
    "loads it all the same"
)


@dataclasses.dataclass
class _Awaited:
    """An adapter whose base's weights are still to come, and the hooks that compare them."""

    folder: str
    base: Fingerprint
    full: list[str]  # names of tensors trained in full
    hooks: list[Any]


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], metrics: Mapping[str, Any] | None = None, name: str | None = None
) -> None:
    """Write an adapter and the modules trained in full; an earlier adapter in that folder is replaced as a whole.

    Args:
        model: a model that was injected; merged or not, the base's fingerprint is that of the unmerged one.
        folder: where to write `adapter_model.safetensors`, `adapter_config.json` and `peft_d2.json`: a new folder, an
            empty one, or one that holds nothing but these three.
        metrics: what was measured, stored with it.
        name: which adapter; the active one when None.

    Raises:
        ValueError: the model has no injection.
        InjectionError: the model is a wrapper around one that has none.
        peft_d2.storage.StorageError: the folder holds other files, or the disk is full; what was there before stays.
    """
    adapter_file.write(folder, **_stored(model, metrics, name))


def adapter_contents(model: nn.Module, metrics: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The files that `save_adapter` writes, by name: for a caller that stores more beside them."""
    return adapter_file.contents(**_stored(model, metrics, None))


def _stored(model: nn.Module, metrics: Mapping[str, Any] | None, name: str | None) -> dict[str, Any]:
    """What an adapter's files hold, as `adapter_file.write` takes it."""
    model = _root(model)
    injection = peft.get_injection(model)
    if injection is None:
        raise ValueError("the model has no adapter to save: call peft_d2.inject(model, methods) first")
    name = name or injection.active
    _warn_of_strays(model)
    tensors = peft.adapter_state_dict(model, name)
    return {
        "tensors": tensors,
        "methods": injection.adapters[name].methods,
        "train": injection.adapters[name].train,
        "base": _base_fingerprint(model, tensors),
        "metrics": metrics,
        "scales": _scales(model, name),
        "modules": [(path, module) for path, module, _ in walk(model)],
    }


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    allow_other_base: bool = False,
    base_follows: bool = False,
) -> AdapterFile:
    """Load an adapter folder, of ours or of Hugging Face `peft`; a model not injected yet is injected as it says.

    A model that has no adapter `name` gets one; `peft_d2.set_adapter` makes it the active one.

    Args:
        model: the base model, injected or not.
        folder: written by `save_adapter` or by `peft`'s `save_pretrained`.
        name: the adapter's name in the model.
        allow_other_base: only warn when the base has other tensors than the adapter was made for.
        base_follows: the base's weights are loaded later: names and shapes are compared now, values as soon as a state
            dict of the base was loaded, at the latest in the first forward.

    Returns:
        what the file holds: methods, metrics, fingerprint.

    Raises:
        AdapterFileError: the files are missing or damaged, or belong to another base, rank, or method.
    """
    model = _root(model)
    is_theirs = huggingface.is_huggingface(folder)
    if is_theirs:
        with _base_of(model):
            content = huggingface.read(folder, model)
    else:
        content = adapter_file.read(folder)
    if content.base is not None:
        found = _base_fingerprint(model, content.tensors, values=not base_follows)
        _refuse_other_base(difference(content.base, found), folder, allow_other_base)
    was_injected = peft.get_injection(model) is not None
    try:
        _inject_as_stored(model, content, name)
        _check_methods(model, content, name, compare_entries=not is_theirs)
        peft.load_adapter_state_dict(model, content.tensors, name)
    except (ValueError, KeyError, RuntimeError) as error:
        if not was_injected and peft.get_injection(model) is not None:
            peft.remove(model)
        remedy = (
            "inject the model as the adapter was trained (its peft_d2.json lists the methods), or let the file do it"
        )
        raise AdapterFileError(folder, f"it does not fit the model: {error}", remedy) from error
    if is_theirs:
        logger.info("%s was written by Hugging Face peft: it does not say for which base", folder)
    _await(model, content if base_follows and not allow_other_base else None, folder)
    return content


def save_merged(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Merge the active adapter for good and write one checkpoint with the base's keys and versions.

    Programs that know nothing of adapters, the base's own code among them, load it as any other. The model is a plain
    one afterwards.

    Raises:
        InjectionError: a part is no change of weights (a sequential adapter, say) and cannot be in such a checkpoint.
        peft_d2.storage.StorageError: the disk is full; what was there before stays.
    """
    model = _root(model)
    peft.remove(model, keep=True)
    with atomic.file(path) as temporary:
        torch.save({"model": model.state_dict(), "__author__": "peft_d2"}, temporary)


def _root(model: nn.Module) -> nn.Module:
    """The model that was injected or will be, without DistributedDataParallel, ``torch.compile`` and the like."""
    root = peft.injected_root(model)
    if root is None:
        peft.refuse_wrapper(model)
    return model if root is None else root


def _warn_of_strays(model: nn.Module) -> None:
    """Say which parameters are trained besides the adapter: the file does not hold them, and the base is another."""
    own = {id(trained.param) for trained in peft.trained_parameters(model)}
    strays = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in own]
    if strays:
        logger.warning(
            "%d parameters require gradients and are in no adapter, from %s on: if they were trained, this adapter "
            "does not fit its base. Name them in TRAIN.",
            len(strays),
            strays[0],
        )


def _inject_as_stored(model: nn.Module, content: AdapterFile, name: str) -> None:
    injection = peft.get_injection(model)
    if injection is None:
        peft.inject(model, content.methods, train=content.train, name=name)
    elif name not in injection.adapters:
        peft.add_adapter(model, name, content.methods, content.train)


def _check_methods(model: nn.Module, content: AdapterFile, name: str, compare_entries: bool) -> None:
    """A tensor of the right shape may still mean another thing: compare what the file and the model compute with it."""
    for path, scale in _scales(model, name).items():
        expected = content.scales.get(path, scale)
        if abs(scale - expected) > 1e-6 * expected:
            raise ValueError(f"the LoRA of {path} is scaled by {scale:g} in the model and by {expected:g} in the file")
    injection = peft.get_injection(model)
    if injection is None or not compare_entries:
        return
    methods = injection.adapters[name].methods
    own, stored = ([_meaning(entry) for entry in entries] for entries in (methods, content.methods))
    if own != stored:
        pairs = [(a, b) for a, b in zip(own, stored, strict=False) if a != b]
        detail = _first_difference(*pairs[0]) if pairs else f"{len(own)} methods instead of {len(stored)}"
        raise ValueError(f"the model's methods are not the file's ({detail})")


def _meaning(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in _FREE}


def _first_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    key = next(key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key))
    return f"{key} is {found.get(key)!r} in the model and {expected.get(key)!r} in the file"


def _refuse_other_base(differs: str, folder: str | os.PathLike[str], allowed: bool) -> None:
    if differs and not allowed:
        raise AdapterFileError(folder, f"it was made for another base ({differs})", _OTHER_BASE)
    if differs:
        logger.warning("Adapter %s was made for another base (%s); loaded because that is allowed", folder, differs)


def _base_fingerprint(model: nn.Module, tensors: Collection[str], values: bool = True) -> Fingerprint:
    """Fingerprint of the base under a model, whatever adapter is active or merged.

    Args:
        model: injected or not.
        tensors: names of an adapter's tensors; the values of those that are the base's, trained in full, do not count.
        values: False hashes no values at all.
    """
    with _base_of(model):
        state = {key: value for key, value in peft.base_state_dict(model).items() if isinstance(value, Tensor)}
        return fingerprint(state, trained=_with_aliases(model, state, tensors) if values else state)


def _base_of(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within the block the model is its base, where one is kept: where everything is trained there is no other."""
    injection = peft.get_injection(model)
    hidden = injection is not None and not any("*" in record.train for record in injection.adapters.values())
    return peft.disabled(model) if hidden else contextlib.nullcontext()


def _with_aliases(model: nn.Module, state: Mapping[str, Tensor], names: Collection[str]) -> set[str]:
    """The names in `state` of tensors that one of `names` calls; a shared module has several for each."""
    chosen = {id(value) for name, value in _all_tensors(model) if name in names}
    return {name for name, value in _all_tensors(model) if name in state and id(value) in chosen}


def _all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _scales(model: nn.Module, name: str) -> dict[str, float]:
    """Path of each pair of LoRA factors, as in the file -> the factor on its branch."""
    scales = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.Specialised) and name in getattr(module, "peft", ()):
            for part in module.peft_parts(name).values():
                for local, factors in part.named_modules():
                    if isinstance(factors, LowRank):
                        scales[f"{path}.{local}" if local else path] = float(factors.scale)
    return scales


def _await(model: nn.Module, content: AdapterFile | None, folder: str | os.PathLike[str]) -> None:
    """Compare the base's values with the file's once they are there; None ends waiting for an earlier adapter."""
    earlier: _Awaited | None = model.__dict__.pop(_AWAITED, None)
    for hook in earlier.hooks if earlier is not None else ():
        hook.remove()
    if content is None or content.base is None:
        return
    hooks = [
        model.register_load_state_dict_post_hook(_after_loading),
        model.register_forward_pre_hook(_before_forward),
    ]
    full = [name for name in content.tensors if name in content.base.tensors]
    model.__dict__[_AWAITED] = _Awaited(str(folder), content.base, full, hooks)


def _after_loading(model: nn.Module, incompatible: Any) -> None:
    awaited: _Awaited = model.__dict__[_AWAITED]
    if all(key.endswith(tuple(awaited.full)) for key in incompatible.missing_keys):  # the whole base is there now
        _check_awaited(model, awaited)


def _before_forward(model: nn.Module, arguments: Any) -> None:
    _check_awaited(model, model.__dict__[_AWAITED])


def _check_awaited(model: nn.Module, awaited: _Awaited) -> None:
    _refuse_other_base(difference(awaited.base, _base_fingerprint(model, awaited.full)), awaited.folder, False)
    _await(model, None, awaited.folder)
