"""Proof that a gradient reaches what is trained, that predictions use adapter layers, and that what is frozen stays.

A layer that the model never calls (it reads the weight instead), or that no gradient reaches (``torch.no_grad``, a
detached output, a reentrant checkpoint behind frozen layers), learns nothing, and no error says so. Here a training
pass and a prediction show of every trained tensor whether it gets a gradient, and if not, whether it was used at all.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .adapted import Adapted, own_buffers, own_parameters
from .errors import LivenessError, shortened
from .probe import as_it_was, call, own_event_storage, tensors_of
from .state import (
    Injection,
    base_values,
    counters,
    injected,
    refuse_meta,
    refuse_sharded,
    require_intact,
    tensor_hash,
    trained_parameters,
    warn_of_strays,
)
from .targets import EVERYTHING, ModelIndex, resolve_train

logger = logging.getLogger(__name__)

PASSED_BY, NOT_RECORDED, NOT_REACHED, UNUSED, ZERO = "passed by", "not recorded", "not reached", "unused", "zero"
_MEANING = {
    PASSED_BY: "The model does not call these modules, or reads their weights directly; choose a module around them",
    NOT_RECORDED: (
        "They run only while no gradients are recorded: under torch.no_grad, or in a reentrant checkpoint behind "
        "frozen layers (give it use_reentrant=False). Train something else, or change that"
    ),
    NOT_REACHED: (
        "They run, and no gradient reaches them: the model detaches what they give, or it is in no loss. Train "
        "something else, or change that"
    ),
    UNUSED: "The model has no use for them with this batch; choose other modules, or give a batch that needs them",
    ZERO: "Their gradient is exactly zero with this batch; give one with objects, or choose other modules",
}
_DEPENDS_ON_OBJECTS = (NOT_REACHED, UNUSED, ZERO)


@dataclass(frozen=True)
class NotLive:
    """One adapter layer (``path: method``) or parameter that could not be proved live in "train" or "eval" mode."""

    name: str
    mode: str
    reason: str
    is_fault: bool  # False for a parameter of the base that has no part in this batch's losses, as others beside it do


def prove_live(model: nn.Module, *batches: Any) -> None:
    """Prove that a gradient reaches every trained tensor, and that each adapter layer takes part in predictions.

    Args:
        model: an injected model.
        batches: what the model is called with, in train and in eval mode: Detectron2's list of dicts, say, with its
            ground truth; or a callable that takes the model. It is enough if one of the batches needs a tensor.

    Raises:
        LivenessError: naming each layer and parameter that is not live, and why.
        InjectionError: adapters are merged or disabled, or what was injected is no longer in the model.
    The model, its gradients, modes, buffers and the random state are as before.
    """
    require_intact(model)
    warn_of_strays(model)
    found = not_live(model, *batches)
    faults = [item for item in found if item.is_fault]
    if faults:
        raise LivenessError(describe(faults))
    if found:
        logger.info(
            "%d parameters that are trained in full have no part in this batch's losses, from %s on.",
            *(len(found), found[0].name),
        )


def describe(found: Sequence[NotLive]) -> str:
    """A message that names what is not live, by reason, with the remedy of each."""
    lines = []
    for reason, meaning in _MEANING.items():
        names = [f"{item.name} ({item.mode})" for item in found if item.reason == reason]
        if names:
            lines.append(f"{shortened(names, 12)}. {meaning}.")
    return f"these injected parts cannot change the output, or are trained without effect: {' '.join(lines)}"


def not_live(model: nn.Module, *batches: Any) -> list[NotLive]:
    """Make the passes of :func:`prove_live` and return what they do not prove live, faults or not."""
    root, injection = injected(model)
    injection.require_plain()
    require_intact(model)
    refuse_sharded(root, "prove_live")
    refuse_meta(root, "prove_live")
    if torch.is_inference_mode_enabled():
        raise LivenessError("no gradient is recorded under torch.inference_mode(): call prove_live outside of it")
    if not batches:
        raise LivenessError("give at least one batch, as the model is called with in training")
    record, trained = injection.current, list(trained_parameters(root))
    if frozen := _frozen_later(injection):
        raise LivenessError(
            f"what is trained requires no gradients any more, {shortened(frozen, 6)}: requires_grad_(False) or its "
            "like came after inject, which is what freezes the base. Leave it out, or call it before"
        )
    for item in trained:
        if item.param.dtype in (torch.float16, torch.bfloat16):
            raise LivenessError(
                f"{item.name} is {item.param.dtype}, in which steps of 1e-4 vanish (model.half() after inject?): what "
                "is trained must be float32, model.float(); train under autocast"
            )
    layers = {
        name: (module, [value for value in values if value.requires_grad])
        for name, module, values in _layers(record.modules)
    }
    full = {item.name: item.param for item in trained if item.kind == "full"}
    with as_it_was(root), torch.random.fork_rng(), own_event_storage():
        seen, buffers = _Pass(root), _frozen_buffers(root, injection)
        for number, batch in enumerate([*batches, *batches[:1]]):
            shown = seen.reached.issuperset(id(item.param) for item in trained)
            if number and shown and not torch.distributed.is_initialized():
                break  # processes must stay together: their passes may meet
            seen.train(batch, seed=number)
        found = [*_of_layers(layers, seen, "train"), *_of_parameters(injection, root, full, seen)]
        if moved := [name for name, value in _frozen_buffers(root, injection).items() if value != buffers.get(name)]:
            raise LivenessError(
                f"training moves buffers that are in no adapter, {shortened(moved, 6)} (spectral_norm, a running "
                "average), so that it would not fit its base: name their modules in TRAIN"
            )
        if not _has_objects(batches):
            found = [item for item in found if item.reason not in _DEPENDS_ON_OBJECTS]
        seen = _Pass(root)
        if seen.predict(batches[0]):
            logger.info("The model finds nothing on the first image yet: predictions are not proved.")
        else:
            found += _of_layers(layers, seen, "eval")
    return found


def _frozen_later(injection: Injection) -> list[str]:
    """Names of adapter layers, and of what is trained in full, that somebody has frozen since the injection."""
    record = injection.current
    layers = [(name, values) for name, _, values in _layers(record.modules)]
    full = [(name, injection.full[name].get()) for name in record.full]
    every = [(name, [value]) for name, value in full if isinstance(value, nn.Parameter) and value.is_floating_point()]
    groups = layers + ([("all", [value for _, [value] in every])] if EVERYTHING in record.train else every)
    return [name for name, values in groups if values and not any(value.requires_grad for value in values)]


def _layers(modules: Iterable[Adapted]) -> Iterator[tuple[str, Adapted, list[nn.Parameter]]]:
    """Yield the name, module and parameters of each layer of the active adapter."""
    for module in modules:
        for method, layer in module.peft_layers().items():
            yield f"{module.peft_name}: {method}", module, list(layer.parameters())


def _frozen_buffers(root: nn.Module, injection: Injection) -> dict[str, str]:
    """Hashes of the base's buffers by name, without those that are trained and those that count steps."""
    trained = {alias for name in injection.current.full for alias in injection.full[name].names}
    names = dict(own_buffers(root, remove_duplicate=False)).keys() - counters(root) - trained
    return {key: tensor_hash(value) for key, value in base_values(root).items() if key in names}


