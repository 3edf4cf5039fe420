"""One training step: forward under the chosen precision, guard, backward, guard, update."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peft_d2.engine.errors import ConfigError, LossNotFinite
from peft_d2.models.layers.joined_batch import joined_batch

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
    """An iterator that builds its loader when the first batch is asked for.

    Where a run starts is known after ``resume_or_load``, while Detectron2 asks for the iterator before.
    """

    def __init__(self, build: Callable[[], Iterable[Any]]) -> None:
        self._build = build
        self._ahead: list[Any] = []
        self._batches: Iterator[Any] | None = None

    def first(self) -> Any:
        """The next batch, which stays the next one."""
        if not self._ahead:
            self._ahead.append(next(self))
        return self._ahead[0]

    def close(self) -> None:
        """Let go of the loader; who asks for another batch gets a new one's."""
        self._ahead, self._batches = [], None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ahead:
            return self._ahead.pop()
        if self._batches is None:
            self._batches = iter(self._build())
        try:
            return next(self._batches)
        except StopIteration:
            raise RuntimeError(
                "the training's data loader has no more batches: it must go on without end, epoch by epoch."
            ) from None


class TrainStep(SimpleTrainer):
    """Detectron2's inner trainer with mixed precision and a step that is never taken on a bad loss or gradient.

    Args:
        model: on its device, wrapped for several processes or not.
        data_loader: gives lists of samples.
        optimizer: of what is trained.
        dtype: half precision of the forward pass; None is float32.
        pieces: parts of a batch that are computed one after another, their gradients added up.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None = None,
        pieces: int = 1,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.dtype = dtype
        self.pieces = pieces
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        """One step; raises :class:`LossNotFinite`, on every rank at once, before anything is updated."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(data)
        if not self.grad_scaler.is_enabled():  # the scaler itself leaves out a step whose gradients overflow
            self._require_finite_gradients(losses, data)
        self._record(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, data: list[Any]) -> dict[str, Tensor]:
        """Add up the gradients of the batch's pieces; returns the losses of the whole."""
        size = len(data) // self.pieces
        pieces = [data[i * size : (i + 1) * size] for i in range(self.pieces)]
        head = getattr(unwrapped(self.model), "sem_seg_head", None)
        joined = joined_batch(pieces, getattr(head, "ignore_value", 255)) if self.pieces > 1 else nullcontext()
        means: dict[str, Tensor] = {}
        with joined:
            for number, piece in enumerate(pieces, 1):
                with self._gradients_kept_local() if number < self.pieces else nullcontext():
                    losses = self._forward(piece)
                    self._require_finite(losses, piece)
                    total = torch.stack([loss.float() for loss in losses.values()]).sum() / self.pieces
                    self.grad_scaler.scale(total).backward()
                for name, loss in losses.items():
                    means[name] = means.get(name, torch.zeros_like(loss)) + loss.detach() / self.pieces
        return means

    def _gradients_kept_local(self) -> contextlib.AbstractContextManager[Any]:
        """Without exchange between processes: the last piece's exchange covers those before it."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _forward(self, data: Any) -> dict[str, Tensor]:
        with self.precision():
            losses = self.model(data)
        return {"total_loss": losses} if isinstance(losses, Tensor) else losses

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def _require_finite(self, losses: Mapping[str, Tensor], data: Any) -> None:
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        if _all_ranks(bool(torch.isfinite(values).all()), values.device):
            return
        bad = {name: float(v) for name, v in zip(losses, values, strict=True) if not math.isfinite(v)}
        self._stop(f"loss is not finite ({bad})", data, bool(bad))

    def _require_finite_gradients(self, losses: Mapping[str, Tensor], data: Any) -> None:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).sum()
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
        values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()  # waits for a GPU once
        row = dict(zip(losses, values, strict=True)) | {"data_time": data_time}
        rows = comm.gather(row)
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("data_time", max(r.pop("data_time") for r in rows))
        means = {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}
        storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            storage.put_scalars(**means)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


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
