"""One training step: forward under the chosen precision, guard, backward, guard, update."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from peft_d2.engine.errors import ConfigError, LossNotFinite

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def amp_dtype(cfg: Any) -> torch.dtype | None:
    """The half precision to train in, None for float32.

    Raises:
        ConfigError: an unknown name, or a type that the device cannot do.
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name, on_cpu = cfg.SOLVER.AMP.DTYPE, cfg.MODEL.DEVICE.startswith("cpu")
    if name == "auto":
        return torch.bfloat16 if on_cpu or torch.cuda.is_bf16_supported() else torch.float16
    if name not in _DTYPES:
        raise ConfigError(f"SOLVER.AMP.DTYPE is {name!r}; expected 'auto', 'bf16' or 'fp16'.")
    if on_cpu and name == "fp16":
        raise ConfigError("SOLVER.AMP.DTYPE fp16 needs a GPU; on the CPU choose bf16, or SOLVER.AMP.ENABLED False.")
    if not on_cpu and name == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError("SOLVER.AMP.DTYPE bf16 is not supported by this GPU; choose fp16.")
    return _DTYPES[name]


class LazyLoader:
    """An iterable that builds its loader when the first sample is asked for.

    Where a run starts is known after ``resume_or_load``, while Detectron2 asks for the iterator before.
    """

    def __init__(self, build: Callable[[], Iterable[Any]]) -> None:
        self._build = build
        self._first: Any = None
        self._rest: Iterator[Any] = iter(())

    def first(self) -> Any:
        """The first batch; it is still the first one of the iteration."""
        if self._first is None:
            self._rest = iter(self._build())
            self._first = next(self._rest)
        return self._first

    def __iter__(self) -> Iterator[Any]:
        yield self.first()
        yield from self._rest


class TrainStep(SimpleTrainer):
    """Detectron2's inner trainer with mixed precision and a step that is never taken on a bad loss or gradient."""

    def __init__(
        self, model: nn.Module, data_loader: Iterable[Any], optimizer: torch.optim.Optimizer, dtype: torch.dtype | None
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.dtype = dtype
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """One step; raises :class:`LossNotFinite`, on every rank at once, before anything is updated."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        losses = self._forward(data)
        self._require_finite(losses, data)
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        self.grad_scaler.scale(total).backward()
        if not self.grad_scaler.is_enabled():  # the scaler itself leaves out a step whose gradients overflow
            self._require_finite_gradients(losses, data)
        self._record(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _forward(self, data: Any) -> dict[str, Tensor]:
        with self.precision():
            losses = self.model(data)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def _require_finite(self, losses: Mapping[str, Tensor], data: Any) -> None:
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        if _all_ranks(bool(torch.isfinite(values).all()), values.device):
            return
        bad = {name: float(v) for name, v in zip(losses, values, strict=True) if not math.isfinite(v)}
        self._stop(f"loss is not finite ({bad})", data, bool(bad))

    def _require_finite_gradients(self, losses: Mapping[str, Tensor], data: Any) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.detach().float().norm() for g in torch._foreach_norm(gradients)]).sum()
        if _all_ranks(bool(torch.isfinite(norm)), norm.device):
            return
        shown = {name: round(float(loss.detach()), 4) for name, loss in losses.items()}
        self._stop(f"losses are finite ({shown}) but their gradients are not", data, not bool(torch.isfinite(norm)))

    def _stop(self, what: str, data: Any, here: bool) -> None:
        """Raise on every rank, naming what is bad on those where it is."""
        notes = comm.all_gather(f"{what}; images: {_images(data)}" if here else "")
        found = "; ".join(f"rank {rank}: {note}" if len(notes) > 1 else note for rank, note in enumerate(notes) if note)
        raise LossNotFinite(
            f"iteration {self.iter}: {found}. The step was not applied and the last checkpoint is good. "
            "Look at these images and their annotations, lower SOLVER.BASE_LR, or switch SOLVER.AMP off."
        )

    def _record(self, losses: Mapping[str, Tensor], data_time: float) -> None:
        row = {name: float(loss.detach()) for name, loss in losses.items()} | {"data_time": data_time}
        rows = comm.gather(row)
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(r.pop("data_time") for r in rows))
        means = {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}
        storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            storage.put_scalars(**means)


def _all_ranks(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds on every rank."""
    if comm.get_world_size() == 1:
        return flag
    everywhere = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MIN)
    return bool(everywhere)


def _images(data: Any) -> str:
    names = []
    for sample in data if isinstance(data, (list, tuple)) else []:
        if isinstance(sample, Mapping):
            names.append(f"{sample.get('file_name', '?')} (id {sample.get('image_id', '?')})")
    return ", ".join(names) or "unknown"
