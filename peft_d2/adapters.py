"""Saving what a model learned and loading it again: where `peft` (what is trained) and `storage` (what is stored) meet.

The order is: build the model, load its base, inject, load the adapter.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_d2 import peft
from peft_d2.peft.adapted import own_buffers, own_parameters, unwrapped_name, walk
from peft_d2.peft.errors import shortened
from peft_d2.peft.state import injected, low_ranks, tensor_hash
from peft_d2.storage import CheckpointError, LoadReport, adapter_file, checkpoint, disk, huggingface
from peft_d2.storage.adapter_file import RECORD, AdapterFile, AdapterFileError
from peft_d2.storage.disk import Fingerprint, difference, fingerprint
from peft_d2.storage.foreign import newest_in_run

logger = logging.getLogger(__name__)

# Keys of a method that may differ between the file and the model.
_FREE = {"TARGETS", "EXCLUDE", "DROPOUT", "INIT", "OUTPUTS"}
_OTHER_BASE = (
    "load the base weights that the adapter was trained on, peft_d2.load_base(model, path) or MODEL.WEIGHTS, before "
    "the adapter; MODEL.PEFT.ALLOW_OTHER_BASE True (allow_other_base=True) loads it all the same"
)


def load_base(model: nn.Module, path: str | os.PathLike[str]) -> LoadReport:
    """Load a base's weights: the step before `inject` and `load_adapter`. What is not loaded is named in the log.

    Args:
        model: any module.
        path: a .pth, .pkl or .safetensors file, or what Detectron2 can fetch (`detectron2://`, `https://`, ...). A
            `?matching_heuristics=True` behind it, as model zoos have it, is a hint that is not needed.

    Raises:
        CheckpointError: the file does not exist, is damaged or does not fit. Nothing was loaded.
        InjectionError: the model has adapters already, on another base than this.
    """
    return checkpoint.load_base(model, _local_file(os.fspath(path)))


def load_trained(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load what somebody's trainer saved of an injected model, such as ``model_final.pth``: base and adapter in one.

    Args:
        model: injected as in training, on the same base.
        path: a state dict, by itself or under ``model``; what DistributedDataParallel, ``torch.compile``, Lightning and
            other training programs put before the names is taken off.

    Raises:
        CheckpointError: the file is damaged, or was not written of this model with this adapter. Nothing was loaded.
        InjectionError: the model has no injection, or the file has another base under its adapter.
    """
    root = peft.injected_root(model)
    if root is None:
        raise peft.InjectionError(f"{peft.no_injection(model)}; inject the model as it was trained, then load that")
    state, _ = checkpoint.unwrapped(root, checkpoint.read_checkpoint(path), root.state_dict())
    own = {key: tuple(value.shape) for key, value in root.state_dict().items() if isinstance(value, Tensor)}
    given = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [f"{key} {given.get(key, 'missing')} instead of {own[key]}" for key in own if given.get(key) != own[key]]
    if wrong:
        is_base = peft.injected_keys(root) and not any(map(checkpoint.is_layer, given))
        what = "holds a base alone" if is_base else "was not written of this model with this adapter"
        raise CheckpointError(
            f"{os.fspath(path)} {what}: {len(wrong)} of {len(own)} tensors are missing or of another shape, "
            f"{shortened(wrong, 4)}. Build and inject the model as it was trained, and give what was saved after that."
        )
    checkpoint.load_named_as_now(root, {key: value for key, value in state.items() if key in own})


def load_base_of_any(model: nn.Module, path: str) -> tuple[LoadReport, dict[str, Tensor]]:
    """Load the base out of a file as :func:`load_base` does, or out of the state dict of an injected model.

    Detectron2's own programs write the latter. Then the whole state is returned besides, for `load_layers` after the
    injection, and otherwise an empty one.
    """
    file = checkpoint.read_checkpoint(_local_file(path))
    layers = {name: value for name, value in file.state.items() if checkpoint.is_layer(name)}
    report = checkpoint.load_base(model, file, of_injected=True)
    return report, file.state if layers else {}


