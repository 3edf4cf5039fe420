"""Torch files and pickles of weights, read without running any code of theirs.

A pickle is a program: its GLOBAL opcode fetches any importable object and REDUCE calls it. The reader below keeps the
opcodes that build plain containers and answers GLOBAL from a short table, whose entries are all defined here: nothing
is imported on behalf of a file, and torch's own reader is never called. What torch stores beside the pickle (a zip
archive, or raw bytes in files older than torch 1.6) is read here too: sizes are checked before anything is allocated,
and the checksum that the archive keeps of every member is compared.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from peft_d2.storage import foreign
from peft_d2.storage.disk import Defect

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch before 1.6
_MOST_CLAIMED = 4  # times the file's bytes: an array may be made of bytes that were made of a text
_MAX_READS = 10**7  # about two an opcode: a state dict of 10,000 tensors needs 5 % of that
_CHUNK = 2**24
_ATTACK = "it may be an attack"
_LARGER, _STORAGE = "it holds a tensor that is larger than its data", "it holds a torch storage of an unknown form"


def read(path: str | os.PathLike[str], values: bool = True) -> Any:
    """Read a torch file, or a pickle, of plain containers, numbers, texts, NumPy arrays and torch tensors.

    Args:
        path: a regular file. One that does not end in ".pkl" must begin as torch writes it.
        values: False reads the structure of a torch archive alone; its tensors are on the meta device.

    Returns:
        the object, NumPy arrays as `Array`; `as_tensor` gives their values.

    Raises:
        Defect: the file is cut short or damaged, holds more than it should, or asks for anything else.
        OSError: it cannot be read.
        MemoryError: its tensors do not fit into memory.
    """
    with open(path, "rb") as stream:
        size, start = os.fstat(stream.fileno()).st_size, stream.read(foreign.LENGTH)
        stream.seek(0)
        _require(bool(start), "it is empty")
        try:
            if start[:4] == _ZIP:
                return _read_archive(stream, size, values)
            is_pickle = start[:1] == _PICKLE or Path(path).suffix == ".pkl"  # Caffe2's are of protocol 0 and 1
            kind = foreign.kind_of(start)
            _require(not kind, f"it is {kind}")
            _require(is_pickle, "it is neither a torch file nor a pickle, or its beginning is damaged")
            return _read_pickle(_Bounded(stream, size), nested=False)
        except (Defect, MemoryError):
            raise
        except (EOFError, struct.error):
            raise Defect("it ends too early: it is cut short") from None
        except Exception as error:  # damaged bytes fail in as many ways as there are Python operations
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise Defect(f"it is damaged or not a pickle ({type(error).__name__})") from None


def as_tensor(value: Any) -> Tensor | None:
    """The tensor that a value of a file is, or None; NumPy arrays of numbers are taken as tensors."""
    if isinstance(value, Array):
        return value.tensor()
    return value if isinstance(value, Tensor) else None


def _require(condition: bool, defect: str) -> None:
    if not condition:
        raise Defect(defect)


class _Bounded:
    """A file read within limits: its own size, a number of reads, and the bytes that its arrays may take in all."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left, self.reads, self.claimed = file, size, size, 0, 0

    def read(self, count: int) -> bytes:
        self.reads += 1
        _require(self.reads <= _MAX_READS, f"it has more parts than weights have: {_ATTACK}")
        data = self.file.read(max(0, min(count, self.left)))
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self.file.readline(self.left)
        self.left -= len(data)
        return data

    def claim(self, count: int) -> None:
        """Count ``count`` bytes that were made of the file's content, which a pickle can have made again and again."""
        self.claimed += count
        _require(self.claimed <= _MOST_CLAIMED * self.size, "its arrays claim more bytes than the file has")


