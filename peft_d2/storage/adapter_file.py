"""The file format of an adapter: a folder of three files, verified as a whole before anything is used.

    adapter_model.safetensors   the injected tensors and the modules trained in full, under Hugging Face's names
    adapter_config.json         Hugging Face's description, exact where the methods agree
    peft_d2.json                the rest: format version, methods, the base's fingerprint, sizes and sha256 of the other
                                two, metrics, and a checksum of itself

Every byte of the folder is covered by a checksum, so a flipped bit anywhere is found, and a file that was exchanged or
written again, in half precision say, is refused. An adapter is a difference: on other base weights it is noise that
loads without complaint, so its record carries a fingerprint of its base.

`adapter_config.json` says `peft_type` LORA only where `PeftModel.from_pretrained(model, folder)` computes what our
model computes. Everything else is stored under the same scheme of names with `peft_type` PEFT_D2, which `peft` refuses
by that name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_d2.peft.errors import shortened
from peft_d2.peft.state import NAME, SUFFIXES, unstorable
from peft_d2.storage import disk, foreign
from peft_d2.storage.disk import Defect, Fingerprint

logger = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "peft_d2-adapter", 1
TENSORS, CONFIG, RECORD = FILES = "adapter_model.safetensors", "adapter_config.json", "peft_d2.json"
# Of the record, where there is something to say: why Hugging Face's peft cannot open the folder as it is, which
# commit of which adapter on the hub the training started from, how the model takes its pixels, and the names of the
# classes that it was trained on.
WHY_NOT_PEFT, STARTED_FROM, PIXELS, CLASSES = "why_not_peft", "started_from", "pixels", "classes"
MARK = "peft_d2"  # in the tensors' header: tells our folder that lost its record from one of Hugging Face's
PREFIX = "base_model.model."  # of all names in the file of tensors
LORA, OWN = "LORA", "PEFT_D2"  # peft_type
A, B, MAGNITUDE, EMBEDDING_A, EMBEDDING_B = SUFFIXES

_ATTEMPTS = 3
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")  # on the hub
_INSTALL = "pip install 'peft_d2[hub]'"
_OF_THE_SYSTEM = "correct the path, its permissions, or the limits of this process; the files themselves may be whole"
_CORRECT = "correct MODEL.PEFT.WEIGHTS or the path given"
_DAMAGED = "copy the folder again from where it was saved, or use an earlier checkpoint"
_AGAIN = "save the adapter again with this version of peft_d2"
_TYPES = {"base": dict, "checksum": str, "files": dict, "format": str, "format_version": int, "methods": list,
          "metrics": dict, "peft_d2_version": str, "train": list,
          WHY_NOT_PEFT: str, STARTED_FROM: str, PIXELS: dict, CLASSES: list}  # fmt: skip
_ABSENT: dict[str, Any] = {WHY_NOT_PEFT: "", STARTED_FROM: "", PIXELS: {}, CLASSES: []}
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# What `peft` adds below a module that it adapts; its `modules_to_save` are compared with these names, too.
_LAYER_NAMES = [".base_layer", ".lora_embedding_A", ".lora_embedding_B"]
_LAYER_NAMES += [f".{name}{end}" for name in ("lora_dropout", "lora_A", "lora_B") for end in ("", ".default")]
_LAYER_NAMES += [".lora_magnitude_vector", ".lora_magnitude_vector.default"]

Modules = Sequence[tuple[str, nn.Module]]


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
        started_from: `user/name@commit` of the adapter on the hub that its training started from, or "".
        pixels: `mean`, `std` and `format` (RGB or BGR) of the images that it was trained on, as far as they are known.
        classes: names of the classes that it was trained on, by the model's indices; empty where they are not known.
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
    classes: tuple[str, ...] = ()


def write(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], **described: Any) -> None:
    """Write an adapter folder, replacing an earlier adapter there as a whole; arguments as of `contents`.

    Raises:
        StorageError: the folder holds something else than an adapter, or cannot be stored; what was there stays.
        ValueError: a tensor name or a value cannot be stored.
    """
    data = contents(tensors, **described)
    with disk.folder(folder, FILES) as temporary:
        for name, content in data.items():
            (temporary / name).write_bytes(content)
    say_why_not_peft(folder, data)


def say_why_not_peft(folder: str | os.PathLike[str], written: Mapping[str, bytes]) -> None:
    """Log why Hugging Face's `peft` cannot open what was written, where it cannot."""
    if reason := json.loads(written[RECORD]).get(WHY_NOT_PEFT):
        logger.info("Hugging Face's peft cannot open %s, this package can: %s.", folder, reason)


