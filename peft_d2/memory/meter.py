"""How much memory tensors take: of one step from block to block, and what autograd keeps of it, by module."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .blocks import resident_bytes


class SavedTensors:
    """Counts what autograd saves for the backward pass inside a ``with`` block.

    Attributes:
        count: tensors that are no weight or buffer of the model, each saving counted.
        bytes: of the storages behind them, each once.
        by_module: the same bytes by the name of the module that saved a storage first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, int] = {}
        self._model = model
        self._stack: list[str] = []
        self._exit = contextlib.ExitStack()
        self.count = 0
        self.by_module: dict[str, int] = {}

    @property
    def bytes(self) -> int:
        """In all, by now."""
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self.count += 1
            if storage.data_ptr() not in self._storages:
                name = self._stack[-1] if self._stack else ""
                self.by_module[name] = self.by_module.get(name, 0) + storage.nbytes()
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def _leave(self, *_: Any) -> None:
        if self._stack:
            self._stack.pop()

    def __enter__(self) -> SavedTensors:
        for name, module in self._model.named_modules():
            before = module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name))
            after = module.register_forward_hook(self._leave, always_call=True)
            self._exit.callback(before.remove)
            self._exit.callback(after.remove)
        self._exit.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor))
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()


def saved_by_module(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """Bytes that autograd keeps of ``forward()``, by the innermost module that kept them, largest first."""
    with SavedTensors(model) as saved:
        output = forward()
    del output
    return dict(sorted(saved.by_module.items(), key=lambda item: -item[1]))


def return_workspaces(device: torch.device) -> None:
    """Let cuBLAS give back what it keeps for itself (32 MiB a thread on some GPUs), so that it is seen to take it."""
    if device.type == "cuda" and hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()


class Meter:
    """Bytes of tensors that came into being within the ``with`` block and live: now, and at most since the last call.

    On a GPU torch's allocator counts them. On a CPU nobody does, so every operator's results are followed; what a
    kernel takes for itself within one operator is not seen.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._tracker = None if self._cuda else _Tracker()
        self._start = 0

    @staticmethod
    def allocated(device: torch.device) -> int:
        """What torch's allocator has given out on a GPU, to libraries too (cuBLAS); 0 on a CPU."""
        return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def __enter__(self) -> Meter:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            self._start = self.allocated(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            assert self._tracker is not None
            self._tracker.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._tracker is not None:
            self._tracker.__exit__(*error)

    def read(self) -> tuple[int, int]:
        """(bytes now, most bytes since the last reading)."""
        if self._cuda is not None:
            now = self.allocated(self._cuda) - self._start
            peak = torch.cuda.max_memory_allocated(self._cuda) - self._start
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return now, peak
        assert self._tracker is not None
        now, peak = self._tracker.live, self._tracker.peak
        self._tracker.peak = now
        return now, peak


class _Tracker(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        output = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if _has_storage(leaf):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._sizes and key not in before:
                    self._sizes[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.live)
        return output

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


class ProcessPeak:
    """The highest resident memory of this process within the ``with`` block, above what it was at the start.

    ``bytes`` is 0 where the system does not let it be measured.
    """

    def __enter__(self) -> ProcessPeak:
        self.bytes = 0
        self._start = resident_bytes()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = max(0, _bytes_of("/proc/self/status", "VmHWM") - self._start)


class StepPeak:
    """The most that training steps took since this was made: tensors on the device, or the process's growth on a CPU.

    The model's own weights count in both.
    """

    def __init__(self, model: nn.Module) -> None:
        self._device = device_of(model)
        self._weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        self._process = ProcessPeak()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._process.__enter__()

    def read(self) -> int:
        """Bytes at most, until now."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        self._process.__exit__()
        return self._weights + self._process.bytes


def free_bytes(device: torch.device) -> int:
    """What is free on ``device`` for tensors yet to come."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if available := _bytes_of("/proc/meminfo", "MemAvailable"):
        return min(available, _group_limit())
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes_of(file: str, key: str) -> int:
    """A row of such a table of Linux's, which counts kilobytes; 0 where there is none."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _group_limit() -> int:
    """What a container's limit leaves."""
    folder = Path("/sys/fs/cgroup")
    try:
        return int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**63


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is."""
    return next(iter(model.parameters())).device
