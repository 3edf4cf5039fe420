"""Which parts of a model a small update would help most on given batches, and what to train within a budget.

Batches are dealt out to two halves, so that each weight W (out, in) has two independent gradients G1 and G2. Of the
i-th singular direction (u, s, v) of G1 the energy is ``s u' G2 v``, an estimate of the squared gradient there to which
noise, being of one half alone, adds nothing on average. A rank of LoRA buys one direction for (in + out) parameters,
training in full buys the whole gradient: what brings the most energy per parameter is taken until the budget is spent.
The gradient's singular directions are those that LoRA-GA (arXiv 2407.05000) starts from; ranks by need are EVA's
(arXiv 2410.07170).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import join
from .errors import InjectionError
from .lora import Lora
from .method import parse
from .probe import as_it_was, call, own_event_storage
from .state import get_injection
from .targets import ModelIndex, Target, match, resolve_train

RANKS = (2, 4, 8, 16, 32)
_DIGITS = re.compile(r"\d+")
Gradients = dict[str, Tensor]
Losses = Callable[[nn.Module, Any], Tensor | dict[str, Tensor]]


class BudgetError(InjectionError):
    """A budget that is too small; ``least`` is the number of parameters that would do."""

    def __init__(self, message: str, least: int) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Candidate:
    """One thing that could be trained.

    Attributes:
        names: of the module (LoRA), of one parameter, or of vectors whose names differ in numbers alone (in full).
        kind: "linear" (convolutions, too), "attention" (``nn.MultiheadAttention``) or "full".
        cost: parameters of one rank, or of all of them.
        energies: of each rank in turn, falling; one for "full".
    """

    names: tuple[str, ...]
    kind: str
    cost: int
    energies: tuple[float, ...]


@dataclass(frozen=True)
class Recommendation:
    """``methods`` and ``train`` as :func:`inject` takes them, and each choice with its rank (0: in full) as ``chosen``.

    ``share`` is the part of all measured energy that the chosen directions hold, ``parameters`` what would be trained.
    """

    methods: list[dict[str, Any]]
    train: list[str]
    chosen: list[tuple[Candidate, int]]
    parameters: int
    share: float


def recommend(
    model: nn.Module,
    batches: Sequence[Any],
    budget: int,
    train: Sequence[str] = (),
    losses: Losses | None = None,
    scale: float = 4.0,
) -> Recommendation:
    """What to train of ``model`` with at most ``budget`` parameters, of which ``train`` (new heads) is trained anyway.

    Args:
        model: not injected yet, with the base's weights.
        batches: a list of two or more that it is called with in training, ``list(itertools.islice(loader, 16))`` say.
        budget: number of parameters.
        train: patterns, as for :func:`inject`.
        losses: gives the loss of (model, batch), or a dict of losses to be summed; by default what the model returns.
        scale: of LoRA's branches, ``ALPHA / RANK``.

    Raises:
        BudgetError: a budget that ``train`` alone exceeds or no place fits.
        InjectionError: a model that is injected already, fewer than two batches, a loss that is not finite or that no
            gradient comes from, or no gradient anywhere.
        PatternError: a pattern that matches nothing.
    The model is as it was.
    """
    if get_injection(model) is not None:
        raise InjectionError("this model is injected already: rank the modules of one that is not, then inject it")
    if not isinstance(batches, Sequence):
        how = "list(itertools.islice(batches, 16))"
        raise InjectionError(f"batches is a {type(batches).__name__}: give a list of some of them, {how}")
    if len(batches) < 2:
        raise InjectionError(f"{len(batches)} batch(es) to measure gradients on: expected two or more")
    index = ModelIndex.of(model)
    given = set(resolve_train(index, list(train))[0])
    fixed = sum(index.tensors[name].get().numel() for name in given if name in dict(model.named_parameters()))
    if fixed >= budget:
        raise BudgetError(f"TRAIN alone has {fixed:,} parameters and the budget is {budget:,}: raise it", fixed + 1)
    halves = measure(model, batches, losses or call)
    device = next(model.parameters()).device.type
    with torch.random.fork_rng(), torch.autocast(device, enabled=False):
        torch.manual_seed(0)  # of the randomised singular values
        found = candidates(index, halves, given)
    if not found:
        raise InjectionError("no weight has a gradient that two halves of these batches agree on: give more batches")
    chosen = choose(found, budget - fixed)
    if not (chosen or train):
        least = fixed + min(candidate.cost for candidate in found)
        raise BudgetError(f"the budget is {budget:,} parameters, and no place takes as few: raise it", least)
    methods, in_full = _entries(index, chosen, scale)
    cost = fixed + sum(candidate.cost * (rank or 1) for candidate, rank in chosen)
    energy = sum(sum(candidate.energies[: rank or 1]) for candidate, rank in chosen)
    share = energy / sum(sum(candidate.energies) for candidate in found)
    return Recommendation(methods, [*train, *in_full], chosen, cost, share)


def measure(model: nn.Module, batches: Sequence[Any], losses: Losses) -> tuple[Gradients, Gradients]:
    """Mean gradients of every parameter over the even and the odd batches, by the parameters' first names.

    Raises:
        InjectionError: a loss or a gradient that is not finite, or a loss that is no number with a gradient.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    halves: tuple[Gradients, Gradients] = ({}, {})
    with as_it_was(model), torch.random.fork_rng(), own_event_storage(), torch.enable_grad():
        model.train()
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for number, batch in enumerate(batches):
            torch.manual_seed(number)
            model.zero_grad(set_to_none=True)
            try:
                _backward(model, losses, batch)
            except FloatingPointError as error:  # of Detectron2's region proposals, too
                raise InjectionError(
                    f"batch {number}, before any step: {error}. Look whether the base's weights are those of its config"
                ) from error
            half = halves[number % 2]
            for parameter in model.parameters():
                if parameter.grad is not None:
                    own = parameter.grad.detach().float() / len(batches[number % 2 :: 2])
                    half[names[id(parameter)]] = half.get(names[id(parameter)], 0) + own
    return halves


