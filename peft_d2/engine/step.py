"""One training step: forward under the chosen precision, backward, one look at all figures, update."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peft_d2.engine.errors import ConfigError, LossNotFinite

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GATHER_EVERY = 20  # steps; Detectron2's writers write as often


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
        self._loader: Any = None
        self._ahead: list[Any] = []
        self._batches: Iterator[Any] | None = None

    def first(self) -> Any:
        """The next batch, which stays the next one."""
        if not self._ahead:
            self._ahead.append(next(self))
        return self._ahead[0]

    def close(self) -> None:
        """Close the loader, if it can be closed, and forget it; another batch asked for comes from a new one."""
        loader, self._ahead, self._batches, self._loader = self._loader, [], None, None
        if hasattr(loader, "close"):
            loader.close()

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Close the loader at the end of the block.

        After an error the frames of its traceback are cleared where they hold the processes of another loader.
        """
        before = set(multiprocessing.active_children())
        try:
            yield
        except BaseException as error:
            self.close()
            cause: BaseException | None = error if set(multiprocessing.active_children()) - before else None
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__context__
            raise
        finally:
            self.close()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ahead:
            return self._ahead.pop()
        if self._batches is None:
            self._loader = self._build()
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except StopIteration:
            raise RuntimeError(
                "the training's data loader has no more batches: it must go on without end, epoch by epoch."
            ) from None


class TrainStep(SimpleTrainer):
    """Detectron2's inner trainer with mixed precision and a step that is never taken on a bad loss or gradient.

    The host waits for the device once a step, when it reads all losses and the norm of the gradients together.

    Args:
        model: on its device, wrapped for several processes or not.
        data_loader: gives lists of samples.
        optimizer: of what is trained.
        dtype: half precision of the forward pass; None is float32.
        pieces: parts of a batch that are computed one after another, their gradients added up.

    Attributes:
        stop_requested: set where this process ought to stop.
        stop: after a step, whether any process ought to.
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
        self.stop_requested = self.stop = False
        self._recorded = False

    def run_step(self) -> None:
        """One step; raises :class:`LossNotFinite`, on every rank at once, before anything is updated."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        if not self.model.training:
            raise RuntimeError(
                f"iteration {self.iter}: the model is in eval mode, in which it predicts and learns nothing. What put "
                "it there (a hook, an evaluation of your own) must call model.train() afterwards."
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(data)
        own = torch.stack([loss.float() for loss in losses.values()])
        joint = torch.stack([own.sum(), self._gradient_norm(own), own.new_tensor(float(self.stop_requested))])
        if comm.get_world_size() > 1:
            dist.all_reduce(joint)
        *values, total, norm, stop = torch.cat([own, joint]).tolist()  # here the host waits for the device
        self.stop = stop > 0
        if not math.isfinite(total + norm):
            self._refuse(dict(zip(losses, values, strict=True)), data)
        self._record(dict(zip(losses, values, strict=True)), total / comm.get_world_size(), data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, data: list[Any]) -> dict[str, Tensor]:
        """Add up the gradients of the batch's pieces; returns the losses of the whole."""
        if len(data) < self.pieces:
            raise ConfigError(
                f"the loader gave a batch of {len(data)} images, which is computed in {self.pieces} pieces: let it "
                "drop the last ones of an epoch (drop_last), or lower SOLVER.ACCUMULATE."
            )
        ends = [len(data) * i // self.pieces for i in range(self.pieces + 1)]
        pieces = [data[start:end] for start, end in itertools.pairwise(ends)]
        if self.pieces > 1 or comm.get_world_size() > 1:
            self._tell_objects(pieces)
        means: dict[str, Tensor] = {}
        for number, piece in enumerate(pieces, 1):
            with self._gradients_kept_local() if number < self.pieces else nullcontext():
                try:
                    with self.precision():
                        losses = self.model(piece)
                except FloatingPointError as error:  # Detectron2's region proposals look at theirs
                    raise LossNotFinite(self._refusal(f"{str(error).rstrip('.')}; images: {_images(data)}")) from error
                losses = {"total_loss": losses} if isinstance(losses, Tensor) else losses
                total = torch.stack([loss.float() for loss in losses.values()]).sum() / self.pieces
                self.grad_scaler.scale(total).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0) + loss.detach() / self.pieces
        return means

    def _tell_objects(self, pieces: list[list[dict[str, Any]]]) -> None:
        """Put into each piece's first sample how many objects all images of the batch have, by piece and process.

        A model whose losses are means over objects needs them: it has a method ``count_objects``.
        """
        count = getattr(unwrapped(self.model), "count_objects", None)
        if count is None:
            return
        objects = [count(piece) for piece in pieces]
        if comm.get_world_size() > 1:
            # On CPUs: no device is waited for. Batches of other people's loaders may be of different sizes.
            rows: list[Any] = [None] * comm.get_world_size()
            dist.all_gather_object(rows, objects, group=comm._get_global_gloo_group())
            objects = list(itertools.chain(*rows))
        for piece in pieces:
            piece[0] = {**piece[0], "batch_objects": objects}

    def _gradients_kept_local(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which gradients are not exchanged between processes: the last piece exchanges all of them."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """The context that a forward pass runs in."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def _gradient_norm(self, losses: Tensor) -> Tensor:
        """A sum of norms that is finite where all gradients are; 0 under fp16, whose scaler leaves such steps out."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.grad_scaler.is_enabled() or not gradients:
            return losses.new_zeros(())
        return torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]).sum()

    def _refuse(self, losses: Mapping[str, float], data: Any) -> None:
        """Raise on every rank, naming what is bad on those where it is."""
        bad = {name: value for name, value in losses.items() if not math.isfinite(value)}
        shown = {name: round(value, 4) for name, value in losses.items()}
        what = f"loss is not finite ({bad})" if bad else f"losses are finite ({shown}) but their gradients are not"
        notes = list(enumerate(comm.all_gather((bool(bad), f"{what}; images: {_images(data)}"))))
        # Where one rank's loss is bad, the exchange has spread its gradients to the others.
        chosen = [item for item in notes if item[1][0]] or notes
        found = "; ".join(f"rank {rank}: {note}" if len(notes) > 1 else note for rank, (_, note) in chosen)
        raise LossNotFinite(self._refusal(found))

    def _refusal(self, found: str) -> str:
        return (
            f"iteration {self.iter}: {found}. The step was not applied and the last checkpoint is good. "
            "Look at these images and their annotations, lower SOLVER.BASE_LR, or switch SOLVER.AMP off."
        )

    def _record(self, losses: dict[str, float], total: float, data_time: float) -> None:
        """Put the figures into Detectron2's storage; all processes' single losses are gathered every few steps only."""
        rows = []
        if comm.get_world_size() == 1 or not self._recorded or (self.iter + 1) % _GATHER_EVERY == 0:
            rows, self._recorded = comm.gather({**losses, "data_time": data_time}), True
        if not comm.is_main_process():
            return
        storage = get_event_storage()
        storage.put_scalar("total_loss", total)
        if rows:
            storage.put_scalar("data_time", max(row.pop("data_time") for row in rows))
            if len(rows[0]) > 1:
                storage.put_scalars(**{name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _images(data: Any) -> str:
    """File names and ids of a batch's images, for a message."""
    names = []
    for sample in data if isinstance(data, (list, tuple)) else []:
        if isinstance(sample, Mapping):
            names.append(f"{sample.get('file_name', '?')} (id {sample.get('image_id', '?')})")
    return ", ".join(names) or "unknown"
