"""One training step at its leanest, measured: what it takes with no block keeping a thing, and what each would keep."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint

from peft_d2.peft.errors import InjectionError
from peft_d2.peft.probe import as_it_was, own_event_storage, tensors_of, with_own_dicts

from .blocks import BlockState, return_freed_memory
from .kept import OnHost
from .meter import Meter, ProcessPeak, device_of, return_workspaces

Forward = Callable[[nn.Module, Any], Any]


def _total(losses: Any) -> Tensor:
    values = [value.float().sum() for value in tensors_of(losses) if value.requires_grad]
    if not values:
        raise InjectionError(
            f"what the model gives in training ({type(losses).__name__}) has no loss that depends on what is trained; "
            "give fit_memory the losses, forward=lambda model, batch: ..."
        )
    return torch.stack(values).sum()


@dataclass
class Call:
    """One run of a block, with the numbers of readings: after its forward pass, before and after its recomputing.

    Attributes:
        size: bytes of the activations that it keeps unless something is done about it.
        passing: bytes that the recomputing takes beyond these while it lasts.
        seconds: what doing something about it takes.
    """

    name: str
    forward_end: int
    start: int = 0
    end: int = 0
    size: int = 0
    passing: int = 0
    seconds: float = 0.0


class Recorder:
    """Recomputes every block and notes when, how long, and with a meter how much memory."""

    def __init__(self, device: torch.device, meter: Meter | None = None) -> None:
        self.device = device
        self.meter = meter
        self.calls: list[Call] = []
        self.spans: list[tuple[Call, Any, Any]] = []  # calls with the moments around their recomputing
        self.readings: list[tuple[int, int]] = []

    def read(self) -> int:
        """Take a reading; returns its number."""
        self.readings.append((0, 0) if self.meter is None else self.meter.read())
        return len(self.readings) - 1

    def run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block's forward pass, whose activations are computed once more in the backward pass."""
        call = Call(name, 0)
        runs = 0

        def body(*args: Any, **kwargs: Any) -> Any:
            """Run the block's own forward pass; the second run, in the backward pass, is the one that is measured."""
            nonlocal runs
            runs += 1
            if runs == 1:
                return forward(*args, **kwargs)
            return_freed_memory()
            call.start, begun = self.read(), _moment(self.device)
            try:
                return forward(*args, **kwargs)
            except BaseException as stop:  # torch leaves by one of its own once all that is needed is there
                traceback.clear_frames(stop.__traceback__)  # which would keep what was not needed, too
                raise
            finally:
                self.spans.append((call, begun, _moment(self.device)))
                call.end = self.read()
                now, peak = self.readings[call.end]
                call.size, call.passing = max(0, now - self.readings[call.start][0]), peak - now

        output = checkpoint(body, *args, use_reentrant=False, **kwargs)
        call.forward_end = self.read()
        self.calls.append(call)
        return output


class HostRecorder(Recorder):
    """Lets every block keep its activations in the host's memory, and notes when its backward pass begins."""

    def run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block's forward pass, whose activations come back from the host in the backward pass."""
        with OnHost():
            output = forward(*args, **kwargs)
        number = self.read()
        self.calls.append(call := Call(name, number, number, number))

        def begin(_: Tensor) -> None:
            """Note that the block's backward pass begins: the first gradient of its outputs is there."""
            call.start = call.end = self.read() + 1  # what a block keeps is freed little by little until the next

        if learning := [tensor for tensor in tensors_of(output) if tensor.requires_grad]:
            register_multi_grad_hook(learning, begin, mode="any")
        return output


def _moment(device: torch.device) -> Any:
    """Now: the processor's seconds, which other programs disturb less, or a GPU's event, which waits for nothing."""
    if device.type != "cuda":
        return time.process_time()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begun: Any, ended: Any) -> float:
    if not isinstance(begun, torch.cuda.Event):
        return float(ended - begun)
    ended.synchronize()
    return float(begun.elapsed_time(ended)) / 1e3