def summed(losses: Any) -> Any:
    """The sum of a dict of losses in float32; anything else as it is."""
    return torch.stack([value.float() for value in losses.values()]).sum() if isinstance(losses, dict) else losses


def _backward(model: nn.Module, losses: Losses, batch: Any) -> None:
    """Fill the parameters' gradients; raises FloatingPointError where the loss or one of them is not finite."""
    loss = summed(losses(model, batch))
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        kind = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        given = " without a gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
        raise InjectionError(f"the loss is {kind}{given}: expected one number with a gradient, or a dict of such")
    if not loss.isfinite():
        raise FloatingPointError(f"the loss is {loss.item()}")
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise FloatingPointError(f"the gradient of {name} is not finite")


def candidates(index: ModelIndex, halves: tuple[Gradients, Gradients], given: Iterable[str] = ()) -> list[Candidate]:
    """LoRA of every module that is larger than it, every other parameter in full; without the ``given``."""
    lora = parse({"NAME": "lora", "TARGETS": ["*"]}, {"lora": Lora})
    owners = {target.name: target for target in index.targets.values()}
    pairs = {name: (halves[0][name], halves[1][name]) for name in halves[0] if name in halves[1]}
    for name in given:
        pairs.pop(name, None)
    found: list[Candidate] = []
    small: dict[str, list[str]] = {}
    for name, pair in list(pairs.items()):
        path, _, leaf = name.rpartition(".")
        kind = _kind(owners[path], leaf, lora) if name in pairs and path in owners else ""
        out = join(path, "out_proj.weight")
        if kind == "attention" and out in pairs:  # which is not there where it is trained anyway
            parts = [*zip(pair[0].chunk(3), pair[1].chunk(3), strict=True), pairs.pop(out)]
            found.append(_low_rank(path, kind, parts))
        elif kind == "linear":
            found.append(_low_rank(path, kind, [pair]))
        elif name in pairs:
            small.setdefault(_DIGITS.sub("*", name) if pair[0].dim() == 1 else name, []).append(name)
    for names in small.values():
        energy = sum(float((pairs[name][0] * pairs[name][1]).sum()) for name in names if name in pairs)
        names = [name for name in names if name in pairs]
        found.append(Candidate(tuple(names), "full", sum(pairs[n][0].numel() for n in names), (max(0.0, energy),)))
    return [candidate for candidate in found if any(candidate.energies)]