def contents(
    tensors: Mapping[str, Tensor],
    *,
    methods: Sequence[Mapping[str, Any]],
    train: Sequence[str],
    base: Fingerprint,
    metrics: Mapping[str, Any] | None = None,
    scales: Mapping[str, float] | None = None,
    modules: Modules = (),
    started_from: str = "",
    pixels: Mapping[str, Any] | None = None,
    classes: Sequence[str] = (),
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
    labels = [] if isinstance(classes, str) else list(classes)
    if isinstance(classes, str) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"classes are {classes!r:.80}; expected a list of names, in the order of the model's classes")
    config, reason = describe(tensors, base.tensors, scales or {}, modules)
    lora_scales(tensors, config)  # what could not be read is not written
    stored = disk.dump_tensors(to_file(tensors), {MARK: str(FORMAT_VERSION)})
    data = {TENSORS: stored, CONFIG: disk.dump_json(config)}
    optional = {WHY_NOT_PEFT: reason, STARTED_FROM: started_from, PIXELS: pixels, CLASSES: labels}
    record = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "peft_d2_version": __version__,
        "methods": [disk.plain(dict(method), "a method") for method in methods],
        "train": list(train),
        "base": base.to_json(),
        "metrics": disk.plain(dict(metrics or {}), "the metrics"),
        "files": {name: {"bytes": len(content), "sha256": disk.sha256(content)} for name, content in data.items()},
        **{key: said for key, said in optional.items() if said},
    }
    try:
        return {**data, RECORD: disk.sign(record)}
    except Defect as error:
        raise ValueError(f"methods or metrics cannot be stored: {error}") from None


def resolved(folder: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], str]:
    """For ``user/name@revision`` the folder in the hub's cache, fetched where that is needed, and ``user/name@commit``.

    Other folders, and those that exist, are as they are (`~` is one's home), and "". The revision is required, so that
    a run names what it used. Offline (HF_HUB_OFFLINE) the cache alone is asked.

    Raises:
        AdapterFileError: it is no path, it cannot be fetched, or ``huggingface_hub`` is missing.
    """
    if not isinstance(folder, str | os.PathLike):
        raise AdapterFileError(repr(folder), "it is no path", "give the folder of an adapter")
    folder = os.path.expanduser(folder)
    address = _ADDRESS.fullmatch(os.fspath(folder))
    if address is None or os.path.exists(folder):
        return folder, ""
    hub = import_hub(folder)
    try:
        local = hub.snapshot_download(address["repo"], revision=address["revision"], allow_patterns=list(FILES))
    except (OSError, ValueError) as error:  # the library's own errors are of these
        said = str(error).strip().partition("\n")[0]
        remedy = "check the name, the revision and your access (hf auth login); offline it has to be in the cache"
        raise AdapterFileError(folder, f"cannot be fetched from the hub: {said}", remedy) from error
    logger.info("Adapter %s is commit %s of %s, in %s", folder, Path(local).name, address["repo"], local)
    return local, f"{address['repo']}@{Path(local).name}"


def import_hub(folder: str | os.PathLike[str]) -> Any:
    """The package ``huggingface_hub``.

    Raises:
        AdapterFileError: it is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise AdapterFileError(folder, "the hub needs the package huggingface_hub", _INSTALL) from error
    return huggingface_hub


def read(folder: str | os.PathLike[str]) -> AdapterFile:
    """Read and verify an adapter folder written by `write`. One that is replaced meanwhile is read again.

    Raises:
        AdapterFileError: anything about it is not as it was written.
    """
    if not os.fspath(folder):
        raise AdapterFileError("", "the path of the adapter folder is empty", "name the folder")
    root = Path(folder)
    for _ in range(_ATTEMPTS - 1):
        before = _identity(root)
        try:
            return _read(root)
        except AdapterFileError:
            if _identity(root) == before:
                raise
    return _read(root)


def classes_of(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the classes that an adapter was trained on; none where its record does not say or cannot be read."""
    with contextlib.suppress(AdapterFileError):
        return list(_read_record(Path(resolved(folder)[0], RECORD))[CLASSES])
    return []


