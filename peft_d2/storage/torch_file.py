"""Torch files and pickles of weights: written, and read without running any code of theirs.

A pickle is a program: its GLOBAL opcode fetches any importable object and REDUCE calls it. The reader below keeps the
opcodes that build plain containers and answers GLOBAL from a short table, whose entries are all defined here: nothing
is imported on behalf of a file, and torch's own reader is never called. What torch stores beside the pickle (a zip
archive, or raw bytes in files older than torch 1.6) is read here too: sizes are checked before anything is allocated,
and the checksum that the archive keeps of every member is compared.
"""

from __future__ import annotations

import collections
import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

_ENCODING = "latin1"  # Python 2 pickles hold array bytes as text
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # begins a file of torch before 1.6
_MOST_CLAIMED = 4  # times the file's bytes: an array may be made of bytes that were made of a text
_MAX_READS = 10**7  # about two an opcode: a state dict of 10,000 tensors needs 5 % of that
_ATTACK = "it may be an attack"
_LARGER = "it holds a tensor that is larger than its data"
_SIZED = (bytes, tuple, dict)
_PLAIN = (str, bytes, int, float, type(None))


class Refused(ValueError):
    """What is wrong with a file, in words; the caller adds the file and the remedy."""


def read(path: str | os.PathLike[str], values: bool = True) -> Any:
    """Read a torch file, or a pickle, of plain containers, numbers, texts, NumPy arrays and torch tensors.

    Args:
        path: a regular file. One that does not end in ".pkl" must begin as torch writes it.
        values: False reads the structure of a torch archive alone; its tensors are on the meta device.

    Returns:
        the object, NumPy arrays as `Array`; `as_tensor` gives their values.

    Raises:
        Refused: the file is cut short or damaged, holds more than it should, or asks for anything else.
        OSError: it cannot be read.
        MemoryError: its tensors do not fit into memory.
    """
    with open(path, "rb") as stream:
        return load(stream, os.fstat(stream.fileno()).st_size, Path(path).suffix == ".pkl", values)


def load(stream: BinaryIO, size: int, any_pickle: bool = True, values: bool = True) -> Any:
    """As `read`, from a stream of `size` bytes at its beginning; `any_pickle` accepts the protocols 0 and 1 too."""
    start = stream.read(4)
    stream.seek(0)
    try:
        if not start:
            raise Refused("it is empty")
        if start == _ZIP:
            return _Archive(stream, size, values).load()
        if start[:1] != _PICKLE and not any_pickle:
            raise Refused("it is neither a torch file nor a pickle, or its beginning is damaged")
        return _load_pickle(_Bounded(stream, size), nested=False)
    except (Refused, MemoryError):
        raise
    except OSError as error:
        if not isinstance(error, io.UnsupportedOperation) and error.errno is not None:
            raise
        raise Refused("it is damaged") from None
    except (EOFError, struct.error):
        raise Refused("it ends too early: it is cut short") from None
    except Exception as error:  # damaged bytes fail in as many ways as there are Python operations
        raise Refused(f"it is damaged or not a pickle ({type(error).__name__})") from None


def write(content: Any, path: str | os.PathLike[str]) -> tuple[int, str]:
    """`torch.save`; returns the number of bytes and their sha256.

    Raises:
        OSError: the system's own, where torch would only say that a write failed.
    """
    with open(path, "wb") as stream:
        written = _Written(stream)
        try:
            torch.save(content, written)  # type: ignore[arg-type]
        except RuntimeError:
            if written.error is None:
                raise
        if written.error is not None:
            raise written.error
    return written.count, written.digest.hexdigest()


class _Written:
    """A stream that hashes what is written and keeps the first error."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.count = stream, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.count += len(data)
        try:
            self.stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        return len(data)

    def flush(self) -> None:
        self.stream.flush()


def as_tensor(value: Any) -> Tensor | None:
    """The tensor that a value of a file is, or None; NumPy arrays of numbers are taken as tensors."""
    if isinstance(value, Array):
        return value.tensor()
    return value if isinstance(value, Tensor) else None


class _Bounded:
    """A file that never gives more than it has, counts how often it is asked, and what its arrays claim."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left, self.reads, self.claimed = file, size, size, 0, 0

    def read(self, count: int) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise Refused(f"it has more parts than weights have: {_ATTACK}")
        data = self.file.read(max(0, min(count, self.left)))
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        self.reads += 1
        data = self.file.readline(self.left)
        self.left -= len(data)
        return data

    def claim(self, count: int) -> None:
        """Account for what was made of a part of the file: what is used time and again must not fill the memory."""
        self.claimed += count
        if self.claimed > _MOST_CLAIMED * self.size:
            raise Refused("its arrays claim more bytes than the file has")


