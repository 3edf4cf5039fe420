"""The file format of an adapter: a folder of three files, verified as a whole before anything is used.

    adapter_model.safetensors   the injected tensors and the modules trained in full, under Hugging Face's names
    adapter_config.json         Hugging Face's description, exact where the methods agree
    peft_d2.json                the rest: format version, methods, the base's fingerprint, sizes and sha256 of the other
                                two, metrics, and a checksum of itself

Every byte of the folder is covered by a checksum, so a flipped bit anywhere is found. An adapter is identified by its
record: it names the sha256 of the tensors' file (so names, types, shapes and values) and description, the methods,
what is trained in full and the base; the record of a training state names the record's. A file that was exchanged or
written again, in half precision say, is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_d2.storage import adapter_config, atomic, strict_json, tensor_file
from peft_d2.storage.base_fingerprint import Fingerprint
from peft_d2.storage.checkpoint import newest_in_run

FORMAT = "peft_d2-adapter"
FORMAT_VERSION = 1
TENSORS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "peft_d2.json"
FILES = (TENSORS, CONFIG, RECORD)
MARK = "peft_d2"  # in the tensors' header: tells our folder that lost its record from one of Hugging Face's

_ATTEMPTS = 3
_MAX_DEPTH = 100
_OF_THE_SYSTEM = "correct the path, its permissions, or the limits of this process; the files themselves may be whole"
_DAMAGED = "copy the folder again from where it was saved, or use an earlier checkpoint"
_KEYS = {"base", "checksum", "files", "format", "format_version", "methods", "metrics", "peft_d2_version", "train"}


class AdapterFileError(ValueError):
    """An adapter's files are missing, damaged, of another version, or belong to another base; names file and remedy."""

    def __init__(self, path: str | os.PathLike[str], defect: str, remedy: str) -> None:
        self.path, self.defect, self.remedy = str(path), defect, remedy
        super().__init__(f"{path}: {defect}. Remedy: {remedy}")


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """A verified adapter.

    Attributes:
        tensors: name in the model -> tensor on the CPU.
        methods: the methods that were injected, as `inject` takes them.
        train: the patterns of modules trained in full.
        base: fingerprint of the base that it was made for; None for a folder written by Hugging Face peft.
        metrics: what was measured when it was saved.
        version: of peft_d2 that wrote it.
        scales: path of each LoRA that `adapter_config.json` describes -> factor on its branch.
    """

    tensors: dict[str, Tensor]
    methods: list[dict[str, Any]]
    train: tuple[str, ...]
    base: Fingerprint | None
    metrics: dict[str, Any]
    version: str
    scales: dict[str, float]


def write(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    *,
    methods: Sequence[Mapping[str, Any]],
    train: Sequence[str],
    base: Fingerprint,
    metrics: Mapping[str, Any] | None = None,
    scales: Mapping[str, float] | None = None,
    modules: adapter_config.Modules = (),
) -> None:
    """Write an adapter folder, replacing an earlier adapter there as a whole.

    Args:
        folder: where; the three files are its whole content.
        tensors: injected tensors and those trained in full, by name in the model.
        methods: the methods that were injected, as `inject` takes them.
        train: the patterns of modules trained in full.
        base: fingerprint of the base model.
        metrics: what was measured; numbers, texts, lists, dicts.
        scales: path of a LoRA -> factor on B A x; with it the folder is one that Hugging Face `peft` reads.
        modules: (name, module) of the base model: the folder says so only where `peft` computes the same.

    Raises:
        StorageError: the folder holds something else than an adapter, or cannot be stored; what was there stays.
        ValueError: a tensor name or a value cannot be stored.
    """
    data = contents(tensors, methods=methods, train=train, base=base, metrics=metrics, scales=scales, modules=modules)
    with atomic.folder(folder, FILES) as temporary:
        for name, content in data.items():
            (temporary / name).write_bytes(content)