class _Pass:
    """What passes through the model have shown of its tensors, which are noted by their ids."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.used: set[int] = set()  # were given to some operator
        self.recorded: set[int] = set()  # the same, while gradients were recorded
        self.reached: set[int] = set()  # have a gradient
        self.moved: set[int] = set()  # have a gradient that is not zero

    def train(self, batch: Any, seed: int) -> None:
        """One forward and backward pass in training mode, without dropout, which would hide a layer by chance."""
        self.root.train()
        for module in self.root.modules():
            if not (module._modules or module._parameters or module._buffers):
                module.eval()
        for _, parameter in own_parameters(self.root):
            parameter.grad = None
        torch.manual_seed(seed)
        torch.clear_autocast_cache()
        with torch.enable_grad(), _Uses(self.used, self.recorded):
            try:
                outputs = tensors_of(call(self.root, batch))
            except FloatingPointError as error:  # Detectron2's region proposals look at theirs
                raise LivenessError(f"the model refuses its own values ({error}); {_not_finite(self.root)}") from error
            if any(bool(value.isnan().any()) for value in outputs if value.is_floating_point()):
                said = _not_finite(self.root)
                raise LivenessError(f"the model's output is NaN, so nothing can be proved live; {said}")
            losses = [value * torch.randn_like(value) for value in outputs if value.requires_grad]
            if losses:
                sums = [torch.where(loss.isfinite(), loss, 0).sum().real.double() for loss in losses]
                torch.stack(sums).sum().backward()
        for _, parameter in own_parameters(self.root):
            if parameter.grad is not None:
                self.reached.add(id(parameter))
                if bool(parameter.grad.any()):
                    self.moved.add(id(parameter))

    def predict(self, batch: Any) -> bool:
        """Predict in eval mode, in which torch takes shortcuts; returns whether a detector found nothing."""
        self.root.eval()
        torch.clear_autocast_cache()  # which has copies of the parameters that the pass before used
        with torch.no_grad(), _Uses(self.used, self.recorded):
            output = call(self.root, batch)
        self.reached = self.moved = self.used
        return _finds_nothing(output)

    def reason(self, own: Sequence[Tensor], base: Sequence[Tensor]) -> str:
        """Why the tensors ``own`` of a layer are not live, "" if they are; ``base`` are those of its target module."""
        ids = {id(value) for value in own}
        if not ids <= self.reached:
            if ids & self.used:
                return NOT_REACHED if ids & self.recorded else NOT_RECORDED
            return PASSED_BY if any(id(value) in self.used for value in base) else UNUSED
        return "" if ids & self.moved or not ids else ZERO


def _of_layers(layers: Mapping[str, Any], seen: _Pass, mode: str) -> list[NotLive]:
    """The adapter layers that are not live in ``mode``, "train" or "eval"."""
    found = []
    for name, (module, own) in layers.items():
        inside = {id(value) for value in own}
        reason = seen.reason(own, [value for value in module.parameters() if id(value) not in inside])
        runs = mode == "eval" and reason in (NOT_REACHED, NOT_RECORDED)  # some of its tensors are for training alone
        if reason and not runs:
            found.append(NotLive(name, mode, reason, is_fault=True))
    return found


def _of_parameters(
    injection: Injection, root: nn.Module, full: Mapping[str, nn.Parameter], seen: _Pass
) -> list[NotLive]:
    """The parameters trained in full that are not live.

    A broad pattern of TRAIN also takes in parameters that a training has no use for, which is no fault. It is one where
    all that a pattern chooses is cut off from the losses, or where it runs while no gradients are recorded.
    """
    reasons = {name: seen.reason([parameter], []) for name, parameter in full.items()}
    patterns = injection.current.train
    faults: set[str] = set()
    for pattern in patterns if EVERYTHING not in patterns else ():
        names = [name for name in resolve_train(ModelIndex.of(root), [pattern])[0] if name in reasons]
        cut = {name for name in names if reasons[name] == NOT_REACHED}
        faults |= {name for name in names if reasons[name] == NOT_RECORDED}
        faults |= cut if not any(reasons[name] in ("", ZERO) for name in names) else set()
    if full and not any(reason in ("", ZERO) for reason in reasons.values()):
        faults |= {name for name, reason in reasons.items() if reason in (NOT_REACHED, NOT_RECORDED)}
    return [NotLive(name, "train", reason, is_fault=name in faults) for name, reason in reasons.items() if reason]


class _Uses(TorchDispatchMode):
    """Within the block, note the ids of all parameters that operators are given."""

    def __init__(self, used: set[int], recorded: set[int]) -> None:
        super().__init__()
        self.used, self.recorded = used, recorded

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(value) for value in tree_leaves((args, kwargs)) if isinstance(value, nn.Parameter)}
        self.used |= given
        if torch.is_grad_enabled():
            self.recorded |= given
        return func(*args, **(kwargs or {}))


def _not_finite(root: nn.Module) -> str:
    """Name the weights that are not finite, by which a model's output may be NaN, which proves nothing."""
    bad = [name for name, value in own_parameters(root) if not bool(value.isfinite().all())]
    bad += [name for name, value in root.named_buffers() if value.is_floating_point() and bool(value.isnan().any())]
    return f"{', '.join(bad[:6])} hold values that are not finite" if bad else "all weights are finite: see the batch"


def _has_objects(batches: Sequence[Any]) -> bool:
    """False where the batches are Detectron2's and have no object, so that the losses may pass over whole heads."""
    samples = [sample for batch in batches if isinstance(batch, list) for sample in batch]
    return not samples or any(not isinstance(s, Mapping) or len(s.get("instances", "?")) > 0 for s in samples)


def _finds_nothing(output: Any) -> bool:
    """Whether an output is a list of Detectron2's results without any instance."""
    if not isinstance(output, list) or not output:
        return False
    return all(isinstance(found, Mapping) and len(found.get("instances", "?")) == 0 for found in output)


def frozen_hash(model: nn.Module) -> str:
    """sha256 over everything that the active adapter does not train, buffers included and counters left out.

    It is the same before and after training, merging and unmerging.

    Raises:
        InjectionError: a module that was adapted or is trained was replaced since.
    """
    require_intact(model)
    root, injection = injected(model)
    left_out = {alias for name in injection.current.full for alias in injection.full[name].names} | counters(root)
    digest = hashlib.sha256()
    for key, value in sorted(base_values(root).items()):
        if key not in left_out:
            digest.update(f"{key} {tensor_hash(value)}\n".encode())
    return digest.hexdigest()
