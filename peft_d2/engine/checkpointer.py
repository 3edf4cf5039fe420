"""Checkpoints: an adapter folder with its training state in it, or, where no PEFT is used, Detectron2's file.

A checkpoint appears under its name only when it is whole. Nothing that is read is unpickled freely. Each holds the
mark of its run and its iteration, so that a run goes on from the newest of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from peft_d2 import adapters, peft
from peft_d2.engine.errors import ConfigError
from peft_d2.storage import CheckpointError, adapter_file, disk
from peft_d2.storage.checkpoint import SYSTEM_ERRORS, CheckpointDamaged, read_file

TRAINING_STATE, STATE_RECORD = "training_state.pth", "training_state.json"
_CHECKPOINT_FILES = (*adapter_file.FILES, TRAINING_STATE, STATE_RECORD)
LAST = "last_checkpoint"
_NAME = re.compile(r"(adapter|model)_(\d{7,10}|final)(\.pth)?")
_RECORD = {"format": "peft_d2-training-state", "format_version": 1}
_SURELY = 10**10  # iterations that no run has; the place of a "final" checkpoint among those of its run
logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Saves and loads a run: ``adapter_0000999/`` for PEFT, ``model_0000999.pth`` without.

    Args:
        model: the model, wrapped for several processes or not.
        save_dir: where checkpoints and ``last_checkpoint`` are.
        keep: how many periodic checkpoints stay; 0 keeps all.
        allow_other_base: take up an adapter of another base all the same.
        checkpointables: objects with ``state_dict`` that are stored and restored besides.

    Attributes:
        metrics: of the last evaluation, stored with an adapter.
        resumed: whether :meth:`resume_or_load` has gone on from a checkpoint.
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
        self.metrics: dict[str, float] = {}
        self.resumed = False
        self._keep = keep
        self._allow_other_base = allow_other_base
        # The mark of this run: a number, larger for each further run in the folder and 0 for one that a version without
        # marks began; and random digits.
        self._run = ""
        self._own: list[str] = []  # names of this run's checkpoints, oldest first

    @property
    def prefix(self) -> str:
        """How the names of this run's checkpoints begin, which is its kind, too: "adapter" or "model"."""
        return "adapter" if peft.get_injection(self.model) is not None else "model"

    def save(self, name: str, **extra: Any) -> None:
        """Write the checkpoint ``name`` as a whole, then point ``last_checkpoint`` at it.

        Raises:
            peft_d2.storage.disk.StorageError: it cannot be stored; the checkpoints before it are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if not self._run:
            earlier = max((_number(run or "") for _, run, _ in self._found()), default=0)
            self._run = f"{earlier + 1:04d}-{secrets.token_hex(4)}"
        state = {key: item.state_dict() for key, item in self.checkpointables.items()} | extra | {"run": self._run}
        basename = name if self.prefix == "adapter" else f"{name}.pth"
        target = Path(self.save_dir, basename)
        if self.prefix == "adapter":
            files = adapters.adapter_contents(self.model, metrics=self.metrics)
            with disk.folder(target, _CHECKPOINT_FILES) as folder:
                torch.save(state, folder / TRAINING_STATE)
                # What ties the state to its adapter: the sha256 of the adapter's record, which covers all of it.
                tie = disk.sha256(files[adapter_file.RECORD])
                record = {**_RECORD, "run": self._run, "adapter": tie, **disk.file_digest(folder / TRAINING_STATE)}
                for filename, data in {**files, STATE_RECORD: disk.sign(record)}.items():
                    (folder / filename).write_bytes(data)
            if name.endswith("final"):
                adapter_file.say_why_not_peft(target, files)
        else:
            with disk.file(target) as path:
                torch.save({"model": _dense(self.model.state_dict()), **state}, path)
        self.tag_last_checkpoint(basename)
        logger.info("Saved checkpoint %s", os.path.join(self.save_dir, basename))
        self._own = [*(own for own in self._own if own != basename), basename]
        periodic = [own for own in self._own if "final" not in own]
        for oldest in periodic[: -self._keep] if self._keep > 0 else ():
            self._delete(oldest)

    def require_own(self, start: int) -> None:
        """Refuse, before a run that goes on at iteration ``start``, folders that it could not replace when it saves.

        Raises:
            peft_d2.storage.disk.StorageError: one holds somebody's files.
        """
        for path, _ in self._named():
            number = _NAME.fullmatch(path.name)[2]  # type: ignore[index]
            if os.path.isdir(path) and (number == "final" or int(number) >= start):
                disk.require_own(path, _CHECKPOINT_FILES)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write that name into ``last_checkpoint``, as a whole or not at all."""
        disk.write_bytes(Path(self.save_dir, LAST), last_filename_basename.encode())

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights of the model itself from a file or URL; an empty path loads nothing.

        Raises:
            CheckpointError: the file does not exist, or is an adapter.
        """
        if not path:
            logger.info("MODEL.WEIGHTS is empty: the model keeps the weights that it was built with.")
            return {}
        injection = peft.get_injection(self.model)
        if injection is not None and injection.base_file == path:
            logger.info("The base %s was loaded before its adapter was placed; nothing changes.", path)
            return {}
        report = adapters.load_base(self.model, path)
        if injection is not None:
            adapters.require_trained(self.model, report)
        return {}

    def names(self) -> list[str]:
        """Names of this kind of run's checkpoints in ``save_dir``, the newest last."""
        return [found.name for found, *_ in sorted(self._found(), key=lambda row: row[2])]

    def warn_of_beginning(self, resume: bool) -> None:
        """Warn that a run begins anew where it was to be resumed, or where an earlier run has left checkpoints."""
        if resume:
            logger.warning("--resume: %s holds no checkpoint yet; the run begins at iteration 0.", self.save_dir)
        elif names := self.names():
            logger.warning(
                "%s holds %d checkpoint(s) of an earlier run, up to %s: this run begins anew and writes over those of "
                "the same names. --resume would go on from them; another OUTPUT_DIR keeps them.",
                *(self.save_dir, len(names), names[-1]),
            )

    def has_checkpoint(self) -> bool:
        """Whether there is a whole checkpoint to resume from."""
        return self.resumed or bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Path of the newest whole checkpoint of this kind of run, empty when there is none."""
        return self._newest()[0]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continue the newest whole checkpoint of ``save_dir`` where ``resume`` asks for it and there is one.

        Otherwise, and for the base under an adapter in any case, load the weights at ``path``.

        Raises:
            CheckpointError: the checkpoint is of a run of another kind, or does not fit this one.
        """
        newest, state = self._newest() if resume else ("", {})
        if not newest:
            return self.load(path)
        logger.info("Resuming from %s", newest)
        if os.path.isdir(newest):
            self.load(path)
            adapters.load_adapter(self.model, newest, allow_other_base=self._allow_other_base)
        try:
            if not os.path.isdir(newest):
                self.model.load_state_dict(state.pop("model"))
            for key, item in self.checkpointables.items():
                if key not in state:
                    raise CheckpointError(f"{newest} holds no {key!r}: it cannot be resumed. Start without --resume.")
                item.load_state_dict(state.pop(key))
        except (CheckpointError, ConfigError, OSError, MemoryError):
            raise
        except Exception as error:  # a state_dict of another model or optimizer fails in many ways
            told = " ".join(str(error).split())[:600]
            raise CheckpointError(
                f"{newest} does not fit this run ({type(error).__name__}: {told}). Resume with the config it was "
                "trained with, or start without --resume in another OUTPUT_DIR."
            ) from error
        self.resumed = True
        self._run = state.pop("run", f"0000-{secrets.token_hex(4)}")
        marks = {self._run} if _number(self._run) else {self._run, ""}
        self._own = [found.name for found, run, _ in sorted(self._found(), key=lambda row: row[2]) if run in marks]
        return state

    def _found(self) -> list[tuple[Path, str | None, int]]:
        """Checkpoints of this kind of run: path, mark of the run, iteration.

        The mark is "" of one that an earlier version wrote, and None of one that cannot be read.
        """
        found = []
        for path, kind in self._named():
            if kind == self.prefix:
                number = _NAME.fullmatch(path.name)[2]  # type: ignore[index]
                iteration = _SURELY if number == "final" else int(number)
                try:
                    state = read_file(path / TRAINING_STATE if os.path.isdir(path) else path, values=False)
                    run, told = state.get("run", ""), _iterations(state)
                    run = run if run == "" or re.fullmatch(r"\d{1,9}-[0-9a-f]{8}", run) else None
                    found.append((path, run, told[0] if told and type(told[0]) is int else iteration))
                except (CheckpointError, OSError, AttributeError, TypeError):
                    found.append((path, None, iteration))
        return found

    def _named(self) -> list[tuple[Path, str]]:
        """Paths in ``save_dir`` that are named as checkpoints are, each with its kind: "adapter" or "model"."""
        try:
            names = [(path, _NAME.fullmatch(path.name)) for path in sorted(Path(self.save_dir).iterdir())]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"OUTPUT_DIR {self.save_dir} cannot be read: {error.strerror or error}") from error
        return [(p, name[1]) for p, name in names if name and (name[3] or "") == {"model": ".pth"}.get(name[1], "")]

    def _candidates(self) -> list[Path]:
        """Checkpoints of one run: first the one to resume from, then the others, from later iterations to earlier ones.

        That is the one named in ``last_checkpoint``. The process may have been killed before it wrote the name, so a
        checkpoint of a later iteration or run goes first if it was completed after ``last_checkpoint`` was. What an
        older run left behind is thus never preferred.
        """
        tag = Path(self.save_dir, LAST)
        tagged, written = "", 0
        if os.path.isfile(tag):
            tagged, written = tag.read_bytes()[:300].decode(errors="replace").strip(), tag.stat().st_mtime_ns
            if _NAME.fullmatch(tagged):
                disk.recover(tag.with_name(tagged), only_put_back=True)
        found = self._found()
        newest = max((run for _, run, _ in found if run is not None), key=_number, default="")
        # What cannot be read is taken for this run's, so that it is tried, and a line says why it is passed over.
        rows = [(path, newest if run is None else run, iteration) for path, run, iteration in found]
        ages = {path: (_number(run), iteration, path.name == tagged) for path, run, iteration in rows}
        named = next((path for path in ages if path.name == tagged), None)
        later = [path for path in ages if named is None or (ages[path] > ages[named] and _time(path) > written)]
        first = max(later, key=ages.__getitem__, default=named)
        if first is None:
            return []
        if named is None and _NAME.fullmatch(tagged):
            logger.warning(
                "Checkpoint %s is passed over: %s names it, and it is not there", tag.with_name(tagged), LAST
            )
        elif tagged and first is not named:
            logger.info("%s names %r; going on from %s, which is newer.", LAST, tagged[:80], first.name)
        runs = {path: run if _number(run) else "" for path, run, _ in rows}
        own = [path for path in ages if runs[path] == runs[first] and ages[path] <= ages[first]]
        own += [
            path for path in ages if ages[first][0] < _number(newest) == ages[path][0]
        ]  # if the named one is damaged
        return sorted(own, key=lambda path: (runs[path] == runs[first], ages[path]), reverse=True)

    def _newest(self) -> tuple[str, dict[str, Any]]:
        """The path of the newest whole checkpoint and its training state; damaged ones are passed over, with a line.

        Raises:
            CheckpointError: the folder's checkpoints are of another kind of run, or this process cannot read them.
        """
        candidates = self._candidates()
        for path in candidates:
            try:
                return str(path), _read(path)
            except CheckpointDamaged as error:
                logger.warning("Checkpoint %s is passed over: %s", path, error.defect)
        if candidates:
            logger.warning("No whole checkpoint is left in %s.", self.save_dir)
        elif others := [path for path, _ in self._named()]:
            this = "trains an adapter" if self.prefix == "adapter" else "has no MODEL.PEFT (is --peft-config missing?)"
            raise CheckpointError(
                f"{self.save_dir} holds checkpoints of another kind of run ({others[-1].name}), and this one {this}. "
                "Give the config of that run, or another OUTPUT_DIR."
            )
        return "", {}

    def remove(self, name: str) -> None:
        """Delete this run's checkpoint ``name`` and point ``last_checkpoint`` at the one before it."""
        if not self.save_dir or not self.save_to_disk:
            return
        basename = name if self.prefix == "adapter" else f"{name}.pth"
        others = [other for other in self._own if other != basename]
        if others:
            self.tag_last_checkpoint(others[-1])
        else:
            Path(self.save_dir, LAST).unlink(missing_ok=True)
        self._delete(basename)

    def _delete(self, basename: str) -> None:
        self._own.remove(basename)
        path = Path(self.save_dir, basename)
        if not os.path.isdir(path):
            path.unlink(missing_ok=True)
        elif (other := disk.foreign_entry(path, _CHECKPOINT_FILES)) is None:
            shutil.rmtree(path)
        else:
            logger.warning("Checkpoint %s is kept: it holds %r, which is not part of one.", path, other)


