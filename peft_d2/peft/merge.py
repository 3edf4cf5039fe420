"""What can be done with adapters after the injection: switch, disable, merge, combine, delete, remove.

A combination is a new adapter. ``linear`` adds the weight changes exactly, ``sum_i w_i s_i B_i A_i``, by putting the
factors side by side (rank = sum of ranks); ``svd`` gives the best approximation of that sum of a chosen rank (Eckart
and Young 1936). Bottlenecks and other layers that are no change of weights are averaged parameter by parameter
(Chronopoulou et al., "AdapterSoup", EACL 2023, arXiv 2302.07027), and modules trained in full become
``base + sum_i w_i (value_i - base)``.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import STORE, Adapted, join
from .errors import InjectionError, shortened
from .inject import Report, add_adapter, forget_adapter, undo
from .lora.factors import LowRank
from .state import (
    BASE,
    Injection,
    in_own_mode,
    injected,
    low_ranks,
    refuse_meta,
    refuse_sharded,
    require_intact,
)

logger = logging.getLogger(__name__)
KINDS = ("linear", "svd")


def set_adapter(model: nn.Module, name: str) -> None:
    """Run and train the adapter ``name`` instead of the active one, its fully trained modules included.

    Raises:
        InjectionError: there is none, or adapters are merged or disabled, or the model is given in a wrapper that
            exchanges gradients of the parameters that were trained when it was made.
    """
    injection = injected(model)[1]
    injection.adapter(name)
    injection.require_plain()
    active = injection.active
    if name == active:
        return
    for module in injection.current.modules[:1]:  # one tells of all, and a switch between images costs no walk
        refuse_sharded(module, "set adapters")
    if type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise InjectionError(
            f"a {type(model).__name__} exchanges no gradients of adapter {name!r}: set it in the model itself, "
            "set_adapter(model.module, ...), and wrap that anew (for inference it needs no wrapper)"
        )
    trained = [*injection.current.injected, *[injection.full[key].get() for key in injection.current.values]]
    if name != BASE and [value for value in trained if value.grad is not None]:
        warnings.warn(
            f"adapter {name!r} is trained from here on: an optimizer that was made for {active!r} alone does not move "
            "it. Make one after set_adapter, of the parameters that require gradients",
            stacklevel=2,
        )
    for adapter in (active, name):
        for parameter in injection.adapters[adapter].injected:
            parameter.requires_grad_(adapter == name)
    injection.install(name)
    injection.running.name = name
    for module in injection.statistics:
        module.train(module.peft_mode)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model computes what its base does, bit for bit, modules trained in full included.

    Raises:
        InjectionError: TRAIN is "*", so no base values were kept.
    """
    root, injection = injected(model)
    if injection.full and not injection.base:
        raise InjectionError("TRAIN '*' trains the base itself and keeps no copy of it: it cannot be disabled")
    if injection.full:
        refuse_sharded(root, "predict with the base")
    if not injection.running.enabled:
        yield model
        return
    merged = injection.merged
    if merged:
        unmerge(model)
    injection.running.enabled = False
    try:
        injection.install(None)
        yield model
    finally:
        injection.install(injection.active)
        injection.running.enabled = True
        if merged:
            merge(model)


@in_own_mode
@torch.no_grad()
def merge(model: nn.Module) -> list[str]:
    """Write the active adapter's weight changes into the base weights; the originals are kept for :func:`unmerge`.

    Returns:
        names of the modules with layers that no weight can hold (adapters, say): these run beside the merged weights.

    Raises:
        InjectionError: a merged weight also belongs to a module that is not adapted in the same way, or to none of the
            model any more.
    """
    root, injection = injected(model)
    injection.require_plain()
    refuse_sharded(root, "merge")
    refuse_meta(root, "merging")
    try:
        plan = [(module, *_merged_weights(module)) for module in injection.current.modules]
    except KeyError:  # a weight that a layer changes
        require_intact(model)
        raise
    _refuse_shared(model, plan)
    for module, changed, methods in plan:
        module.peft_merged.extend(methods)
        for name, value in changed.items():
            weight = module.get_parameter(name)
            module.peft_backup[name] = weight.detach().clone()
            _write(weight, value)
    injection.merged = True
    left = [module.peft_name for module, _, methods in plan if len(methods) < len(module.peft_layers())]
    if left:
        logger.info("Merged; %d modules keep layers that no weight can hold, from %s on.", len(left), left[0])
    return left