@dataclass
class LeanStep:
    """A lean step's readings: (bytes now, peak since the reading before), the blocks' calls, and the whole's time."""

    readings: list[tuple[int, int]]
    calls: list[Call]
    seconds: float
    unseen: int  # of the process beyond the tensors that were followed; on a GPU what libraries keep for themselves

    @property
    def largest_growth(self) -> int:
        """The most bytes by which a moment is above the reading before it; the first, above the step's start."""
        pairs = zip([(0, 0), *self.readings], self.readings, strict=False)
        return max((peak - before for (before, _), (_, peak) in pairs), default=0)

    def with_kept(self, peaks: Sequence[int], calls: Sequence[Call]) -> list[int]:
        """``peaks``, one for each reading, if these calls keep their activations."""
        raised = list(peaks)
        for call in calls:
            for number in range(call.forward_end + 1, call.start + 1):
                raised[number] += call.size
            raised[call.end] -= call.passing
        return raised


def measure(model: nn.Module, batch: Any, forward: Forward, states: dict[str, BlockState]) -> LeanStep:
    """A step with every block recomputing: to warm up, for its time and the process's peak, and for its tensors."""
    device = device_of(model)
    run = partial(_run, model, batch, forward, states)
    timed, metered = Recorder(device), Recorder(device, Meter(device))
    with _apart(model, device):
        model.zero_grad()
        return_workspaces(device)
        before = Meter.allocated(device)
        run(Recorder(device))
        model.zero_grad()
        unseen = Meter.allocated(device) - before
        return_freed_memory()
        with ProcessPeak() as process:
            seconds = run(timed)
        return_freed_memory()
        run(metered)
    for call, begun, ended in timed.spans:
        call.seconds += _seconds(begun, ended)
    for call, of_time in zip(metered.calls, timed.calls, strict=True):
        call.seconds = of_time.seconds
    if device.type == "cpu":
        unseen = process.bytes - max(peak for _, peak in metered.readings)
    return LeanStep(metered.readings, metered.calls, seconds, max(0, unseen))


def measure_on_host(
    model: nn.Module, batch: Any, forward: Forward, states: dict[str, BlockState], recomputing: LeanStep
) -> LeanStep:
    """The same step with every block's activations in the host's memory; what they take is known from ``recomputing``.

    What the transfers take is shared out by size.
    """
    device = device_of(model)
    run = partial(_run, model, batch, forward, states)
    metered = HostRecorder(device, Meter(device))
    with _apart(model, device):
        run(HostRecorder(device))  # allocates the host's memory
        seconds = run(HostRecorder(device))
        run(metered)
    nothing = recomputing.seconds - sum(call.seconds for call in recomputing.calls)
    whole = sum(call.size for call in recomputing.calls)
    for call, known in zip(metered.calls, recomputing.calls, strict=True):
        call.size = known.size
        call.seconds = max(0.0, seconds - nothing) * known.size / max(whole, 1)
    return LeanStep(metered.readings, metered.calls, seconds, recomputing.unseen)


def measure_peak(model: nn.Module, batch: Any, forward: Forward) -> int:
    """Bytes of tensors that a step takes at most above those that are there, as its blocks are set."""
    device = device_of(model)
    with _apart(model, device), Meter(device) as meter:
        _step(model, batch, forward)
        return meter.read()[1]


@contextlib.contextmanager
def _apart(model: nn.Module, device: torch.device) -> Iterator[None]:
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with as_it_was(model), torch.random.fork_rng(devices), own_event_storage():
        yield


def _run(model: nn.Module, batch: Any, forward: Forward, states: dict[str, BlockState], recorder: Recorder) -> float:
    """One step with ``recorder``; returns the seconds that it took."""
    for state in states.values():
        state.recorder = recorder.run
    try:
        with recorder.meter or contextlib.nullcontext():
            begun = _moment(recorder.device)
            _step(model, batch, forward)
            recorder.read()
            return _seconds(begun, _moment(recorder.device))
    finally:
        for state in states.values():
            state.recorder = None


def _step(model: nn.Module, batch: Any, forward: Forward) -> None:
    model.zero_grad()
    with torch.enable_grad():
        _total(forward(model, with_own_dicts(batch))).backward()