def model_classes(model: nn.Module, path: str) -> list[str]:
    """Names of a model's classes, by its indices: those that it is told, or was trained on; none where unknown.

    Args:
        path: of its checkpoint, which is asked where it has no adapter.
    """
    injection = peft.get_injection(model)
    told = list(getattr(model, "class_names", ()))
    return told or (injection.current.classes if injection else trained_classes(path))


def trained_classes(path: str) -> list[str]:
    """Names of the classes that a whole model was trained on, of a run's or a merged checkpoint; none where unknown."""
    if path.endswith(".safetensors"):  # tensors alone, which there is no need to read
        return []
    with contextlib.suppress(CheckpointError, OSError):
        content = read_file(path, values=False)
        places = (content, content.get("trainer")) if isinstance(content, Mapping) else ()
        names = next((place["classes"] for place in places if isinstance(place, Mapping) and "classes" in place), None)
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    return []


def teach_safetensors() -> None:
    """Let Detectron2's own checkpointer, and so ``DefaultPredictor``, read ``.safetensors``.

    It chooses how to read a file by its name inside a method and leaves no other place to add one.
    """
    original = DetectionCheckpointer._load_file

    def _load_file(self: DetectionCheckpointer, filename: str) -> Any:
        if not filename.endswith(".safetensors"):
            return original(self, filename)
        return {"model": read_file(filename).state}

    if original.__module__ != __name__:
        DetectionCheckpointer._load_file = _load_file