class _Storage:
    """Bytes of tensors and their type."""

    def __init__(self, data: Tensor, dtype: torch.dtype) -> None:
        self.data, self.dtype = data, dtype


class _Archive:
    """A torch file since torch 1.6: a zip archive of stored members, one of them the pickle."""

    def __init__(self, stream: BinaryIO, size: int, values: bool) -> None:
        self.stream, self.size, self.values = stream, size, values
        try:
            with zipfile.ZipFile(stream) as archive:
                members = archive.infolist()
        except (MemoryError, OSError):
            raise
        except Exception as error:  # zipfile fails in many ways on a damaged directory
            raise Refused(f"it is cut short or damaged ({type(error).__name__})") from None
        self.members = {member.filename: member for member in members}
        if len(self.members) != len(members) or not members or min(m.header_offset for m in members) != 0:
            raise Refused("its list of members is damaged, or another file stands before the archive")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise Refused("it holds compressed members, which torch never writes")
        if sum(member.file_size for member in members) > size:
            raise Refused("its members claim more bytes than the file has")
        if any(name.endswith(("constants.pkl", ".py")) for name in self.members):
            raise Refused("it is a TorchScript program, not weights")
        self.unchecked = not any(member.CRC for member in members)  # torch can be told to leave checksums out
        roots = [name.removesuffix("data.pkl") for name in self.members if name.endswith("/data.pkl")]
        if len(roots) != 1 or any(not name.startswith(roots[0]) for name in self.members):
            raise Refused("it is not an archive of torch's: its members are not in a subdirectory with a data.pkl")
        self.root = roots[0]
        self.storages: dict[str, Tensor] = {}

    def load(self) -> Any:
        for name in [name for name in self.members if not name.startswith(f"{self.root}data")]:
            data = bytes(self.member(name.removeprefix(self.root)).numpy())
            if name == f"{self.root}byteorder" and data != b"little":
                raise Refused("it was written on a big-endian machine")
        program = self.member("data.pkl").numpy()
        return _Reader(_Bounded(io.BytesIO(program.data), self.size), self.storage).load()

    def member(self, name: str, values: bool = True) -> Tensor:
        """The bytes of a member, compared with its checksum."""
        info = self.members.get(self.root + name)
        if info is None:
            raise Refused(f"its member {name[:60]!r} is missing")
        if not values:
            return torch.empty(info.file_size, dtype=torch.uint8, device="meta")
        self.stream.seek(info.header_offset)
        magic, _, _, method, *_, length, extra = struct.unpack("<4s5H3I2H", self.stream.read(30))
        start = info.header_offset + 30 + length + extra
        own_name = self.stream.read(length)
        if magic != _ZIP or method or own_name != self.encoded(info) or start + info.file_size > self.size:
            raise Refused(f"the beginning of its member {name[:60]!r} is damaged")
        self.stream.seek(start)
        data = _empty(info.file_size)
        view = data.numpy().data
        if self.stream.readinto(view) != info.file_size:  # type: ignore[attr-defined]
            raise EOFError
        if not self.unchecked and zlib.crc32(view) != info.CRC:
            raise Refused(f"its member {name[:60]!r} is damaged: its checksum is not the recorded one")
        return data

    @staticmethod
    def encoded(info: zipfile.ZipInfo) -> bytes:
        """The name of a member as the file has it."""
        return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")

    def storage(self, kind: torch.dtype, key: Any, count: Any) -> _Storage:
        if not isinstance(key, str) or not isinstance(count, int):
            raise Refused("it holds a storage of an unknown form")
        if key not in self.storages:
            self.storages[key] = self.member(f"data/{key}", self.values)
        if len(self.storages[key]) != count * kind.itemsize:
            raise Refused(_LARGER)
        return _Storage(self.storages[key], kind)