def load_layers(model: nn.Module, path: str, state: Mapping[str, Tensor]) -> None:
    """Load the state dict of an injected model into one that was injected alike.

    Raises:
        CheckpointError: the model has other adapter layers than the file.
    """
    keys, current = peft.injected_keys(model), model.state_dict()
    own = {(name, tuple(current[name].shape)) for name in keys}
    given = {(name, tuple(value.shape)) for name, value in state.items() if checkpoint.is_layer(name)}
    if own != given:
        names = sorted({f"{name} {shape}" for name, shape in own ^ given})
        raise CheckpointError(
            f"the checkpoint {path} is of a model with other adapters: {shortened(names, 4)} are not in both. Give the "
            "config that it was trained with: MODEL.PEFT, class counts"
        )
    checkpoint.load_named_as_now(model, state, strict=False)
    logger.info("%s is of a model with adapters: their %d tensors are in effect.", path, len(given))


def require_trained(model: nn.Module, report: LoadReport) -> None:
    """Refuse an injected model of which random parameters would stay random.

    Raises:
        CheckpointError: a head of another class count is not trained.
    """
    parameters = dict(own_parameters(model, remove_duplicate=False))
    frozen = [name for name, *_ in report.reinitialised if name in parameters and not parameters[name].requires_grad]
    if frozen:
        raise CheckpointError(
            f"a head of another class count starts at random and is not trained: {', '.join(frozen)}. "
            f"Add {frozen[0].rpartition('.')[0]!r} and its like to MODEL.PEFT.TRAIN, or give the config the class "
            f"count of {report.path}."
        )


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    metrics: Mapping[str, Any] | None = None,
    name: str | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write an adapter and the modules trained in full; an earlier adapter in that folder is replaced as a whole.

    Args:
        model: a model that was injected; merged or not, the base's fingerprint is that of the unmerged one.
        folder: where to write `adapter_model.safetensors`, `adapter_config.json` and `peft_d2.json`: a new folder, an
            empty one, or one that holds nothing but these three.
        metrics: what was measured, stored with it.
        name: which adapter; the active one when None.
        classes: names of the classes that it was trained on, by the model's indices. None: those that are known, from
            the config (``PEFTModel``) or from the folder that the adapter was loaded from.
    Of a model under FSDP's ``fully_shard`` every process must call this; the first one writes.

    Raises:
        ValueError: the model has no injection, or `classes` are no names.
        InjectionError: the model is a wrapper around one that has none, or what was injected is no longer in it.
        peft_d2.storage.StorageError: the folder holds other files, or the disk is full; what was there before stays.
    """
    stored = _stored(model, metrics, name, classes)
    if not peft.is_sharded(model) or torch.distributed.get_rank() == 0:
        adapter_file.write(folder, **stored)


def adapter_contents(model: nn.Module, metrics: Mapping[str, Any] | None = None) -> dict[str, bytes]:
    """The files that `save_adapter` writes, by name: for a caller that stores more beside them."""
    return adapter_file.contents(**_stored(model, metrics, None, None))


def _stored(
    model: nn.Module, metrics: Mapping[str, Any] | None, name: str | None, classes: Sequence[str] | None
) -> dict[str, Any]:
    """The arguments of `adapter_file.write` for one adapter of a model."""
    model = _root(model)
    injection = peft.get_injection(model)
    if injection is None:
        raise ValueError(peft.no_injection(model))
    peft.require_intact(model)
    peft.refuse_sharded(model, "save", flat_alone=True)
    peft.refuse_meta(model, "saving")
    name = injection.active if name is None else name
    if name == peft.BASE:
        raise ValueError("the base is in effect, which is no adapter: name one, save_adapter(model, folder, name=...)")
    peft.warn_of_strays(model)
    tensors = peft.adapter_state_dict(model, name)
    _warn_of_untrained(injection, name, tensors)
    return {
        "tensors": tensors,
        "methods": injection.adapters[name].methods,
        "train": injection.adapters[name].train,
        "base": injection.adapters[name].base or _base_fingerprint(model, tensors),
        "metrics": metrics,
        "scales": {path: float(item.scale) for path, item in low_ranks(injection, name).items()},
        "modules": [(path, module) for path, module, _ in walk(model)],
        "started_from": injection.adapters[name].started_from,
        "pixels": _pixels(model),
        "classes": injection.adapters[name].classes if classes is None else classes,
    }


def load_adapter(
    model: nn.Module, folder: str | os.PathLike[str], name: str = "default", allow_other_base: bool = False
) -> AdapterFile:
    """Load an adapter folder, of ours or of Hugging Face `peft`; a model not injected yet is injected as it says.

    A model that has no adapter `name` gets one; `peft_d2.set_adapter` makes it the active one. Beside others that
    :func:`load_adapters` has loaded, heads trained in full may have other class counts than the base's.

    Args:
        model: the model with its base's weights, injected or not.
        folder: written by `save_adapter` or by `peft`'s `save_pretrained`; or `user/name@revision` on the Hugging Face
            hub, which needs the extra `hub`.
        name: the adapter's name in the model.
        allow_other_base: only warn when the base has other tensors than the adapter was made for.

    Returns:
        what the file holds: methods, metrics, fingerprint, names of classes.

    Raises:
        AdapterFileError: the files are missing or damaged, or belong to another base, rank, or method. The model is
            as it was.
        InjectionError: an adapter is merged or disabled.
    """
    model = _root(model)
    peft.check_name(name)
    if name == peft.BASE:
        raise peft.InjectionError(f"{name!r} names the base itself, without an adapter: choose another name")
    injection = peft.get_injection(model)
    if injection is not None:
        injection.require_plain()
    other_classes = injection is not None and peft.BASE in injection.adapters
    peft.refuse_sharded(model, "load adapters")
    if said := peft.without_values(model):
        remedy = "give it its base's weights first: model.to_empty(device=...), then peft_d2.load_base(model, path)"
        raise AdapterFileError(folder, said, remedy)
    folder, pinned = adapter_file.resolved(folder)
    content, is_theirs = _read(model, folder)
    if content.base is not None:
        _refuse_other_base(model, content, folder, allow_other_base, other_classes)
    try:
        with _as_before_on_error(model):
            if injection is None:
                peft.inject(model, content.methods, content.train, name)
            elif name not in injection.adapters:
                peft.add_adapter(model, name, content.methods, content.train)
            _check_methods(model, content, name, compare_entries=not is_theirs)
            peft.load_adapter_state_dict(model, content.tensors, name, other_classes)
    except (ValueError, KeyError, RuntimeError) as error:
        remedy = "inject the model as the adapter was trained (its peft_d2.json has the methods), or let the file do it"
        raise AdapterFileError(folder, f"it does not fit the model: {error}", remedy) from error
    if is_theirs:
        logger.info("%s was written by Hugging Face peft: it does not say for which base", folder)
    record = injected(model)[1].adapters[name]
    record.started_from = pinned or content.started_from
    record.classes = list(content.classes)
    record.base = content.base if other_classes and not allow_other_base else None
    _say_in_effect(model, content, folder, name)
    _warn_of_other_pixels(model, content, folder)
    return content


def _read(model: nn.Module, folder: str | os.PathLike[str]) -> tuple[AdapterFile, bool]:
    """What an adapter's folder holds, and whether Hugging Face `peft` wrote it."""
    is_theirs = not os.path.lexists(os.path.join(folder, RECORD)) and huggingface.is_huggingface(folder)
    if is_theirs:
        with _base_of(model):
            content = huggingface.read(folder, model)
    else:
        content = adapter_file.read(folder)
    if defect := disk.not_finite(content.tensors, dict(own_buffers(model, remove_duplicate=False)).keys()):
        remedy = "use an earlier checkpoint: this one comes from a training that diverged, or is damaged"
        raise AdapterFileError(folder, f"it holds {defect}", remedy)
    return content, is_theirs