class _Storage:
    """Bytes of tensors and their type."""

    def __init__(self, data: Tensor, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype


def _read_archive(stream: BinaryIO, size: int, values: bool) -> Any:
    """A torch file since torch 1.6: a zip archive of stored members, one of them the pickle."""
    with zipfile.ZipFile(stream) as archive:  # compares names, and checksums as members are read
        members, root = _members(archive.infolist(), size)
        storages: dict[str, Tensor] = {}

        def member(name: str) -> Tensor:
            """The bytes of a member, (bytes,) uint8, whose checksum was compared."""
            _require(name in members, f"its member {name[:60]!r} is missing")
            data = _empty(members[name].file_size)
            view, start = data.numpy().data, 0
            with archive.open(members[name]) as part:
                while start < len(view):
                    count = part.readinto(view[start : start + _CHUNK])  # type: ignore[attr-defined]
                    if not count:
                        raise EOFError
                    start += count
                part.read(1)  # at its end the checksum is compared
            return data

        def storage(kind: torch.dtype, key: Any, count: Any) -> _Storage:
            """The storage ``key`` of ``count`` numbers, read when it is asked for first; see :class:`_Reader`."""
            _require(isinstance(key, str) and isinstance(count, int), _STORAGE)
            name = f"{root}data/{key}"
            if key not in storages and values:
                storages[key] = member(name)
            elif key not in storages:
                storages[key] = torch.empty(members[name].file_size, dtype=torch.uint8, device="meta")
            _require(len(storages[key]) == count * kind.itemsize, _LARGER)
            return _Storage(storages[key], kind)

        for name in members:
            if not name.startswith(f"{root}data"):  # small ones: versions and the like
                content = bytes(member(name).numpy())
                is_big = name == f"{root}byteorder" and content != b"little"
                _require(not is_big, "it was written on a big-endian machine")
        program = member(f"{root}data.pkl").numpy()
        return _Reader(_Bounded(io.BytesIO(program.data), size), storage).load()


def _members(infos: list[zipfile.ZipInfo], size: int) -> tuple[dict[str, zipfile.ZipInfo], str]:
    """The members of an archive that torch can have written, by name, and the folder that they are in."""
    members = {info.filename: info for info in infos}
    damaged = len(members) != len(infos) or not infos or min(info.header_offset for info in infos) != 0
    _require(not damaged, "its list of members is damaged, or another file stands before the archive")
    is_script = any(name.endswith(("constants.pkl", ".py")) for name in members)
    _require(not is_script, "it is a TorchScript program, not weights")
    stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos)
    _require(stored, "it holds compressed members, which torch never writes")
    _require(sum(info.file_size for info in infos) <= size, "its members claim more bytes than the file has")
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    is_torchs = len(roots) == 1 and all(name.startswith(roots[0]) for name in members)
    _require(is_torchs, "it is not an archive of torch's: its members are not in a subdirectory with a data.pkl")
    if not any(info.CRC for info in infos):  # torch can be told to leave checksums out
        for info in infos:
            del info.CRC
    return members, roots[0]


def _read_pickle(file: _Bounded, nested: bool) -> Any:
    """One pickle; or several and raw bytes behind them, as torch wrote files before 1.6."""
    storages: dict[Any, _Storage] = {}

    def storage(kind: torch.dtype, key: Any, count: Any) -> _Storage:
        """The storage ``key`` of ``count`` numbers, whose bytes come behind the pickles; see :class:`_Reader`."""
        _require(isinstance(key, (str, int)) and isinstance(count, int) and count >= 0, _STORAGE)
        if key not in storages:
            file.claim(count * kind.itemsize)
            storages[key] = _Storage(_empty(count * kind.itemsize), kind)
        return storages[key]

    def load() -> Any:
        return _Reader(file, storage, nested).load()

    content = load()
    if type(content) is not int or content != _OLD_MAGIC:
        return content
    _, system = load(), load()
    is_little = isinstance(system, dict) and system.get("little_endian") is True
    _require(is_little, "it was written on a big-endian machine, or is damaged")
    content, keys = load(), load()
    known = isinstance(keys, list) and len(keys) == len(storages) and all(key in storages for key in keys)
    _require(known, "its list of storages is damaged")
    for key in keys:
        data = storages[key].data
        (count,) = struct.unpack("<q", file.read(8))
        _require(count * storages[key].dtype.itemsize == len(data), _LARGER)
        if file.file.readinto(data.numpy().data) != len(data):  # type: ignore[attr-defined]
            raise EOFError
    return content


def _empty(count: int) -> Tensor:
    try:
        return torch.empty(count, dtype=torch.uint8, device="cpu")  # within `with torch.device(...)`, too
    except RuntimeError as error:  # what torch says where there is no memory
        raise MemoryError(str(error).partition("\n")[0]) from None