def contents(
    tensors: Mapping[str, Tensor],
    *,
    methods: Sequence[Mapping[str, Any]],
    train: Sequence[str],
    base: Fingerprint,
    metrics: Mapping[str, Any] | None = None,
    scales: Mapping[str, float] | None = None,
    modules: adapter_config.Modules = (),
) -> dict[str, bytes]:
    """The three files of `write`, for a caller that stores more beside them.

    Raises:
        ValueError: a tensor name or a value cannot be stored.
    """
    require_storable(tensors)
    plain = [_plain(dict(method), "a method") for method in methods]
    config = adapter_config.describe(tensors, base.tensors, scales or {}, modules)
    adapter_config.scales(tensors, config)  # what could not be read is not written
    data = {
        TENSORS: tensor_file.dumps(adapter_config.to_file(tensors), {MARK: str(FORMAT_VERSION)}),
        CONFIG: strict_json.dumps(config),
    }
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "peft_d2_version": _own_version(),
        "methods": plain,
        "train": list(train),
        "base": base.to_json(),
        "metrics": _plain(dict(metrics or {}), "the metrics"),
        "files": {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in data.items()},
    }
    try:
        return {**data, RECORD: strict_json.signed(record)}
    except strict_json.JSONDefect as error:
        raise ValueError(f"methods or metrics cannot be stored: {error}") from None


def require_storable(names: Iterable[str]) -> None:
    """Refuse names of tensors that an adapter's files cannot hold.

    Raises:
        ValueError: with the first of them.
    """
    for name in names:
        if adapter_config.model_name(adapter_config.file_name(name)) != name or not adapter_config.NAME.fullmatch(name):
            raise ValueError(
                f"the tensor name {name!r} cannot be stored in an adapter file: it holds control characters, or ends "
                "as the factors of a LoRA do there. Rename the module, or choose another place"
            )