def _refuse_other_folder(root: Path) -> None:
    """Raise AdapterFileError for a folder without a record, saying what it is instead of an adapter's.

    Returns where nothing but the record is missing.
    """
    there = [name for name in (CONFIG, TENSORS) if os.path.lexists(root / name)]
    inside = [str(path.parent) for path in sorted(root.glob(f"*/{CONFIG}"))]
    if not there and inside:
        raise AdapterFileError(root, "it holds folders of adapters and none itself", f"give {' or '.join(inside[:3])}")
    if not there:
        others = [path.name for path in sorted(root.glob("*.safetensors"))]
        raise AdapterFileError(
            root,
            "it holds no file of an adapter" + (f", but {shortened(others, 3)}" if others else ""),
            f"{_CORRECT}; an adapter is {TENSORS} beside {CONFIG}, as this package and Hugging Face's peft write them, "
            "and not kohya's scripts or diffusers",
        )
    if len(there) == 1:
        missing = CONFIG if there == [TENSORS] else TENSORS
        raise AdapterFileError(root / missing, f"the file is missing beside {there[0]}", _DAMAGED)
    with _refusing(root / TENSORS), (root / TENSORS).open("rb") as stream:
        if kind := foreign.kind_of(stream.read(foreign.LENGTH)):
            raise Defect(f"it is {kind}")


def _identity(root: Path) -> Any:
    """Something that is another when the folder was replaced meanwhile; None where there is no record."""
    with contextlib.suppress(OSError, ValueError):
        found = (root / RECORD).stat()
        return found.st_ino, found.st_mtime_ns, found.st_size


def _read(root: Path) -> AdapterFile:
    """Read a folder once, as :func:`read` does."""
    with _refusing(root):
        if not root.exists():
            disk.recover(root, only_put_back=True)
        if root.is_file():
            remedy = "give the folder that holds it"
            if root.name not in FILES and root.suffix != ".safetensors":
                remedy = "unpack an archive, and give its folder; the file of a whole model goes into MODEL.WEIGHTS"
            raise AdapterFileError(root, "it is a file, not an adapter folder", remedy)
        if not root.is_dir():
            raise AdapterFileError(root, "there is no such adapter folder", _CORRECT)
        if not any(os.path.lexists(root / name) for name in FILES) and (inside := foreign.newest_in_run(root)):
            raise AdapterFileError(root, "it is the folder of a run, not of an adapter", f"give {inside}")
        if not os.path.lexists(root / RECORD):
            _refuse_other_folder(root)
    record = _read_record(root / RECORD)
    config = _read_member(root / CONFIG, record["files"][CONFIG], disk.load_json)
    stored, metadata = _read_member(root / TENSORS, record["files"][TENSORS], disk.load_tensors)
    if metadata.get(MARK) != str(FORMAT_VERSION):
        raise AdapterFileError(root / TENSORS, "it was not written together with its record", _AGAIN)
    with _refusing(root, _AGAIN):
        tensors = to_model(stored)
        check_config(tensors, config)
        scales, base = lora_scales(tensors, config), Fingerprint.from_json(record["base"])
    return AdapterFile(
        tensors, record["methods"], tuple(record["train"]), base, record["metrics"], record["peft_d2_version"], scales,
        record[STARTED_FROM], record[PIXELS], tuple(record[CLASSES]),
    )  # fmt: skip


def _read_record(path: Path) -> dict[str, Any]:
    """The record of an adapter: whole, of this format's version, each entry of its type."""
    with _refusing(path):
        data = _bounded(path, disk.MAX_JSON)
        record = disk.load_json(data)
        is_whole = disk.is_signed(data, record)
    version = record.get("format_version")
    if record.get("format") == FORMAT and version != FORMAT_VERSION:
        remedy = "install a peft_d2 that reads that version, or save the adapter again; if the number looks odd, "
        defect = f"it has format version {version!r}, and this peft_d2 reads {FORMAT_VERSION}"
        raise AdapterFileError(path, defect, remedy + _DAMAGED)
    if not is_whole:
        raise AdapterFileError(path, "its checksum does not match: it was damaged or edited", _DAMAGED)
    record = {**_ABSENT, **record}
    if not (
        _has_types(record, _TYPES)
        and record["format"] == FORMAT
        and record["files"].keys() == {TENSORS, CONFIG}  # fixed names: none can point elsewhere
        and all(_has_types(entry, {"bytes": int, "sha256": str}) for entry in record["files"].values())
        and all(isinstance(method, dict) for method in record["methods"])
        and all(isinstance(text, str) for text in (*record["train"], *record[CLASSES]))
        and _are_pixels(record[PIXELS])
    ):
        raise AdapterFileError(path, "it is not the record of a peft_d2 adapter", _AGAIN)
    return record