@in_own_mode
@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the base weights back, bit for bit. A model that is not merged stays as it is."""
    injection = injected(model)[1]
    for module in injection.current.modules:
        for name, value in module.peft_backup.items():
            _write(module.get_parameter(name), value)
        module.peft_backup.clear()
        module.peft_merged.clear()
    injection.merged = False


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget one adapter and free its tensors; its modules stay adapted as long as others use them.

    Raises:
        InjectionError: it is active (switch to another one first, or ``remove`` all).
    """
    root, injection = injected(model)
    injection.adapter(name)
    if name == injection.active:
        raise InjectionError(f"adapter {name!r} is active: set_adapter(model, another) first, or remove(model)")
    forget_adapter(root, name)


@in_own_mode
def remove(model: nn.Module, keep: bool = False) -> nn.Module:
    """Undo the injection: every module has its own class and its own Parameters again, and nothing injected is left.

    ``keep=True`` leaves the merged weights and the fully trained values in; otherwise the base's values come back.

    Raises:
        InjectionError: ``keep`` and some layers cannot be merged; they are named. Or it is within ``disabled``.
    """
    root, injection = injected(model)
    if not injection.running.enabled:
        raise InjectionError("adapters are disabled: leave the disabled(model) block first")
    refuse_sharded(root, "remove adapters")
    installed = {key: tensor.get() for key, tensor in injection.full.items()}  # an error comes before any change
    if keep:
        merge_whole(model)
        for module in injection.current.modules:
            module.peft_backup.clear()
    else:
        unmerge(model)
    for key, original in injection.original.items():
        now = installed[key] if keep or key not in injection.base else injection.base[key]
        if now is not original:
            original.data = now.detach().clone()  # of another class count, perhaps
    undo(root, injection)
    return root


def merge_whole(model: nn.Module) -> None:
    """:func:`merge` where the weights can hold all of the active adapter.

    Raises:
        InjectionError: they cannot; the layers that are left are named, and the model is as it was.
    """
    injection = injected(model)[1]
    was_merged = injection.merged
    if not was_merged:
        merge(model)
    left = [
        f"{module.peft_name} ({method})"
        for module in injection.current.modules
        for method in module.peft_layers()
        if method not in module.peft_merged
    ]
    if left:
        if not was_merged:
            unmerge(model)
        raise InjectionError(
            f"these modules hold layers that no weight can hold: {shortened(left, 8)}. Keep them as an adapter "
            "(save_adapter), or train one that only changes weights, such as lora"
        )


def _write(weight: Tensor, value: Tensor) -> None:
    """Give a weight other values, but not in other processes: torch lets a model that is sent to one share memory."""
    if weight.device.type == "cpu" and weight.is_shared():
        weight.data = weight.detach().clone()
    weight.data.copy_(value)


def _merged_weights(module: Adapted) -> tuple[dict[str, Tensor], list[str]]:
    """The weights into which the layers of a module can be merged, by name, and the methods of these layers."""
    weights = {name: value for name, value in module.named_parameters() if not name.startswith(f"{STORE}.")}
    changed: dict[str, Tensor] = {}
    methods = []
    for method, layer in module.peft_layers().items():
        update = layer.effective_weights({**weights, **changed})
        if update:
            methods.append(method)
        changed.update(update)
    return changed, methods


