"""A weighted combination of adapters as a new adapter.

``linear`` adds the weight changes exactly, ``sum_i w_i s_i B_i A_i``, by putting the factors side by side (rank = sum
of ranks); ``svd`` gives the best approximation of that sum of a chosen rank (Eckart and Young 1936). Bottlenecks and
other parts that are no change of weights are averaged parameter by parameter (Chronopoulou et al., "AdapterSoup",
EACL 2023, arXiv 2302.07027), and modules trained in full become ``base + sum_i w_i (value_i - base)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .inject import add_adapter
from .lora.factors import LowRank
from .report import Report
from .runtime import InjectionError, Runtime, get_runtime, known_adapter

KINDS = ("linear", "svd")


@torch.no_grad()
def combine_adapters(
    model: nn.Module, weights: Mapping[str, float], name: str, kind: str = "linear", rank: int | None = None
) -> Report:
    """Add the adapter ``name`` = the weighted sum of those in ``weights``; it is not active.

    Args:
        weights: adapter name -> weight. The adapters must have the same methods on the same places; LoRA ranks may
        differ. kind: "linear" or "svd". rank: for svd, the new rank; the largest of the given ones when None.

    Raises:
        InjectionError: the adapters differ in more than rank, or hold a kind that has no sum (DoRA, COBOT).
    """
    runtime = get_runtime(model)
    if kind not in KINDS or not weights or not all(map(math.isfinite, weights.values())):
        raise InjectionError(
            f"cannot combine {dict(weights)} by {kind!r}: expected adapters with finite weights, and one of "
            f"{', '.join(KINDS)}"
        )
    places = [{(p.name, p.method) for p in known_adapter(runtime, adapter).places} for adapter in weights]
    records = [runtime.record.adapters[adapter] for adapter in weights]
    first = records[0]
    if any(place != places[0] for place in places) or any(record.full != first.full for record in records):
        raise InjectionError(f"{', '.join(weights)} do not adapt the same places and cannot be combined")
    sources = [(weight, _low_ranks(runtime, adapter)) for adapter, weight in weights.items()]
    others = [(weight, _others(runtime, adapter)) for adapter, weight in weights.items()]
    _refuse(sources, others, kind)
    largest = [max((item.lora_a.shape[0] for item in found.values()), default=0) for _, found in sources]
    starts = any(item.lora_a_start is not None for _, found in sources for item in found.values())
    width = (rank or max(largest)) if kind == "svd" else sum(largest) * (2 if starts else 1)
    report = add_adapter(model, name, [_entry(entry, width) for entry in first.methods], first.train)
    for key, target in _low_ranks(runtime, name).items():
        terms = [(weight, found[key]) for weight, found in sources]
        b, a = _side_by_side(terms) if kind == "linear" else _truncated(terms, width)
        target.lora_a.zero_()
        target.lora_b.zero_()
        target.lora_a.flatten(1)[: a.shape[0]].copy_(a)
        target.lora_b.flatten(1)[:, : b.shape[1]].copy_(b / target.scale)
    for key, value in _others(runtime, name).items():
        value.copy_(sum(weight * found[key] for weight, found in others))  # type: ignore[arg-type]
    for key, value in runtime.values[name].items():
        if value.is_floating_point():
            base = runtime.base[key]
            value.copy_(
                base + sum(weight * (_own(runtime, adapter, key) - base) for adapter, weight in weights.items())
            )
    return report


def _own(runtime: Runtime, adapter: str, key: str) -> Tensor:
    return runtime.slots[key].get() if runtime.installed == adapter else runtime.values[adapter][key]


def _low_ranks(runtime: Runtime, adapter: str) -> dict[str, LowRank]:
    """All LoRA factors of an adapter, by place, method and position in the part."""
    return {
        f"{module.peft_name} {method} {path}": item
        for module in runtime.places[adapter]
        for method, part in module.peft_parts(adapter).items()
        for path, item in part.named_modules()
        if isinstance(item, LowRank)
    }


def _others(runtime: Runtime, adapter: str) -> dict[str, Tensor]:
    """All other injected parameters of an adapter."""
    inside = {id(value) for item in _low_ranks(runtime, adapter).values() for value in item.parameters()}
    return {
        f"{module.peft_name}.{local}": value
        for module in runtime.places[adapter]
        for local, value in module.peft_parameters(adapter).items()
        if id(value) not in inside
    }


_Found = Sequence[tuple[float, Mapping[str, LowRank]]]


def _refuse(sources: _Found, others: Sequence[tuple[float, Mapping[str, Tensor]]], kind: str) -> None:
    """Raise for what has no sum."""
    for _, found in sources:
        if found.keys() != sources[0][1].keys():
            raise InjectionError("the adapters' LoRA is on different parts (PARTS) and cannot be combined")
        for item in found.values():
            if item.lora_magnitude is not None or item.cobot is not None:
                raise InjectionError("DoRA and COBOT are not linear in their weights; such adapters cannot be combined")
    if kind == "svd" and others[0][1]:
        raise InjectionError(f"svd is for LoRA alone, but there is {next(iter(others[0][1]))}; combine by 'linear'")
    for _, values in others:
        if {key: value.shape for key, value in values.items()} != {k: v.shape for k, v in others[0][1].items()}:
            raise InjectionError("the adapters' parts differ in size and cannot be averaged")


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


def _truncated(terms: Sequence[tuple[float, LowRank]], rank: int) -> tuple[Tensor, Tensor]:
    """B (out, R) and A (R, in), R at most ``rank``, whose product is nearest to the weighted sum of the changes."""
    total = sum((weight * item.delta().flatten(1).double() for weight, item in terms), start=torch.zeros(()))
    u, s, v = torch.linalg.svd(total, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
