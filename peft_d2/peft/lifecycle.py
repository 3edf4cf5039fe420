"""Switch, disable, merge, unmerge, delete, remove."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .runtime import InjectionError, Runtime, detach, get_runtime, injected_root, known_adapter
from .specialise import STORE, Part, Specialised, remove_parts, restore, specialised_modules
from .state import unprotect_on_load

logger = logging.getLogger(__name__)


def set_adapter(model: nn.Module, name: str) -> None:
    """Run and train the adapter ``name`` instead of the active one, its fully trained modules included.

    Raises:
        InjectionError: there is none, or adapters are merged or disabled, or the model is given in a wrapper that
            exchanges gradients of the parameters that were trained when it was made.
    """
    runtime = get_runtime(model)
    known_adapter(runtime, name)
    _expect_plain(runtime)
    if name == runtime.record.active:
        return
    if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise InjectionError(
            f"a {type(model).__name__} exchanges no gradients of adapter {name!r}: set it in the model itself, "
            "set_adapter(model.module, ...), and wrap that anew (for inference it needs no wrapper)"
        )
    for parameter in runtime.injected[runtime.record.active]:
        parameter.requires_grad_(False)
    for parameter in runtime.injected[name]:
        parameter.requires_grad_(True)
    runtime.install(name)
    runtime.record.active = runtime.switch.active = name
    for module in runtime.statistics:
        module.train(model.training)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is the base, bit for bit, fully trained modules included.

    Raises:
        InjectionError: TRAIN is "*", so no base values were kept.
    """
    runtime = get_runtime(model)
    if runtime.slots and not runtime.base:
        raise InjectionError("TRAIN '*' trains the base itself and keeps no copy of it: it cannot be disabled")
    if not runtime.record.enabled:
        yield model
        return
    merged = runtime.record.merged
    if merged:
        unmerge(model)
    runtime.record.enabled = runtime.switch.enabled = False
    runtime.install(None)
    try:
        yield model
    finally:
        runtime.install(runtime.record.active)
        runtime.record.enabled = runtime.switch.enabled = True
        if merged:
            merge(model)


@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Write the active adapter's weight changes into the base weights; the originals are kept for :func:`unmerge`.

    Returns:
        The places whose parts are no change of weights (adapters, say): they keep running beside the merged weights.

    Raises:
        InjectionError: a merged weight also belongs to a module that is not adapted in the same way.
    """
    runtime = get_runtime(model)
    _expect_plain(runtime)
    plan: list[tuple[Specialised, dict[str, Tensor]]] = []
    left, merged = [], []
    for module in runtime.places[runtime.record.active]:
        changed, methods = _effective(module, runtime.record.active)
        plan.append((module, changed))
        merged.append(methods)
        if len(methods) < len(module.peft_parts(runtime.record.active)):
            left.append(module.peft_name)
    _refuse_shared(model, plan)
    for (module, changed), methods in zip(plan, merged, strict=True):
        module.peft_merged.extend(methods)
        for name, value in changed.items():
            weight = module.get_parameter(name)
            module.peft_backup[name] = weight.detach().clone()
            weight.data.copy_(value)
    runtime.record.merged = True
    if left:
        logger.info("Merged; %d places keep running because no weight can hold them, from %s on.", len(left), left[0])
    return left


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the base weights back, bit for bit. A model that is not merged stays as it is."""
    runtime = get_runtime(model)
    for module in runtime.places[runtime.record.active]:
        for name, value in module.peft_backup.items():
            module.get_parameter(name).data.copy_(value)
        module.peft_backup.clear()
        module.peft_merged.clear()
    runtime.record.merged = False


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget one adapter and free its tensors; its places stay specialised as long as others use them.

    Raises:
        InjectionError: it is active (switch to another one first, or ``remove`` all).
    """
    runtime = get_runtime(model)
    known_adapter(runtime, name)
    if name == runtime.record.active:
        raise InjectionError(f"adapter {name!r} is active: set_adapter(model, another) first, or remove(model)")
    for module in runtime.places.pop(name):
        remove_parts(module, name)
    for table in (runtime.record.adapters, runtime.injected, runtime.values, runtime.loaded):
        table.pop(name, None)


def remove(model: nn.Module, keep: bool = False) -> nn.Module:
    """Undo the injection: every module has its own class again and nothing injected is left.

    ``keep=True`` leaves the merged weights and the fully trained values in; otherwise the base's values come back.

    Raises:
        InjectionError: ``keep`` and some parts cannot be merged; they are named. Or it is within ``disabled``.
    """
    runtime = get_runtime(model)
    root = injected_root(model)
    assert root is not None
    if not runtime.record.enabled:
        raise InjectionError("adapters are disabled: leave the disabled(model) block first")
    if keep:
        left = [] if runtime.record.merged else merge(model)
        left = left or [module.peft_name for module in runtime.places[runtime.record.active] if not _is_whole(module)]
        if left:
            unmerge(model)
            raise InjectionError(f"these places hold parts that no weight can hold: {', '.join(left[:8])}")
    else:
        unmerge(model)
        if runtime.base:
            runtime.install(None)
    for module in list(specialised_modules(root)):
        module.__dict__.pop("peft_trained_by", None)
        restore(module)
    unprotect_on_load(root)
    detach(root)
    for key, parameter in root.named_parameters():
        parameter.requires_grad_(runtime.was_trainable.get(key, parameter.requires_grad))
    root.train(root.training)
    return root


def _is_whole(module: Specialised) -> bool:
    adapter = module.peft_switch.active
    return len(_effective(module, adapter)[1]) == len(module.peft_parts(adapter))


def _effective(module: Specialised, adapter: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that all mergeable parts of a module give together, and the methods of those parts."""
    weights: dict[str, Tensor] = {
        name: value for name, value in module.named_parameters() if not name.startswith(f"{STORE}.")
    }
    changed: dict[str, Tensor] = {}
    methods = []
    for method, part in module.peft_parts(adapter).items():
        assert isinstance(part, Part)
        update = part.effective_weights({**weights, **changed})
        if update:
            methods.append(method)
        changed.update(update)
    return changed, methods


def _refuse_shared(model: nn.Module, plan: list[tuple[Specialised, dict[str, Tensor]]]) -> None:
    """A weight with two owners cannot be merged: the other owner would change too."""
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    for module, changed in plan:
        for name in changed:
            if owners[id(module.get_parameter(name))] > 1:
                raise InjectionError(
                    f"{module.peft_name}.{name} also belongs to another module, which merging would change too"
                )


def _expect_plain(runtime: Runtime) -> None:
    if runtime.record.merged:
        raise InjectionError("the adapter is merged into the weights: call unmerge(model) first")
    if not runtime.record.enabled:
        raise InjectionError("adapters are disabled: leave the disabled(model) block first")