def _refuse_shared(model: nn.Module, plan: Sequence[tuple[Adapted, Mapping[str, Tensor], Sequence[str]]]) -> None:
    """Refuse to merge into a weight that belongs to another module as well, which would change too."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(join(path, leaf))
    for module, changed, methods in plan:
        for name in changed:
            known = owners.get(id(module.get_parameter(name)), [])
            if not known:  # another module is in this one's place
                require_intact(model)
            if len(known) > 1:
                own = f"{module.peft_name}.{name}"
                others = " and ".join(other for other in known if other != own)
                raise InjectionError(
                    f"{own} also belongs to another module, which merging {'/'.join(methods)} would change too: "
                    f"{others}. EXCLUDE the module, or untie the weights (a clone for each) before inject"
                )


@in_own_mode
@torch.no_grad()
def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, kind: str = "linear", rank: int | None = None
) -> Report:
    """Add the adapter ``name`` = the weighted sum of those in ``weights``; it is not active.

    Args:
        weights: adapter name -> weight. The adapters must have the same methods on the same modules; ranks may differ.
        kind: "linear" or "svd".
        rank: for svd, the new rank; the largest of the given ones when None.

    Raises:
        InjectionError: the adapters differ in more than rank, or hold a kind that has no sum (DoRA, COBOT).
    """
    injection = injected(model)[1]
    require_intact(model)
    values = list(weights.values()) if isinstance(weights, Mapping) else []
    finite = all(isinstance(value, Real | Tensor) and math.isfinite(value) for value in values)
    if kind not in KINDS or not values or not finite:
        raise InjectionError(
            f"cannot combine {weights!r} by {kind!r}: expected {{name: weight, ...}}, finite weights, and one of "
            f"{', '.join(KINDS)}"
        )
    records = {adapter: injection.adapter(adapter) for adapter in weights}
    places = [({(p.name, p.method) for p in record.places}, record.full) for record in records.values()]
    if any(place != places[0] for place in places):
        raise InjectionError(f"{', '.join(weights)} do not adapt the same places and cannot be combined")
    first = records[next(iter(weights))]
    _compare_classes([record.classes for record in records.values() if record.classes])
    sources = [(weight, low_ranks(injection, adapter)) for adapter, weight in weights.items()]
    others = [(weight, _others(injection, adapter)) for adapter, weight in weights.items()]
    _refuse(sources, others, kind)
    pairs = {key: _side_by_side([(weight, factors[key]) for weight, factors in sources]) for key in sources[0][1]}
    width = max((len(a) for _, a in pairs.values()), default=0)
    if kind == "svd":
        width = rank or max((len(item.lora_a) for _, factors in sources for item in factors.values()), default=0)
        pairs = {key: _nearest(*pair, width) for key, pair in pairs.items()}
    report = add_adapter(model, name, [_entry(entry, width) for entry in first.methods], first.train)
    record = injection.adapters[name]
    record.classes = first.classes
    for key, target in low_ranks(injection, name).items():
        b, a = pairs[key]
        target.lora_a.zero_()
        target.lora_b.zero_()
        target.lora_a.flatten(1)[: a.shape[0]].copy_(a)
        target.lora_b.flatten(1)[:, : b.shape[1]].copy_(b / target.scale)
    for key, value in _others(injection, name).items():
        value.copy_(sum(weight * tensors[key] for weight, tensors in others))  # type: ignore[arg-type]
    for key, value in record.values.items():
        if value.is_floating_point():
            base = injection.base[key]
            value.copy_(base + sum(w * (injection.own_value(adapter, key) - base) for adapter, w in weights.items()))
    return report


def _others(injection: Injection, adapter: str) -> dict[str, Tensor]:
    """The injected parameters of an adapter that are no low-rank factors, by name."""
    inside = {id(value) for item in low_ranks(injection, adapter).values() for value in item.parameters()}
    return {
        f"{module.peft_name}.{local}": value
        for module in injection.adapters[adapter].modules
        for local, value in module.peft_parameters(adapter).items()
        if id(value) not in inside
    }


def _compare_classes(lists: Sequence[list[str]]) -> None:
    """Refuse to combine adapters that were trained on the same classes in another order; say if they are others."""
    for names in lists:
        if names != lists[0]:
            both = f"{shortened(lists[0], 5)} and {shortened(names, 5)}"
            if sorted(names) == sorted(lists[0]):
                raise InjectionError(f"adapters of the same classes in another order cannot be combined: {both}")
            logger.warning("Adapters of other classes are combined, heads too if they are trained: %s.", both)


def _refuse(sources: Sequence[Any], others: Sequence[Any], kind: str) -> None:
    """Raise InjectionError for adapters that cannot be added up."""
    for _, factors in sources:
        if factors.keys() != sources[0][1].keys():
            raise InjectionError("the adapters' LoRA is on different parts (PARTS) and cannot be combined")
        if any(item.lora_magnitude is not None or item.cobot is not None for item in factors.values()):
            raise InjectionError("DoRA and COBOT are not linear in their weights; such adapters cannot be combined")
    if kind == "svd" and others[0][1]:
        raise InjectionError(f"svd is for LoRA alone, but there is {next(iter(others[0][1]))}; combine by 'linear'")
    shapes = [{key: value.shape for key, value in tensors.items()} for _, tensors in others]
    if any(shape != shapes[0] for shape in shapes):
        raise InjectionError("the adapters' layers differ in size and cannot be averaged")


def _entry(entry: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """A method's entry for the combination: LoRA of the new rank with scale 1, everything else as it was."""
    if entry["NAME"] != "lora":
        return dict(entry)
    plain = {"RANK": rank, "ALPHA": float(rank), "RSLORA": False, "INIT": "default"}
    return {**entry, **plain, "RANK_PATTERN": {}, "ALPHA_PATTERN": {}}


def _side_by_side(terms: Sequence[tuple[float, LowRank]]) -> tuple[Tensor, Tensor]:
    """B (out, R) and A (R, in) whose product is the weighted sum of the changes."""
    bs, as_ = [], []
    for weight, item in terms:
        bs.append(weight * item.scale * item.lora_b.flatten(1))
        as_.append(item.lora_a.flatten(1))
        if item.lora_a_start is not None and item.lora_b_start is not None:
            bs.append(-weight * item.scale * item.lora_b_start.flatten(1))
            as_.append(item.lora_a_start.flatten(1))
    return torch.cat(bs, dim=1), torch.cat(as_)


def _nearest(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (out, R) and A (R, in), R at most ``rank``, whose product is nearest to that of ``b`` and ``a``."""
    u, s, v = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
