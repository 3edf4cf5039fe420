"""The file format of an adapter: a folder of three files, verified as a whole before anything is used.

    adapter_model.safetensors   the injected tensors and the modules trained in full, under Hugging Face's names
    adapter_config.json         Hugging Face's description, exact where the methods agree
    peft_d2.json                the rest: format version, methods, the base's fingerprint, sizes and sha256 of the other
                                two, metrics, and a checksum of itself

Every byte of the folder is covered by a checksum, so a flipped bit anywhere is found, and a file that was exchanged or
written again, in half precision say, is refused. An adapter is a difference: on other base weights it is noise that
loads without complaint, so its record carries a fingerprint of its base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from peft_d2.peft.errors import shortened
from peft_d2.peft.state import unstorable, whole
from peft_d2.storage import adapter_config, atomic, foreign
from peft_d2.storage.atomic import Defect

logger = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "peft_d2-adapter", 1
TENSORS, CONFIG, RECORD = FILES = "adapter_model.safetensors", "adapter_config.json", "peft_d2.json"
# Of the record, where there is something to say: why Hugging Face's peft cannot open the folder as it is, which
# commit of which adapter on the hub the training started from, and how the model takes its pixels.
WHY_NOT_PEFT, STARTED_FROM, PIXELS = "why_not_peft", "started_from", "pixels"
MARK = "peft_d2"  # in the tensors' header: tells our folder that lost its record from one of Hugging Face's
MAX_JSON = 32 * 2**20  # bytes

_ATTEMPTS = 3
_MAX_DEPTH, _MAX_DIGITS, _MAX_NAME = 100, 40, 1024
_CHUNK = 2**22  # values that are hashed at once
_ROW = 2**13  # bytes that are summed up together
_NAMED = 6
_OF_THE_SYSTEM = "correct the path, its permissions, or the limits of this process; the files themselves may be whole"
_DAMAGED = "copy the folder again from where it was saved, or use an earlier checkpoint"
_AGAIN = "save the adapter again with this version of peft_d2"
_TYPES = {"base": dict, "checksum": str, "files": dict, "format": str, "format_version": int, "methods": list,
          "metrics": dict, "peft_d2_version": str, "train": list}  # fmt: skip
_OPTIONAL = {WHY_NOT_PEFT: str, STARTED_FROM: str, PIXELS: dict}
_ENTRY = re.compile(r"(?P<shape>|\d{1,12}(x\d{1,12}){0,15})(:(?P<hash>[0-9a-f]{16}))?")


class AdapterFileError(ValueError):
    """An adapter's files are missing, damaged, of another version, or belong to another base; names file and remedy."""

    def __init__(self, path: str | os.PathLike[str], defect: str, remedy: str) -> None:
        self.path, self.defect, self.remedy = str(path), defect, remedy
        super().__init__(f"{path}: {defect}. Remedy: {remedy}")


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a base model is: which tensors it has, and hashes of the values that a run leaves as they are.

    Attributes:
        tensors: name -> "64x3x7x7:0123456789abcdef" (shape and start of the value's sha256), or the shape alone for a
            tensor that the run trains in full and whose value therefore is no property of the base.
        halves: name -> "float16" or "bfloat16" of the tensors that are held so: their values are rounded.
    """

    tensors: Mapping[str, str]
    halves: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def structure(self) -> str:
        """sha256 over all names and shapes."""
        return _sha256("\n".join(f"{name} {shape}" for name, (shape, _) in sorted(self.parts().items())).encode())

    @property
    def weights(self) -> str:
        """sha256 over the names and value hashes of the tensors that are not trained."""
        return _sha256("\n".join(f"{name} {e}" for name, e in sorted(self.tensors.items()) if ":" in e).encode())

    def parts(self) -> dict[str, tuple[str, str]]:
        """Name -> shape and hash, both as texts; the hash is "" where the value does not count."""
        return {name: entry.partition(":")[::2] for name, entry in self.tensors.items()}

    def without(self, names: Collection[str]) -> Fingerprint:
        """The fingerprint of the other tensors alone."""
        return Fingerprint(*({k: v for k, v in t.items() if k not in names} for t in (self.tensors, self.halves)))

    def to_json(self) -> dict[str, Any]:
        """A plain record; `from_json` reverses it."""
        record: dict[str, Any] = {"structure": self.structure, "weights": self.weights, "count": len(self.tensors)}
        record["tensors"] = dict(self.tensors)
        return record | ({"halves": dict(self.halves)} if self.halves else {})

    @classmethod
    def from_json(cls, record: Any) -> Fingerprint:
        """Read a record written by `to_json`.

        Raises:
            ValueError: the record has another form, or contradicts itself.
        """
        tensors, halves = record.get("tensors"), record.get("halves", {})
        plain = isinstance(tensors, dict) and all(isinstance(v, str) and _ENTRY.fullmatch(v) for v in tensors.values())
        if not plain or not isinstance(halves, dict) or not set(halves.values()) <= {"float16", "bfloat16"}:
            raise ValueError("the base's fingerprint has another form than expected")
        result = cls(tensors, halves)
        if record != result.to_json() or not halves.keys() <= tensors.keys():
            raise ValueError("the base's fingerprint contradicts itself")
        return result


def fingerprint(
    state: Mapping[str, Tensor], trained: Collection[str] = (), memo: dict[str, Any] | None = None
) -> Fingerprint:
    """Fingerprint of a base model's state dict (without injected tensors).

    Values are hashed as float32 or int64, so a model has the same fingerprint on any device and, as long as the
    values are equal, in any dtype. Rounding to half precision changes values and so changes the fingerprint.

    Args:
        state: all tensors of the base model.
        trained: names in `state` whose values do not count, while their names and shapes do: what is trained in full,
            and counters that every step moves.
        memo: filled with what was hashed. Given again, a tensor is hashed once more only where the sums of its bits
            (a tenth of the work, and on its own device) have changed, by whatever means.
    """
    left_out, memo = set(trained), {} if memo is None else memo
    entries, halves = {}, {}
    for name, tensor in state.items():
        tensor = whole(tensor)
        entries[name] = "x".join(map(str, tensor.shape))
        if name in left_out:
            continue
        if tensor.dtype in (torch.float16, torch.bfloat16):
            halves[name] = str(tensor.dtype).removeprefix("torch.")
        sums = _sums(tensor)
        if name not in memo or memo[name][0] != sums:
            memo[name] = sums, _hash(tensor)[:16]
        entries[name] += f":{memo[name][1]}"
    return Fingerprint(entries, halves)


def difference(expected: Fingerprint, found: Fingerprint) -> str:
    """Say in one line how the base `found` differs from `expected`; empty when an adapter of one fits the other.

    A value is compared where both sides hash it: a tensor that either side trains in full is no property of the base.
    """
    old, new = expected.parts(), found.parts()
    common = sorted(old.keys() & new.keys())
    structure = {
        "tensors missing": sorted(old.keys() - new.keys()),
        "tensors not expected": sorted(new.keys() - old.keys()),
        "other shapes": [f"{n} ({old[n][0]} -> {new[n][0]})" for n in common if old[n][0] != new[n][0]],
    }
    if parts := [f"{len(names)} {what}: {shortened(names, _NAMED)}" for what, names in structure.items() if names]:
        return "; ".join(parts)
    compared = [n for n in common if old[n][1] and new[n][1]]
    changed = [n for n in compared if old[n] != new[n]]
    if rounded := [n for n in changed if expected.halves.get(n) != found.halves.get(n)]:
        here, there = (base.halves.get(rounded[0], "float32") for base in (found, expected))
        return (
            f"same structure, other dtype: {len(rounded)} tensors that were {there} when the adapter was saved are "
            f"{here} here, so their values are rounded differently: {shortened(rounded, _NAMED)}"
        )
    if changed:
        count = f"{len(changed)} of {len(compared)} tensors differ"
        return f"same structure, other weights: {count}: {shortened(changed, _NAMED)}"
    return ""


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
        started_from: `user/name@commit` of the adapter on the hub that its training started from, or "".
        pixels: `mean`, `std` and `format` (RGB or BGR) of the images that it was trained on, as far as they are known.
    """

    tensors: dict[str, Tensor]
    methods: list[dict[str, Any]]
    train: tuple[str, ...]
    base: Fingerprint | None
    metrics: dict[str, Any]
    version: str
    scales: dict[str, float]
    started_from: str = ""
    pixels: dict[str, Any] = dataclasses.field(default_factory=dict)


def write(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], **described: Any) -> None:
    """Write an adapter folder, replacing an earlier adapter there as a whole; arguments as of `contents`.

    Raises:
        StorageError: the folder holds something else than an adapter, or cannot be stored; what was there stays.
        ValueError: a tensor name or a value cannot be stored.
    """
    data = contents(tensors, **described)
    with atomic.folder(folder, FILES) as temporary:
        for name, content in data.items():
            (temporary / name).write_bytes(content)
    say_why_not_peft(folder, data)


