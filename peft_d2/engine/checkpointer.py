"""Checkpoints: an adapter folder and its training state, or Detectron2's file where no PEFT is in play.

A checkpoint appears under its name only when it is whole. Nothing that is read is unpickled freely.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from peft_d2 import adapters, peft
from peft_d2.storage import CheckpointError, adapter_file, atomic, base_weights

TRAINING_STATE = "training_state.pth"
_CHECKPOINT_FILES = (*adapter_file.FILES, TRAINING_STATE)
LAST = "last_checkpoint"
_NAME = re.compile(r"(adapter|model)_(\d{7}|final)(\.pth)?")
logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Saves and loads a run: ``adapter_0000999/`` for PEFT, ``model_0000999.pth`` without.

    Args:
        model: the model, wrapped for several processes or not.
        save_dir: where checkpoints and ``last_checkpoint`` are.
        keep: how many periodic checkpoints stay; 0 keeps all.
        allow_other_base: take up an adapter of another base all the same.
        checkpointables: objects with ``state_dict`` that are stored and restored besides.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        keep: int = 0,
        allow_other_base: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.logger = logger
        self.metrics: dict[str, float] = {}  # of the last evaluation, stored with an adapter
        self._keep = keep
        self._allow_other_base = allow_other_base

    @property
    def prefix(self) -> str:
        """How the names of this run's checkpoints begin."""
        return "adapter" if peft.get_injection(self.model) is not None else "model"

    def save(self, name: str, **extra: Any) -> None:
        """Write the checkpoint ``name`` as a whole, then point ``last_checkpoint`` at it.

        Raises:
            peft_d2.storage.atomic.StorageError: it cannot be stored; the checkpoints before it are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = {key: item.state_dict() for key, item in self.checkpointables.items()} | extra
        if self.prefix == "adapter":
            basename = name
            with atomic.folder(Path(self.save_dir, basename), _CHECKPOINT_FILES) as folder:
                adapters.save_adapter(self.model, folder, metrics=self.metrics)
                torch.save(state, folder / TRAINING_STATE)
        else:
            basename = f"{name}.pth"
            with atomic.file(Path(self.save_dir, basename)) as path:
                torch.save({"model": self.model.state_dict(), **state}, path)
        self.tag_last_checkpoint(basename)
        logger.info("Saved checkpoint %s", os.path.join(self.save_dir, basename))
        self._thin_out()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write that name into ``last_checkpoint``, as a whole or not at all."""
        atomic.write_bytes(Path(self.save_dir, LAST), last_filename_basename.encode())

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights of the model itself from a file or URL; an empty path loads nothing.

        Raises:
            CheckpointError: the file does not exist, or is an adapter.
        """
        if not path:
            logger.info("MODEL.WEIGHTS is empty: the model keeps its random initial weights.")
            return {}
        report = base_weights.load_base(self.model, self._local_path(path), logger=logger)
        self._require_trained(report)
        return {}

    def has_checkpoint(self) -> bool:
        """Whether there is a whole checkpoint to resume from."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Path of the newest whole checkpoint of this kind of run, empty when there is none."""
        for path in self._candidates():
            defect = _defect(path)
            if not defect:
                return str(path)
            logger.warning("Checkpoint %s is passed over: %s", path, defect)
        return ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continue the newest whole checkpoint of ``save_dir`` where ``resume`` asks for it and there is one.

        Otherwise, and for the base under an adapter in any case, load the weights at ``path``.
        """
        newest = self.get_checkpoint_file() if resume else ""
        if not newest:
            return self.load(path)
        logger.info("Resuming from %s", newest)
        if os.path.isdir(newest):
            self.load(path)
            adapters.load_adapter(self.model, newest, allow_other_base=self._allow_other_base)
            state = _read(Path(newest, TRAINING_STATE))
        else:
            state = _read(Path(newest))
            self.model.load_state_dict(state.pop("model"))
        for key, item in self.checkpointables.items():
            if key not in state:
                raise CheckpointError(f"{newest} holds no {key!r}: it cannot be resumed. Start without --resume.")
            item.load_state_dict(state.pop(key))
        return state

    def _local_path(self, path: str) -> str:
        """The file behind a path or URL, downloaded where that is needed."""
        if os.path.isdir(path):
            raise CheckpointError(
                f"MODEL.WEIGHTS {path!r} is a folder. It takes a model's weights; an adapter folder goes into "
                "MODEL.PEFT.WEIGHTS."
            )
        try:
            # "?matching_heuristics=True" behind a path is a zoo's hint.
            local = self.path_manager.get_local_path(path.partition("?")[0])
        except (OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"weights {path!r} cannot be fetched: {error}. Download them and give the file."
            ) from error
        if not os.path.isfile(local):
            raise CheckpointError(f"weights {path!r} do not exist. Give the path of a .pth, .pkl or .safetensors file.")
        return local

    def _require_trained(self, report: base_weights.LoadReport) -> None:
        """Refuse a model whose random parameters would stay random.

        Raises:
            CheckpointError: under PEFT, a head of another class count that is not trained.
        """
        if self.prefix == "model":
            return
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        random = [name for name, *_ in report.reinitialised if name in parameters]
        frozen = [name for name in random if not parameters[name].requires_grad]
        if frozen:
            raise CheckpointError(
                f"a head of another class count starts at random and is not trained: {', '.join(frozen)}. "
                f"Add {frozen[0].rpartition('.')[0]!r} and its like to MODEL.PEFT.TRAIN."
            )

    def _candidates(self) -> list[Path]:
        """Checkpoints, the one to try first in front.

        ``last_checkpoint`` decides, except that a checkpoint that was completed after it was written comes before:
        the process may have been killed between the two. What an older run left behind is thus never preferred.
        """
        root = Path(self.save_dir)
        if not root.is_dir():
            return []
        atomic.recover(root / LAST)
        tag = root / LAST
        tagged = tag.read_text().strip() if tag.is_file() else ""
        tag_time = tag.stat().st_mtime_ns if tag.is_file() else 0
        suffix = "" if self.prefix == "adapter" else ".pth"
        found = []
        for path in root.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is None or name[1] != self.prefix or (name[3] or "") != suffix:
                continue
            marker = path / TRAINING_STATE if path.is_dir() else path
            time = marker.stat().st_mtime_ns if marker.is_file() else 0
            rank = 2 if time > tag_time else int(path.name == tagged)
            found.append((rank, time, name[2], path))
        return [path for *_, path in sorted(found, reverse=True)]

    def _thin_out(self) -> None:
        if self._keep <= 0:
            return
        periodic = re.compile(rf"{self.prefix}_\d{{7}}(\.pth)?")
        found = sorted(p for p in Path(self.save_dir).iterdir() if periodic.fullmatch(p.name))
        for path in found[: -self._keep]:
            if not path.is_dir():
                path.unlink()
            elif (other := atomic.foreign_entry(path, _CHECKPOINT_FILES)) is None:
                shutil.rmtree(path)
            else:
                logger.warning("Checkpoint %s is kept: it holds %r, which is not part of one.", path, other)


def _defect(path: Path) -> str:
    """Why a checkpoint cannot be resumed from, in words; empty when it is whole."""
    try:
        if path.is_dir():
            adapter_file.read(path)
            path = path / TRAINING_STATE
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        return f"{path.name} is damaged at {broken}" if broken else ""
    except (adapter_file.AdapterFileError, OSError, zipfile.BadZipFile) as error:
        return str(error)


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)