def _has_types(record: Any, types: Mapping[str, type]) -> bool:
    """Whether `record` is a dict of exactly these keys and types."""
    return isinstance(record, dict) and {key: type(value) for key, value in record.items()} == types


def _are_pixels(record: Mapping[str, Any]) -> bool:
    lists = [record.get(key, []) for key in ("mean", "std")]
    numbers = all(isinstance(values, list) and all(isinstance(v, int | float) for v in values) for values in lists)
    kind = record.get("format", "")
    return numbers and record.keys() <= {"mean", "std", "format"} and isinstance(kind, str) and kind.isprintable()


def _read_member(path: Path, entry: Mapping[str, Any], parse: Callable[[bytes], Any]) -> Any:
    """What `parse` makes of a file of the folder, if it has the size and sha256 of its `entry` in the record."""
    with _refusing(path):
        data = _bounded(path, entry["bytes"])
        if len(data) != entry["bytes"]:
            raise Defect(f"it has {len(data)} bytes instead of {entry['bytes']}: it was cut short")
        if disk.sha256(data) != entry["sha256"]:
            raise Defect("its sha256 is not the recorded one: it was damaged or replaced")
        return parse(data)


def _bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of the folder; Defect where it is missing or has more than `limit` bytes."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise AdapterFileError(path, "it is a link or no regular file", "put the file itself into the folder")
    if not path.exists():
        raise Defect("the file is missing")
    size = path.stat().st_size
    if size > limit:
        raise Defect(f"it has {size} bytes instead of {limit}")
    with path.open("rb") as stream:
        return stream.read(size)


@contextlib.contextmanager
def _refusing(path: Path, remedy: str = _DAMAGED) -> Iterator[None]:
    """Turn defects and errors of the system in the block into an AdapterFileError that names the file and a remedy."""
    try:
        yield
    except AdapterFileError:
        raise
    except ValueError as error:
        raise AdapterFileError(path, str(error), remedy) from None
    except MemoryError as error:
        raise AdapterFileError(path, "it does not fit into the memory of this process", _OF_THE_SYSTEM) from error
    except OSError as error:
        remedy = _DAMAGED if error.errno == errno.EIO else _OF_THE_SYSTEM
        raise AdapterFileError(str(path)[:400], f"it cannot be read ({error.strerror or error})", remedy) from error


def to_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model under their names in the file: "fc.lora_a" is "base_model.model.fc.lora_A.weight" there.

    `peft` keeps DoRA's magnitude of a convolution as (1, out, 1, 1).
    """
    stored = {}
    for name, value in tensors.items():
        own = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        a = tensors.get(name.removesuffix(own) + A)
        if own == MAGNITUDE and a is not None and a.ndim > 2:
            value = value.reshape(1, -1, *[1] * (a.ndim - 2))
        stored[PREFIX + name.removesuffix(own) + SUFFIXES.get(own, "")] = value
    return stored


def to_model(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reverse of `to_file`.

    Raises:
        ValueError: a name that `to_file` cannot have given.
    """
    tensors = {}
    for name, value in stored.items():
        suffix, theirs = next((pair for pair in SUFFIXES.items() if name.endswith(pair[1])), ("", ""))
        own = name.removeprefix(PREFIX).removesuffix(theirs) + suffix
        if not name.startswith(PREFIX) or name.endswith(tuple(SUFFIXES)) or not NAME.fullmatch(own):
            raise ValueError(
                f"the tensor name {name[:80]!r} is not one of an adapter, where peft writes "
                "'base_model.model.<module>.lora_A.weight'; kohya's scripts, diffusers and loralib write others"
            )
        tensors[own] = value.flatten() if suffix == MAGNITUDE else value
    return tensors