def _load_pickle(file: _Bounded, nested: bool) -> Any:
    """One pickle; or several and raw bytes behind them, as torch wrote files before 1.6."""
    storages: dict[Any, _Storage] = {}

    def storage(kind: torch.dtype, key: Any, count: Any) -> _Storage:
        if not isinstance(key, (str, int)) or not isinstance(count, int) or count < 0:
            raise Refused("it holds a storage of an unknown form")
        if key not in storages:
            file.claim(count * kind.itemsize)
            storages[key] = _Storage(_empty(count * kind.itemsize), kind)
        return storages[key]

    content = _Reader(file, storage, nested).load()
    if type(content) is not int or content != _OLD_MAGIC:
        return content
    _, system = (_Reader(file, storage, nested).load() for _ in range(2))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("it was written on a big-endian machine, or is damaged")
    content = _Reader(file, storage, nested).load()
    keys = _Reader(file, storage, nested).load()
    if not isinstance(keys, list) or len(keys) != len(storages) or any(key not in storages for key in keys):
        raise Refused("its list of storages is damaged")
    for key in keys:
        data = storages[key].data
        (count,) = struct.unpack("<q", file.read(8))
        if count * storages[key].dtype.itemsize != len(data):
            raise Refused(_LARGER)
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
        if not isinstance(code, str) or len(code) > 8 or code.lstrip("<>=|")[:1] not in tuple("biufcSU?"):
            raise Refused("it holds an array of another type; only numbers and strings are read")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise Refused("it holds a structured array; only plain ones are read")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class Array:
    """Stand-in for numpy.ndarray, filled by BUILD; its bytes are copied when they are asked for."""

    def __init__(self, *_: Any) -> None:
        self._parts: tuple[bytes, np.dtype[Any], tuple[int, ...], str] | None = None
        self._tensor: Tensor | None = None

    def build(self, state: Any) -> Array:
        _, shape, dtype, fortran, raw = state
        return self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> Array:
        if not isinstance(dtype, _DType) or not isinstance(raw, (bytes, bytearray, str)):
            raise Refused("it holds an array of Python objects; only numbers and strings are read")
        if isinstance(raw, str):
            raw = raw.encode(_ENCODING)
        if not _are_sizes(shape):
            raise Refused("it holds an array of an impossible shape")
        if math.prod(shape) * dtype.dtype.itemsize != len(raw):
            raise Refused("it holds an array whose shape does not fit its bytes: it is damaged")
        self._parts = bytes(raw), dtype.dtype, shape, "F" if order == "F" else "C"
        return self

    def numpy(self) -> np.ndarray:
        """The array, in this machine's byte order."""
        if self._parts is None:
            raise Refused("it holds an array without content")
        raw, dtype, shape, order = self._parts
        value = np.frombuffer(bytearray(raw), dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]
        return np.asarray(value, dtype=dtype.newbyteorder("="))

    def tensor(self) -> Tensor | None:
        """The numbers as a tensor; None for texts."""
        if self._tensor is None and self._parts is not None and self._parts[1].kind in "biufc":
            self._tensor = torch.from_numpy(self.numpy())
        return self._tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the file that it consists of."""
        return len(self._parts[0]) if self._parts else 0


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 32 and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused("it encodes text in an unusual way")
    return text.encode(_ENCODING)


def _nothing(*arguments: Any) -> bytes:
    if arguments:
        raise Refused("it builds bytes in an unusual way")
    return b""


def _ordered(items: Any = ()) -> collections.OrderedDict[Any, Any]:
    result: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    _set_items(result, [part for pair in items for part in (pair[0], pair[1])])
    return result


def _counter(counts: Any = None) -> collections.Counter[Any]:
    if not isinstance(counts, dict):
        raise Refused("it holds a counter of an unknown form")
    return collections.Counter(counts)


def _is_key(value: Any) -> bool:
    """Whether a value is a plain key of a dict: tuples of tuples of tuples take for ever to hash."""
    parts = value if isinstance(value, tuple) and len(value) <= 8 else (value,)
    return all(isinstance(part, _PLAIN) for part in parts)


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or not all(map(_is_key, items[::2])):
        raise Refused(f"it builds a dict in an unusual way: {_ATTACK}")
    target.update(zip(items[::2], items[1::2], strict=True))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, _Storage) or not _are_sizes((offset,)) or not _are_sizes(size) or not _are_sizes(stride):
        raise Refused("it holds a torch tensor of an unknown form")
    kind = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype  # of _rebuild_tensor_v3
    count, needed = len(storage.data) // kind.itemsize, math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if needed and (needed > count or last >= count):
        raise Refused(_LARGER)
    if not needed:
        return torch.empty(size, dtype=kind, device=storage.data.device)
    return storage.data[: count * kind.itemsize].view(kind).as_strided(size, stride, offset)


def _parameter(data: Any = None, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("it holds a torch parameter without a tensor")
    return data


def _from_type(function: Any, _kind: Any, arguments: Any, *_: Any) -> Any:
    if not (function is _tensor or function is _parameter) or not isinstance(arguments, tuple):
        raise Refused(f"it builds a tensor in an unusual way: {_ATTACK}")
    return function(*arguments)


class _Options:
    """Stand-in for argparse.Namespace: many published files carry the options of their training program."""

    def build(self, state: Any) -> None:
        pass


def _stored(reader: _Reader, raw: Any) -> _Storage:
    """A torch storage inside a plain pickle is a small torch file of its own."""
    if not isinstance(raw, bytes) or raw[:1] != _PICKLE or reader.nested:
        raise Refused("it holds a torch storage of an unknown form")
    reader.file.claim(len(raw))
    found = _load_pickle(_Bounded(io.BytesIO(raw), len(raw)), nested=True)
    if not isinstance(found, _Storage):
        raise Refused("it holds a torch storage of an unknown form")
    return found


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    return Array().fill(raw, dtype, ()).numpy().item()


def _array(*parts: Any) -> Array:
    return Array().fill(*parts)


_STORAGE_TYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128, "Untyped": torch.uint8,
}  # fmt: skip
_NUMPY_CORE = ("numpy.core", "numpy._core")
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"{core}.multiarray", "_reconstruct"): Array for core in _NUMPY_CORE},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _NUMPY_CORE},
    **{(f"{core}.numeric", "_frombuffer"): _array for core in _NUMPY_CORE},
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _nothing,
    ("__builtin__", "bytes"): _nothing,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "Counter"): _counter,
    ("argparse", "Namespace"): _Options,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch", "device"): lambda *parts: ":".join(str(part) for part in parts if isinstance(part, (str, int))),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _stored,
}
_VALUES: Mapping[tuple[str, str], Any] = {
    **{(module, f"{name}Storage"): kind for name, kind in _STORAGE_TYPES.items() for module in ("torch", "torch.cuda")},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch.storage", "_UntypedStorage"): torch.uint8,
    ("torch", "Tensor"): "Tensor",
    **{("torch", str(v).partition(".")[2]): v for v in vars(torch).values() if isinstance(v, torch.dtype)},
}
_CALLABLE = {id(function) for function in _FUNCTIONS.values()}

_Unpickler: Any = pickle._Unpickler  # the Python one: its opcodes can be replaced


class _Reader(_Unpickler):
    dispatch: dict[int, Callable[..., None]] = dict(_Unpickler.dispatch)

    def __init__(self, file: _Bounded, storage: Callable[..., _Storage], nested: bool = False) -> None:
        super().__init__(file, encoding=_ENCODING)
        self.file, self.storage, self.nested = file, storage, nested

    def find_class(self, module: str, name: str) -> Any:
        found = _FUNCTIONS.get((module, name)) or _VALUES.get((module, name))
        if found is None:
            raise Refused(f"it asks for {module[:60]}.{name[:60]}, which no weights need: {_ATTACK}")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            raise Refused(f"it refers to something outside of itself: {_ATTACK}")
        if not isinstance(pid[1], torch.dtype):
            raise Refused("it holds a storage of an unknown form")
        return self.storage(pid[1], pid[2], pid[4])

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Array):
            self.file.claim(target.build(state).nbytes)
        elif isinstance(target, (_DType, _Options)):
            target.build(state)
        elif isinstance(target, collections.OrderedDict) and isinstance(state, dict):
            if isinstance(state.get("_metadata"), dict):  # versions of a state dict's modules
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        else:
            raise Refused(f"it sets attributes of an object: {_ATTACK}")

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if id(function) not in _CALLABLE or not isinstance(arguments, tuple):
            raise Refused(f"it calls something that is not a function of this reader: {_ATTACK}")
        result = function(self, *arguments) if function is _stored else function(*arguments)
        made = result.nbytes if isinstance(result, Array) else len(result) if isinstance(result, _SIZED) else 0
        self.file.claim(made)
        self.stack[-1] = result

    def _new(self) -> None:
        arguments = self.stack.pop()
        if self.stack[-1] is not _Options or arguments != ():
            raise Refused(f"it builds an object of a class: {_ATTACK}")
        self.stack[-1] = _Options()

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        _set_items(self.stack[-1], items)

    def _bytearray(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(count)))

    def _frame(self) -> None:
        self.read(8)  # frames only tell how much to read ahead

    def _refuse(self) -> None:
        raise Refused(f"it builds an object of a class: {_ATTACK}")

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _new
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray
    dispatch[pickle.FRAME[0]] = _frame
    for _code in (
        pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.PERSID,
    ):  # fmt: skip
        dispatch[_code[0]] = _refuse