def _kind(owner: Target, leaf: str, lora: Any) -> str:
    """How a parameter is best trained: by LoRA where its module takes it and is large, else in full."""
    module: Any = owner.module
    if isinstance(module, nn.MultiheadAttention):
        return "attention" if leaf == "in_proj_weight" and not lora.refusal(owner) else "full"
    if leaf != "weight" or not isinstance(module, nn.Linear | nn.Conv2d) or lora.refusal(owner):
        return "full"
    weight = module.weight
    small = weight.numel() <= 4 * (len(weight) + weight[0].numel()) or getattr(module, "groups", 1) > 1
    return "full" if small else "linear"


def _low_rank(name: str, kind: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Candidate:
    """LoRA of one rank in all of a module's weights, whose gradients are ``pairs``."""
    largest = min(min(len(one), one[0].numel()) for one, _ in pairs)
    count = max((rank for rank in RANKS if rank <= largest), default=largest)
    energies = torch.stack([_spectrum(one.flatten(1), other.flatten(1), count) for one, other in pairs]).sum(dim=0)
    cost = sum(len(one) + one[0].numel() for one, _ in pairs)
    return Candidate((name,), kind, cost, tuple(energies.clamp(min=0).sort(descending=True).values.tolist()))


def _spectrum(first: Tensor, second: Tensor, count: int) -> Tensor:
    """Energies of the largest directions of two gradients (out, in) of one weight, each half measured by the other."""
    found = torch.zeros(count, device=first.device)
    for one, other in ((first, second), (second, first)):
        u, s, v = torch.svd_lowrank(one, q=min(count + 8, *one.shape), niter=4)
        found += (s * torch.einsum("oi,oj,ji->i", u, other, v))[:count] / 2
    return found


def choose(found: Sequence[Candidate], budget: int) -> list[tuple[Candidate, int]]:
    """What brings the most energy per parameter within ``budget``, with ranks out of ``RANKS`` (0: in full).

    What is too large for what is left of the budget is passed over.
    """
    steps = sorted(
        ((energy / entry.cost, i) for i, entry in enumerate(found) for energy in entry.energies if energy > 0),
        reverse=True,
    )
    directions, left = [0] * len(found), budget
    for _, i in steps:
        more = _cost(found[i], directions[i] + 1) - _cost(found[i], directions[i])
        if more <= left:
            directions[i] += 1
            left -= more
    return [(candidate, _rank(candidate, count)) for candidate, count in zip(found, directions, strict=True) if count]


def _rank(candidate: Candidate, directions: int) -> int:
    """The rank that holds so many directions; 0 is in full."""
    return 0 if candidate.kind == "full" else next((rank for rank in RANKS if rank >= directions), directions)


def _cost(candidate: Candidate, directions: int) -> int:
    """Parameters that so many directions take."""
    return candidate.cost * (_rank(candidate, directions) or 1) if directions else 0


def _entries(index: ModelIndex, chosen: Sequence[tuple[Candidate, int]], scale: float) -> tuple[list[Any], list[str]]:
    """Entries of METHODS, one for each kind and rank, and names to train in full."""
    modules = index.module_names()
    groups: dict[tuple[str, int], list[str]] = {}
    for candidate, rank in chosen:
        groups.setdefault((candidate.kind, rank), []).extend(candidate.names)
    in_full = patterns_of(groups.pop(("full", 0), []), [*modules, *index.parameter_names()])
    methods = []
    for (kind, rank), names in sorted(groups.items()):
        entry = {"NAME": "lora", "RANK": rank, "ALPHA": scale * rank, "TARGETS": patterns_of(names, modules)}
        methods.append({**entry, "PARTS": ["q", "k", "v", "out"]} if kind == "attention" else entry)
    return methods, in_full


def patterns_of(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Few patterns that choose exactly ``names`` out of ``known``."""
    wanted, result = list(names), []
    while wanted:
        for pattern in (_DIGITS.sub("*", wanted[0]), wanted[0], f"re:{re.escape(wanted[0])}"):
            hits = set(match(pattern, known))
            if hits <= set(names):
                break
        result.append(pattern)
        wanted = [name for name in wanted if name not in hits]
    return result