def load_adapters(
    model: nn.Module, folders: Mapping[str, str | os.PathLike[str]], allow_other_base: bool = False
) -> dict[str, AdapterFile]:
    """Load several adapters side by side; samples of a batch then say which one they run with.

    ``model([{"image": ..., "adapter": "night"}, {"image": ...}])`` runs each sample with the adapter that it names, and
    with the base where it names none; ``model.predict_with(image, ["night", "base"])`` one image under several. See
    :mod:`peft_d2.peft.mixed`. Heads trained in full may have other class counts than the base's.

    Args:
        model: the model with its base's weights, injected or not.
        folders: name -> adapter folder, as :func:`load_adapter` takes it.
        allow_other_base: only warn when the base has other tensors than an adapter was made for.

    Returns:
        what each file holds, by name.

    Raises:
        AdapterFileError: as of :func:`load_adapter`. The model is as it was.
        InjectionError: a name is taken, or the model is merged.
    """
    root = _root(model)
    before = peft.get_injection(root)
    if before is not None:
        before.require_plain()
    if taken := [name for name in folders if name == peft.BASE or (before is not None and name in before.adapters)]:
        raise peft.InjectionError(f"the name {taken[0]!r} is taken: give the adapter another one")
    with _as_before_on_error(root):
        peft.serve_adapters(root)
        return {name: load_adapter(root, folder, name, allow_other_base) for name, folder in folders.items()}