class _DType:
    """Stand-in for numpy.dtype: a code such as "f4", and the byte order that BUILD adds."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        plain = isinstance(code, str) and len(code) <= 8 and code.lstrip("<>=|")[:1] in tuple("biufcSU?")
        _require(plain, "it holds an array of another type; only numbers and strings are read")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        order = state[1]
        plain = order in ("<", ">", "=", "|") and all(part is None for part in state[2:5])
        _require(plain, "it holds a structured array; only plain ones are read")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class Array:
    """Stand-in for numpy.ndarray, filled by BUILD; its bytes are copied when they are asked for."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None
        self._tensor: Tensor | None = None

    def build(self, state: Any) -> Array:
        _, shape, dtype, fortran, raw = state
        return self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
        """Take the bytes ``raw`` as an array of this type, shape and memory order ("C" or "F"); returns itself."""
        plain = isinstance(dtype, _DType) and isinstance(raw, (bytes, bytearray, str))
        _require(plain, "it holds an array of Python objects; only numbers and strings are read")
        _require(_are_sizes(shape), "it holds an array of an impossible shape")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        fits = math.prod(shape) * dtype.dtype.itemsize == len(raw)
        _require(fits, "it holds an array whose shape does not fit its bytes: it is damaged")
        self.value = np.frombuffer(raw, dtype.dtype) if raw else np.empty(0, dtype.dtype)
        self.value = self.value.reshape(shape, order="F" if order == "F" else "C")
        return self

    def tensor(self) -> Tensor | None:
        """The numbers as a tensor; None for texts."""
        if self._tensor is None and self.value is not None and self.value.dtype.kind in "biufc":
            self._tensor = torch.from_numpy(self.value.astype(self.value.dtype.newbyteorder("=")))
        return self._tensor


def _are_sizes(*values: Any) -> bool:
    return all(
        isinstance(value, tuple) and len(value) <= 32 and all(type(n) is int and 0 <= n < 2**62 for n in value)
        for value in values
    )


def _is_key(value: Any) -> bool:
    """Whether a value is a plain key of a dict: tuples of tuples of tuples take for ever to hash."""
    parts = value if isinstance(value, tuple) and len(value) <= 8 else (value,)
    return all(isinstance(part, (str, bytes, int, float, type(None))) for part in parts)


def _set_items(target: Any, items: list[Any]) -> Any:
    plain = isinstance(target, dict) and all(map(_is_key, items[::2]))
    _require(plain, f"it builds a dict in an unusual way: {_ATTACK}")
    target.update(zip(items[::2], items[1::2], strict=True))
    return target


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    known = isinstance(storage, _Storage) and _are_sizes((offset,), size, stride)
    _require(known, "it holds a torch tensor of an unknown form")
    kind = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype  # of _rebuild_tensor_v3
    count, needed = len(storage.data) // kind.itemsize, math.prod(size)
    if not needed:
        return torch.empty(size, dtype=kind, device=storage.data.device)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    _require(needed <= count and last < count, _LARGER)
    return storage.data[: count * kind.itemsize].view(kind).as_strided(size, stride, offset)


def _parameter(data: Any = None, *_: Any) -> Tensor:
    _require(isinstance(data, Tensor), "it holds a torch parameter without a tensor")
    return data