def say_why_not_peft(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Log why Hugging Face's `peft` cannot open what was written, where it cannot."""
    if reason := json.loads(files[RECORD]).get(WHY_NOT_PEFT):
        logger.info("Hugging Face's peft cannot open %s, this package can: %s.", folder, reason)


def contents(
    tensors: Mapping[str, Tensor],
    *,
    methods: Sequence[Mapping[str, Any]],
    train: Sequence[str],
    base: Fingerprint,
    metrics: Mapping[str, Any] | None = None,
    scales: Mapping[str, float] | None = None,
    modules: adapter_config.Modules = (),
    started_from: str = "",
    pixels: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """The three files of an adapter, by name.

    Args are what :class:`AdapterFile` has, with every LoRA in `scales`, and
        modules: (name, module) of the base model: the folder is one of Hugging Face `peft` only where that computes the
            same with them.

    Raises:
        ValueError: a tensor name or a value cannot be stored.
    """
    from peft_d2 import __version__

    if problem := unstorable(tensors):
        raise ValueError(problem)
    config, reason = adapter_config.describe(tensors, base.tensors, scales or {}, modules)
    adapter_config.scales(tensors, config)  # what could not be read is not written
    data = {
        TENSORS: dump_tensors(adapter_config.to_file(tensors), {MARK: str(FORMAT_VERSION)}),
        CONFIG: dump_json(config),
    }
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "peft_d2_version": __version__,
        "methods": [_plain(dict(method), "a method") for method in methods],
        "train": list(train),
        "base": base.to_json(),
        "metrics": _plain(dict(metrics or {}), "the metrics"),
        "files": {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in data.items()},
        **{k: said for k, said in ((WHY_NOT_PEFT, reason), (STARTED_FROM, started_from), (PIXELS, pixels)) if said},
    }
    try:
        return {**data, RECORD: sign(record)}
    except Defect as error:
        raise ValueError(f"methods or metrics cannot be stored: {error}") from None


def read(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and verify an adapter folder written by `write`. One that is replaced meanwhile is read again.

    Raises:
        AdapterFileError: anything about it is not as it was written.
    """
    if not os.fspath(folder):
        raise AdapterFileError("", "the path of the adapter folder is empty", "name the folder")
    root, attempt = Path(folder), 1
    while True:
        before = _identity(root)
        try:
            return _read(root)
        except AdapterFileError:
            if _identity(root) == before or attempt == _ATTEMPTS:
                raise
        attempt += 1


def _refuse_other_folder(root: Path) -> None:
    """Say what a folder without a record is, where more than the record is not as it should be."""
    there = [name for name in (CONFIG, TENSORS) if os.path.lexists(root / name)]
    inside = [str(path.parent) for path in sorted(root.glob(f"*/{CONFIG}"))]
    if not there and inside:
        raise AdapterFileError(root, "it holds folders of adapters and none itself", f"give {' or '.join(inside[:3])}")
    if not there:
        others = [path.name for path in sorted(root.glob("*.safetensors"))]
        raise AdapterFileError(
            root,
            "it holds no file of an adapter" + (f", but {shortened(others, 3)}" if others else ""),
            f"correct MODEL.PEFT.WEIGHTS or the path given; an adapter is {TENSORS} beside {CONFIG}, as this package "
            "and Hugging Face's peft write them, and not kohya's scripts or diffusers",
        )
    if len(there) == 1:
        missing = CONFIG if there == [TENSORS] else TENSORS
        raise AdapterFileError(root / missing, f"the file is missing beside {there[0]}", _DAMAGED)
    with _refusing(root / TENSORS), (root / TENSORS).open("rb") as stream:
        is_pointer = stream.read(12) == b"version http"
    if is_pointer:
        raise AdapterFileError(root / TENSORS, "it is a pointer of Git LFS, not the file itself", "run git lfs pull")


def _identity(root: Path) -> Any:
    """What changes when the folder is replaced."""
    with contextlib.suppress(OSError, ValueError):
        found = (root / RECORD).stat()
        return found.st_ino, found.st_mtime_ns, found.st_size


def _read(root: Path) -> AdapterFile:
    with _refusing(root):
        if not root.exists():
            atomic.recover(root, only_put_back=True)
        if root.is_file():
            raise AdapterFileError(root, "it is a file, not an adapter folder", "give the folder that holds it")
        if not root.is_dir():
            remedy = "correct MODEL.PEFT.WEIGHTS or the path given"
            raise AdapterFileError(root, "there is no such adapter folder", remedy)
        if not any(os.path.lexists(root / name) for name in FILES) and (inside := newest_in_run(root)):
            raise AdapterFileError(root, "it is the folder of a run, not of an adapter", f"give {inside}")
        if not os.path.lexists(root / RECORD):
            _refuse_other_folder(root)
    record = _read_record(root)
    data = {name: _read_member(root / name, record["files"][name]) for name in (CONFIG, TENSORS)}
    with _refusing(root / CONFIG):
        config = load_json(data[CONFIG])
    with _refusing(root / TENSORS):
        stored, metadata = load_tensors(data[TENSORS])
        if metadata.get(MARK) != str(FORMAT_VERSION):
            raise AdapterFileError(root / TENSORS, "it was not written together with its record", _AGAIN)
    try:
        tensors = adapter_config.to_model(stored)
        adapter_config.check(tensors, config)
        scales, base = adapter_config.scales(tensors, config), Fingerprint.from_json(record["base"])
    except ValueError as error:
        raise AdapterFileError(root, str(error), _AGAIN) from None
    version, train = record["peft_d2_version"], tuple(record["train"])
    more = record.get(STARTED_FROM, ""), record.get(PIXELS, {})
    return AdapterFile(tensors, record["methods"], train, base, record["metrics"], version, scales, *more)


def _read_record(root: Path) -> dict[str, Any]:
    path = root / RECORD
    data = _bounded(path, MAX_JSON)
    with _refusing(path):
        record = load_json(data)
        is_whole = is_signed(data, record)
    version = record.get("format_version")
    if record.get("format") == FORMAT and version != FORMAT_VERSION:
        remedy = "install a peft_d2 that reads that version, or save the adapter again; if the number looks odd, "
        defect = f"it has format version {version!r}, and this peft_d2 reads {FORMAT_VERSION}"
        raise AdapterFileError(path, defect, remedy + _DAMAGED)
    if not is_whole:
        raise AdapterFileError(path, "its checksum does not match: it was damaged or edited", _DAMAGED)
    if (
        record.get("format") != FORMAT
        or {**_OPTIONAL, **{key: type(value) for key, value in record.items()}} != {**_OPTIONAL, **_TYPES}
        or record["files"].keys() != {TENSORS, CONFIG}  # fixed names: none can point elsewhere
        or any(not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"} for entry in record["files"].values())
        or any(not isinstance(entry["bytes"], int) for entry in record["files"].values())
        or not all(isinstance(method, dict) for method in record["methods"])
        or not all(isinstance(pattern, str) for pattern in record["train"])
        or not _are_pixels(record.get(PIXELS, {}))
    ):
        raise AdapterFileError(path, "it is not the record of a peft_d2 adapter", _AGAIN)
    return record


def _are_pixels(record: Mapping[str, Any]) -> bool:
    numbers = [record.get(key, []) for key in ("mean", "std")]
    plain = all(isinstance(values, list) and all(isinstance(v, int | float) for v in values) for values in numbers)
    kind = record.get("format", "")
    return plain and record.keys() <= {"mean", "std", "format"} and isinstance(kind, str) and kind.isprintable()


def _read_member(path: Path, entry: Mapping[str, Any]) -> bytes:
    data, expected = _bounded(path, entry["bytes"]), entry["bytes"]
    if len(data) != expected:
        raise AdapterFileError(path, f"it has {len(data)} bytes instead of {expected}: it was cut short", _DAMAGED)
    if _sha256(data) != entry["sha256"]:
        raise AdapterFileError(path, "its sha256 is not the recorded one: it was damaged or replaced", _DAMAGED)
    return data


def _bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of the folder; never more than `limit`, nor than there are."""
    with _refusing(path):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise AdapterFileError(path, "it is a link or no regular file", "put the file itself into the folder")
        if not path.exists():
            raise AdapterFileError(path, "the file is missing", _DAMAGED)
        size = path.stat().st_size
        if size > limit:
            raise AdapterFileError(path, f"it has {size} bytes instead of {limit}", _DAMAGED)
        with path.open("rb") as stream:
            return stream.read(size)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Say of which file a defect is, and what the system says about a path that cannot be read."""
    try:
        yield
    except Defect as error:
        raise AdapterFileError(path, str(error), _DAMAGED) from None
    except MemoryError as error:
        raise AdapterFileError(path, "it does not fit into the memory of this process", _OF_THE_SYSTEM) from error
    except OSError as error:
        remedy = _DAMAGED if error.errno == errno.EIO else _OF_THE_SYSTEM
        raise AdapterFileError(str(path)[:400], f"it cannot be read ({error.strerror or error})", remedy) from error


def newest_in_run(folder: Path) -> str:
    """The checkpoint that stands for the run in a folder, "" where it is none's: for messages."""
    found = [folder / "adapter_final", folder / "model_final.pth"]
    for pattern in ("adapter_[0-9]*", "model_[0-9]*.pth"):
        found += sorted(folder.glob(pattern), reverse=True)
    return next((str(path) for path in found if path.exists()), "")


def not_finite(tensors: Mapping[str, Tensor], buffers: Collection[str]) -> str:
    """Say which tensor holds NaN or infinity, and how often; "" for none. Infinity in `buffers` (masks) is allowed."""
    for name, value in tensors.items():
        if (value.is_floating_point() or value.is_complex()) and not value.is_meta:
            value = value.float() if value.element_size() == 1 else value
            wrong = value.isnan() if name in buffers else ~value.isfinite()
            if wrong.any():
                return f"NaN or infinity: {int(wrong.sum())} of {value.numel()} values of {name}"
    return ""


def dump_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as the bytes of a safetensors file: equal input, equal bytes; shared memory is written once per name."""
    whole = {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in sorted(tensors)}
    data = save(whole, {"format": "pt", **(metadata or {})})
    # The library writes metadata in random order: the header is put in order, so that equal files have equal hashes.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join((len(header).to_bytes(8, "little"), header, memoryview(data)[start:]))


def load_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file given as bytes; the library checks header, offsets and sizes.

    Raises:
        Defect: the bytes are not a whole safetensors file.
    """
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
        said = foreign.kind_of(data) or f"cut short, damaged, or not safetensors ({str(error)[:200]})"
        raise Defect(f"it is {said}") from None
    if strange := next((name for name in tensors if len(name) > _MAX_NAME or not name.isprintable()), ""):
        raise Defect(f"the tensor name {strange[:60]!r} is too long or has unprintable characters")
    return tensors, header.get("__metadata__", {})


def load_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object from a stranger: bounded in size, depth and numbers, finite, no key twice.

    Raises:
        Defect: the bytes are not such an object.
    """
    if len(data) > MAX_JSON:
        raise Defect(f"it has {len(data)} bytes, more than the {MAX_JSON} that such a file may have")
    numbers: dict[str, Any] = {"parse_constant": _number, "parse_float": _number, "parse_int": _number}
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, **numbers)
    except RecursionError:
        raise Defect("it is nested too deeply") from None
    except Defect:
        raise
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        kind = foreign.kind_of(data)
        raise Defect(f"it is {kind or f'not valid JSON ({error}): the file is damaged or cut short'}") from None
    if not isinstance(parsed, dict):
        raise Defect(f"it holds a {type(parsed).__name__}, not an object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Defect("a key occurs twice in one object")
    return result


def _number(text: str) -> int | float:
    if len(text) > _MAX_DIGITS or not math.isfinite(number := float(text)):
        raise Defect(f"it holds the number {text[:_MAX_DIGITS]}, which is not finite or has too many digits")
    return number if set(".eE") & set(text) else int(text)


def dump_json(value: Mapping[str, Any]) -> bytes:
    """The one form of a file of ours, so that any change of a byte is seen: sorted keys, two spaces, a final newline.

    Raises:
        Defect: it is nested too deeply.
    """
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode("ascii")
    except RecursionError:
        raise Defect("it is nested too deeply") from None


def sign(record: dict[str, Any]) -> bytes:
    """A record with a checksum of itself.

    Raises:
        Defect: `load_json` would not accept it: it is too long, too deep, or holds too long a number.
    """
    data = dump_json({**record, "checksum": _sha256(dump_json(record))})
    load_json(data)
    return data


def is_signed(data: bytes, record: Mapping[str, Any]) -> bool:
    """Whether `data`, of which `load_json` gave `record`, is what `sign` wrote."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return record.get("checksum") == _sha256(dump_json(rest)) and data == dump_json(record)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of plain JSON values; numbers that JSON cannot hold (the AP of an absent class is NaN) become null."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} are nested more than {_MAX_DEPTH} deep, or hold themselves")
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, where, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, where, depth + 1) for entry in value]
    if not isinstance(value, (str, int, float)) and callable(getattr(value, "item", None)):
        value = value.item()  # NumPy and torch scalars
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise ValueError(f"{where} hold a {type(value).__name__}; only numbers, texts, lists and dicts can be stored")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sums(tensor: Tensor) -> Any:
    """A cheap checksum of a tensor: its type, its shape and a hash of sums over its bits."""
    raw = tensor.detach().contiguous().reshape(-1)
    raw = (torch.view_as_real(raw).reshape(-1) if raw.is_complex() else raw).view(torch.uint8)
    whole = len(raw) // _ROW * _ROW
    words = raw[:whole] if raw.storage_offset() % 8 == 0 else raw[:whole].clone()
    digest = hashlib.sha256(words.view(torch.int64).view(-1, _ROW // 8).sum(1).cpu().numpy().data)
    digest.update(raw[whole:].cpu().numpy().data)
    return tensor.dtype, tuple(tensor.shape), digest.digest()


def _hash(tensor: Tensor) -> str:
    """sha256 of a tensor's values in row-major order; converted chunk by chunk, so that no second copy is held."""
    digest = hashlib.sha256()
    flat = tensor.detach().reshape(-1)
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    kind = torch.float32 if flat.is_floating_point() else torch.int64
    for chunk in flat.split(_CHUNK):
        digest.update(chunk.to(device="cpu", dtype=kind).contiguous().numpy())
    return digest.hexdigest()
