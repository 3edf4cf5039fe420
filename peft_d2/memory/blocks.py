"""Activation checkpointing of any module, in place: its activations are computed again in the backward pass.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, section 4. What recomputes is torch's
own non-reentrant ``checkpoint``. Only the module's class changes: torch's ``checkpoint_wrapper`` would replace the
module, after which ``isinstance``, module names, targets of adapters and ``get_parameter`` mean something else.
"""

from __future__ import annotations

import contextlib
import copyreg
import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_d2.peft.adapted import Adapted, has_statistics

from .kept import FrozenConvolutions, OnHost

Mode = Literal["keep", "recompute", "offload"]
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
_M_MMAP_THRESHOLD, _LARGE = -3, 8 * 2**20  # mallopt's key, and bytes
_SLACK = 64 * 2**20  # freed bytes that malloc may hold back


@dataclass
class BlockState:
    """What one block does with its activations: keep them, compute them again, or keep them in the host's memory.

    Attributes:
        recorder: while a plan is made, runs the forward pass instead: of (name, forward, *args, **kwargs).
        ceiling: resident bytes of the process above which freed memory is given back.
    """

    name: str
    mode: Mode = "keep"
    recorder: Callable[..., Any] | None = None
    ceiling: int = 0


class Block(nn.Module):
    """What a block is besides its own class. It is never instantiated: see :func:`make_block`."""

    memory_class: ClassVar[type[nn.Module]]
    memory_block: BlockState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with its activations treated as ``memory_block`` says."""
        state = self.memory_block
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(*args, **kwargs)
        forward = partial(_lean, super().forward)
        if state.recorder is not None:
            output = state.recorder(state.name, forward, *args, **kwargs)
        elif state.mode == "recompute":
            output = checkpoint(partial(_tidied, forward, state.ceiling), *args, use_reentrant=False, **kwargs)
        else:
            with OnHost() if state.mode == "offload" else contextlib.nullcontext():
                output = forward(*args, **kwargs)
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(lambda _, ceiling=state.ceiling: return_freed_memory(ceiling))
        return_freed_memory(state.ceiling)
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, args, *rest = reduced
        if make is copyreg.__newobj__ and args == (type(self),):  # type: ignore[attr-defined]
            args = (type(self).memory_class,)
        return (_new, (make, args), *rest)


def _lean(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with FrozenConvolutions():
        return forward(*args, **kwargs)


def _tidied(forward: Callable[..., Any], ceiling: int, *args: Any, **kwargs: Any) -> Any:
    return_freed_memory(ceiling)
    return forward(*args, **kwargs)


def _new(make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    """An empty block, for unpickling and deepcopy."""
    module = make(*args)
    module.__class__ = _block_class(type(module))
    return module


def _block_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:
        fields = {"memory_class": base, "__module__": base.__module__, "__doc__": base.__doc__}
        _CLASSES[base] = type(base.__name__, (Block, base), fields)
    return _CLASSES[base]


def make_block(module: nn.Module, name: str) -> BlockState:
    """Change the class of ``module`` in place; its names, weights and identity stay."""
    if not isinstance(module, Block):
        module.__class__ = _block_class(type(module))
        module.__dict__["memory_block"] = BlockState(name)
    return module.__dict__["memory_block"]


def release_block(module: nn.Module) -> None:
    """Undo :func:`make_block`."""
    if isinstance(module, Block):
        module.__dict__.pop("memory_block", None)
        module.__class__ = type(module).memory_class  # type: ignore[assignment]


def find_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules whose activations can be computed again one by one: (name, module), none within another.

    These are the largest parts of the model that have weights and hold no further list of composed modules: blocks
    of backbones, encoder and decoder layers, residual blocks, convolutions; and those, without weights too, whose
    ``is_memory_block`` is True. A norm that learns its running statistics would learn them twice, so what holds one is
    left out.
    """
    seen: set[int] = set()
    for name, child in model.named_children():
        yield from _find(name, child, seen)


def _find(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    single = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or _is_marked(module)
    if id(module) in seen or not (_children(module) or single):
        return
    seen.add(id(module))
    if _divides(module):
        for child_name, child in _children(module):
            yield from _find(f"{name}.{child_name}", child, seen)
    elif _can_run_twice(module):
        yield name, module


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    adapters = module._modules.get("peft") if isinstance(module, Adapted) else None
    return [(name, child) for name, child in module.named_children() if child is not adapters]


def _divides(module: nn.Module) -> bool:
    """Whether this has in it a block that is marked, or is or has a list of modules that consist of others."""
    lists = nn.ModuleList | nn.Sequential | nn.ModuleDict
    inside = _children(module)
    here = isinstance(module, lists) and any(_children(child) for _, child in inside)
    return here or any(_is_marked(child) or _divides(child) for _, child in inside)


def _is_marked(module: nn.Module) -> bool:
    """Whether a module says itself that it is a block."""
    return getattr(module, "is_memory_block", False) is True


def _can_run_twice(module: nn.Module) -> bool:
    parts = list(module.modules())
    learns_statistics = any(has_statistics(part) and part.training for part in parts)
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in parts)
    worth_it = _is_marked(module) or any(True for _ in module.parameters())
    return not learns_statistics and not scripted and worth_it


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t) for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"]
    ]
    _fields_ += [("uordblks", ctypes.c_size_t), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


class _Malloc:
    """glibc's allocator, as far as it is there: what it holds of memory that was freed, and how it is given back."""

    def __init__(self) -> None:
        self._library: Any = None
        self._least = 0  # resident bytes that are none of malloc's in use, right after all was given back
        with contextlib.suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            library.mallinfo2.restype = _MallocInfo
            library.malloc_trim.argtypes = [ctypes.c_size_t]
            self._library = library
            library.malloc_trim(0)
            self._least = resident_bytes() - self._used()

    def map_large(self) -> None:
        """Give each large block pages of its own, which go back when it is freed, from now on."""
        if self._library is not None:
            self._library.mallopt(_M_MMAP_THRESHOLD, _LARGE)

    def give_back(self, ceiling: int) -> None:
        """Give back what is held, if it is much and the process has more than ``ceiling`` resident bytes."""
        if self._library is None:
            return
        resident = resident_bytes()
        if resident > ceiling and resident - self._used() > self._least + _SLACK:
            self._library.malloc_trim(0)
            self._least = resident_bytes() - self._used()

    def _used(self) -> int:
        info = self._library.mallinfo2()
        return info.uordblks + info.hblkhd


def resident_bytes() -> int:
    """Resident memory of this process; 0 where Linux does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_malloc = functools.cache(_Malloc)


def return_freed_memory(ceiling: int = 0) -> None:
    """Let malloc give back what it holds of freed tensors; without it, a CPU's peak is up to twice what is used."""
    _malloc().give_back(ceiling)


def map_large_blocks() -> None:
    """Let malloc give large tensors pages of their own: freed ones leave no holes, at the price of page faults."""
    _malloc().map_large()