def _from_type(function: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    known = function in (_tensor, _parameter) and isinstance(arguments, tuple)
    _require(known, f"it builds a tensor in an unusual way: {_ATTACK}")
    return function(*arguments)


def _stored(reader: _Reader, raw: Any) -> _Storage:
    """A torch storage inside a plain pickle is a small torch file of its own."""
    _require(isinstance(raw, bytes) and raw[:1] == _PICKLE and not reader.nested, _STORAGE)
    reader.file.claim(len(raw))
    found = _read_pickle(_Bounded(io.BytesIO(raw), len(raw)), nested=True)
    _require(isinstance(found, _Storage), _STORAGE)
    return found


class _Options:
    """Stand-in for argparse.Namespace: many published files carry the options of their training program."""

    def build(self, state: Any) -> None:
        pass


_STORAGE_TYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
# What a file may call; arguments of another form fail inside and are refused as damage.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"numpy.{core}.multiarray._reconstruct": Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": lambda dtype, raw: Array().fill(raw, dtype, ()).value.item()  # type: ignore[union-attr]
       for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": lambda *parts: Array().fill(*parts) for core in ("core", "_core")},
    "numpy.ndarray": Array,
    "numpy.dtype": _DType,
    "_codecs.encode": lambda text, encoding: str.encode(text, {"latin1": "latin1", "latin-1": "latin1"}[encoding]),
    "builtins.bytes": lambda: b"",
    "__builtin__.bytes": lambda: b"",
    "collections.OrderedDict": lambda pairs=(): _set_items(
        collections.OrderedDict(), [part for pair in pairs for part in (pair[0], pair[1])]
    ),
    "collections.Counter": lambda counts: collections.Counter({**counts}),
    "argparse.Namespace": _Options,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *parts: ":".join(str(part) for part in parts if isinstance(part, (str, int))),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.storage._load_from_bytes": _stored,
}  # fmt: skip
_VALUES: dict[str, Any] = {
    **{f"{module}.{name}Storage": kind for name, kind in _STORAGE_TYPES.items() for module in ("torch", "torch.cuda")},
    **{f"torch.storage.{name}": torch.uint8 for name in ("UntypedStorage", "_UntypedStorage")},
    "torch.Tensor": "Tensor",
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}
_CALLABLE = {id(function) for function in _FUNCTIONS.values()}
_Unpickler: Any = pickle._Unpickler  # the Python one: its opcodes can be replaced


class _Reader(_Unpickler):
    """The unpickler: its opcodes build plain containers, and call nothing but what the tables above name.

    ``storage(dtype, key, count)`` gives the torch storages that the pickle refers to.
    """

    dispatch: dict[int, Callable[..., None]] = dict(_Unpickler.dispatch)

    def __init__(self, file: _Bounded, storage: Callable[..., _Storage], nested: bool = False) -> None:
        super().__init__(file, encoding="latin1")  # Python 2 pickles hold array bytes as text
        self.file, self.storage, self.nested = file, storage, nested

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        found = _FUNCTIONS.get(path) or _VALUES.get(path)
        said = f"it asks for {path[:120]}, which no weights need: {_ATTACK}, or a model that was saved whole"
        _require(found is not None, said)
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        inside = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and not any(pid[5:])
        _require(inside, f"it refers to something outside of itself: {_ATTACK}")
        _require(isinstance(pid[1], torch.dtype), _STORAGE)
        return self.storage(pid[1], pid[2], pid[4])

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Array):
            self.file.claim(target.build(state).value.nbytes)  # type: ignore[union-attr]
        elif isinstance(target, (_DType, _Options)):
            target.build(state)
        else:
            plain = isinstance(target, collections.OrderedDict) and isinstance(state, dict)
            _require(plain, f"it sets attributes of an object: {_ATTACK}")
            if isinstance(state.get("_metadata"), dict):  # versions of a state dict's modules
                target._metadata = state["_metadata"]

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        known = id(function) in _CALLABLE and isinstance(arguments, tuple)
        _require(known, f"it calls something that is not a function of this reader: {_ATTACK}")
        result = function(self, *arguments) if function is _stored else function(*arguments)
        if isinstance(result, Array):
            self.file.claim(result.value.nbytes if result.value is not None else 0)
        elif isinstance(result, (bytes, tuple, dict)):
            self.file.claim(len(result))
        self.stack[-1] = result

    def _new(self) -> None:
        arguments = self.stack.pop()
        _require(self.stack[-1] is _Options and arguments == (), f"it builds an object of a class: {_ATTACK}")
        self.stack[-1] = _Options()

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def _dict(self) -> None:
        items = self.pop_mark()  # before `append`, which is then the stack's below the mark
        self.append(_set_items({}, items))

    def _bytearray(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(count)))

    def _frame(self) -> None:
        self.read(8)  # frames only tell how much to read ahead

    def _refuse(self) -> None:
        raise Defect(f"it builds an object of a class: {_ATTACK}")

    dispatch |= {
        pickle.BUILD[0]: _build, pickle.REDUCE[0]: _reduce, pickle.NEWOBJ[0]: _new, pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items, pickle.DICT[0]: _dict, pickle.BYTEARRAY8[0]: _bytearray,
        pickle.FRAME[0]: _frame,
    }  # fmt: skip
    for _code in (
        pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.PERSID,
    ):  # fmt: skip
        dispatch[_code[0]] = _refuse