def read(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and verify an adapter folder written by `write`. One that is replaced meanwhile is read again.

    Raises:
        AdapterFileError: anything about it is not as it was written.
    """
    if not os.fspath(folder):
        raise AdapterFileError("", "the path of the adapter folder is empty", "name the folder")
    root = Path(folder)
    for attempt in range(_ATTEMPTS):
        before = _identity(root)
        try:
            return _read(root)
        except AdapterFileError:
            if _identity(root) == before or attempt + 1 == _ATTEMPTS:
                raise
    raise AssertionError


def _identity(root: Path) -> Any:
    """What changes when the folder is replaced."""
    try:
        found = (root / RECORD).stat()
    except (OSError, ValueError):
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read(root: Path) -> AdapterFile:
    with _accessible(root):
        if not root.exists():
            atomic.recover(root, only_put_back=True)
        if root.is_file():
            raise AdapterFileError(root, "it is a file, not an adapter folder", "give the folder that holds it")
        if not root.is_dir():
            remedy = "correct MODEL.PEFT.WEIGHTS or the path given"
            raise AdapterFileError(root, "there is no such adapter folder", remedy)
        if not any(os.path.lexists(root / name) for name in FILES) and (inside := newest_in_run(root)):
            raise AdapterFileError(root, "it is the folder of a run, not of an adapter", f"give {inside}")
    record = _read_record(root)
    files = record["files"]
    config_data = _read_member(root, CONFIG, files[CONFIG])
    tensors_data = _read_member(root, TENSORS, files[TENSORS])
    try:
        config = strict_json.loads(config_data)
    except strict_json.JSONDefect as error:
        raise AdapterFileError(root / CONFIG, str(error), _DAMAGED) from None
    tensors = _named_as_in_model(root / TENSORS, tensors_data)
    try:
        adapter_config.check(tensors, config)
        scales = adapter_config.scales(tensors, config)
        base = Fingerprint.from_json(record["base"])
    except ValueError as error:
        raise AdapterFileError(root, str(error), "save the adapter again with a version of peft_d2") from None
    methods = [dict(method) for method in record["methods"]]
    version: str = record["peft_d2_version"]
    return AdapterFile(tensors, methods, tuple(record["train"]), base, record["metrics"], version, scales)


def _read_record(root: Path) -> dict[str, Any]:
    path = root / RECORD
    try:
        data = _bounded(path, strict_json.MAX_BYTES)
        record = strict_json.loads(data)
        is_whole = strict_json.is_signed(data, record)
    except strict_json.JSONDefect as error:
        raise AdapterFileError(path, str(error), _DAMAGED) from None
    if record.get("format") == FORMAT and record.get("format_version") != FORMAT_VERSION:
        raise AdapterFileError(
            path,
            f"it has format version {record.get('format_version')!r}, and this peft_d2 reads {FORMAT_VERSION}",
            "install a peft_d2 that reads that version, or save the adapter again; if the number looks odd, "
            + _DAMAGED,
        )
    if not is_whole:
        raise AdapterFileError(path, "its checksum does not match: it was damaged or edited", _DAMAGED)
    if record.get("format") != FORMAT or set(record) != _KEYS or not _has_types(record):
        raise AdapterFileError(path, "it is not the record of a peft_d2 adapter", "save the adapter again")
    return record


def _has_types(record: Mapping[str, Any]) -> bool:
    """Whether all parts of a record have their types; names of files are fixed, so none can point elsewhere."""
    files, methods, train = record["files"], record["methods"], record["train"]
    return (
        isinstance(files, dict)
        and set(files) == {TENSORS, CONFIG}
        and all(
            isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
            for entry in files.values()
        )
        and isinstance(methods, list)
        and all(isinstance(method, dict) for method in methods)
        and isinstance(train, list)
        and all(isinstance(pattern, str) for pattern in train)
        and isinstance(record["metrics"], dict)
        and isinstance(record["peft_d2_version"], str)
    )


def _read_member(root: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    path, expected = root / name, entry["bytes"]
    data = _bounded(path, expected)
    if len(data) != expected:
        raise AdapterFileError(path, f"it has {len(data)} bytes instead of {expected}: it was cut short", _DAMAGED)
    if _sha256(data) != entry["sha256"]:
        raise AdapterFileError(path, "its sha256 is not the recorded one: it was damaged or replaced", _DAMAGED)
    return data


def _bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of the folder; never more than `limit`, nor than there are."""
    with _accessible(path):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise AdapterFileError(path, "it is a link or no regular file", "put the file itself into the folder")
        if not path.exists():
            remedy = _DAMAGED
            if path.name == RECORD:
                remedy += "; a folder written by Hugging Face peft is read by peft_d2.storage.huggingface.read"
            raise AdapterFileError(path, "the file is missing", remedy)
        size = path.stat().st_size
        if size > limit:
            raise AdapterFileError(path, f"it has {size} bytes instead of {limit}", _DAMAGED)
        with path.open("rb") as stream:
            return stream.read(size)


@contextlib.contextmanager
def _accessible(path: Path) -> Iterator[None]:
    """Say what the system says about a path that cannot be read."""
    try:
        yield
    except MemoryError as error:
        raise AdapterFileError(path, "it does not fit into the memory of this process", _OF_THE_SYSTEM) from error
    except OSError as error:
        remedy = _DAMAGED if error.errno == errno.EIO else _OF_THE_SYSTEM
        raise AdapterFileError(str(path)[:400], f"it cannot be read ({error.strerror or error})", remedy) from error


def _named_as_in_model(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        stored, metadata = tensor_file.loads(data)
    except tensor_file.TensorFileDefect as error:
        raise AdapterFileError(path, str(error), _DAMAGED) from None
    if metadata.get(MARK) != str(FORMAT_VERSION):
        raise AdapterFileError(path, "it was not written together with its record", "save the adapter again")
    try:
        return adapter_config.to_model(stored)
    except ValueError as error:
        raise AdapterFileError(path, str(error), "save the adapter again") from None


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of plain JSON values; numbers that JSON cannot hold (the AP of an absent class is NaN) become null."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} are nested more than {_MAX_DEPTH} deep, or hold themselves")
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, where, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where, depth + 1) for entry in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    item = getattr(value, "item", None)  # NumPy and torch scalars
    number = item() if callable(item) else value
    if isinstance(number, float):
        return number if math.isfinite(number) else None
    if isinstance(number, (bool, int)):
        return number
    raise ValueError(f"{where} hold a {type(value).__name__}; only numbers, texts, lists and dicts can be stored")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _own_version() -> str:
    from peft_d2 import __version__

    return __version__
