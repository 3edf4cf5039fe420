"""One training step at its leanest, measured: what it takes with every block recomputing, and what each would keep."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_d2.peft.errors import InjectionError
from peft_d2.peft.probe import as_it_was, own_event_storage, tensors_of, with_own_dicts

from .blocks import BlockState, Mode, return_freed_memory
from .meter import Meter, ProcessPeak, device_of

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
    """One run of a block: the reading after its forward pass, those around its recomputing, and what that took."""

    name: str
    forward_end: int
    start: int = 0
    end: int = 0
    seconds: float = 0.0


class Recorder:
    """Recomputes every block and notes when, how long, and with a meter how much memory."""

    def __init__(self, meter: Meter | None) -> None:
        self.meter = meter
        self.calls: list[Call] = []
        self.readings: list[tuple[int, int]] = []

    def read(self) -> int:
        """Take a reading; returns its number."""
        self.readings.append((0, 0) if self.meter is None else self.meter.read())
        return len(self.readings) - 1

    def run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = Call(name, 0)
        runs = 0

        def body(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1:
                return forward(*args, **kwargs)
            return_freed_memory()
            call.start, begun = self.read(), _clock()
            try:
                return forward(*args, **kwargs)
            finally:  # torch leaves by an exception of its own once all that is needed is there
                call.seconds += _clock() - begun
                call.end = self.read()

        output = checkpoint(body, *args, use_reentrant=False, **kwargs)
        call.forward_end = self.read()
        self.calls.append(call)
        return output


def _clock() -> float:
    """On a CPU the processor's seconds, which other programs disturb less."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@dataclass
class LeanStep:
    """A lean step's readings: (bytes now, peak since the reading before), the blocks' calls, and the whole's time."""

    readings: list[tuple[int, int]]
    calls: list[Call]
    seconds: float
    unseen: int  # bytes of the process's peak beyond the tensors that were followed

    @property
    def largest_growth(self) -> int:
        """The most bytes by which a moment is above the reading before it; the first, above the step's start."""
        pairs = zip([(0, 0), *self.readings], self.readings, strict=False)
        return max((peak - before for (before, _), (_, peak) in pairs), default=0)

    def size(self, call: Call) -> int:
        """Bytes of the activations that a call keeps unless it is recomputed."""
        return max(0, self.readings[call.end][0] - self.readings[call.start][0]) if call.end else 0

    def with_kept(self, peaks: Sequence[int], calls: Sequence[Call]) -> list[int]:
        """``peaks``, one for each reading, if these calls keep their activations."""
        raised = list(peaks)
        for call in calls:
            for number in range(call.forward_end + 1, call.start + 1):
                raised[number] += self.size(call)
        return raised


def measure(model: nn.Module, batch: Any, forward: Forward, states: dict[str, BlockState], mode: Mode) -> LeanStep:
    """One step at its leanest, three times: to warm up, for its time and the process's peak, and for its tensors."""
    device = device_of(model)
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with as_it_was(model), torch.random.fork_rng(devices), own_event_storage():
        with _recording(states, timed := Recorder(None)):
            _step(model, batch, forward)
        return_freed_memory()
        with _recording(states, timed := Recorder(None)), ProcessPeak() as process:
            begun = _clock()
            _step(model, batch, forward)
            seconds = _clock() - begun
        return_freed_memory()
        with Meter(device) as meter, _recording(states, metered := Recorder(meter)):
            _step(model, batch, forward)
            metered.read()
    for before, after in zip(timed.calls, metered.calls, strict=True):
        after.seconds = before.seconds
    peak = max(peak for _, peak in metered.readings)
    unseen = max(0, process.bytes - peak) if device.type == "cpu" else 0
    return LeanStep(metered.readings, metered.calls, seconds, unseen)


def _step(model: nn.Module, batch: Any, forward: Forward) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    with torch.enable_grad():
        _total(forward(model, with_own_dicts(batch))).backward()


@contextlib.contextmanager
def _recording(states: dict[str, BlockState], recorder: Recorder) -> Iterator[None]:
    for state in states.values():
        state.recorder = recorder
    try:
        yield
    finally:
        for state in states.values():
            state.recorder = None