def _number(run: str) -> int:
    """The number in the mark of a run; 0 of one without a mark."""
    return int(run.partition("-")[0] or 0)


def _time(path: Path) -> int:
    """When a checkpoint was completed."""
    file = path / TRAINING_STATE if os.path.isdir(path) else path
    return file.stat().st_mtime_ns if os.path.isfile(file) else 0


def _dense(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict with tensors that repeat their values (expanded ones) copied: torch.save stores their storage."""
    for name, value in state.items():
        if isinstance(value, Tensor) and 0 in value.stride() and value.numel() > 1:
            state[name] = value.contiguous()
    return state


def _iterations(state: Any) -> list[Any]:
    """The iterations that a training state tells, in each of the places where it may."""
    return [
        part["iteration"] for part in (state, state.get("trainer")) if isinstance(part, dict) and "iteration" in part
    ]


def _read(path: Path) -> dict[str, Any]:
    """Read a checkpoint and prove it whole: its adapter, its training state, and that they belong together.

    Raises:
        CheckpointDamaged: it is not as it was saved.
        CheckpointError: this process cannot read it.
    """
    if not os.path.isdir(path):
        state = read_file(path)
    else:
        try:
            adapter_file.read(path)
        except adapter_file.AdapterFileError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in SYSTEM_ERRORS:
                raise CheckpointError(str(error)) from error
            raise CheckpointDamaged(str(error)) from error
        recorded = _check_record(path)
        state = read_file(path / TRAINING_STATE)
        if isinstance(state, dict) and "run" in state and recorded is None:
            raise CheckpointDamaged(f"{STATE_RECORD} is missing")
    if defect := _defect(path, state):
        raise CheckpointDamaged(f"its training state is not one of a run: {defect}")
    return state


def _check_record(folder: Path) -> dict[str, Any] | None:
    """Compare a training state with its record; None for one of an earlier version, which wrote no record."""
    path, file = folder / STATE_RECORD, folder / TRAINING_STATE
    try:
        if not file.is_file() or file.is_symlink():
            raise CheckpointDamaged(f"{TRAINING_STATE} is missing or no regular file")
        if not os.path.lexists(path):
            return None
        data = path.read_bytes() if path.is_file() and path.stat().st_size < disk.MAX_JSON else b""
        record = disk.load_json(data)
        if not disk.is_signed(data, record) or any(record.get(key) != _RECORD[key] for key in _RECORD):
            raise CheckpointDamaged(f"{STATE_RECORD} was damaged or edited, or is of another version")
        if any(record.get(key) != value for key, value in disk.file_digest(file).items()):
            raise CheckpointDamaged(f"{TRAINING_STATE} is not the one that was saved: it was damaged or replaced")
        if disk.sha256((folder / adapter_file.RECORD).read_bytes()) != record.get("adapter"):
            raise CheckpointDamaged(f"{TRAINING_STATE} was saved beside another adapter")
    except disk.Defect as error:
        raise CheckpointDamaged(f"{STATE_RECORD}: {error}") from error
    except OSError as error:
        kind = CheckpointError if error.errno in SYSTEM_ERRORS else CheckpointDamaged
        raise kind(f"{folder} cannot be read: {error.strerror or error}") from error
    return record


def _defect(path: Path, state: Any) -> str:
    """What is wrong with the content of a training state, in words; empty where nothing is."""
    if not isinstance(state, dict) or not (os.path.isdir(path) or isinstance(state.get("model"), dict)):
        return "it holds no model or is no dict"
    told, number = _iterations(state), _NAME.fullmatch(path.name)[2]  # type: ignore[index]
    if any(type(iteration) is not int or not 0 <= iteration < _SURELY for iteration in told):
        return "its iteration is none"
    if len({*told, *([int(number)] if number != "final" else [])}) > 1:
        return f"it is of iteration {told[0]}"
    if not isinstance(trainer := state.get("trainer", {}), dict):
        return "it holds no trainer"
    seed, optimizer = trainer.get("seed", 0), trainer.get("optimizer", {"param_groups": [], "state": {}})
    if type(seed) is not int or seed < 0:
        return "its seed is no number"
    parts = (optimizer.get("param_groups"), optimizer.get("state")) if isinstance(optimizer, dict) else ()
    return "" if [type(part) for part in parts] == [list, dict] else "it holds no optimizer"
