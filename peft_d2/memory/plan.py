"""Fit a training step into a memory budget: measure one step at its leanest, then keep what the budget has room for.

The step is measured with every block recomputing, all but the least memory it can run in. Whenever a block is
computed again, one sees what keeping its activations would have cost and what it would have saved in time. From these
the peak of any choice follows: at each moment, the lean step's peak there plus the activations of the kept blocks
between their forward and their backward pass. Blocks are then kept in the order of time saved per byte. That is a
little too much, as a kept block needs no copy of its input, so steps with the choice are measured and it is made anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from peft_d2.peft.errors import InjectionError, PeftError
from peft_d2.peft.state import refuse_meta

from .blocks import (
    Block,
    BlockState,
    Mode,
    find_blocks,
    make_block,
    map_large_blocks,
    release_block,
    resident_bytes,
    return_freed_memory,
)
from .meter import device_of, free_bytes
from .step import Call, Forward, LeanStep, measure, measure_on_host, measure_peak

GIB = 2**30
AUTO_SHARE = 0.9  # of what is free: allocators need some room between tensors
_FILLED = 0.8  # of the planned peak, up to which malloc may hold freed memory: giving it back takes time
_CPU_SHARE = 0.95  # of the room beside the weights: malloc leaves holes between what is kept
_FAR_ABOVE = 2**62
_TRIES = 3  # choices that are measured


class MemoryBudgetError(PeftError, ValueError):
    """No choice fits the budget; ``smallest`` is the least budget in GiB that one does."""

    def __init__(self, message: str, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


@dataclass
class MemoryPlan:
    """What was chosen, and what it is expected to need. Sizes are bytes, times seconds of one step.

    Attributes:
        budget: None where there is no limit.
        resident: what is there all the time: weights, buffers, and the optimizer's states of what is trained.
        peak: the highest memory within a step, ``resident`` included.
        unplanned_peak: the same with nothing recomputed.
        smallest: the least budget that could be met.
        largest_block: the activations of the largest block, below which no recomputing gets.
        seconds, unplanned_seconds: of forward and backward pass, with this choice and with nothing recomputed.
        modes: what each block does, by name.
        kept: bytes of each block's activations, by name.
        pieces: parts of a batch that are computed one after another.
    """

    budget: int | None
    resident: int
    peak: int
    unplanned_peak: int
    smallest: int
    largest_block: int
    seconds: float
    unplanned_seconds: float
    modes: dict[str, Mode] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    pieces: int = 1

    @property
    def kept_bytes(self) -> int:
        """Of the activations that stay on the device until the backward pass."""
        return sum(size for name, size in self.kept.items() if self.modes[name] == "keep")

    @property
    def recomputed(self) -> list[str]:
        """Names of the blocks whose activations are computed again."""
        return [name for name, mode in self.modes.items() if mode == "recompute"]

    @property
    def above_idle(self) -> int:
        """The peak above the idle model, which has weights alone."""
        return self.peak - self.resident

    def __str__(self) -> str:
        offloaded = sum(mode == "offload" for mode in self.modes.values())
        chosen = [
            f"{len(self.recomputed)} of {len(self.modes)} blocks recomputed" if self.recomputed else "",
            f"{offloaded} blocks offloaded to the host" if offloaded else "",
            f"a batch in {self.pieces} pieces" if self.pieces > 1 else "",
        ]
        rows = [
            ("", "peak GiB", "of it above weights and optimizer", "seconds of a step"),
            ("---", "---:", "---:", "---:"),
            _row("nothing", self.unplanned_peak, self.resident, self.unplanned_seconds),
            _row(", ".join(filter(None, chosen)) or "chosen: nothing", self.peak, self.resident, self.seconds),
            _row("smallest possible", self.smallest, self.resident, None),
        ]
        text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        groups: dict[str, list[int]] = {}
        for name in self.recomputed:
            pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
            groups.setdefault(pattern, []).append(self.kept.get(name, 0))
        lines = [f"  {name}: {len(sizes)}, {sum(sizes) / 2**20:.0f} MiB" for name, sizes in groups.items()]
        return "\n".join([text, *(["recomputed:"] if lines else []), *lines])


def _row(name: str, peak: int, resident: int, seconds: float | None) -> tuple[str, ...]:
    above = f"{(peak - resident) / GIB:.2f}"
    return name, f"{peak / GIB:.2f}", above, "" if seconds is None else f"{seconds:.2f}"


def fit_memory(
    model: nn.Module,
    batch: Any,
    budget: float | str | None,
    *,
    forward: Forward | None = None,
    optimizer_states: int = 2,
    pieces: int = 1,
    agree: Callable[[int], int] = int,
) -> MemoryPlan:
    """Make training steps of ``model`` fit into ``budget``; gradients and names stay what they are.

    Args:
        model: any nn.Module on its device, injected if it is to be; in place, its blocks change their class.
        batch: what a step is given, as large as any to come; a list is also tried in equal pieces.
        budget: GiB of tensors on the device at most, weights and optimizer included; ``"auto"`` is what the device
            has free; None measures and recomputes nothing.
        forward: gives the losses (a tensor, or any nesting of them) of ``forward(model, batch)``; by default
            ``model(batch)``.
        optimizer_states: numbers that the optimizer keeps per trained one: 2 for Adam, 1 for SGD with momentum.
        pieces: in how many pieces the batch is computed already.
        agree: of a number of each of several processes, the largest: all choose equal pieces, after equally many steps.

    Raises:
        InjectionError: nothing is trained, no step can be run, or there are no values: the meta device.
        MemoryBudgetError: the budget cannot be met; the message names the smallest that can.
    After an error the model is as before, with an earlier plan if it had one.
    """
    _check(model, batch)
    limit = _limit(budget, model)
    before = {module: module.memory_block for module in model.modules() if isinstance(module, Block)}
    release_memory(model)
    if limit is not None and device_of(model).type == "cpu":
        map_large_blocks()
    states = {name: make_block(module, name) for name, module in find_blocks(model)}
    resident = _resident(model, optimizer_states)
    smallest: int | None = None
    share = _CPU_SHARE if device_of(model).type == "cpu" else 1.0
    room = None if limit is None else int(share * (limit - resident))
    forward = forward or (lambda model, batch: model(batch))
    try:
        for step, part, mode, count in _steps(model, batch, pieces, forward, states):
            if agree(int(step is None)) or step is None:  # one of the processes has no memory for it
                continue
            choice = partial(choose, step, resident=resident, mode=mode, pieces=count)
            if room is None:
                plan = choice(None)
            else:
                plan = _measured(choice, room, partial(measure_peak, model, part, forward), step, states, agree)
            smallest = min(smallest or plan.smallest, plan.smallest)
            if agree(0 if limit is None else plan.peak - limit) <= 0:
                plan.budget, plan.smallest = limit, smallest
                return_freed_memory()
                idle = resident_bytes() + optimizer_states * _trained_bytes(model)
                _set_modes(states, plan.modes)
                for state in states.values():
                    state.ceiling = idle + int(_FILLED * (plan.above_idle - step.largest_growth))
                return plan
        raise _cannot_be_met(limit, smallest, resident)
    except BaseException:
        _put_back(model, before)
        raise


def _steps(
    model: nn.Module, batch: Any, pieces: int, forward: Forward, states: dict[str, BlockState]
) -> Iterator[tuple[LeanStep | None, Any, Mode, int]]:
    """Measured steps, each leaner than the one before: what is measured, None where the device has no memory for it, a
    piece of the batch, the blocks' mode, and how many pieces there are.
    """
    step = part = None
    size = len(batch) if isinstance(batch, list | tuple) else 0
    counts = [count for count in range(pieces, size + 1) if size % count == 0] or [1]
    for count in counts:
        step, part = None, batch[: size // count] if count > 1 else batch
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            step = measure(model, part, forward, states)
        yield step, part, "recompute", count
    if device_of(model).type == "cuda":
        host = None
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            host = step and measure_on_host(model, part, forward, states, step)
        yield host, part, "offload", counts[-1]


def _measured(
    choice: Callable[[int], MemoryPlan],
    room: int,
    measure: Callable[[], int],
    step: LeanStep,
    states: dict[str, BlockState],
    agree: Callable[[int], int],
) -> MemoryPlan:
    """The plan of most kept activations whose measured peak is within ``room``; else the leanest that was tried.

    A choice that equals the one before is not measured again, unless another process has a new one: all take equally
    many steps, as their losses may wait for each other.
    """
    tried: list[MemoryPlan] = []
    within: list[MemoryPlan] = []
    asked = room
    for number in range(_TRIES):
        plan = choice(asked if within or number < _TRIES - 1 else 0)  # the last of them is the leanest
        if not agree(int(not tried or plan.modes != tried[-1].modes)):
            continue
        _set_modes(states, plan.modes)
        planned = plan.above_idle
        try:
            plan.peak = plan.resident + measure() + step.unseen
        except torch.cuda.OutOfMemoryError:
            plan.peak = _FAR_ABOVE
        tried.append(plan)
        within += [plan] if plan.above_idle <= room else []
        asked = room + planned - plan.above_idle
    if within:
        return max(within, key=lambda plan: plan.kept_bytes)
    leanest = min(tried, key=lambda plan: plan.peak)
    leanest.smallest = max(leanest.smallest, leanest.peak)
    return leanest


def _set_modes(states: dict[str, BlockState], modes: dict[str, Mode]) -> None:
    for name, state in states.items():
        state.mode = modes.get(name, "keep")


def choose(step: LeanStep, room: int | None, resident: int, mode: Mode, pieces: int) -> MemoryPlan:
    """Keep the activations that pay most, as long as the peak stays within ``room`` bytes."""
    blocks: dict[str, list[Call]] = {}
    for call in step.calls:
        blocks.setdefault(call.name, []).append(call)
    sizes = {name: sum(call.size for call in calls) for name, calls in blocks.items()}
    times = {name: sum(call.seconds for call in calls) for name, calls in blocks.items()}
    peaks = [peak + step.unseen for _, peak in step.readings]
    smallest = max(peaks)
    whole = step.with_kept(peaks, step.calls)
    kept: set[str] = set()
    for name in sorted(blocks, key=lambda name: -times[name] / max(sizes[name], 1)):
        raised = step.with_kept(peaks, blocks[name])
        if room is None or max(raised) <= max(room, max(peaks)):
            kept.add(name)
            peaks = raised
    nothing = step.seconds - sum(times.values())
    return MemoryPlan(
        budget=None,
        resident=resident,
        peak=max(peaks) + resident,
        unplanned_peak=max(whole) + resident,
        smallest=smallest + resident,
        largest_block=max((call.size for call in step.calls), default=0),
        seconds=pieces * (nothing + sum(seconds for name, seconds in times.items() if name not in kept)),
        unplanned_seconds=pieces * nothing,
        modes={name: "keep" if name in kept else mode for name in blocks},
        kept=sizes,
        pieces=pieces,
    )


def _cannot_be_met(limit: int | None, smallest: int | None, resident: int) -> MemoryBudgetError:
    """That no step fits; ``smallest`` is the peak of the leanest, None where that was not even measured."""
    if smallest is None or limit is None:
        return MemoryBudgetError("even the leanest step does not fit on this device: use smaller images", float("inf"))
    needed = -(-smallest * 100 // GIB) / 100
    return MemoryBudgetError(
        f"a memory budget of {limit / GIB:.2f} GiB cannot be met: the smallest possible is {needed:.2f} GiB, of which "
        f"{resident / GIB:.2f} GiB are weights and the optimizer's states. Allow more, use smaller images, or train "
        "fewer parameters",
        needed,
    )


def release_memory(model: nn.Module) -> None:
    """Undo :func:`fit_memory`: every block keeps its activations and has its own class again."""
    for module in model.modules():
        release_block(module)


def _put_back(model: nn.Module, before: dict[Block, BlockState]) -> None:
    """Let the blocks be those of ``before``, each with its state."""
    release_memory(model)
    for module, state in before.items():
        vars(make_block(module, state.name)).update(vars(state))


def _check(model: nn.Module, batch: Any) -> None:
    """Refuse what no step can be measured of."""
    if not isinstance(model, nn.Module):
        raise InjectionError(f"expected the model, an nn.Module, got {type(model).__name__}")
    if not _trained_bytes(model):
        raise InjectionError("no parameter of the model is trained: inject before fit_memory, or set requires_grad")
    refuse_meta(model, "a step, which is measured by running it,")
    if isinstance(batch, list | tuple) and not batch:
        raise InjectionError("the batch is empty: give fit_memory one as large as any to come")
    if torch.is_inference_mode_enabled():
        raise InjectionError("a step is measured with gradients: call fit_memory outside of torch.inference_mode()")


def _limit(budget: float | str | None, model: nn.Module) -> int | None:
    if budget is None:
        return None
    if budget == "auto":
        there = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        return int(AUTO_SHARE * free_bytes(device_of(model))) + there
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < float("inf"):
        raise MemoryBudgetError(f"the memory budget is {budget!r}: expected GiB above 0, or 'auto'", float("nan"))
    return int(budget * GIB)


def _resident(model: nn.Module, optimizer_states: int) -> int:
    storages = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
    sizes = {storage._cdata: storage.nbytes() for storage in storages}
    return sum(sizes.values()) + optimizer_states * _trained_bytes(model)


def _trained_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