def lora_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Path of each module with a LoRA -> rank.

    Raises:
        ValueError: a factor is missing, or the two disagree.
    """
    ranks = {}
    for path in sorted({name.removesuffix(s) for s in SUFFIXES for name in tensors if name.endswith(s)}):
        a = tensors.get(path + A, tensors.get(path + EMBEDDING_A))
        b = tensors.get(path + B, tensors.get(path + EMBEDDING_B))
        if a is None or b is None:
            raise ValueError(f"the LoRA of {path} has only one of its two factors")
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"the LoRA factors of {path} have no common rank: {tuple(a.shape)}, {tuple(b.shape)}")
        ranks[path] = int(a.shape[0])
    return ranks


def describe(
    tensors: Mapping[str, Tensor], base: Collection[str], scales: Mapping[str, float], modules: Modules = ()
) -> tuple[dict[str, Any], str]:
    """The content of `adapter_config.json`, and why `peft` cannot open the folder, "" where it can.

    Args:
        tensors: injected tensors and those trained in full, by name in the model.
        base: names of the base model's tensors.
        scales: path of a LoRA -> factor on B A x (alpha / r, or alpha / sqrt(r) with rsLoRA).
        modules: (name, module) of the whole base model, shared modules under each of their names. Empty: whether
            `peft` finds the same modules and computes the same in them is not checked.
    """
    injected, full = tensors.keys() - set(base), tensors.keys() & set(base)
    ranks = lora_ranks(tensors)
    unknown = sorted(injected - {path + suffix for path in ranks for suffix in SUFFIXES})
    dora = sum(path + MAGNITUDE in tensors for path in ranks)
    saved = _saved_modules(full, base, list(ranks), modules)
    targets = _targets(list(ranks), saved or [], modules)
    if reason := _not_for_peft(ranks, unknown, dora, saved, targets, scales, dict(modules)):
        return {
            "peft_type": OWN,
            "target_modules": sorted({name.rpartition(".")[0] for name in injected}),
            "modules_to_save": sorted({name.rpartition(".")[0] or name for name in full}) or None,
            "inference_mode": True,
            "lora_scales": {path: float(value) for path, value in scales.items()},
        }, reason
    alphas = {path: scales[path] * rank for path, rank in ranks.items()}
    alphas = {path: round(v) if math.isclose(v, round(v), rel_tol=1e-9) else v for path, v in alphas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": LORA,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": targets,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {_exactly(path): value for path, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": bool(dora),
        "modules_to_save": saved or None,
    }, ""


def _not_for_peft(
    ranks: Mapping[str, int], unknown: Sequence[str], dora: int, saved: list[str] | None,
    targets: list[str] | str | None, scales: Mapping[str, float], modules: Mapping[str, nn.Module],
) -> str:  # fmt: skip
    """Why `peft` would not open the folder, or would compute something else with it; empty where it does."""
    if unknown:
        return f"{unknown[0]} belongs to a method that peft does not have ({len(unknown)} such tensors)"
    if not ranks:
        return "it has no LoRA, and peft needs one"
    if saved is None:
        return (
            "what is trained in full is shared, no whole module, or of a name that modules_to_save finds elsewhere too"
        )
    if not targets:
        return "an adapted module lies in one that is trained in full, where peft leaves it out"
    if not ranks.keys() <= scales.keys():
        return "the factor of a LoRA is not known"
    if dora not in (0, len(ranks)):
        return "some modules have DoRA and some have not, and peft has one use_dora for all"
    for path in ranks if modules else ():
        if reason := difference_to_peft(path, modules) if path in modules else "it is not in the base":
            return f"{path}: {reason}"
        parents = [modules[path[:end]] for end, letter in enumerate(path) if letter == "."]
        if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents):
            return f"{path}: torch's fast path of nn.TransformerEncoderLayer passes peft's layer by in eval mode"
    return ""


def _saved_modules(
    full: Collection[str], base: Collection[str], targets: Sequence[str], modules: Modules
) -> list[str] | None:
    """The modules that hold exactly the tensors in ``full``; None where `modules_to_save` would hit others, too.

    `peft` copies each module whose name ends with an entry, with all that is in it, which unties what is shared.
    """
    owners = sorted({name.rpartition(".")[0] for name in full})
    if any(not owner or any(n.startswith(f"{owner}.") and n not in full for n in base) for owner in owners):
        return None
    outer = [owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners)]
    if not modules or not outer:
        return outer
    by_name = dict(modules)
    names = [*by_name, *(f"{path}{end}" for path in targets for end in _LAYER_NAMES)]
    hit = {name for name in names if name.endswith(tuple(outer))}
    inside = [by_name[name] for name in by_name if f"{name}.".startswith(tuple(f"{owner}." for owner in outer))]
    shared = shared_ids(modules)
    tied = any(id(module) in shared or any(id(t) in shared for t in _own(module)) for module in inside)
    return None if tied or hit != set(outer) or any(isinstance(by_name[n], _CONTAINERS) for n in outer) else outer


def shared_ids(modules: Modules) -> set[int]:
    """`id` of every module and tensor with several owners or names. `peft` copies modules, which parts the shared."""
    count = Counter(id(module) for _, module in modules)
    for module in {id(module): module for _, module in modules}.values():
        count.update(id(tensor) for tensor in _own(module))
    return {key for key, number in count.items() if number > 1}


def _own(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of the module itself, without those of its children."""
    return [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]