@contextlib.contextmanager
def _as_before_on_error(model: nn.Module) -> Iterator[None]:
    """Where the block fails, remove the adapters that were added in it, or the injection if there was none before."""
    before = peft.get_injection(model)
    known, active = (set(before.adapters), before.active) if before is not None else (set[str](), "")
    try:
        yield
    except BaseException:
        now = peft.get_injection(model)
        if now is not None and before is None:
            peft.remove(model)
        elif now is not None:
            peft.set_adapter(model, active)
            for name in now.adapters.keys() - known:
                peft.delete_adapter(model, name)
        raise


def save_merged(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Merge the active adapter for good and write one checkpoint with the base's keys and versions.

    Programs that know nothing of adapters, the base's own code among them, load it as any other. The model is a plain
    one afterwards.

    Raises:
        CheckpointError: the file's name is that of another kind of file.
        InjectionError: a layer is no change of weights (a sequential adapter, say) and cannot be in such a checkpoint.
        peft_d2.storage.StorageError: the disk is full; what was there before stays, the model too.
    """
    require_torch_name(path)
    model = _root(model)
    injection = injected(model)[1]
    was_merged, classes = injection.merged, injection.current.classes
    peft.merge_whole(model)
    try:
        own, others = model.state_dict(), peft.injected_keys(model)  # of other adapters
        state: Any = OrderedDict((key, value) for key, value in own.items() if key not in others)
        modules = {name for name, *_ in walk(model)}
        # Versions of adapter layers are no part of a base.
        versions = getattr(own, "_metadata", {})  # none where a model makes its state dict itself
        versions = {unwrapped_name(name): entry for name, entry in versions.items()}
        state._metadata = {name: entry for name, entry in versions.items() if name in modules}
        with disk.file(path) as temporary:
            known = {"classes": classes} if classes else {}
            torch.save({"model": state, "__author__": "peft_d2", **known}, temporary)
    except BaseException:
        if not was_merged:
            peft.unmerge(model)
        raise
    peft.remove(model, keep=True)


def require_torch_name(path: str | os.PathLike[str]) -> None:
    """Refuse a name by which programs, Detectron2 among them, would read the file as one that is not torch's."""
    if (suffix := os.path.splitext(os.fspath(path))[1]) in (".pkl", ".safetensors", ".yaml", ".onnx"):
        raise CheckpointError(
            f"{os.fspath(path)}: a merged checkpoint is a file of torch's, not {suffix}. Call it .pth."
        )


def _local_file(path: str) -> str:
    """The file behind a path or URL, downloaded where that is needed."""
    if not path:
        raise CheckpointError("the path of the base's weights is empty. Give a .pth, .pkl or .safetensors file.")
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return path  # the reader says what kind of folder it is
    try:
        from detectron2.utils.file_io import PathManager
    except ImportError:  # any torch model can be adapted without Detectron2
        local = path.partition("?")[0]
    else:
        try:
            local = PathManager.get_local_path(path.partition("?")[0])
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"weights {path!r} cannot be fetched: {error}. Download them and give the file."
            ) from error
    if not os.path.isfile(local):
        inside = newest_in_run(Path(local).parent)
        remedy = f"There is {inside}. {checkpoint.GIVE_ADAPTER}" if inside else "Give a .pth, .pkl or .safetensors"
        raise CheckpointError(f"weights {path!r} do not exist. {remedy}.")
    return local


