"""Pickles of weights, read without running any code of theirs.

A pickle is a program: its GLOBAL opcode fetches any importable object and REDUCE calls it. This reader keeps the
opcodes that build plain containers and answers GLOBAL from a short table, whose entries are all defined here: nothing
is imported on behalf of a file. NumPy's and torch's own rebuilding functions are replaced too, because they were not
written for hostile arguments.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
import torch

_ENCODING = "latin1"  # Python 2 pickles hold array bytes as text


class PickleRefused(ValueError):
    """What is wrong with a pickle, or what it asked for that no weights need."""


def load(file: BinaryIO, size: int) -> Any:
    """Read one pickle of plain containers, numbers, strings, NumPy arrays and torch tensors.

    Args:
        file: opened for reading in binary mode.
        size: bytes that may be read; nothing larger is ever allocated in one piece.

    Returns:
        the object, with NumPy arrays as np.ndarray and torch tensors as torch.Tensor.

    Raises:
        PickleRefused: it is cut short or damaged, or asks for anything else.
    """
    try:
        return _finished(_Reader(_Bounded(file, size), encoding=_ENCODING).load())
    except PickleRefused:
        raise
    except (EOFError, struct.error):
        raise PickleRefused("it ends too early: it is cut short") from None
    except Exception as error:  # damaged opcodes fail in as many ways as there are Python operations
        raise PickleRefused(f"it is damaged or not a pickle ({type(error).__name__}: {error})") from None


class _Bounded:
    """A file that never allocates more than it still has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, count: int) -> bytes:
        data = self._file.read(max(0, min(count, self._left)))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        data = self._file.readline(self._left)
        self._left -= len(data)
        return data


class _DType:
    """Stand-in for numpy.dtype: a code such as "f4", and the byte order that BUILD adds."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        if not isinstance(code, str) or len(code) > 8 or code.lstrip("<>=|")[:1] not in tuple("biufcSU?"):
            raise PickleRefused(f"it holds an array of type {str(code)[:40]!r}; only numbers and strings are read")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise PickleRefused("it holds a structured array; only plain ones are read")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stand-in for numpy.ndarray, filled by BUILD."""

    def __init__(self, *_: Any) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(raw, (bytes, bytearray, str)):
        raise PickleRefused("it holds an array of Python objects; only numbers and strings are read")
    if isinstance(raw, str):
        raw = raw.encode(_ENCODING)
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape) or len(shape) > 32:
        raise PickleRefused("it holds an array of an impossible shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise PickleRefused(f"it holds an array of shape {shape} with {len(raw)} bytes: it is damaged")
    value = np.frombuffer(bytearray(raw), dtype=dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return np.asarray(value, dtype=dtype.dtype.newbyteorder("="))


def _scalar(dtype: Any, raw: Any = b"") -> Any:
    return _array(raw, dtype, (), "C").item()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    result = _Array()
    result.value = _array(raw, dtype, shape, str(order))
    return result


def _encode(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleRefused("it encodes text in an unusual way")
    return text.encode(_ENCODING)


def _empty(*arguments: Any) -> Any:
    if arguments:
        raise PickleRefused("it builds bytes in an unusual way")
    return b""


def _ordered(*items: Any) -> collections.OrderedDict[Any, Any]:
    return collections.OrderedDict(*items[:1])


def _storage(raw: Any) -> Any:
    """A torch storage inside a plain pickle is a small torch file of its own."""
    if not isinstance(raw, bytes) or raw[:1] != b"\x80":
        raise PickleRefused("it holds a torch storage of an unknown form")
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    if not isinstance(storage, torch.TypedStorage):
        raise PickleRefused("it holds a torch tensor without a storage")
    flat = torch.empty(0, dtype=storage.dtype)
    stored = storage._untyped_storage.nbytes() // flat.element_size()
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or last >= max(stored, 1) or math.prod(size) > stored:
        raise PickleRefused("it holds a torch tensor that is larger than its storage")
    return flat.set_(storage._untyped_storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *_: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise PickleRefused("it holds a torch parameter without a tensor")
    return data


_NUMPY_CORE = ("numpy.core", "numpy._core")
_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(f"{core}.multiarray", "_reconstruct"): _Array for core in _NUMPY_CORE},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _NUMPY_CORE},
    **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in _NUMPY_CORE},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _empty,
    ("__builtin__", "bytes"): _empty,
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
}


_Unpickler: Any = pickle._Unpickler  # the Python one: its opcodes can be replaced


class _Reader(_Unpickler):
    dispatch: dict[int, Callable[..., None]] = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        found = _GLOBALS.get((module, name))
        if found is None:
            raise PickleRefused(f"it asks for {module[:60]}.{name[:60]}, which no weights need: it may be an attack")
        return found

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, (_Array, _DType)):
            target.build(state)
        elif not isinstance(target, collections.OrderedDict):  # a state dict's _metadata are not needed
            raise PickleRefused("it sets attributes of an object: it may be an attack")

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not any(function is known for known in _GLOBALS.values()) or not isinstance(arguments, tuple):
            raise PickleRefused("it calls something that is not a function of this reader: it may be an attack")
        self.stack[-1] = function(*arguments)

    def _bytearray(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(count)))

    def _refuse(self) -> None:
        raise PickleRefused("it builds an object of a class: it may be an attack")

    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.BYTEARRAY8[0]] = _bytearray
    for _code in (
        pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
        pickle.PERSID, pickle.BINPERSID, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
    ):  # fmt: skip
        dispatch[_code[0]] = _refuse


def _finished(value: Any, depth: int = 0) -> Any:
    """Replace the stand-ins by arrays in the outer containers, where weights are; deeper ones are of no interest."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict) and depth < 3:
        return {key: _finished(entry, depth + 1) for key, entry in value.items()}
    return value