def _targets(paths: Sequence[str], saved: Sequence[str], modules: Modules) -> list[str] | str | None:
    """`target_modules` that choose exactly ``paths``: the list, or where its suffixes hit more a regular expression.

    None where `peft` would leave one out, because it is in one of `modules_to_save`.
    """
    if any(re.match(rf"(^|.*\.){module}($|\..*)", path) for module in saved for path in paths):
        return None
    ends = tuple(f".{path}" for path in paths)
    only = all(name in paths for name, _ in modules if f".{name}".endswith(ends))
    return list(paths) if only else "|".join(map(re.escape, paths))


def difference_to_peft(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Why `peft`'s LoRA on the module computes something else than ours; empty where both are the same."""
    module = modules[path]
    if sum(other is module for other in modules.values()) > 1:
        return "it is shared under several names, and peft adapts it under the first alone"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if getattr(module, "norm", None) is not None or getattr(module, "activation", None) is not None:
            return "peft adds its branch after the norm and the activation of this layer, ours before them"
        if module.groups > 1:
            return "peft's branch of a grouped convolution mixes all groups, ours changes the grouped weight"
        dilated = any(d > 1 < k for d, k in zip(module.dilation, module.kernel_size, strict=True))
        if dilated or module.padding_mode != "zeros":
            return "peft's branch of a convolution knows neither dilation nor padding modes"
        return ""
    return "" if isinstance(module, nn.Linear | nn.Embedding) else f"peft has no such layer for {type(module).__name__}"


def check_config(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Verify that a description fits its tensors.

    Raises:
        ValueError: a type that is not known, factors that disagree, or a rank other than the described one.
    """
    ranks, kind = lora_ranks(tensors), config.get("peft_type")
    if kind not in (LORA, OWN):
        raise ValueError(f"adapter_config.json has peft_type {kind!r}; known are {LORA} and {OWN}")
    for path, rank in ranks.items() if kind == LORA else ():
        described = by_pattern(config, "rank_pattern", path, config.get("r"))
        if type(described) is not int or described != rank:
            says = f"adapter_config.json says {described!r} (r, rank_pattern)"
            raise ValueError(f"the LoRA of {path} has rank {rank}, and {says}")


def lora_scales(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
    """Path of each LoRA -> factor on B A x.

    Raises:
        ValueError: an alpha is missing or no positive number.
    """
    result: dict[str, float] = {}
    if config.get("peft_type") != LORA:
        stored = config.get("lora_scales") or {}  # not there in folders written before 0.2
        if not isinstance(stored, Mapping) or not all(isinstance(value, float) for value in stored.values()):
            raise ValueError("adapter_config.json: lora_scales are not numbers")
        return dict(stored)
    for path, rank in lora_ranks(tensors).items():
        alpha = by_pattern(config, "alpha_pattern", path, config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            says = f"lora_alpha of {path} is {alpha!r}, not a positive number (lora_alpha, alpha_pattern)"
            raise ValueError(f"adapter_config.json: {says}")
        result[path] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return result


def by_pattern(config: Mapping[str, Any], key: str, path: str, default: Any) -> Any:
    """The value of the first expression in `rank_pattern` or `alpha_pattern` that matches the end of a module's path.

    Raises:
        ValueError: the patterns have another form.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping) or len(patterns) > 100_000:
        raise ValueError(f"adapter_config.json: {key} is not an object of patterns")
    if _exactly(path) in patterns:
        return patterns[_exactly(path)]
    for pattern, value in patterns.items():
        if expression(rf"(.*\.)?({pattern})$", key).match(path):
            return value
    return default


def expression(pattern: str, key: str) -> re.Pattern[str]:
    """A regular expression of the field ``key``, compiled.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"adapter_config.json: {pattern[:80]!r} in {key} is no regular expression ({error})") from None


def _exactly(path: str) -> str:
    """The pattern by which `rank_pattern` and `alpha_pattern` name one module."""
    return "^" + re.escape(path)