def _root(model: nn.Module) -> nn.Module:
    """The model that was injected or will be, without DistributedDataParallel, ``torch.compile`` and the like."""
    root = peft.injected_root(model)
    if root is None:
        peft.refuse_wrapper(model)
    return model if root is None else root


def _warn_of_untrained(injection: peft.Injection, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Warn where no adapter layer has changed since the start (or nothing trained in full, where there are none)."""
    record = injection.adapters[name]
    layers = [key for key in tensors if key not in record.values]
    if tensors and all(tensor_hash(tensors[key]) == record.start.get(key) for key in layers or tensors):
        logger.warning(
            "%s of %r has changed since it was made. If it was trained: make the optimizer after inject and after "
            "set_adapter, of the parameters that require gradients.",
            *("No adapter layer" if layers else "Nothing", name),
        )


def _say_in_effect(model: nn.Module, content: AdapterFile, folder: str | os.PathLike[str], name: str) -> None:
    """Log what was loaded and whether it is active, and warn where the model has other dtypes than the file."""
    injection = injected(model)[1]
    full = len(injection.adapters[name].full)
    logger.info(
        "Adapter %s: %d tensors %s as %r, %d of adapter layers and %d of what is trained in full.",
        *(folder, len(content.tensors)),
        "in effect" if injection.active == name else "loaded (set_adapter makes it the active one)",
        *(name, len(content.tensors) - full, full),
    )
    own = peft.adapter_state_dict(model, name)
    if changed := [key for key, value in content.tensors.items() if own[key].dtype != value.dtype]:
        kinds = f"{content.tensors[changed[0]].dtype} in the file and {own[changed[0]].dtype} in the model"
        logger.warning("%d tensors of %s are %s, from %s on.", len(changed), folder, kinds, changed[0])


def _pixels(model: nn.Module) -> dict[str, Any]:
    """The mean, std and order of channels by which a model takes its images, as far as its attributes tell them."""
    given = {key: getattr(model, f"pixel_{key}", None) for key in ("mean", "std")}
    known: dict[str, Any] = {
        key: [round(number, 4) for number in value.flatten().tolist()]
        for key, value in given.items()
        if isinstance(value, Tensor) and value.numel() <= 64
    }
    kind = getattr(model, "input_format", None)
    return {**known, "format": kind} if isinstance(kind, str) else known


def _warn_of_other_pixels(model: nn.Module, content: AdapterFile, folder: str | os.PathLike[str]) -> None:
    """Warn where an adapter was trained on images of another order of channels, or normalised in another way."""
    here, there = _pixels(model), content.pixels

    def alike(a: Any, b: Any) -> bool:  # but for rounding, as half precision does
        numbers = zip(a, b, strict=False)
        return a == b if isinstance(a, str) else len(a) == len(b) and all(isclose(*n, rel_tol=0.01) for n in numbers)

    names = {"mean": "MODEL.PIXEL_MEAN", "std": "MODEL.PIXEL_STD", "format": "INPUT.FORMAT"}
    for key in [key for key in names if key in here.keys() & there and not alike(here[key], there[key])]:
        logger.warning(
            "Adapter %s was trained with %s %s, and this model takes images with %s: set it as it was, or the images "
            "look different to what was trained.",
            *(folder, names[key], there[key], here[key]),
        )


def _check_methods(model: nn.Module, content: AdapterFile, name: str, compare_entries: bool) -> None:
    """Refuse a file whose methods or LoRA scales are not the model's: equal shapes may still mean something else."""
    injection = injected(model)[1]
    for path, item in low_ranks(injection, name).items():
        scale, expected = item.scale, content.scales.get(path, item.scale)
        if abs(scale - expected) > 1e-6 * expected:
            raise ValueError(f"the LoRA of {path} is scaled by {scale:g} in the model and by {expected:g} in the file")
    if not compare_entries:
        return
    methods = injection.adapters[name].methods
    own, stored = ([_meaning(entry) for entry in entries] for entries in (methods, content.methods))
    if own != stored:
        details = [
            f"{key} is {here.get(key)!r} in the model and {there.get(key)!r} in the file"
            for here, there in zip(own, stored, strict=False)
            for key in ["NAME", *sorted({*here, *there})]
            if here.get(key) != there.get(key)
        ]
        detail = details[0] if details else f"{len(own)} methods instead of {len(stored)}"
        names = ", ".join(str(entry.get("NAME")) for entry in content.methods) or "modules trained in full"
        raise ValueError(f"the model's methods are not the file's, which is an adapter of {names} ({detail})")


def _meaning(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry of METHODS means: its keys and the defaults of those it lacks, without keys that may differ."""
    method = peft.METHODS.get(entry.get("NAME", ""))
    defaults = {} if method is None else {k.upper(): v for k, v in asdict(method.options_class()).items()}
    return {key: value for key, value in {**defaults, **entry}.items() if key not in _FREE}


def _refuse_other_base(
    model: nn.Module, content: AdapterFile, folder: str | os.PathLike[str], allowed: bool, other_classes: bool
) -> None:
    """Refuse an adapter that was made for another base than the model's, unless ``allowed``.

    ``other_classes`` lets pass what another class count explains: other first sizes of what is trained in full, and of
    a loss's weights by class.
    """
    assert content.base is not None
    expected, found = content.base, _base_fingerprint(model, content.tensors)
    old, new = expected.parts(), found.parts()
    sizes = {name: [shape[name][0].split("x") for shape in (old, new)] for name in old.keys() & new.keys()}
    resized = {name for name, (a, b) in sizes.items() if a != b}
    rows = {name for name in resized if sizes[name][0][1:] == sizes[name][1][1:]}
    if other_classes:
        free = {*content.tensors, *getattr(model, "by_class_in_training", ()), *dict(own_buffers(model))}
        expected, found = expected.without(rows & free), found.without(rows & free)
    differs = difference(expected, found)
    if differs and not allowed:
        if old.keys() == new.keys() and resized == rows and rows & content.tensors.keys():
            remedy = (
                "build the model with as many classes as the adapter was trained with; load_adapters takes any number"
            )
            raise AdapterFileError(folder, f"its heads are of another size than the model's ({differs})", remedy)
        half = "load the adapter on the base as it was trained, then convert both (model.half()); otherwise "
        remedy = (half if "dtype" in differs else "") + _OTHER_BASE
        raise AdapterFileError(folder, f"it was made for another base ({differs})", remedy)
    if differs:
        logger.warning("Adapter %s was made for another base (%s); loaded because that is allowed", folder, differs)


def _base_fingerprint(model: nn.Module, tensors: Collection[str]) -> Fingerprint:
    """Fingerprint of the base under a model, whatever adapter is active or merged.

    The values of `tensors`, an adapter's names, do not count where they are the base's, trained in full; nor do those
    of buffers that count steps.
    """
    injection = peft.get_injection(model)
    state = (
        peft.base_values(model) if injection else {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    )
    all_names = [*own_parameters(model, remove_duplicate=False), *own_buffers(model, remove_duplicate=False)]
    chosen = {id(value) for name, value in all_names if name in tensors}  # a shared module has several names for each
    left_out = {name for name, value in all_names if id(value) in chosen} | peft.counters(model)
    return fingerprint(state, trained=left_out, memo=injection.hashes if injection else None)


def _base_of(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Let the model be its base within the block. Where TRAIN is "*" no base is kept, and nothing changes."""
    injection = peft.get_injection(model)
    hidden = injection is not None and not any("*" in record.train for record in injection.adapters.values())
    return peft.disabled(model) if hidden else contextlib.nullcontext()
